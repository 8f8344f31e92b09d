"""Ablations against the same by hand, the identities that must hold, planted circuits, and random controls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.data import shapes
from hooked_vlm.edits import Noise, Replace, Zero
from hooked_vlm.experiments.ablate import _scored, ablate, ablation_sweep
from hooked_vlm.experiments.parts.cases import prepared, ready
from hooked_vlm.experiments.parts.components import Component, Node, all_heads, all_mlps, components_of, nodes
from hooked_vlm.metrics import LogitDifference
from hooked_vlm.sweep import Effects
from tests.experiments import planted, planted_llava
from tests.experiments.planted_samples import planted as planted_model
from tests.experiments.planted_samples import red_and_blue

COLORS = shapes(5, seed=7, kinds=("color",))
SAMPLE = COLORS[0]
LD = {"metric": "logit_difference"}

# The pages of the documentation run the same code with every signature checked.
pytestmark = pytest.mark.usefixtures("unchecked")
MOVER = "language_model.L1.attn.H1"


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def blip():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@torch.no_grad()
def difference(model, sample, edits):
    """The logit difference of a sample's run under some edits, in a forward of its own."""
    case = ready(model, sample)
    return LogitDifference(case.answer, case.foil)(model.patch(case.clean, edits)).item()


# By hand --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_way_is_as_by_hand(blip):
    z, mlp = "question_encoder.blocks.3.cross_attn.hook_z", "question_encoder.blocks.1.hook_mlp_out"
    parts = ["question_encoder.L3.cross_attn.H[12]", "question_encoder.L1.mlp"]
    caches = [blip.run_with_cache(prepared(blip, sample), names_filter=[z, mlp])[1] for sample in COLORS]

    def put(source):
        return [Replace(z, source[z], heads=[1, 2]), Replace(mlp, source[mlp])]

    mean = {name: torch.stack([cache[name] for cache in caches]).mean(0) for name in (z, mlp)}
    flat = {name: own.mean(1, keepdim=True).expand_as(own) for name, own in mean.items()}
    zeros = {name: torch.zeros_like(own) for name, own in mean.items()}
    noise = [Noise(z, 0.5, seed=4, heads=[1, 2]), Noise(mlp, 0.5, seed=4)]
    expected = {"zero": put(zeros), "mean": put(mean), "global": put(flat), "noise": noise}
    for name, edits in expected.items():
        how, by = ("mean", "global") if name == "global" else (name, "position")
        options = {"reference": COLORS, "by": by, "std": 0.5, "draws": 1, "seed": 4}
        found = ablate(blip, SAMPLE, parts, how, **options).sel(LD).isel(sample=0, set=0)
        # Noise is in units of what stands there: by hand, of the run in which the MLP is noisy already.
        tolerance = 0.02 if how == "noise" else 1e-4
        assert float(found.ablated) == pytest.approx(difference(blip, SAMPLE, edits), abs=tolerance), name
        assert float(found.effect) == pytest.approx(float(found.ablated - found.clean))
        assert float(found.clean) == pytest.approx(difference(blip, SAMPLE, []), abs=1e-5)
        assert abs(float(found.effect)) > 0.01
        assert float(found.sign) == np.sign(float(found.effect))


@torch.no_grad()
def test_draws_of_other_samples_are_averaged(llava):
    """Over all donors there are: the mean of runs with each one's activation."""
    site = "language_model.blocks.1.attn.hook_z"
    sets = {"other": ["language_model.L4.mlp"], "mover": [MOVER]}
    both = ablate(llava, SAMPLE, sets, "resample", reference=COLORS, draws=10).sel(LD).squeeze()
    found = both.sel(set="mover")
    each = []
    for donor in COLORS[1:]:
        _, cache = llava.run_with_cache(prepared(llava, donor), names_filter=site)
        each.append(difference(llava, SAMPLE, [Replace(site, cache, heads=1)]))
    assert int(found.draws.squeeze()) == 4
    assert float(found.ablated) == pytest.approx(np.mean(each), abs=1e-4)
    assert float(found.deviation) == pytest.approx(np.std(each), abs=1e-4)


def test_a_sign_is_of_what_is_more_than_rounding():
    values = torch.tensor([[[1.5]], [[0.5]], [[1.01]], [[0.99]]])
    scores = Effects.of(values, torch.tensor([[1.0]]), [torch.tensor([0.1])])
    found = _scored(scores, ["up", "down", "same", "equal"], ["log_probability"], 1)
    assert found.sign.values.tolist() == [[[1, -1, 0, 0]]]
    assert found.effect.values[0, 0] == pytest.approx([0.5, -0.5, 0.01, -0.01])
    assert found.noise_floor.values == pytest.approx([0.1])


def test_what_is_named_twice_is_ablated_once(llava):
    once, twice = (
        ablate(llava, SAMPLE, parts, "noise", draws=1) for parts in ([MOVER], [MOVER, MOVER, "*.L1.attn.H1"])
    )
    assert len(components_of(llava, [MOVER, MOVER])) == 1
    both = ablate(llava, SAMPLE, [MOVER, "vision_encoder.L1.attn.H1"], "noise", draws=1)
    assert float(once.ablated.sel(LD).squeeze()) != float(both.ablated.sel(LD).squeeze())
    assert np.allclose(twice.ablated, both.ablated)


def test_noise_has_its_own_draws_and_seed(llava):
    options = {"how": "noise", "std": 2.0}
    one, other = (ablate(llava, SAMPLE, [MOVER], draws=1, seed=seed, **options).sel(LD).squeeze() for seed in (3, 4))
    both = ablate(llava, SAMPLE, [MOVER], draws=2, seed=3, **options).sel(LD).squeeze()
    assert float(one.ablated) != float(other.ablated)
    assert float(both.ablated) == pytest.approx(float(one.ablated + other.ablated) / 2, abs=1e-5)
    assert float(both.deviation) == pytest.approx(abs(float(one.ablated - other.ablated)) / 2, abs=1e-5)


# Identities -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["question_encoder.L2.cross_attn", "vision_encoder.L1.attn", "language_model.L1.attn"])
def test_a_head_that_is_zeroed_takes_its_result_away(name, blip, llava):
    model = llava if name.startswith("language") else blip
    place = name.replace(".L", ".blocks.")
    out, result = (f"{place.rpartition('.')[0]}.hook_{place.rpartition('.')[2]}_out", f"{place}.hook_result")
    inputs = prepared(model, SAMPLE)
    _, cache = model.run_with_cache(inputs, names_filter=[out, result])

    def without(parts):
        with model.hooks([hook for part in parts for hook in part.edited(Zero).hooks(model, inputs, set())]):
            return model.run_with_cache(inputs, names_filter=[out])[1][out]

    one = without(components_of(model, f"{name}.H1"))
    assert torch.allclose(one, cache[out] - cache[result][:, :, 1], atol=1e-5)
    bias = model.get_submodule(place).b_O
    assert (bias is None) == name.startswith("language")
    none = without(components_of(model, f"{name}.H*"))
    assert torch.allclose(none, (torch.zeros(()) if bias is None else bias).expand_as(none), atol=1e-6)


@pytest.mark.parametrize(
    ("how", "by"), [("mean", "position"), ("mean", "role"), ("resample", "position"), ("resample", "role")]
)
def test_a_sample_with_its_own_activations_is_itself(llava, how, by):
    copy = replace(SAMPLE, id="copy")
    options = {"reference": [copy], "by": by, "draws": 3}
    # By role the image is one: a mean over its positions is another thing.
    positions = "question" if (how, by) == ("mean", "role") else None
    parts = {"all": ["language_model.L*"], "one": [MOVER]}
    found = ablate(llava, SAMPLE, parts, how, positions=positions, **options)
    assert abs(found.effect).max() < 1e-4
    assert abs(ablate(llava, SAMPLE, parts, "zero").effect.sel(LD)).min() > 0.1


def test_the_mean_of_what_never_changes_is_what_it_is(blip):
    """``[DEC]``, and the embeddings of positions."""
    sets = {"start": ["answer_decoder.embed"], "positions": ["*hook_pos_embed"]}
    found = ablate(blip, COLORS[:3], sets, "mean")
    assert abs(found.effect).max() < 1e-5
    assert abs(ablate(blip, COLORS[:1], sets, "zero").effect.sel(LD)).min() > 1e-3


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_without_image_tokens_two_pictures_are_one(blip, llava, how):
    other = replace(SAMPLE, id="other", image=SAMPLE.image_cf)
    image = {"llava": Component("language_model.hook_merged_embed", positions="image"), "blip": "vision_encoder.out"}
    for model, part in ((llava, image["llava"]), (blip, image["blip"])):
        found = ablate(model, [SAMPLE, other], [part], how, reference=COLORS, by="global").ablated.squeeze()
        assert np.allclose(found[:, 0], found[:, 1], atol=1e-5)
    clean = ablate(llava, [SAMPLE, other], [MOVER], "zero").clean.sel(LD)
    assert abs(float(clean[0] - clean[1])) > 1


# Planted circuits, and the finding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_in_a_planted_blip_two_heads_matter_and_nothing_else(how):
    model = planted_model(planted)
    found = ablation_sweep(model, red_and_blue(), how, reference=[red_and_blue(), red_and_blue("blue")])
    places = [("question_encoder", planted.LAYER, planted.HEAD), ("answer_decoder", planted.DECODER_LAYER, 0)]
    check_lit(found, [(tower, "cross_attn", layer, head) for tower, layer, head in places], how)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_in_a_planted_llava_two_heads_matter_and_nothing_else(how):
    model = planted_model(planted_llava)
    found = ablation_sweep(model, red_and_blue(), how, reference=[red_and_blue(), red_and_blue("blue")])
    layers = (planted_llava.TO_QUESTION, planted_llava.TO_ANSWER)
    check_lit(found, [("language_model", "attn", layer, planted_llava.HEAD) for layer in layers], how)
    assert found.tower.values.tolist() == ["language_model"]


def check_lit(found, places, how):
    effect, expected = found.effect.isel(sample=0).sel(LD), found.isel(sample=0).sel(LD).effect * 0
    clean = float(found.clean.sel(LD).squeeze())
    for tower, kind, layer, head in places:
        # A colour that is away, or half of either, leaves no difference; the other colour turns it round.
        expected.loc[{"tower": tower, "kind": kind, "layer": layer, "head": head}] = -clean * (
            2 if how == "resample" else 1
        )
    assert np.allclose(effect, expected, atol=1e-3, equal_nan=True)
    assert np.array_equal(found.sign.isel(sample=0).sel(LD), np.sign(expected), equal_nan=True)
    assert int(effect.notnull().sum()) > 10


def test_heads_that_one_half_of_samples_selects_hurt_the_other_half_more_than_random_ones(llava):
    chosen = ablation_sweep(llava, shapes(4, seed=8, kinds=("color",)), nodes=["heads"], towers=["language_model"])
    effects = chosen.effect.sel(LD).mean("sample").stack(node=["tower", "kind", "layer", "head"]).dropna("node")
    best = effects.node.values[np.argsort(effects.values)[:3]]
    heads = [f"{tower}.L{layer}.{kind}.H{head}" for tower, kind, layer, head in best]
    found = ablate(llava, COLORS, {"selected": heads}, controls=6, seed=1).effect.sel(LD).mean("sample")
    random = found[1:]
    assert len(random) == 6
    assert float(found.sel(set="selected")) < float(random.min()) < 0
    assert found.control_of.values.tolist() == ["", *["selected"] * 6]


# Components -------------------------------------------------------------------------------------------------------


def test_nodes_are_those_that_are_read(blip, llava):
    assert all_heads(llava, ["vision_encoder"])[0] == "vision_encoder.L0.attn.H0"
    assert not [name for name in nodes(llava) if name.startswith("vision_encoder.L3")]  # beyond the feature layer
    assert all_mlps(blip, ["answer_decoder"]) == [f"answer_decoder.L{layer}.mlp" for layer in range(4)]
    assert [str(part) for part in components_of(blip, "answer_decoder.L2.cross_attn.H3")] == [
        "answer_decoder.blocks.2.cross_attn.hook_z heads 3"
    ]
    assert Node.of("answer_decoder.L2.cross_attn.H3") == ("answer_decoder", "cross_attn", 2, 3)
    assert Node.of("language_model.L12.attn.KV0.k") == ("language_model", "attn", 12, 0)
    assert Node.of("projector") == ("projector", "projector", -1, -1)
    with pytest.raises(ValueError, match="no node's name"):
        Node.of("answer_decoder.blocks.2")


def test_the_sweep_has_each_node_in_its_place(blip):
    found = ablation_sweep(blip, SAMPLE, "zero")
    assert found.attrs["method"] == "ablation_sweep"
    assert found["head"].values.tolist() == [0, 1, 2, 3, -1]
    assert found.tower.values.tolist() == list(blip.towers)
    names = ["question_encoder.L3.cross_attn.H1", "vision_encoder.L1.mlp", "answer_decoder.L0.attn.H2"]
    alone = ablate(blip, SAMPLE, {name: [name] for name in names}, "zero")
    for name in names:
        tower, kind, layer, head = Node.of(name)
        cell = found.effect.sel(tower=tower, kind=kind, layer=layer, head=head)
        assert np.allclose(cell, alone.effect.sel(set=name), atol=1e-5)
    assert bool(found.effect.sel(tower="vision_encoder", kind="cross_attn").isnull().all())
    assert bool(found.effect.sel(kind="mlp", head=slice(0, 3)).isnull().all())
    assert int(found.effect.sel(LD).notnull().sum()) == len(all_heads(blip)) + len(all_mlps(blip))


def test_positions_may_be_of_each_component_or_of_all(llava):
    z = "language_model.blocks.1.attn.hook_z"
    sets = {
        "last": [Component(z, heads=1, positions="last")],
        "image": [MOVER],
        "same": [Component(z, heads=1, positions="image")],
    }
    found = ablate(llava, SAMPLE, sets, "zero", positions="image").sel(LD).isel(sample=0)
    assert float(found.effect.sel(set="image")) == pytest.approx(float(found.effect.sel(set="same")), abs=1e-6)
    assert float(found.effect.sel(set="last")) == pytest.approx(
        difference(llava, SAMPLE, [Zero(z, heads=1, positions=[-1])]) - float(found.clean), abs=1e-4
    )
    lacking = replace(SAMPLE, id="no region", regions={})
    some = ablate(llava, [SAMPLE, lacking], [Component(z, positions="image.object")], "zero")
    assert (some.attrs["samples_used"], some.attrs["samples_dropped"]) == (1, 1)
    assert "no positions 'image.object'" in some.attrs["dropped"]


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("components", "settings", "message"),
    [
        ([], {}, "the set 'set' holds no components"),
        ({"selected": []}, {}, "the set 'selected' holds no components"),
        ({}, {}, "no sets of components are given"),
        (["language_model.L1.attn.H7"], {}, "no node or hook point of this model; nearest: language_model.L1.attn.H"),
        (["language_model.blocks.1.hook_z"], {}, "no hook is called"),
        ([Component("language_model.blocks.1.attn.hook_z", heads=9)], {"how": "zero"}, "heads .9. are out of range"),
        ([MOVER], {"how": "median"}, "'noise', not 'median'"),
        ([MOVER], {}, "the mean over one sample is what it has"),
        ([MOVER], {"how": "noise", "draws": 0}, "at least one draw"),
        ([MOVER], {"how": "resample", "draws": 0}, "at least one draw"),
        ([MOVER], {"how": "resample", "by": "global"}, "by='position' or by='role'"),
        ([MOVER], {"how": "resample", "donors": "kin"}, "'other_answer', not 'kin'"),
        ([MOVER], {"by": "word", "reference": COLORS}, "'role' or 'global', not 'word'"),
        (["*.attn.hook_pattern"], {"by": "role", "reference": COLORS}, "take its mean by='position'"),
    ],
)
def test_what_cannot_be_is_said(llava, components, settings, message):
    with pytest.raises(ValueError, match=message):
        ablate(llava, SAMPLE, components, **settings)


def test_kinds_of_nodes_that_there_are_not(llava):
    for nodes_, message in ((["layers"], "heads, mlps; not"), ([], "heads, mlps; not"), ("heads", "heads, mlps; not")):
        with pytest.raises(ValueError, match=message):
            ablation_sweep(llava, SAMPLE, nodes=nodes_)
    with pytest.raises(ValueError, match="no random controls"):
        ablation_sweep(llava, SAMPLE, controls=1)
    with pytest.raises(ValueError, match="no tower 'vision'"):
        ablation_sweep(llava, SAMPLE, towers=["vision"])

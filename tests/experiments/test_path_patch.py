"""Paths against the same by hand, in three forwards with hooks; against edges; and the identities that must hold."""

from __future__ import annotations

import importlib
import itertools
import re
from importlib import import_module

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.analysis.edge_patching import patch_each_edge
from hooked_vlm.analysis.graph import Receivers, build_graph
from hooked_vlm.analysis.runs import Runs
from hooked_vlm.corruptions import AdditiveGaussian, CounterfactualImage
from hooked_vlm.data import shapes
from hooked_vlm.data.samples import Sample
from hooked_vlm.edits import Replace
from hooked_vlm.experiments.parts.cases import ready
from hooked_vlm.experiments.parts.paths import Paths
from hooked_vlm.experiments.path_patch import path_patch
from hooked_vlm.metrics import LogitDifference
from tests import llava_processors
from tests.experiments import planted, planted_llava
from tests.experiments.planted_samples import planted as planted_model
from tests.experiments.planted_samples import red_and_blue

module = importlib.import_module("hooked_vlm.experiments.path_patch")  # the package has the function of that name

(SAMPLE,) = shapes(1, seed=7, kinds=("color",))
LD = {"metric": "logit_difference"}

# The pages of the documentation run the same code with every signature checked.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def blip():
    return HookedVLM.from_pretrained("toy-blip-vqa")


# By hand --------------------------------------------------------------------------------------------------------------


def writes(name: str) -> tuple[str, int | None]:
    """Where a sender writes, and which head it is."""
    found = re.fullmatch(r"(\w+)\.L(\d+)\.(?:mlp|(attn|cross_attn)\.H(\d+))", name)
    if found:
        tower, layer, attention, head = found.groups()
        place = f"{tower}.blocks.{layer}"
        return (f"{place}.hook_mlp_out", None) if attention is None else (f"{place}.{attention}.hook_z", int(head))
    return {"projector": "projector.hook_out"}.get(
        name, name.replace(".embed", ".hook_full_embed").replace(".out", ".hook_out")
    ), None


def reads(name: str) -> tuple[str, int | None]:
    """Where a receiver's input is, and which head it is of."""
    found = re.fullmatch(r"(\w+)\.L(\d+)\.(?:mlp|(attn|cross_attn)\.H(\d+)\.([qkv]))", name)
    if found:
        tower, layer, attention, head, kind = found.groups()
        place = f"{tower}.blocks.{layer}"
        return (f"{place}.hook_mlp_in", None) if attention is None else (f"{place}.{attention}.hook_{kind}", int(head))
    return ("vision_encoder.hook_out", None) if name == "projector" else (name.replace(".out", ".hook_out"), None)


@torch.no_grad()
def two_runs(model, case, noising=True):
    """The original inputs, with both runs' activations."""
    clean, corrupted = case.clean, case.corrupted.inputs
    runs = (clean, corrupted) if noising else (corrupted, clean)
    return runs[0], *(model.run_with_cache(run)[1] for run in runs)


@torch.no_grad()
def by_hand(model, case, runs, senders, receivers, *, free=False, positions=slice(None), where=slice(None)):
    """Steps two and three, in a forward each: the logit difference."""
    inputs, original, new = runs
    sent, read = [writes(name) for name in senders], [reads(name) for name in receivers]

    def step_two(activation, hook):
        is_head = hook.name.endswith("hook_z")
        is_mlp = hook.name.endswith(("hook_mlp_out", "projector.hook_out"))
        if is_head or (is_mlp and not free):
            activation = original[hook.name].clone()
        for site, head in sent:
            if site == hook.name:
                # What the projector sends is at the image's positions, of which a test takes all or none.
                own = slice(None) if site == "projector.hook_out" else positions
                at = (slice(None), own) if head is None else (slice(None), own, head)
                activation[at] = new[site][at]
        return activation

    frozen = [name for name in model.hook_names if name.endswith(("hook_z", "hook_mlp_out", "projector.hook_out"))]
    names = list(dict.fromkeys([*frozen, *(site for site, _ in sent)]))
    with model.hooks(fwd_hooks=[(names, step_two)]):
        _, found = model.run_with_cache(inputs, names_filter=[site for site, _ in read])

    def step_three(activation, hook):
        for site, head in read:
            if site == hook.name:
                at = (slice(None), where) if head is None else (slice(None), where, head)
                activation[at] = found[site][at]
        return activation

    logits = model.run_with_hooks(inputs, fwd_hooks=[([site for site, _ in read], step_three)])
    return LogitDifference(case.answer, case.foil)(logits).item()


SENDERS = {
    "llava": [
        *["vision_encoder.L0.mlp", "vision_encoder.L1.attn.H2", "projector"],
        *["language_model.L0.attn.H0", "language_model.L1.attn.H1"],
    ],
    "blip": [
        *["vision_encoder.embed", "vision_encoder.L1.mlp", "question_encoder.L1.cross_attn.H2"],
        *["question_encoder.L2.mlp", "answer_decoder.L1.cross_attn.H0"],
    ],
}
RECEIVERS = {
    "llava": [
        *["projector", "language_model.L1.attn.H1.q", "language_model.L2.attn.H1.k", "language_model.L1.attn.H1.v"],
        *["language_model.L4.mlp", "language_model.out"],
    ],
    "blip": [
        *[
            "question_encoder.L3.cross_attn.H1.v",
            "question_encoder.L2.cross_attn.H2.q",
            "question_encoder.L3.attn.H2.v",
        ],
        *["question_encoder.L3.mlp", "answer_decoder.L3.cross_attn.H1.k", "answer_decoder.out"],
    ],
}


@pytest.mark.parametrize("name", ["llava", "blip"])
@pytest.mark.parametrize(("mlps", "direction"), [("frozen", "noising"), ("free", "denoising")])
def test_every_path_is_as_by_hand(name, mlps, direction, request):
    model = request.getfixturevalue(name)
    case = ready(model, SAMPLE, "sip")
    runs = two_runs(model, case, noising=direction == "noising")
    names = {"senders": SENDERS[name], "receivers": RECEIVERS[name]}
    found = path_patch(model, SAMPLE, "sip", mlps=mlps, direction=direction, **names).sel(LD).isel(sample=0)
    for sender, receiver in itertools.product(SENDERS[name], RECEIVERS[name]):
        cell = found.sel(sender=sender, receiver=receiver)
        if not bool(cell.is_path):
            assert float(cell.effect) == 0
            if receiver != RECEIVERS[name][-1]:
                continue
        expected = by_hand(model, case, runs, [sender], [receiver], free=mlps == "free")
        assert float(cell.patched) == pytest.approx(expected, abs=2e-4), (sender, receiver)
    start = found.clean if direction == "noising" else found.corrupted
    assert np.allclose(found.effect, found.patched - start)
    assert np.allclose(found.relative, found.effect / abs(found.clean - found.corrupted))
    assert found.is_path.sum() >= 10
    assert (abs(found.effect) > 0.01).sum() >= 4


@pytest.mark.parametrize("mlps", ["frozen", "free"])
def test_sets_and_positions_are_as_by_hand(llava, mlps):
    """Senders that send together at the image, into receivers of several layers that read it at the last words."""
    case = ready(llava, SAMPLE, "sip")
    senders = ["projector", "language_model.L0.mlp", "language_model.L0.attn.H1", "language_model.L1.mlp"]
    receivers = ["language_model.L1.attn.H1.v", "language_model.L2.attn.H0.k", "language_model.L2.attn.H0.q"]
    image, after = list(case.clean.spans["image"][0]), list(range(38, 44))
    found = path_patch(
        *(llava, SAMPLE, "sip"),
        **{"senders": {"some": senders}, "receivers": {"these": receivers, "one": receivers[:1]}, "mlps": mlps},
        **{"positions": "image", "receiver_positions": [*image, *after]},
    ).sel(LD)
    for name, own in (("these", receivers), ("one", receivers[:1])):
        places = {"positions": image, "where": [*image, *after]}
        expected = by_hand(llava, case, two_runs(llava, case), senders, own, free=mlps == "free", **places)
        assert float(found.patched.sel(receiver=name).squeeze()) == pytest.approx(expected, abs=2e-4)
    assert abs(float(found.effect.sel(receiver="these").squeeze())) > 0.1


@torch.no_grad()
def test_heads_that_share_keys_read_the_same():
    """Two of four heads share a key: ``KV1`` is what heads 2 and 3 read."""
    model = llava_processors.model()
    assert model.language_model.config.n_kv_heads == 2
    pictures = [llava_processors.noise(28, 28, seed) for seed in (0, 1)]
    sample = Sample("noise", pictures[0], "what is it ?", image_cf=pictures[1])
    sender, receiver = "language_model.L0.attn.H1", "language_model.L1.attn.KV1.v"
    found = path_patch(model, sample, "sip", senders=[sender], receivers=[receiver], scored="own").sel(LD)
    case = ready(model, sample, "sip", scored="own")
    inputs, here, other = two_runs(model, case)
    z, weight = "language_model.blocks.0.attn.hook_z", model.language_model.blocks[0].attn.W_O[1]
    block = model.language_model.blocks[1]
    stream = here["language_model.blocks.1.hook_attn_in"] + (other[z] - here[z])[:, :, 1] @ weight

    def put(activation, hook):
        activation[:, :, 1] = block.ln1(stream) @ block.attn.W_V[1] + (
            0 if block.attn.b_V is None else block.attn.b_V[1]
        )

    logits = model.run_with_hooks(inputs, fwd_hooks=[("language_model.blocks.1.attn.hook_v", put)])
    expected = LogitDifference(case.answer, case.foil)(logits).item()
    assert float(found.patched.squeeze()) == pytest.approx(expected, abs=1e-5)
    assert abs(float(found.effect.squeeze())) > 1e-4


def test_paths_with_frozen_mlps_are_the_edges_of_attribution(blip):
    """Against the other implementation of the same, which attribution of edges is held against."""
    case = ready(blip, SAMPLE, "sip")
    metric = LogitDifference(case.answer, case.foil)
    runs = Runs.of(blip, case.clean, case.corruption, metric)
    graph = build_graph(blip, blip.towers)
    _, source = runs.activations(runs.corrupted, graph.sender_sites)
    before, _ = runs.activations(runs.clean, graph.sender_sites[:1])
    found = (
        path_patch(blip, SAMPLE, "sip", senders=["*"], receivers=["*.L3.*", "answer_decoder.out"])
        .sel(LD)
        .isel(sample=0)
    )
    columns = torch.tensor([graph.receivers.index(name) for name in found.receiver.values])
    edges = graph.edges[:, columns].nonzero()
    edges = edges[torch.randperm(len(edges))[:24]]
    exact = (
        patch_each_edge(runs, runs.clean, source, graph, torch.stack([edges[:, 0], columns[edges[:, 1]]], 1)) - before
    )
    own = found.effect.values[edges[:, 0], edges[:, 1]]
    assert np.allclose(own, exact[:, 0], atol=2e-4)
    assert np.array_equal(found.is_path.values, graph.edges[:, columns].numpy())


# Identities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlps", ["frozen", "free"])
def test_all_senders_into_the_end_give_the_other_run(llava, blip, mlps):
    every = {"all": ["projector", "language_model.*"]}
    found = path_patch(llava, SAMPLE, "sip", senders=every, mlps=mlps)
    assert np.allclose(found.patched.squeeze(), found.corrupted.squeeze(), atol=1e-4)
    assert found.receiver.values.tolist() == ["language_model.out"]
    found = path_patch(blip, SAMPLE, "sip", senders={"all": ["answer_decoder.*"]}, mlps=mlps, direction="denoising")
    assert np.allclose(found.patched.squeeze(), found.clean.squeeze(), atol=1e-4)
    assert np.allclose(found.relative.sel(LD), 1, atol=1e-5)


def test_the_image_is_all_that_cross_attention_reads(blip):
    """Noise on the image embeddings, in several draws, through every key and value: the noised run."""
    noise = AdditiveGaussian(std=3.0, draws=2, seed=3)
    every = {"all": ["question_encoder.L*.cross_attn.H*.[kv]"]}
    found = path_patch(blip, SAMPLE, noise, senders=["vision_encoder.out"], receivers=every)
    assert np.allclose(found.patched.squeeze(), found.corrupted.squeeze(), atol=1e-4)
    assert abs(found.clean - found.corrupted).sel(LD) > 1
    back = path_patch(blip, SAMPLE, noise, senders=["vision_encoder.out"], receivers=every, direction="denoising")
    assert np.allclose(back.patched.squeeze(), back.clean.squeeze(), atol=1e-4)
    # One head's values alone, brought back in the noised run.
    found = path_patch(
        *(blip, SAMPLE, noise),
        **{"senders": ["vision_encoder.out"], "receivers": ["question_encoder.L3.cross_attn.H1.v"]},
        direction="denoising",
    ).sel(LD)
    case, values = ready(blip, SAMPLE, noise), "question_encoder.blocks.3.cross_attn.hook_v"
    _, clean = blip.run_with_cache(case.clean, names_filter=values)
    with torch.no_grad():
        logits = blip.patch(case.corrupted.inputs, [*case.corrupted.edits, Replace(values, clean, heads=1)])
    expected = LogitDifference(case.answer, case.foil)(logits).mean().item()
    assert float(found.patched.squeeze()) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="edits vision_encoder"):
        path_patch(blip, SAMPLE, noise, senders=["vision_encoder.L0.mlp"], receivers=every)


@pytest.mark.parametrize("mlps", ["frozen", "free"])
def test_the_same_picture_changes_nothing(llava, mlps):
    same = CounterfactualImage(SAMPLE.picture())
    found = path_patch(llava, SAMPLE, same, receivers=["language_model.L2.*", "language_model.out"], mlps=mlps)
    assert abs(found.effect).max() < 1e-4
    assert bool(found.relative.isnull().all())
    assert found.attrs["n_undefined"] == found.relative.size


def test_what_senders_add_to_a_pre_ln_stream_adds_up(llava):
    """Into the last MLP: the sum of what they write in the other run, less the sum of what they write in this."""
    case = ready(llava, SAMPLE, "sip")
    inputs, here, other = two_runs(llava, case)
    graph = build_graph(llava, ["language_model"])
    chosen = ["projector", "language_model.L0.attn.H3", "language_model.L2.mlp", "language_model.L3.attn.H0"]
    alone = torch.tensor([[name == one for name in graph.senders] for one in chosen])
    paths = Paths(llava, graph, inputs, here, other)
    last = next(one for one in graph.stages(Receivers) if one.inputs == ("language_model.L4.mlp",))
    read = torch.tensor([name == "language_model.L4.mlp" for name in graph.receivers])
    apart, together = (dict(paths.changes(sent, read))[last] for sent in (alone, alone.any(0, keepdim=True)))
    expected = other["projector.hook_out"].new_zeros(together[0].shape)
    expected[:, list(case.clean.spans["image"][0])] += (other["projector.hook_out"] - here["projector.hook_out"])[0]
    for layer, head in ((0, 3), (3, 0)):
        z = f"language_model.blocks.{layer}.attn.hook_z"
        expected += (other[z] - here[z])[:, :, head] @ llava.language_model.blocks[layer].attn.W_O[head].detach()
    mlp = "language_model.blocks.2.hook_mlp_out"
    expected += other[mlp] - here[mlp]
    assert torch.allclose(apart.sum(0), together[0], atol=1e-5)
    assert torch.allclose(together[0], expected, atol=1e-5)


def test_how_many_are_taken_together_does_not_matter(llava, monkeypatch):
    names = {"senders": ["projector", "language_model.L[01].*"], "receivers": ["language_model.L4.mlp"], "mlps": "free"}
    whole = path_patch(llava, SAMPLE, "sip", **names)
    module = import_module("hooked_vlm.experiments.path_patch")
    monkeypatch.setattr(module, "HELD", 1)
    assert module._at_once({"one": torch.zeros(3)}) == 1
    assert np.allclose(path_patch(llava, SAMPLE, "sip", **names).patched, whole.patched, atol=1e-4)


# Planted circuits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mlps", "direction"), [("frozen", "noising"), ("free", "denoising")])
def test_of_a_planted_blip_the_three_steps_of_the_answer_are_found_and_nothing_else(mlps, direction):
    model = planted_model(planted)
    every = ["*"] if mlps == "frozen" else ["*.v", "*.mlp", "*.out"]
    settings = {"mlps": mlps, "direction": direction, "senders": ["*"], "receivers": every}
    found = path_patch(model, red_and_blue(), "sip", **settings)
    mover = f"question_encoder.L{planted.LAYER}.cross_attn.H{planted.HEAD}"
    reader = f"answer_decoder.L{planted.DECODER_LAYER}.cross_attn.H0"
    steps = [("vision_encoder.embed", f"{mover}.v"), (mover, f"{reader}.v"), (reader, "answer_decoder.out")]
    check_lit(found, steps, -1 if direction == "noising" else 1)


@pytest.mark.parametrize("mlps", ["frozen", "free"])
def test_of_a_planted_llava_the_steps_of_the_answer_are_found_and_nothing_else(mlps):
    model = planted_model(planted_llava)
    found = path_patch(model, red_and_blue(), "sip", senders=["*"], receivers=["*"], mlps=mlps)
    to_question, to_answer = (
        f"language_model.L{layer}.attn.H{planted_llava.HEAD}"
        for layer in (planted_llava.TO_QUESTION, planted_llava.TO_ANSWER)
    )
    steps = [("projector", f"{to_question}.v"), (to_question, f"{to_answer}.v"), (to_answer, "language_model.out")]
    steps.append(("vision_encoder.embed", "projector"))
    if mlps == "free":
        steps.append(("vision_encoder.embed", f"{to_question}.v"))
    check_lit(found, steps, -1)


def check_lit(found, steps, sign):
    expected = (found.relative * 0).rename(None)
    for sender, receiver in steps:
        expected.loc[{"sender": sender, "receiver": receiver}] = sign
    for metric in ("logit_difference", "probability"):
        assert np.allclose(found.relative.sel(metric=metric), expected.sel(metric=metric), atol=1e-4)
    assert found.relative.sizes["sender"] > 10


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"senders": []}, "no sender is named"),
        ({"senders": {}}, "no sender is named"),
        ({"senders": {"movers": []}}, "no sender is named"),
        ({"receivers": []}, "no receiver is named"),
        ({"senders": ["language_model.L1.attn.H9"]}, "no sender; nearest: .*language_model.L1.attn.H"),
        ({"receivers": ["language_model.L1.attn.H1"]}, "no receiver; nearest: language_model.L1.attn.H1"),
        ({"senders": ["language_model.L3.mlp"], "receivers": ["language_model.L2.mlp"]}, "no path leads from"),
        ({"senders": ["vision_encoder.L0.mlp"], "receivers": ["language_model.out"]}, "no path leads .* MLPs frozen"),
        ({"mlps": "cold"}, "'frozen' or 'free', not 'cold'"),
        ({"direction": "sideways"}, "'noising' or 'denoising', not 'sideways'"),
        ({"metrics": ["accuracy"]}, "metrics are a list of"),
        ({"positions": [99]}, r"positions \[99\] are out of range"),
        (
            {"senders": ["vision_encoder.L0.mlp"], "receivers": ["projector"], "positions": "image"},
            "a span of language_model cannot say positions at vision_encoder",
        ),
        ({"receiver_positions": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_said(llava, settings, message):
    with pytest.raises(ValueError, match=message):
        path_patch(llava, SAMPLE, "sip", **settings)


def test_samples_are_kept_apart_and_drops_are_counted(llava):
    samples = list(shapes(2, seed=7, kinds=("color",)))
    without = Sample("plain", SAMPLE.image, SAMPLE.question, SAMPLE.answer, SAMPLE.foil)
    names = {"senders": ["projector"], "receivers": ["language_model.L1.attn.H1.v"]}
    names["metrics"] = ["kl_divergence", "logit_difference"]
    found = path_patch(llava, [samples[0], without, samples[1]], "sip", positions="image.changed", **names)
    assert found.sample.values.tolist() == [one.id for one in samples]
    assert (found.attrs["samples_used"], found.attrs["samples_dropped"]) == (2, 1)
    assert "no counterfactual picture" in found.attrs["dropped"]
    for sample in samples:
        alone = path_patch(llava, sample, "sip", positions="image.changed", **names)
        assert np.allclose(found.sel(sample=sample.id).patched, alone.patched.isel(sample=0), atol=1e-5)
    assert found.attrs["positions"] == "image.changed"
    distance = abs(found.clean - found.corrupted)
    assert np.allclose(found.relative, found.effect / distance)
    assert bool((found.relative.sel(metric="kl_divergence") > 0.1).all())  # further from the clean run
    assert found.attrs["direction"] == "noising"


def test_pictures_in_tiles_may_send_from_the_projector():
    """LLaVA-NeXT: its vision encoder's rows are tiles, and are left out; the image's embeddings are a node."""
    model = llava_processors.model(tiles=True)
    pictures = [llava_processors.noise(28, 56, seed) for seed in (0, 1)]
    sample = Sample("tiles", pictures[0], "what is it ?", image_cf=pictures[1])
    every = {"all": ["language_model.*", "projector"]}
    found = path_patch(model, sample, "sip", senders=every, scored="own")
    assert np.allclose(found.patched, found.corrupted.values[..., None, None], atol=1e-5)
    assert abs(found.effect).max() > 1e-4
    with pytest.raises(ValueError, match="rows are pictures, or tiles"):
        path_patch(model, sample, "sip", senders=["vision_encoder.*"], receivers=["projector"], scored="own")

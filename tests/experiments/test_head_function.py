"""What heads look at: the measures against their definitions, planted heads, and what the toys' heads do."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hooked_vlm import HookedVLM, Span
from hooked_vlm.data import SampleError, Samples, shapes
from hooked_vlm.edits import BlockAttention
from hooked_vlm.experiments.head_function import CUTS, head_function, head_summary
from hooked_vlm.experiments.notice import list_heads
from hooked_vlm.experiments.parts.cases import Case, prepared, ready
from hooked_vlm.experiments.parts.heads import Head
from hooked_vlm.experiments.parts.region_measures import enrichment
from hooked_vlm.statistics import auroc
from tests.experiments import planted, planted_llava

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

module = importlib.import_module("hooked_vlm.experiments.head_function")  # the package has the function of that name

LD = "logit_difference"
COLORS = shapes(12, seed=7, kinds=("color",))
READER, DETECTORS, SUPPRESSOR = "question_encoder", (1, 2), 0


@pytest.fixture(scope="module")
def blip():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def found(blip):
    """All heads of the last cross-attention."""
    heads = [Head(READER, "cross_attn", 3, number) for number in range(4)]
    return head_function(blip, COLORS, heads, query="subject", metrics=[LD])


# Measures -------------------------------------------------------------------------------------------------------------

masks = arrays.arrays(bool, 9).filter(lambda mask: mask.any() and not mask.all())
weights = arrays.arrays(float, 9, elements=st.integers(0, 5).map(float)).filter(lambda own: own.sum() > 0)


@settings(max_examples=50)
@given(weights, masks)
def test_measures_are_what_they_are_defined_as(attention, mask):
    share = attention[mask].sum() / attention.sum()
    assert enrichment(attention, mask) == pytest.approx(share / (mask.sum() / 9))
    pairs = [(a > b) + 0.5 * (a == b) for a in attention[mask] for b in attention[~mask]]
    assert auroc(attention, mask) == pytest.approx(np.mean(pairs))
    assert auroc(attention, ~mask) == pytest.approx(1 - np.mean(pairs))
    assert enrichment(7 * attention, mask) == pytest.approx(enrichment(attention, mask))
    assert auroc(attention**3, mask) == pytest.approx(auroc(attention, mask)), "only the order counts"


@given(masks)
def test_a_head_that_does_not_care(mask):
    attention = np.full((2, 9), 0.05)
    assert enrichment(attention, mask) == pytest.approx([1, 1])
    assert auroc(attention, mask).tolist() == [0.5, 0.5]


def test_a_mask_of_all_or_nothing():
    attention = np.arange(9.0)
    everything, nothing = np.ones(9, bool), np.zeros(9, bool)
    assert enrichment(attention, everything) == 1
    assert np.isnan([enrichment(attention, nothing), auroc(attention, everything), auroc(attention, nothing)]).all()
    assert np.isnan(enrichment(np.zeros(9), everything))


# Looking and cutting --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cut", ["query", "all"])
def test_looks_and_cuts_are_those_of_the_model(blip, cut):
    sample, heads = COLORS[0], [Head(READER, "cross_attn", 3, 2), Head(READER, "cross_attn", 1, 0)]
    result = head_function(blip, sample, heads, query="question", cut=cut, controls=2, metrics=[LD])
    assert result["head"].values.tolist() == [str(head) for head in heads]
    case = ready(blip, sample)
    words, keys, seen = (list(case.clean.spans[name][0]) for name in ("question", "image", "image.object"))
    assert result.key.values.tolist() == keys
    assert result.words.values.tolist() == [" ".join(sample.question.split())]
    assert np.array_equal(result.in_region[0], np.isin(keys, seen))
    _, cache = blip.run_with_cache(case.clean)
    every = torch.stack([cache[f"{READER}.blocks.{layer}.cross_attn.hook_pattern"][0] for layer in range(4)])
    every = every[:, :, words][..., keys].mean(2)
    expected = torch.stack([every[head.layer, head.number] for head in heads])
    assert np.allclose(result.attention[0], expected, atol=1e-6)
    assert np.allclose(result.mean_attention[0], every.mean((0, 1)), atol=1e-6)
    assert np.allclose(result.image_share[0], expected.sum(-1), atol=1e-6)
    norms = cache["vision_encoder.hook_out"][0, keys].norm(dim=-1)
    far = norms > norms.mean() + 2 * norms.std(correction=0)
    assert np.array_equal(result.is_outlier[0, 0], far)
    assert np.allclose(result.outlier_share[0], expected[:, far].sum(-1) / expected.sum(-1), atol=1e-6)
    relative = result.enrichment[0] / enrichment(every.mean((0, 1)).numpy(), np.isin(keys, seen))
    assert np.allclose(result.relative_enrichment[0], relative, atol=1e-5)
    closed = {"region": seen, "rest": sorted({*keys} - {*seen}), "outliers": np.array(keys)[far].tolist()}
    for head in heads:
        for name, own in closed.items():
            edit = BlockAttention(head.site, heads=head.number, positions=words if cut == "query" else None, keys=own)
            logits = blip.patch(case.clean, [edit])[0, -1]
            effect = logits[case.answer] - logits[case.foil] - result.clean.item()
            found = result.cut_effect.sel(head=str(head), cut=name)
            assert found.item() == pytest.approx(float(effect), abs=1e-4)


def test_llavas_heads_look_from_the_last_position_at_the_picture(llava):
    sample = COLORS[7]  # whose outliers differ from layer to layer
    result = head_function(llava, sample, controls=0)
    assert "cut_effect" not in result
    assert result["head"].values.tolist() == [str(head) for head in list_heads(llava, ["language_model"])]
    inputs = prepared(llava, sample)
    keys = list(inputs.spans["image"][0])
    assert (result.words.values.tolist(), result.key.values.tolist()) == (["ASSISTANT:"], keys)
    _, cache = llava.run_with_cache(inputs)
    for layer in range(5):
        stream = cache[f"language_model.blocks.{layer}.hook_resid_pre"][0, keys].norm(dim=-1)
        own = result.isel(sample=0).sel(head=f"language_model.L{layer}.attn.H3")
        assert np.array_equal(own.is_outlier, stream > stream.mean() + 2 * stream.std(correction=0))
        pattern = cache[f"language_model.blocks.{layer}.attn.hook_pattern"][0, 3, -1, keys]
        assert np.allclose(own.attention, pattern, atol=1e-6)
    assert len(np.unique(result.is_outlier[0], axis=0)) > 1


def test_random_tokens_are_drawn_by_the_samples_name_and_the_seed(blip):
    head = [Head(READER, "cross_attn", 1, 0)]
    options = {"query": "subject", "controls": 1, "metrics": [LD]}
    one, other = (head_function(blip, order, head, **options) for order in (COLORS[:3], COLORS[:3].samples[::-1]))
    assert one.cut_effect.equals(other.cut_effect.sel(sample=one.sample))
    seeded = head_function(blip, COLORS[:3], head, **options, seed=1).cut_effect
    assert not one.cut_effect.sel(cut="random").equals(seeded.sel(cut="random"))
    assert one.cut_effect.sel(cut="region").equals(seeded.sel(cut="region"))


def test_a_region_that_is_all_of_the_picture(blip):
    whole = replace(COLORS[0], regions={"object": (0, 0, 96, 96)})
    result = head_function(blip, whole, query="subject").isel(sample=0)
    assert np.allclose(result.enrichment, 1)
    assert bool(result.auroc.isnull().all())
    assert bool(result.cut_effect.sel(cut=["random", "rest"]).isnull().all())
    assert not bool(result.cut_effect.sel(cut="region").isnull().any())


def test_samples_without_the_region_are_dropped(blip):
    bare = replace(COLORS[0], regions={})
    result = head_function(blip, Samples([bare, COLORS[1]]), query="subject", controls=0)
    assert (result.attrs["samples_used"], result.attrs["samples_dropped"]) == (1, 1)
    assert bool(result.enrichment_shuffled.isnull().all()), "no other sample to be held against"
    with pytest.raises(SampleError, match="has no region 'object'"):
        head_function(blip, bare, query="subject")


def test_the_random_cut_is_a_mean_over_what_is_drawn(blip):
    """Of a region of 24 patches of 36, all others are drawn each time."""
    wide = replace(COLORS[0], regions={"object": (0, 0, 64, 96)})
    result = head_function(blip, wide, query="subject", controls=3, metrics=[LD])
    assert np.allclose(result.cut_effect.sel(cut="random"), result.cut_effect.sel(cut="rest"), atol=1e-5)
    assert abs(result.cut_effect.sel(cut="rest")).max() > 0.1


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ([], {}, "no heads to look at"),
        (None, {"cut": "some"}, "'query' or 'all', not 'some'"),
        (None, {"query": "last"}, "no head of answer_decoder attends to vision_encoder"),
        ([Head(READER, "attn", 0, 0)], {}, "L0.attn.H0 looks from question_encoder at question_encoder"),
        ([Head("answer_decoder", "cross_attn", 0, 0)], {}, "from answer_decoder at question_encoder"),
        ([Head(READER, "cross_attn", 0, 0), Head(READER, "attn", 0, 0)], {}, "one tower and kind of attention"),
    ],
)
def test_errors_say_what_is_wrong(blip, heads, options, message):
    with pytest.raises(ValueError, match=message):
        head_function(blip, COLORS[:1], heads, **{"query": "subject", **options})


# Planted heads --------------------------------------------------------------------------------------------------------


def planted_case(model, circuit, tower, spans):
    clean = circuit.planted_inputs("red")
    spans = {name: Span(*own) for name, own in spans.items()}
    clean = replace(clean, spans={**clean.spans, **spans}, text_tower=tower)
    model._processor = _Words()
    answer, foil = torch.tensor([circuit.RED_TOKEN]), torch.tensor([circuit.BLUE_TOKEN])
    with torch.no_grad():
        logits, cache = model.run_with_cache(clean, names_filter=[])
        return Case(COLORS[0], clean, None, None, answer, foil, logits[:, -1], cache)


class _Words:
    class tokenizer:  # noqa: N801
        @staticmethod
        def convert_ids_to_tokens(ids):
            return [f"t{token_id}" for token_id in ids]


PLANTED = {
    # The object is in the fourth of nine patches; position 0 holds the class token.
    "blip": (
        planted,
        "question_encoder",
        {
            "answer": ("question_encoder", ((planted.ASKING_POSITION,),)),
            "image": ("vision_encoder", (tuple(range(1, 10)),)),
            "image.object": ("vision_encoder", ((4,),)),
        },
        f"question_encoder.L{planted.LAYER}.cross_attn.H{planted.HEAD}",
    ),
    "llava": (
        planted_llava,
        "language_model",
        {
            "asking": ("language_model", ((planted_llava.ASKING_POSITION,),)),
            "image.object": ("language_model", ((planted_llava.OBJECT_POSITION,),)),
        },
        f"language_model.L{planted_llava.TO_QUESTION}.attn.H{planted_llava.HEAD}",
    ),
}


@pytest.mark.parametrize("name", [*PLANTED])
def test_the_planted_head_detects_and_no_other(monkeypatch, name):
    circuit, tower, spans, head = PLANTED[name]
    model = circuit.planted_model()
    case = planted_case(model, circuit, tower, spans)
    monkeypatch.setattr(module, "ready", lambda *_, **__: case)
    result = head_function(model, COLORS[0], query="answer" if name == "blip" else "asking", metrics=[LD])
    summary = head_summary(result)
    is_planted = result["head"].values == head
    assert is_planted.sum() == 1
    own = result.isel(sample=0, metric=0)
    # What it looks at is nine times as likely as any other patch; others look at all alike.
    assert np.allclose(own.enrichment, np.where(is_planted, 9, 1), atol=1e-3)
    assert np.allclose(own.auroc, np.where(is_planted, 1, 0.5))
    assert summary.label.values.tolist() == np.where(is_planted, "detection", "neither").tolist()
    lost = np.where(is_planted, -float(own.clean), 0)
    assert float(own.clean) > 1
    assert np.allclose(own.cut_effect.sel(cut="region"), lost, atol=1e-3)
    assert np.allclose(own.cut_effect.sel(cut=["random", "rest"]), 0, atol=1e-3)
    assert np.allclose(summary["mean"].sel(quantity="cut_excess"), lost, atol=1e-3)


# Findings on the toys -------------------------------------------------------------------------------------------------


def test_heads_that_look_at_the_object(found):
    """Of 40 samples: enrichments .64, 35.4, 31.3, 5.6 and AUROCs .25, 1, 1, .87."""
    summary = head_summary(found)
    of = summary["mean"].assign_coords(head=range(4))
    for number in DETECTORS:
        assert of.sel(quantity="enrichment", head=number) > 25
        assert of.sel(quantity="auroc", head=number) > 0.97
        assert of.sel(quantity="relative_enrichment", head=number) > 2.5
        assert of.sel(quantity="enrichment_shuffled", head=number) < 3
        assert of.sel(quantity="auroc_shuffled", head=number) == pytest.approx(0.5, abs=0.1)
        assert summary.label.values[number] == "detection"
    assert of.sel(quantity="enrichment", head=SUPPRESSOR) < 0.8
    assert summary.label.values[SUPPRESSOR] == "suppression"
    assert bool(((summary.low <= summary["mean"] + 1e-12) & (summary["mean"] <= summary.high + 1e-12)).all())


def test_the_answer_is_lost_where_they_may_not_look_at_the_object(found):
    """Of 40 samples: heads 1 and 2 lose 10.7 and 3.7, of which random tokens explain nothing; heads 0 and 3 lose less
    than 0.2. So the head that looks away from the object does not thereby do anything for the answer."""
    summary = head_summary(found).assign_coords(head=range(4))
    excess = summary.sel(quantity="cut_excess")
    assert excess.high.sel(head=1) < -5
    assert excess.high.sel(head=2) < -1
    assert abs(excess["mean"].sel(head=[0, 3])).max() < 0.5
    assert abs(summary["mean"].sel(quantity="cut_random")).max() < 0.05
    assert found.cut.values.tolist() == list(CUTS)


def test_a_head_is_called_something_only_if_its_interval_says_so(found):
    wide = np.where(np.arange(12) % 2, 0.1, 1.6)  # 0.85 in the mean
    values = np.stack([np.full(12, 0.5), wide, np.full(12, 1.05), np.full(12, 1.5)], axis=1)
    summary = head_summary(found.assign(enrichment=(("sample", "head"), values)))
    assert summary.label.values.tolist() == ["suppression", "neither", "neither", "detection"]
    narrower = head_summary(found.assign(enrichment=(("sample", "head"), values)), delta=0.01)
    assert narrower.label.values.tolist() == ["suppression", "neither", "detection", "detection"]


def test_a_summary_without_cuts(found):
    summary = head_summary(found.drop_vars(["cut_effect", "clean"]), delta=1000)
    assert not any(str(name).startswith("cut") for name in summary.quantity.values)
    assert summary.label.values.tolist() == ["neither"] * 4
    assert summary.n.sel(quantity="enrichment").values.tolist() == [12] * 4

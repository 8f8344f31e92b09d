"""Attention knockout finds the planted edges and no others, in their layers; and what holds whatever the model."""

import itertools
import json
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM, Span
from hooked_vlm.data import Sample, SampleError, Samples, shapes
from hooked_vlm.edits import BlockAttention, Scale
from hooked_vlm.experiments.information_flow import EDGES, information_flow, layer_groups, route
from hooked_vlm.experiments.parts.cases import prepared
from hooked_vlm.experiments.parts.picture_parts import with_picture_spans
from hooked_vlm.experiments.parts.sites import window
from hooked_vlm.experiments.parts.token_choice import ObjectTokens, RandomTokens
from hooked_vlm.metrics import LogitDifference, Probability
from hooked_vlm.patches import PatchGrid
from hooked_vlm.sweep import sweep
from tests.experiments import planted as blip_planted
from tests.experiments import planted_llava
from tests.experiments.planted_words import planted_model, planted_sample
from tests.llava_processors import model as tiny_llava
from tests.llava_processors import noise

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

COLOR = ("color",)
"""The one kind of question whose answer lies in one object."""


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def eager_llava():
    """Computes attention as runs do whose scores are edited, so that numbers can be equal bit by bit."""
    return HookedVLM.from_pretrained("toy-llava", attention="eager")


@pytest.fixture(scope="module")
def blip():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture(scope="module")
def samples():
    return shapes(8, seed=7, kinds=COLOR)


def dropped(result) -> list[tuple[str, str]]:
    return [(id, kind) for id, kind, _ in json.loads(result.attrs["dropped"])]


# Planted circuits -----------------------------------------------------------------------------------------------------

LLAVA_SPANS = ("image", "image.object", "image - image.object", "asking", "question - asking", "last", "rest")
LLAVA_EDGES = list(itertools.product(LLAVA_SPANS, LLAVA_SPANS))


def llava_carries(source: str, target: str) -> int | None:
    """The layer in which an edge of the planted LLaVA carries the answer."""
    reads_object = source in ("image", "image.object") and target == "asking"
    reads_asking = source == "asking" and target == "last"
    return planted_llava.TO_QUESTION if reads_object else planted_llava.TO_ANSWER if reads_asking else None


@pytest.mark.parametrize("width", [1, 3])
def test_only_the_planted_edges_of_a_llava_carry_the_answer(width):
    result = information_flow(planted_model(), planted_sample("red"), LLAVA_EDGES, width=width).isel(sample=0)
    assert result.edge.size == len(LLAVA_SPANS) ** 2
    lost = 100 * (1 / planted_llava.D_VOCAB / float(result.base.sel(metric="probability")) - 1)
    for (source, target), name in zip(LLAVA_EDGES, result.edge.values, strict=True):
        carries = llava_carries(source, target)
        reached = [carries in window(layer, width, planted_llava.N_LAYERS) for layer in range(planted_llava.N_LAYERS)]
        assert sum(reached) == (width if carries is not None else 0)
        assert result.relative.sel(edge=name).values == pytest.approx(np.where(reached, lost, 0), abs=0.02), name


BLIP_SPANS = ("image", "image.class", "image.object", "image - image.object", "asking", "question - asking", "rest")


def test_only_the_planted_edges_of_a_blip_carry_the_answer():
    model, planted = blip_planted.planted_model(), blip_planted
    model._processor = planted_model().processor  # names of tokens, no matter which
    inputs = planted.planted_inputs("red")
    positions = tuple(range(1, 10))
    grid = PatchGrid.of(None, (12, 12), positions, image_size=12, patch_size=4, tower="vision_encoder")
    spans = {
        "image": Span("vision_encoder", (positions,)),
        "image.object": Span("vision_encoder", ((4,),)),
        "question": Span("question_encoder", ((1, 2, 3, 4),)),
        "asking": Span("question_encoder", ((planted.ASKING_POSITION,),)),
        "last": Span("answer_decoder", ((0,),)),
    }
    inputs = replace(inputs, spans=spans, patch_grid=(grid,), text_tower="question_encoder")
    edges = [
        *itertools.product(BLIP_SPANS[:4], BLIP_SPANS[4:]),
        *itertools.product(BLIP_SPANS[4:], [*BLIP_SPANS[4:], "last"]),
    ]
    blue = torch.tensor([planted.BLUE_TOKEN])
    result = information_flow(model, inputs, edges, foil=blue).isel(sample=0)
    for (source, target), name in zip(edges, result.edge.values, strict=True):
        layer = None
        if source in ("image", "image.object") and target == "asking":
            layer = planted.LAYER
        elif (source, target) == ("asking", "last"):
            layer = planted.DECODER_LAYER
        change = result.change.sel(edge=name, metric="logit_difference").values
        lost = -float(result.base.sel(metric="logit_difference"))
        assert lost < -1
        assert change == pytest.approx([lost if own == layer else 0 for own in range(planted.N_LAYERS)], abs=1e-3), name
        kind = "cross_attn" if target == "last" or source.startswith("image") else "attn"
        tower = "answer_decoder" if target == "last" else "question_encoder"
        assert result.attention.sel(edge=name).item() == f"{tower}.blocks.*.{kind}"


# Identities -----------------------------------------------------------------------------------------------------------


def test_without_any_way_from_the_image_pictures_do_not_matter(llava, blip, samples):
    one = samples[0]
    other = replace(one, id="other", image=samples[1].image, regions=samples[1].regions)
    ways = ((llava, [("image", "question + rest + last")]), (blip, [("image", "question + rest")]))
    for model, edges in ways:
        layers = {"all": (0, model.get_submodule(model.text_towers[-1]).config.n_layers - 1)}
        found = information_flow(model, [one, other], edges, layers=layers, scored="given", metrics=["log_probability"])
        assert abs(found.base.diff("sample")).item() > 1
        assert abs(found.blocked.diff("sample")).item() < 1e-5
        own = [with_picture_spans(prepared(model, sample)) for sample in (one, other)]
        with torch.no_grad():
            cut = [
                model.patch(inputs, route(model, inputs, edges[0]).blocked(range(layers["all"][1] + 1)))
                for inputs in own
            ]
        assert torch.equal(cut[0][:, -1], cut[1][:, -1])


@torch.no_grad()
def test_a_causal_tower_never_reads_what_comes_later(llava, eager_llava, samples):
    edges = [("question", "image"), ("last", "question"), ("last", "image"), ("subject", "image.object")]
    result = information_flow(llava, samples[:2], edges)
    assert result.change.notnull().all()
    assert abs(result.change).max() < 1e-5
    inputs = with_picture_spans(prepared(eager_llava, samples[0]))
    edits = route(eager_llava, inputs, ("last", "question")).blocked(range(5))
    assert torch.equal(eager_llava.patch(inputs, edits), eager_llava(inputs))


@torch.no_grad()
def test_an_empty_edge_changes_nothing(eager_llava, blip, samples):
    for model, edge in ((eager_llava, ("image", "last")), (blip, ("image", "question"))):
        inputs = with_picture_spans(prepared(model, samples[0]))
        whole = route(model, inputs, edge)
        for end in ("source", "target"):
            empty = replace(whole, **{end: Span(getattr(whole, end).tower, ((),))})
            logits = model.patch(inputs, empty.blocked(range(whole.n_layers)))
            assert torch.equal(logits, model(inputs))


@torch.no_grad()
def test_cells_are_knockouts_by_hand(blip, samples):
    sample = samples[0]
    result = information_flow(blip, sample, [("image.object", "question")], width=2, scored="given").isel(sample=0)
    inputs = prepared(blip, sample)
    answer, foil = (blip.processor.tokenizer.convert_tokens_to_ids([word]) for word in (sample.answer, sample.foil))
    metrics = {
        "probability": Probability(torch.tensor(answer)),
        "logit_difference": LogitDifference(torch.tensor(answer), torch.tensor(foil)),
    }
    assert (result.answer.item(), result.foil.item()) == (sample.answer, sample.foil)
    keys = inputs.positions_in(sample.regions["object"])
    for layer in range(4):
        reach = [own for own in (layer - 1, layer) if own >= 0]
        assert (result.first_layer.values[0, layer], result.last_layer.values[0, layer]) == (reach[0], reach[-1])
        edits = [
            BlockAttention(f"question_encoder.blocks.{own}.cross_attn", positions="question", keys=keys)
            for own in reach
        ]
        logits = blip.patch(inputs, edits)
        for name, metric in metrics.items():
            cell = result.sel(metric=name).isel(edge=0, layer=layer)
            assert cell.blocked.item() == pytest.approx(metric(logits).item(), abs=1e-5)
            assert cell.base.item() == pytest.approx(metric(blip(inputs)).item(), abs=1e-5)
            assert cell.change.item() == pytest.approx(cell.blocked.item() - cell.base.item())
        assert result.kept[0, layer].item() == (logits[:, -1].argmax(-1).item() == answer[0])
    probability = result.sel(metric="probability")
    by_hand = 100 * (probability.blocked / probability.base - 1)
    assert np.allclose(result.relative, by_hand.transpose("edge", "layer"))


def test_without_edges_the_papers_are_taken(llava, blip, samples):
    assert information_flow(llava, samples[:1], layers=[(0, 4)]).edge.size == len(EDGES)
    edges = information_flow(blip, samples[:1], layers=[(0, 3)]).edge.values
    assert len(edges) == len(EDGES) - 1
    assert "image → last" not in edges


def test_groups_of_layers_are_windows_that_are_given(llava, samples):
    edges = [("image.object", "last"), ("question", "last")]
    windows = information_flow(llava, samples[:2], edges, width=3)
    groups = information_flow(llava, samples[:2], edges, layers=[(0, 1), (0, 2), (1, 3)])
    assert groups.layer.values.tolist() == ["0–1", "0–2", "1–3"]
    assert np.allclose(groups.blocked, windows.blocked.isel(layer=[0, 1, 2]), atol=1e-5)
    radius = information_flow(llava, samples[:1], edges, width=2, convention="radius")
    every = information_flow(llava, samples[:1], edges, layers={"all": (0, 4)})
    assert np.allclose(radius.blocked.isel(layer=2), every.blocked.sel(layer="all"), atol=1e-5)
    assert json.loads(every.attrs["layers"]) == {"all": [0, 4]}


def test_neos_groups():
    """Of 32 layers, those that the paper gives."""
    groups = {"early": (0, 9), "early-mid": (5, 14), "mid": (11, 20), "mid-late": (15, 24), "late": (21, 31)}
    assert layer_groups(32) == {**groups, "all": (0, 31)}
    for depth in range(1, 50):
        assert all(0 <= first <= last < depth for first, last in layer_groups(depth).values())
        assert layer_groups(depth)["late"][1] == depth - 1


def test_eager_and_fused_attention_agree(llava, eager_llava, samples):
    edges = [("image.object", "last"), ("question", "last"), ("image", "question")]
    fused, eager = (information_flow(model, samples[:2], edges) for model in (llava, eager_llava))
    assert (fused.attrs["attention"], eager.attrs["attention"]) == ("sdpa", "eager")
    assert np.allclose(eager.blocked, fused.blocked, atol=1e-4)
    assert abs(eager.relative).max() > 50


def test_rows_of_a_batch_are_as_alone(llava, samples):
    pair = samples[:2]
    inputs = llava.prepare([one.picture() for one in pair], [one.question for one in pair])
    edges = [("image", "last"), ("question", "last"), ("rest", "last")]
    together = information_flow(llava, inputs, edges, metrics=["probability"])
    alone = information_flow(llava, pair, edges, metrics=["probability"])
    assert np.allclose(together.blocked, alone.blocked, atol=1e-5)
    assert together.answer.values.tolist() == alone.answer.values.tolist()


def test_a_vanished_probability_has_no_relative_change():
    model = planted_model()
    with torch.no_grad():
        model.language_model.unembed.weight *= 1000
    inputs = prepared(model, planted_sample("red"))
    blue = torch.tensor([planted_llava.BLUE_TOKEN])
    result = information_flow(model, inputs, [("image", "last"), ("asking", "last")], answer=blue)
    assert result.base.sel(metric="probability").item() == 0
    assert result.relative.isnull().all()
    assert result.attrs["n_undefined"] == 2 * planted_llava.N_LAYERS
    assert result.change.sel(metric="logit_difference").notnull().all()


def test_signatures_hold(llava, blip, samples, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", False)
    for model in (llava, blip):
        result = information_flow(model, samples[:1], [("image", "question"), ("question", "last")])
        assert result.blocked.dims == ("metric", "sample", "edge", "layer")
        assert result.noise_floor.max() < 1e-4


# Names ----------------------------------------------------------------------------------------------------------------


def test_more_names_for_edges(llava, samples):
    """Controls of equal size, and parts that grow, are spans made of each sample."""
    spans = {"control": RandomTokens(avoid=True), "around": ObjectTokens(dilate=1)}
    result = information_flow(
        llava, samples[:4], [("image.object", "last"), ("control", "last"), ("around", "last")], spans=spans
    )
    sizes = result.n_source.transpose("edge", "sample").values
    assert (sizes[0] == sizes[1]).all()
    assert (sizes[2] > sizes[0]).all()
    worst = result.relative.sel(layer=1).mean("sample").values
    assert worst[0] < -50 < -5 < worst[1]
    assert worst[2] < -50


def test_a_picture_in_tiles():
    """LLaVA-NeXT: the object is in the whole picture and in its tiles; newlines are no part of what is left."""
    model = tiny_llava(tiles=True)
    question = "what is the red square ?"
    sample = Sample("tiles", noise(60, 120), question, spans={"subject": (16, 22)}, regions={"object": (5, 5, 40, 30)})
    edges = [("image", "last"), ("image.object", "last"), ("image - image.object", "last"), ("newline", "last")]
    result = information_flow(model, sample, edges).isel(sample=0)
    inputs = with_picture_spans(prepared(model, sample))
    parts = [inputs.spans[name][0] for name in ("image", "image.object", "newline")]
    image, own, newlines = map(len, parts)
    assert result.n_source.values.tolist() == [image, own, image - own - newlines, newlines]
    assert {inputs.patch_grid[0].places[parts[0].index(position)].tile > 0 for position in parts[1]} == {False, True}
    assert (abs(result.change.sel(metric="logit_difference")) > 0).all()


def test_counts_tell_what_is_blocked(blip, samples):
    result = information_flow(blip, samples[:1], [("image", "rest"), ("image - image.object", "question")])
    assert result.n_source.values.tolist() == [[37, 36 - result_of_object(blip, samples[0])]]
    assert result.n_target.values.tolist() == [[2, 6]]


def result_of_object(model, sample) -> int:
    return len(prepared(model, sample).positions("image.object")[0])


# What cannot be done --------------------------------------------------------------------------------------------------


def test_a_window_wider_than_the_tower_is_an_error(llava, samples):
    with pytest.raises(ValueError, match="wider than the tower, which has 5"):
        information_flow(llava, samples, [("question", "last")], width=6)


@pytest.mark.parametrize("layers", [[(0, 5)], {"early": (-1, 2)}, {"late": (3, 2)}, {}])
def test_groups_that_a_tower_lacks_are_an_error(llava, samples, layers):
    with pytest.raises(ValueError, match="0 to 4|no groups"):
        information_flow(llava, samples[:1], [("question", "last")], layers=layers)


def test_groups_and_windows_exclude_each_other(llava, samples):
    with pytest.raises(ValueError, match="groups or in windows"):
        information_flow(llava, samples[:1], [("question", "last")], layers=[(0, 1)], width=3)


@pytest.mark.parametrize("edge", [("image", "last"), ("last", "question"), ("question", "image")])
def test_where_no_attention_leads_is_an_error(blip, samples, edge):
    with pytest.raises(ValueError, match="no attention leads from"):
        information_flow(blip, samples, [edge])


@pytest.mark.parametrize("edges", [[], ("image", "last"), ["image"], [("image", "last", "last")], [("image", 3)]])
def test_what_is_no_edge_is_an_error(llava, samples, edges):
    with pytest.raises(ValueError, match="pairs"):
        information_flow(llava, samples, edges)


def test_an_edge_twice_is_an_error(llava, samples):
    with pytest.raises(ValueError, match="given twice"):
        information_flow(llava, samples, [("image", "last")] * 2)


def test_a_misspelt_span_is_an_error_that_names_it(llava, samples):
    with pytest.raises(ValueError, match="none of 2 samples.*'qestion' does not occur"):
        information_flow(llava, samples[:2], [("qestion", "last")])


def test_samples_that_lack_something_are_dropped_by_name(llava, samples):
    good, *others = samples[:5]
    no_region = replace(others[0], regions={})
    outside = replace(others[1], regions={"object": (50, 50, 97, 90)})
    gone = replace(others[2], image="no/such/picture.png")
    whole = replace(others[3], regions={"object": (0, 0, 96, 96)})
    edges = [("image.object", "last"), ("image - image.object", "last")]
    result = information_flow(llava, [good, no_region, outside, gone, whole], edges)
    assert result.sample.values.tolist() == [good.id]
    assert dropped(result) == [
        (no_region.id, "an edge without tokens"),
        (outside.id, "a region that does not fit"),
        (gone.id, "a picture that cannot be read"),
        (whole.id, "an edge without tokens"),
    ]
    for bad, message in (
        (outside, "reaches out of the picture"),
        (whole, "nothing is left of 'image.seen - image.obj"),
    ):
        with pytest.raises(SampleError, match=message):
            information_flow(llava, bad, edges)


def test_an_end_without_tokens_is_no_zero(llava, samples):
    spans = {"nobody": lambda model, inputs: Span("language_model", ((),))}
    for edge in (("nobody", "last"), ("image", "nobody")):
        with pytest.raises(SampleError, match="'nobody' has no tokens"):
            information_flow(llava, samples[0], [edge], spans=spans)
    with pytest.raises(ValueError, match="none of 2 samples.*'nobody' has no tokens"):
        information_flow(llava, samples[:2], [("nobody", "last")], spans=spans)


def test_an_object_that_fills_the_picture_is_all_patches(llava, samples):
    whole = replace(samples[0], regions={"object": (0, 0, 96, 96)})
    result = information_flow(llava, whole, [("image.object", "last"), ("image", "last")])
    assert result.n_source.values.tolist() == [[36, 36]]
    assert np.allclose(result.blocked.isel(edge=0), result.blocked.isel(edge=1))


def test_a_name_that_has_a_meaning_is_not_for_a_region(llava, samples):
    taken = replace(samples[0], regions={"seen": (0, 0, 10, 10)})
    with pytest.raises(SampleError, match="a meaning of its own"):
        information_flow(llava, taken, [("image", "last")])


# Findings -------------------------------------------------------------------------------------------------------------


def test_object_patches_carry_the_answer_and_others_do_not(llava, blip):
    """Of 100 pictures: -81 % and 0.0 % in toy-llava, -55 % and 0.0 % in toy-blip-vqa."""
    samples = shapes(12, seed=7, kinds=COLOR)
    for model, target, layer in ((llava, "last", 1), (blip, "question", 3)):
        edges = [("image.object", target), ("image - image.object", target)]
        result = information_flow(model, samples, edges, scored="given")
        assert result.correct.all()
        own, other = result.relative.mean("sample").transpose("edge", "layer").values
        assert own.argmin() == layer
        assert own[layer] < -35
        assert abs(other[layer]) < 1
        assert other.min() > -8
        assert np.delete(own, layer).min() > -1
        kept = result.kept.mean("sample").transpose("edge", "layer").values
        assert kept[0, layer] < 0.7
        assert kept[1].min() > 0.85
        assert np.delete(kept[0], layer).min() == 1


def test_in_toy_llava_the_question_speaks_before_the_picture(llava):
    """The word reaches the last position in layer 0, and the picture in layer 1; nothing passes through the question's
    tokens, or through the rest of the prompt."""
    edges = [("subject", "last"), ("image", "last"), ("image", "question"), ("image", "rest"), ("rest", "last")]
    result = information_flow(llava, shapes(12, seed=7, kinds=COLOR), edges, scored="given")
    subject, image, *closed = result.relative.mean("sample").transpose("edge", "layer").values
    assert subject[0] < -35 < -1 < subject[1:].min()
    assert image[1] < -50 < -1 < np.delete(image, 1).min()
    assert abs(np.stack(closed)).max() < 1


def test_scoring_its_own_answer_is_scoring_the_given_one_where_it_is_right(llava, samples):
    edges = [("image", "last")]
    own, given = (information_flow(llava, Samples(samples[:3]), edges, scored=how) for how in ("own", "given"))
    assert np.allclose(own.relative, given.relative)
    assert own.correct.all()
    wrong = replace(samples[0], answer="star", foil=None)
    assert not information_flow(llava, wrong, edges).correct.item()


def test_blocking_is_an_edit_of_a_run_that_may_be_edited_otherwise(llava, samples):
    """An edge's edits are edits like any others: a sweep takes them together with some."""
    inputs = with_picture_spans(prepared(llava, samples[0]))
    edge = route(llava, inputs, ("image.object", "last"))
    halved = Scale("language_model.blocks.4.hook_mlp_out", 0.5)
    metric = Probability(llava(inputs)[:, -1].argmax(-1))
    (found,) = sweep(llava, inputs, [[halved, *edge.blocked([1])]], metric, progress=False)
    assert found.item() == pytest.approx(metric(llava.patch(inputs, [halved, *edge.blocked([1])])).item(), abs=1e-6)

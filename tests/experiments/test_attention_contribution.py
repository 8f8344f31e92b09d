"""What attention carries: against a loop over heads and positions, as a sum, in the planted circuit, as a predictor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm import HookedVLM, results
from hooked_vlm.data import Sample, SampleError, shapes
from hooked_vlm.experiments.attention_contribution import (
    attention_contribution,
    contributions,
    predict_correctness,
)
from hooked_vlm.experiments.parts.cases import prepared
from hooked_vlm.inputs import SpanError
from hooked_vlm.plots.constraint import contribution_figure
from hooked_vlm.statistics import auroc
from tests import llava_processors
from tests.experiments import planted_mlp as planted
from tests.test_plots import check_legible

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

ASKED = {"prompt": "{question}"}


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def blip():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture(scope="module")
def grouped():
    """A tiny LLaVA whose query heads share keys and values."""
    model = llava_processors.model("words", chat=llava_processors.CHAT)
    assert model.language_model.config.n_kv_heads < model.language_model.config.n_heads
    return model


def by_loop(model, inputs, name, row, target):
    """``[k h d_model]``: what each head writes of each position, one product at a time."""
    attention = model.get_submodule(name)
    _, cache = model.run_with_cache(inputs, names_filter=[f"{name}.hook_v", f"{name}.hook_pattern"])
    pattern, v = cache[f"{name}.hook_pattern"][row], cache[f"{name}.hook_v"][row]
    group = attention.n_heads // attention.n_kv_heads
    written = [
        [
            pattern[head, target, key] * (v[key, head // group] @ attention.W_O[head])
            for head in range(attention.n_heads)
        ]
        for key in range(pattern.shape[-1])
    ]
    return torch.stack([torch.stack(heads) for heads in written])


CASES = [
    ("llava", "language_model", "attn", "what color is the circle ?", "circle", "last"),
    ("grouped", "language_model", "attn", "what color is the red circle ?", "red circle", "last"),
    ("blip", "question_encoder", "attn", "what color is the circle ?", "circle", "color"),
    ("blip", "question_encoder", "cross_attn", "what color is the circle ?", "image", "circle"),
    ("blip", "answer_decoder", "cross_attn", "what color is the circle ?", "circle", "last"),
]


@torch.no_grad()
@pytest.mark.parametrize(("which", "tower", "site", "question", "source", "target"), CASES)
def test_it_is_the_norm_of_what_each_position_writes(request, which, tower, site, question, source, target):
    model = request.getfixturevalue(which)
    inputs = model.prepare(shapes(1, seed=7)[0].picture(), question)
    found = attention_contribution(model, inputs, source, target)
    assert found.reader.item() == f"{tower}.{site}"
    (place,) = inputs.positions(target)[0]
    last = model.get_submodule(tower).config.n_layers - 1
    for layer in (0, last):
        written = by_loop(model, inputs, f"{tower}.blocks.{layer}.{site}", 0, place)
        part = found.isel(sample=0, tower=0).sel(layer=layer)
        assert np.allclose(part.contribution, written.sum(1).norm(dim=-1), atol=1e-5)
        assert np.allclose(part.head_contribution, written.norm(dim=-1).T, atol=1e-5)
        keys = list(inputs.positions(source)[0])
        assert np.allclose(found.from_source.isel(sample=0).sel(layer=layer), written.sum(1).norm(dim=-1)[keys].sum())
        of_heads = written.norm(dim=-1)[keys].sum(0)
        assert np.allclose(found.head_from_source.isel(sample=0).sel(layer=layer), of_heads, atol=1e-5)
    labels = model.position_labels(inputs, inputs.positions(source).tower)[0]
    assert found.token.values[0, 0].tolist() == labels
    assert float(found.from_source.min()) > 0


@torch.no_grad()
@pytest.mark.parametrize("which", ["llava", "grouped", "blip"])
def test_all_positions_write_what_attention_adds(request, which):
    """The vectors, not their norms, sum with the bias to the layer's output at the target."""
    model = request.getfixturevalue(which)
    inputs = model.prepare(shapes(1, seed=7)[0].picture(), "what color is the circle ?")
    tower = inputs.text_tower
    names = {"attn": "attn_out"} | ({"cross_attn": "cross_attn_out"} if which == "blip" else {})
    for site, out in names.items():
        for layer in range(model.get_submodule(tower).config.n_layers):
            name = f"{tower}.blocks.{layer}.{site}"
            wanted = [f"{name}.hook_v", f"{name}.hook_pattern", f"{tower}.blocks.{layer}.hook_{out}"]
            _, cache = model.run_with_cache(inputs, names_filter=wanted)
            attention = model.get_submodule(name)
            written, norms = contributions(attention, cache[wanted[1]][0], cache[wanted[0]][0])
            bias = 0 if attention.b_O is None else attention.b_O
            assert torch.allclose(written.sum(1) + bias, cache[wanted[2]][0], atol=1e-4)
            assert norms.shape == (attention.n_heads, *written.shape[:2])


def test_later_positions_write_nothing(llava):
    inputs = llava.prepare(shapes(1, seed=7)[0].picture(), "what color is the circle ?")
    found = attention_contribution(llava, inputs, "circle", "color")
    (target,) = inputs.positions("color")[0]
    later = found.position.values > target
    assert (found.contribution.values[..., later] == 0).all()
    assert (found.contribution.values[..., ~later] > 0).all()
    assert (found.from_source == 0).all()


def test_several_targets_are_summed(blip):
    inputs = blip.prepare(shapes(1, seed=7)[0].picture(), "what color is the red circle ?")
    both = attention_contribution(blip, inputs, "image", "red circle")
    parts = [attention_contribution(blip, inputs, "image", word) for word in ("red", "circle")]
    for name in ("contribution", "head_contribution", "from_source", "head_from_source"):
        assert np.allclose(both[name], parts[0][name] + parts[1][name], atol=1e-5)


def test_both_ways_to_attend_give_the_same(llava):
    inputs = llava.prepare(shapes(1, seed=7)[0].picture(), "what color is the circle ?")
    before = llava.attention
    try:
        found = []
        for llava.attention in ("eager", "sdpa"):
            found.append(attention_contribution(llava, inputs, "circle"))
    finally:
        llava.attention = before
    assert np.allclose(found[0].head_contribution, found[1].head_contribution, atol=1e-5)


@pytest.mark.parametrize("which", ["llava", "blip"])
def test_samples_give_what_their_inputs_give_alone_and_in_a_batch(request, which):
    model = request.getfixturevalue(which)
    samples = shapes(3, seed=7, kinds=("exists", "shape"))
    found = attention_contribution(model, samples, "subject", **ASKED)
    together = model.prepare([one.picture() for one in samples], [one.question for one in samples])
    batched = attention_contribution(model, together, "is")
    for row, sample in enumerate(samples):
        inputs = prepared(model, sample)
        alone = attention_contribution(model, inputs, "subject")
        part = found.isel(sample=[row]).sel(position=alone.position)
        for name in ("contribution", "from_source", "confidence"):
            assert np.array_equal(part[name], alone[name])
        assert not found.contribution.isel(sample=row, tower=0).sel(position=alone.position).isnull().any()
        there = batched.token.values[row, 0] != ""
        expected = attention_contribution(model, inputs, "is")
        assert np.allclose(batched.contribution.values[row, 0][:, there], expected.contribution[0, 0], atol=1e-4)
        assert np.isnan(batched.contribution.values[row, 0][:, ~there]).all()
    assert found.contribution.isnull().any()  # the shorter one's last position
    assert set(found.role.values.ravel()) >= {"subject", "is"}


# The planted circuit --------------------------------------------------------------------------------------------------


def test_only_the_planted_head_carries_the_fact():
    model = planted.planted_model()
    sample = shapes(1, seed=7, kinds=("color",))[0]
    found = attention_contribution(model, replace(sample, answer=planted.FACTS["triangle"]), "subject", **ASKED)
    layers, heads = found.from_source.values[0] > 1e-6, found.head_from_source.values[0] > 1e-6
    assert np.flatnonzero(layers).tolist() == [planted.TO_ANSWER]
    assert np.argwhere(heads).tolist() == [[planted.TO_ANSWER, planted.HEAD]]
    # Nothing else reaches the last position.
    carried = found.contribution.values[0, 0].sum(0) > 1e-6
    assert found.role.values[0, 0][carried].tolist() == ["subject"]
    assert found.right.values.tolist() == [1.0]


# As a predictor -------------------------------------------------------------------------------------------------------


def test_right_is_what_the_model_answers(blip):
    sample = shapes(1, seed=7, kinds=("color",))[0]
    others = [("right", sample.answer.upper()), ("wrong", "no"), ("unknown", None), ("foil", sample.answer)]
    samples = [replace(sample, id=name, answer=answer) for name, answer in others]
    samples[3] = replace(samples[3], foil=sample.answer)  # no reason to drop it: nothing is held against anything
    found = attention_contribution(blip, samples, "subject", **ASKED)
    assert np.array_equal(found.right, [1, 0, np.nan, 1], equal_nan=True)
    predicted = predict_correctness(found)
    assert (int(predicted.n_right), int(predicted.n_wrong)) == (2, 1)
    with torch.no_grad():
        likeliest = blip(prepared(blip, sample))[0, -1].softmax(-1).max()
    assert np.allclose(found.confidence, float(likeliest))


def made(contribution: np.ndarray, right: np.ndarray, confidence: np.ndarray) -> xr.Dataset:
    """A result with made-up numbers."""
    variables = {"from_source": (("sample", "layer"), contribution), "right": ("sample", right)}
    coords = {"layer": np.arange(contribution.shape[1])}
    return xr.Dataset(variables | {"confidence": ("sample", confidence)}, coords)


def test_a_predictor_that_knows_and_one_that_does_not():
    right = np.array([1.0, 1, 1, 0, 0, 0, np.nan])
    contribution = np.stack([right, 1 - right, np.full(7, 0.3)], 1)
    contribution[-1] = 99.0  # an unknown answer counts for nothing
    found = predict_correctness(made(contribution, right, np.array([0.9, 0.8, 0.1, 0.7, 0.2, 0.3, 0.0])))
    assert found.predictor.values.tolist() == ["confidence", "contribution", "layer 0", "layer 1", "layer 2"]
    assert found.auroc.values.tolist() == pytest.approx([6 / 9, 0.5, 1.0, 0.0, 0.5])
    assert (found.low <= found.auroc).all()
    assert (found.auroc <= found.high).all()
    assert found.low.sel(predictor="confidence") < 0.5 < found.high.sel(predictor="confidence")
    assert found.low.sel(predictor="layer 0") == found.high.sel(predictor="layer 0") == 1


def test_where_all_are_right_there_is_nothing_to_predict():
    found = predict_correctness(made(np.ones((4, 2)), np.ones(4), np.arange(4.0)))
    assert found.auroc.isnull().all()
    assert found.low.isnull().all()
    assert (int(found.n_right), int(found.n_wrong)) == (4, 0)
    with pytest.raises(ValueError, match="no sample of this result has an answer"):
        predict_correctness(made(np.ones((2, 1)), np.full(2, np.nan), np.ones(2)))


numbers = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=40)
@given(numbers)
def test_auroc_is_the_share_of_pairs_in_order(pairs):
    scores, right = np.array([score for score, _ in pairs], float), np.array([is_right for _, is_right in pairs])
    above = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for one, is_right in pairs
        if is_right
        for other, is_other_right in pairs
        if not is_other_right
    ]
    found = auroc(scores, right)
    assert found == pytest.approx(np.mean(above)) if above else np.isnan(found)
    if above:
        assert auroc(np.exp(scores), right) == found
        assert auroc(-scores, right) == pytest.approx(1 - found)
        assert auroc(scores, ~right) == pytest.approx(1 - found)


def test_the_interval_is_that_of_samples_drawn_anew():
    """The products that it is made by, against drawing and counting."""
    rng = np.random.default_rng(3)
    right = rng.random(40) < 0.6
    scores = right + rng.normal(0, 1, 40)
    found = predict_correctness(made(scores[:, None], right.astype(float), scores), resamples=400, seed=5)
    drawn = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), size=400)
    means = [auroc(np.repeat(scores, counts), np.repeat(right, counts)) for counts in drawn]
    low, high = np.nanquantile(means, [0.025, 0.975])
    assert (found.low.values[0], found.high.values[0]) == pytest.approx((low, high))


# What it cannot do, and what it leaves --------------------------------------------------------------------------------


def test_towers_that_do_not_read_each_other(blip, llava):
    sample = shapes(1, seed=7)[0]
    for source, target, message in (
        ("subject", "image", "vision_encoder does not attend to question_encoder"),
        ("image", "last", "answer_decoder does not attend to vision_encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_contribution(blip, sample, source, target, **ASKED)
    with pytest.raises(SpanError, match="'constraint' does not occur"):
        attention_contribution(llava, prepared(llava, sample))
    assert not any(point.is_hooked for model in (blip, llava) for point in model.hook_points())
    clip = llava_processors.clip_model()
    with pytest.raises(ValueError, match="HookedClip predicts no tokens"):
        attention_contribution(clip, clip.prepare(llava_processors.PICTURES[0], "a red circle"), "circle", "red")


@pytest.mark.usefixtures("checked")
def test_samples_without_the_span_are_dropped_by_name(llava):
    samples = shapes(2, seed=7)
    found = attention_contribution(llava, [samples[0], replace(samples[1], spans={})], "subject", **ASKED)
    assert found.sizes["sample"] == 1
    assert samples[1].id in found.attrs["dropped"]
    with pytest.raises(SampleError, match=samples[1].id):
        attention_contribution(llava, replace(samples[1], spans={}), "subject", **ASKED)


def test_no_hook_is_left_by_an_error(llava, monkeypatch):
    def fail(*_):
        raise RuntimeError("in the middle")

    inputs = llava.prepare(None, "what color is the circle ?")
    monkeypatch.setattr(llava.language_model.blocks[2].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        attention_contribution(llava, inputs, "circle")
    assert not any(point.is_hooked for point in llava.hook_points())


def test_it_says_how_it_was_made_and_loads_back_equal(llava, tmp_path):
    sample = Sample("text", None, "what color is the circle ?", "red", spans={"subject": (18, 24)})
    found = attention_contribution(llava, [*shapes(1, seed=7), sample], "subject", **ASKED)
    facts = {"method": "attention_contribution", "source": "subject", "target": "last", "attention": llava.attention}
    assert {name: found.attrs[name] for name in facts} == facts
    results.save(found, tmp_path / "found.nc")
    assert results.load(tmp_path / "found.nc").identical(found)


# Figures --------------------------------------------------------------------------------------------------------------


def test_the_figure_shows_each_token_and_the_picture_as_one(llava):
    samples = shapes(3, seed=7, kinds=("exists", "shape"))
    found = attention_contribution(llava, samples, "subject", **ASKED)
    figure = contribution_figure(found, sample=0, title="what the last position reads")
    shown = check_legible(figure)
    assert {
        "▸ yellow",
        "(image)",
        "object",
        "ASSISTANT:",
        "to last",
        "layer of the language model's self-attention",
    } <= shown
    rows = figure.axes[0].collections[0].get_array()
    own = found.isel(sample=0, tower=0)
    is_text = ~own.is_image & (own.token != "")
    assert np.allclose(np.delete(rows, 2, 0), own.contribution.T[is_text.values])
    assert np.allclose(rows[2], own.contribution.where(own.is_image).sum("position"))
    assert len(rows) == int(is_text.sum()) + 1

    mean = contribution_figure(found)
    assert {"▸ subject", "(image)", "is"} <= check_legible(mean)
    names = [label.get_text() for label in mean.axes[0].get_yticklabels()]
    of_words = [
        part.contribution.where(part.role == "subject").mean("position").values
        for part in (found.isel(sample=sample, tower=0) for sample in range(3))
    ]
    drawn = mean.axes[0].collections[0].get_array()
    assert np.allclose(drawn[names.index("▸ subject")], np.mean(of_words, 0))
    of_image = found.isel(tower=0).contribution.where(found.is_image.isel(tower=0)).sum("position").mean("sample")
    assert np.allclose(drawn[names.index("(image)")], of_image)


def test_some_patches_of_a_picture_are_a_row_beside_the_others(llava):
    found = attention_contribution(llava, shapes(1, seed=7), "image.object", "last", **ASKED)
    figure = contribution_figure(found, sample=0)
    assert {"▸ (image)", "(rest of image)"} <= check_legible(figure)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    drawn, own = figure.axes[0].collections[0].get_array(), found.isel(sample=0, tower=0)
    assert np.allclose(drawn[names.index("▸ (image)")], found.from_source.isel(sample=0))
    rest = own.contribution.where(own.is_image & ~own.is_source).sum("position")
    assert np.allclose(drawn[names.index("(rest of image)")], rest)


def test_a_figure_of_few_rows_and_of_what_is_not_there(blip):
    sample = shapes(1, seed=7)[0]
    found = attention_contribution(blip, sample, "image", "subject", **ASKED)
    assert {"▸ (image)", "[class]"} <= check_legible(contribution_figure(found, title="BLIP"))
    of_inputs = attention_contribution(blip, prepared(blip, sample), "image", "subject")
    assert {"▸ (image)"} <= check_legible(contribution_figure(of_inputs, sample=0))
    with pytest.raises(ValueError, match="no roles"):
        contribution_figure(of_inputs)
    with pytest.raises(ValueError, match="there is no sample 1"):
        contribution_figure(found, sample=1)

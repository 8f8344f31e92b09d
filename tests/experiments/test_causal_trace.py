"""Identities that a right causal trace satisfies (the field's cheap correctness tests), and its errors."""

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM, results, toys
from hooked_vlm.corruptions import (
    AdditiveGaussian,
    CounterfactualImage,
    CounterfactualQuestion,
    MultiplicativeGaussian,
    PixelNoise,
    Scaled,
)
from hooked_vlm.edits import Replace, edit_hooks
from hooked_vlm.experiments import causal_trace
from hooked_vlm.experiments.parts.sites import site_name, window
from hooked_vlm.metrics import Probability

SAMPLE = toys.demo_sample()
CORRUPTIONS = [
    AdditiveGaussian(draws=3),
    MultiplicativeGaussian(draws=2),
    Scaled(0.5),
    PixelNoise(draws=2),
    CounterfactualImage(SAMPLE.sip.image),
    CounterfactualQuestion(SAMPLE.str_.question),
]
NULL_CORRUPTIONS = [
    AdditiveGaussian(std=0.0, draws=2),
    MultiplicativeGaussian(std=0.0, draws=1),
    Scaled(1.0),
    PixelNoise(std=0.0, draws=1),
    CounterfactualImage(SAMPLE.image),
    CounterfactualQuestion(SAMPLE.question),
]


def kind(corruption) -> str:
    return type(corruption).__name__


@pytest.fixture(scope="module")
def model():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture(scope="module")
def clean(model):
    return model.prepare(SAMPLE.image, SAMPLE.question)


@pytest.fixture(scope="module", params=CORRUPTIONS, ids=kind)
def traced(model, clean, request):
    result = causal_trace(model, clean, request.param, sites=["resid", "attn"], all_positions=True)
    return request.param, result.isel(sample=0)


def close(value, to) -> bool:
    return np.allclose(np.asarray(value, float), np.asarray(to, float), atol=1e-5)


def test_last_decoder_stream_gives_the_clean_run(traced):
    _, result = traced
    cell = result.sel(tower="answer_decoder", site="resid", position=0).isel(layer=-1)
    assert close(cell.patched, result.clean)
    assert bool(cell.identity)


def test_all_tokens_of_the_last_encoder_stream_give_the_clean_run(traced):
    _, result = traced
    cell = result.sel(tower="question_encoder", site="resid", position=-1).isel(layer=-1)
    assert close(cell.patched, result.clean)
    assert bool(cell.identity)


def test_identities_are_only_those(traced):
    """Under a corrupted question alone, all tokens of any layer's stream are all that differs, too."""
    corruption, result = traced
    n_layers = result.sizes["layer"]
    assert int(result.identity.sum()) == (1 + n_layers if isinstance(corruption, CounterfactualQuestion) else 2)
    assert float(abs(result.patched - result.clean).where(result.identity).max()) < 1e-5


def test_first_self_attention_has_not_seen_the_image(traced):
    """Under corruption of the image alone, layer 0's self-attention output is the same in both runs."""
    corruption, result = traced
    cells = result.sel(tower="question_encoder", site="attn", layer=0).patched.transpose("metric", "position")
    if isinstance(corruption, CounterfactualQuestion):
        assert not close(cells, result.corrupted.values[:, None])
    else:
        assert close(cells, result.corrupted.values[:, None])


def test_effect_and_normalized_are_what_they_say(traced):
    _, result = traced
    assert close(result.effect.fillna(0), (result.patched - result.corrupted).fillna(0))
    known = result.normalized.notnull()
    by_hand = (result.patched - result.corrupted) / (result.clean - result.corrupted)
    assert np.allclose(result.normalized.values[known], by_hand.values[known])


def test_noising_is_the_other_way_round(model, clean):
    corruption = CounterfactualImage(SAMPLE.sip.image)
    result = causal_trace(model, clean, corruption, sites=["resid", "attn"], direction="noising").isel(sample=0)
    last = result.sel(tower="answer_decoder", site="resid", position=0).isel(layer=-1)
    assert close(last.patched, result.corrupted)
    first = result.sel(tower="question_encoder", site="attn", layer=0)
    assert close(first.patched.transpose("metric", "position"), result.clean.values[:, None])
    assert close(last.effect, result.corrupted - result.clean)


@pytest.mark.parametrize("corruption", NULL_CORRUPTIONS, ids=kind)
def test_no_corruption_no_effect(model, clean, corruption):
    result = causal_trace(model, clean, corruption, sites=["cross_attn"]).isel(sample=0)
    assert close(result.clean, result.corrupted)
    present = result.patched.notnull()
    assert close(result.patched.where(present, 0), result.clean.where(present, 0))
    # 0 / 0 is undefined, not nothing: NaN, and counted.
    assert result.normalized.isnull().all()
    assert result.attrs["n_undefined"] == int(present.sum())


def test_cells_are_patches(model, clean):
    """A cell of the grid is one patched forward, done by hand."""
    corruption = AdditiveGaussian(draws=3)
    result = causal_trace(model, clean, corruption, sites=["mlp"]).isel(sample=0).sel(metric="probability")
    corrupted = corruption(model, clean)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        answer = model(clean)[:, -1].argmax(-1)
        for layer, position in ((0, 1), (2, 5)):
            edit = Replace(site_name(model, "question_encoder", "mlp", layer), cache, positions=position)
            patched = model.patch(corrupted.inputs, [*corrupted.edits, edit])
            score = Probability(answer.repeat(3))(patched).mean()
            assert close(
                result.patched.sel(tower="question_encoder", site="mlp", layer=layer, position=position), score
            )


def test_same_seed_same_grid_other_seed_other_grid(model, clean):
    def grid(seed):
        corruption = AdditiveGaussian(draws=2, seed=seed)
        return causal_trace(model, clean, corruption, sites=["resid"], towers=["answer_decoder"]).patched.values

    assert np.array_equal(grid(1), grid(1), equal_nan=True)
    assert not np.array_equal(grid(1), grid(2), equal_nan=True)


def test_rows_of_a_batch_are_traced_as_if_alone(model):
    samples = [toys.sample(11, index, kinds=("color",)) for index in range(2)] + [toys.sample(11, 5, kinds=("count",))]
    corruption = Scaled(0.4)
    together = model.prepare([sample.image for sample in samples], [sample.question for sample in samples])
    batch = causal_trace(model, together, corruption, sites=["cross_attn"])
    for row, sample in enumerate(samples):
        alone = causal_trace(model, model.prepare(sample.image, sample.question), corruption, sites=["cross_attn"])
        part, alone = results.tower(batch, "question_encoder", row), results.tower(alone, "question_encoder")
        assert list(part.token.values) == list(alone.token.values)
        assert close(part.patched, alone.patched)


def test_windows_restore_several_layers_together(model, clean):
    corruption = Scaled(0.3)
    n_layers = model.question_encoder.config.n_layers
    wide = causal_trace(model, clean, corruption, sites=["mlp"], towers=["question_encoder"], width=3).isel(sample=0)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        run = corruption(model, clean)
        answer = model(clean)[:, -1].argmax(-1)
        names = [site_name(model, "question_encoder", "mlp", layer) for layer in range(0, 3)]
        edits = [*run.edits, *(Replace(name, cache, positions=4) for name in names)]
        by_hand = Probability(answer)(model.patch(run.inputs, edits))
    cell = wide.sel(tower="question_encoder", site="mlp", layer=1, position=4, metric="probability")
    assert close(cell.patched, by_hand)
    assert n_layers > 3


@pytest.mark.parametrize(
    ("width", "convention", "layers"),
    [
        (1, "centered", [5]),
        (3, "centered", [4, 5, 6]),
        (4, "centered", [3, 4, 5, 6]),
        (1, "radius", [5]),
        (2, "radius", [3, 4, 5, 6, 7]),
    ],
)
def test_window_conventions(width, convention, layers):
    assert list(window(5, width, 12, convention)) == layers
    assert list(window(0, width, 12, convention)) == [layer - 5 for layer in layers if layer >= 5]
    assert list(window(11, width, 12, convention)) == [layer + 6 for layer in layers if layer <= 5]


def test_result_says_how_it_was_made_and_loads_back_equal(model, clean, tmp_path):
    result = causal_trace(model, clean, AdditiveGaussian(std=2.0, draws=2, seed=7), sites=["attn"], width=2)
    for name, value in {
        "method": "causal_trace",
        "corruption": "AdditiveGaussian",
        "std": 2.0,
        "draws": 2,
        "seed": 7,
        "direction": "denoising",
        "window": 2,
        "model": "toy-blip-vqa",
        "dtype": "float32",
        "attention": "eager",
    }.items():
        assert result.attrs[name] == value
    results.save(result, tmp_path / "trace.nc")
    assert results.load(tmp_path / "trace.nc").identical(result)


def test_no_hook_is_left(model, clean):
    causal_trace(model, clean, AdditiveGaussian(draws=1), sites=["resid"])
    assert not any(point.is_hooked for point in model.hook_points())
    with pytest.raises(ValueError, match="no tower 'text_encoder'; this model has vision_encoder"):
        causal_trace(model, clean, Scaled(0.5), towers=["text_encoder"])
    assert not any(point.is_hooked for point in model.hook_points())


def test_states_before_the_image_is_read_do_not_matter_to_base_edits(model, clean):
    """The corrupted run of the trace is the run with the base edits alone."""
    corruption = AdditiveGaussian(draws=2)
    result = causal_trace(model, clean, corruption, sites=["resid"], towers=["answer_decoder"]).isel(sample=0)
    run = corruption(model, clean)
    with torch.no_grad():
        logits = model.run_with_hooks(run.inputs, fwd_hooks=edit_hooks(model, run.inputs, run.edits))
        answer = model(clean)[:, -1].argmax(-1)
    assert close(result.corrupted.sel(metric="probability"), Probability(answer.repeat(2))(logits).mean())


def test_bad_arguments(model, clean):
    for arguments, message in (
        ({"direction": "sideways"}, "direction"),
        ({"sites": ["banana"]}, "banana"),
        ({"towers": ["vision_encoder"], "sites": ["cross_attn"]}, "no site 'cross_attn'"),
        ({"width": 0}, "at least one layer"),
        ({"convention": "diagonal"}, "diagonal"),
    ):
        # The suite's own type checks may speak first; either names the argument.
        with pytest.raises((ValueError, TypeError), match=message):
            causal_trace(model, clean, Scaled(0.5), **arguments)

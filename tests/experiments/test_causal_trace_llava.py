"""Identities that a right causal trace of a LLaVA satisfies: one causal stream, with the image among its tokens."""

import jaxtyping
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
from hooked_vlm.edits import Replace
from hooked_vlm.experiments import causal_trace
from hooked_vlm.experiments.parts.sites import site_name, window
from hooked_vlm.metrics import LogitDifference, Probability

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

SAMPLE = toys.demo_sample()
TOWER, SITES, N_LAYERS = "language_model", ("resid", "attn", "mlp"), 5
QUESTION = SAMPLE.question.split()
IMAGE = range(2, 38)
FIRST_WORD = 39  # after <s>, USER:, the patches and a newline
LAST = FIRST_WORD + len(QUESTION)
ALL, ALL_OF_IMAGE = -1, -2
SIP, STR = CounterfactualImage(SAMPLE.sip.image), CounterfactualQuestion(SAMPLE.str_.question)
NULL_CORRUPTIONS = [
    AdditiveGaussian(std=0.0, draws=2),
    MultiplicativeGaussian(std=0.0, draws=1),
    Scaled(1.0),
    PixelNoise(std=0.0, draws=2),
    CounterfactualImage(SAMPLE.image),
    CounterfactualQuestion(SAMPLE.question),
]


def kind(corruption) -> str:
    return type(corruption).__name__


@pytest.fixture(scope="module")
def model():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def clean(model):
    return model.prepare(SAMPLE.image, SAMPLE.question)


@pytest.fixture(scope="module")
def whole(model, clean):
    return causal_trace(model, clean, SIP, all_positions=True)


@pytest.fixture(scope="module")
def sip(whole):
    return whole.isel(sample=0)


@pytest.fixture(scope="module")
def str_(model, clean):
    """Without single patches, which are in ``(image)``."""
    return causal_trace(model, clean, STR, which="text", all_positions=True).isel(sample=0)


@pytest.fixture(params=["sip", "str_"])
def traced(request):
    return request.getfixturevalue(request.param)


def cells(result, **where):
    """The patched scores, metrics first."""
    return result.patched.sel(tower=TOWER, **where).transpose("metric", ...).values


def close(value, to, atol: float = 1e-5) -> bool:
    value, to = np.asarray(value, float), np.asarray(to, float)
    return np.allclose(value, to.reshape(to.shape + (1,) * (value.ndim - to.ndim)), atol=atol)


@torch.no_grad()
def score(logits, answer, foil) -> list[float]:
    draws = len(logits) // len(answer)
    metrics = Probability(answer.repeat(draws)), LogitDifference(answer.repeat(draws), foil.repeat(draws))
    return [float(metric(logits).mean()) for metric in metrics]


@torch.no_grad()
def ends(model, clean, run) -> tuple[torch.Tensor, torch.Tensor]:
    """What is scored: the clean run's likeliest token, and the corrupted run's likeliest other."""
    answer = model(clean)[:, -1].argmax(-1)
    probabilities = model.patch(run.inputs, run.edits)[:, -1].softmax(-1).mean(0, keepdim=True)
    return answer, probabilities.scatter(1, answer[:, None], -1).argmax(-1)


# Identities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", NULL_CORRUPTIONS, ids=kind)
def test_clean_states_in_the_clean_run_change_nothing(model, clean, corruption):
    result = causal_trace(model, clean, corruption, sites=["mlp"], which="text", all_positions=True).isel(sample=0)
    assert close(result.corrupted, result.clean)
    assert close(cells(result), result.clean)
    # 0 / 0 is undefined, not nothing: NaN, and counted.
    assert result.normalized.isnull().all()
    assert result.attrs["n_undefined"] == result.patched.size


def test_all_positions_of_any_layers_stream_give_the_clean_run(traced):
    assert close(cells(traced, site="resid", position=ALL), traced.clean)


def test_the_last_stream_at_the_last_position_gives_the_clean_run(traced):
    assert close(cells(traced, site="resid", position=LAST, layer=N_LAYERS - 1), traced.clean)


def test_identities_are_only_those(traced):
    marked = traced.identity.sel(tower=TOWER)
    assert marked.sel(site="resid", position=ALL).all()
    assert marked.sel(site="resid", position=LAST, layer=N_LAYERS - 1)
    assert int(marked.sum()) == N_LAYERS + 1


def test_of_the_last_layer_only_the_last_position_is_read(traced):
    others = [position for position in traced.position.values if position not in (LAST, ALL)]
    assert close(cells(traced, layer=N_LAYERS - 1, position=others), traced.corrupted, atol=1e-6)


def test_positions_before_the_image_do_not_know_of_it(sip):
    """Under corruption of the image alone, what stands before it is the same in both runs."""
    assert close(cells(sip, position=[0, 1]), sip.corrupted, atol=1e-6)


def test_positions_before_the_changed_word_do_not_know_of_it(str_):
    """Basu et al. 2024 trace the last image token under a corrupted question: nothing can be found there."""
    changed = FIRST_WORD + SAMPLE.str_.position
    before = [0, 1, *range(FIRST_WORD - 1, changed), ALL_OF_IMAGE]
    assert close(cells(str_, position=before), str_.corrupted, atol=1e-6)
    assert not close(cells(str_, site="resid", layer=0, position=changed), str_.corrupted, atol=0.1)


@torch.no_grad()
def test_all_that_block_0_reads_of_the_image_is_all_that_differs(model, clean, sip):
    run = SIP(model, clean)
    site = f"{TOWER}.blocks.0.hook_resid_pre"
    _, cache = model.run_with_cache(clean, names_filter=site)
    logits = model.patch(run.inputs, [Replace(site, cache, positions="image")])
    assert close(score(logits, *ends(model, clean, run)), sip.clean)


@torch.no_grad()
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_the_image_restored_is_the_text_spoilt(model, clean, sip, layer):
    """Clean states of the image in the corrupted run make the same stream as corrupted states of the text in the clean
    run."""
    run = SIP(model, clean)
    site = site_name(model, TOWER, "resid", layer)
    _, spoilt = model.run_with_cache(run.inputs, names_filter=site)
    text = [position for position in range(LAST + 1) if position not in IMAGE]
    logits = model.patch(clean, [Replace(site, spoilt, positions=text)])
    by_hand = score(logits, *ends(model, clean, run))
    assert close(cells(sip, site="resid", layer=layer, position=ALL_OF_IMAGE), by_hand)


@torch.no_grad()
def test_a_words_whole_contribution_is_its_embedding_and_what_its_layers_add(model, clean, str_):
    """Attention and MLP outputs of every layer bring the answer back only with the embedding that they are added to."""
    run, changed = STR(model, clean), FIRST_WORD + SAMPLE.str_.position
    sites = [f"{TOWER}.blocks.*.hook_{kind}_out" for kind in ("attn", "mlp")]
    _, cache = model.run_with_cache(clean)
    added = [Replace(site, cache, positions=changed) for site in sites]
    embedded = Replace(f"{TOWER}.hook_full_embed", cache, positions=changed)
    answer, foil = ends(model, clean, run)
    assert close(score(model.patch(run.inputs, [embedded, *added]), answer, foil), str_.clean)
    assert not close(score(model.patch(run.inputs, added), answer, foil), str_.clean, atol=1e-2)


def test_noising_is_the_other_way_round(model, clean):
    result = causal_trace(model, clean, SIP, direction="noising", sites=["resid"], which="text", all_positions=True)
    result = result.isel(sample=0)
    assert close(cells(result, site="resid", position=ALL), result.corrupted)
    assert close(cells(result, site="resid", position=LAST, layer=N_LAYERS - 1), result.corrupted)
    assert close(cells(result, position=[0, 1]), result.clean, atol=1e-6)
    assert close(result.effect, result.patched - result.clean)
    assert int(result.identity.sum()) == N_LAYERS + 1


# Cells ----------------------------------------------------------------------------------------------------------------

random = np.random.default_rng(0)
SOME_CELLS = [
    ("resid", 0, ALL_OF_IMAGE),
    ("attn", 1, ALL),
    *((SITES[random.integers(3)], int(random.integers(N_LAYERS)), int(random.integers(LAST + 1))) for _ in range(8)),
]


@torch.no_grad()
def test_cells_are_patches(model, clean, sip):
    """A cell of the grid is one patched forward, done by hand."""
    run = SIP(model, clean)
    _, cache = model.run_with_cache(clean)
    answer, foil = ends(model, clean, run)
    for site, layer, position in SOME_CELLS:
        where = {ALL: None, ALL_OF_IMAGE: "image"}.get(position, position)
        edit = Replace(site_name(model, TOWER, site, layer), cache, positions=where)
        by_hand = score(model.patch(run.inputs, [edit]), answer, foil)
        assert close(cells(sip, site=site, layer=layer, position=position), by_hand), (site, layer, position)


@torch.no_grad()
def test_cells_under_noise_are_patches(model, clean):
    corruption = AdditiveGaussian(std=2.0, draws=3)
    result = causal_trace(model, clean, corruption, sites=["resid"], which="text", all_positions=True).isel(sample=0)
    run = corruption(model, clean)
    _, cache = model.run_with_cache(clean)
    answer, foil = ends(model, clean, run)
    assert close(score(model.patch(run.inputs, run.edits), answer, foil), result.corrupted)
    for layer, position in ((0, ALL_OF_IMAGE), (1, LAST), (2, FIRST_WORD), (3, LAST)):
        where = "image" if position == ALL_OF_IMAGE else position
        edit = Replace(site_name(model, TOWER, "resid", layer), cache, positions=where)
        by_hand = score(model.patch(run.inputs, [*run.edits, edit]), answer, foil)
        assert close(cells(result, site="resid", layer=layer, position=position), by_hand), (layer, position)


@torch.no_grad()
@pytest.mark.parametrize(("width", "convention"), [(3, "centered"), (2, "centered"), (2, "radius")])
def test_windows_restore_several_layers_together(model, clean, width, convention):
    settings = {"width": width, "convention": convention, "sites": ["mlp"], "which": "text", "all_positions": True}
    result = causal_trace(model, clean, SIP, **settings).isel(sample=0)
    run = SIP(model, clean)
    _, cache = model.run_with_cache(clean)
    answer, foil = ends(model, clean, run)
    for layer, position in ((0, LAST), (3, LAST), (2, FIRST_WORD), (4, ALL_OF_IMAGE)):
        names = [site_name(model, TOWER, "mlp", own) for own in window(layer, width, N_LAYERS, convention)]
        where = "image" if position == ALL_OF_IMAGE else position
        logits = model.patch(run.inputs, [Replace(name, cache, positions=where) for name in names])
        assert close(cells(result, site="mlp", layer=layer, position=position), score(logits, answer, foil))
    assert (result.attrs["window"], result.attrs["window_convention"]) == (width, convention)


def test_wide_windows_are_identities_wherever_they_reach_the_last_layer(model, clean):
    result = causal_trace(model, clean, SIP, width=3, sites=["resid"], which="text", all_positions=True).isel(sample=0)
    marked = result.identity.sel(tower=TOWER, site="resid")
    assert marked.sel(position=LAST).values.tolist() == [False] * 3 + [True] * 2
    assert float(abs(result.patched - result.clean).where(result.identity).max()) < 1e-5


@pytest.mark.parametrize("which", ["text", "image"])
def test_some_positions_alone(model, clean, sip, which):
    part = causal_trace(model, clean, SIP, sites=["attn"], which=which).isel(sample=0)
    expected = [*IMAGE] if which == "image" else [position for position in range(LAST + 1) if position not in IMAGE]
    assert part.position.values.tolist() == expected
    assert close(cells(part, site="attn"), cells(sip, site="attn", position=expected))
    assert part.token.sel(tower=TOWER).values.tolist() == sip.token.sel(tower=TOWER, position=expected).values.tolist()
    assert ("picture" in part.coords) == (which == "image")


def test_signatures_hold(model, clean, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", False)
    causal_trace(model, clean, PixelNoise(draws=2), sites=["mlp"], which="text", width=5, all_positions=True)


def test_attention_kinds_agree_and_bfloat16_runs(model, clean):
    settings = {"sites": ["attn"], "which": "text", "all_positions": True}
    one = causal_trace(model, clean, SIP, **settings)
    eager = HookedVLM.from_pretrained("toy-llava", attention="eager")
    other = causal_trace(eager, eager.prepare(SAMPLE.image, SAMPLE.question), SIP, **settings)
    assert (one.attrs["attention"], other.attrs["attention"]) == ("sdpa", "eager")
    assert close(one.patched, other.patched, atol=1e-4)
    half = HookedVLM.from_pretrained("toy-llava", dtype=torch.bfloat16)
    rough = causal_trace(half, half.prepare(SAMPLE.image, SAMPLE.question), SIP, **settings).sel(metric="probability")
    assert rough.attrs["dtype"] == "bfloat16"
    assert close(rough.patched, one.patched.sel(metric="probability"), atol=0.1)


# What it says of itself -----------------------------------------------------------------------------------------------


def test_positions_are_named(sip):
    patches = [f"{row},{column}" for row in range(6) for column in range(6)]
    words = ["<s>", "USER:", *patches, "\\n", *QUESTION, "ASSISTANT:", "(image)", "(all)"]
    assert sip.token.sel(tower=TOWER).values.tolist() == words
    assert sip.position.values.tolist() == [*range(LAST + 1), ALL_OF_IMAGE, ALL]
    assert (str(sip.answer.values), str(sip.foil.values)) == (SAMPLE.answer, SAMPLE.sip.answer)


def test_positions_know_what_they_see(model, clean, sip):
    part = sip.sel(tower=TOWER)
    sees = part.picture.values == 0
    assert part.position.values[sees].tolist() == [*IMAGE]
    assert (part.picture.values[~sees] == -1).all()
    assert np.isnan(part.box.values[~sees]).all()
    assert part.side.values.tolist() == ["left", "top", "right", "bottom"]
    for label, box in zip(part.token.values[sees], part.box.values[sees], strict=True):
        row, column = map(int, str(label).split(","))
        assert box.tolist() == [16 * column, 16 * row, 16 * column + 16, 16 * row + 16]
    for item in SAMPLE.objects:
        (position,) = clean.positions_in(item.box).rows[0]
        left, top, right, bottom = part.box.sel(position=position).values
        assert left <= item.box[0] <= item.box[2] <= right
        assert top <= item.box[1] <= item.box[3] <= bottom


def test_the_patch_that_matters_is_the_objects(clean, sip):
    (circle,) = (item for item in SAMPLE.objects if item.shape == "circle")
    effects = sip.effect.sel(tower=TOWER, site="resid", layer=0, metric="probability", position=[*IMAGE])
    assert IMAGE[int(effects.values.argmax())] == clean.positions_in(circle.box).rows[0][0]
    assert float(effects.max()) > 0.9
    assert float(np.sort(effects.values)[-2]) < 0.1


def test_it_loads_back_equal(whole, tmp_path):
    results.save(whole, tmp_path / "trace.nc")
    assert results.load(tmp_path / "trace.nc").identical(whole)
    assert whole.to_dataframe().picture.max() == 0


def test_result_says_how_it_was_made(model, clean):
    corruption = AdditiveGaussian(std=2.0, draws=2, seed=7)
    result = causal_trace(model, clean, corruption, sites=["attn"], which="text", width=2)
    facts = {
        "method": "causal_trace",
        "corruption": "AdditiveGaussian",
        "std": 2.0,
        "draws": 2,
        "seed": 7,
        "site": "vision_encoder.hook_out",
        "direction": "denoising",
        "window": 2,
        "model": "toy-llava",
        "dtype": "float32",
        "attention": "sdpa",
        "samples_used": 1,
    }
    assert {name: result.attrs[name] for name in facts} == facts


def test_no_hook_is_left(model, clean):
    causal_trace(model, clean, AdditiveGaussian(draws=1), sites=["attn"], which="text")
    for arguments, message in (
        ({"towers": ["text_encoder"]}, "no tower 'text_encoder'; this model has vision_encoder, projector, language_m"),
        ({"towers": ["projector"]}, "projector has no layers to trace"),
        ({"sites": ["cross_attn"]}, "language_model has no site 'cross_attn'"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_trace(model, clean, Scaled(0.5), **arguments)
    assert not any(point.is_hooked for point in model.hook_points())

"""Constraint tracing finds the planted fact and nothing else; cells that do nothing are marked; windows and groups."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_vlm import HookedVLM, results
from hooked_vlm.corruptions import ReplaceTokens
from hooked_vlm.data import Sample, SampleError, shapes
from hooked_vlm.edits import Replace
from hooked_vlm.experiments import causal_trace
from hooked_vlm.experiments.constraint_trace import constraint_trace, peak_by_layer, window_study
from hooked_vlm.experiments.parts.cases import prepared
from hooked_vlm.experiments.parts.sites import window
from hooked_vlm.plots.constraint import constraint_trace_figure, window_study_figure
from tests.experiments import planted_mlp as planted
from tests.test_plots import check_legible

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

ASKED = {"span": "subject", "by": "star", "prompt": "{question}"}
"""The toys' questions, as they were taught."""
SITES = ("resid", "attn", "mlp")


@pytest.fixture(scope="module")
def planted_model():
    return planted.planted_model()


@pytest.fixture(scope="module")
def asked():
    """Of each shape but the one that replaces it."""
    found = {one.text_of("subject"): one for one in shapes(6, seed=7, kinds=("color",))}
    return [found[shape] for shape in ("square", "triangle")]


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def mixed():
    """Two questions of different lengths, of two groups."""
    found = {one.group: one for one in shapes(3, seed=7, kinds=("exists", "shape"))}
    return [found["exists"], found["shape"]]


@pytest.fixture(scope="module")
def studied(llava, mixed):
    return window_study(llava, mixed, (2,), **ASKED | {"by": "thing"}, sites=["resid", "mlp"])


def close(value, to, atol=1e-5) -> bool:
    return np.allclose(np.asarray(value, float), np.asarray(to, float), atol=atol, equal_nan=True)


# The planted fact -----------------------------------------------------------------------------------------------------


def carries(site: str, layer: int, role: str) -> bool:
    """Whether the color is there and still needed, or passes there."""
    if site == "mlp":
        return role == "subject" and layer == planted.FACT_LAYER
    if site == "attn":
        return role == "ASSISTANT:" and layer == planted.TO_ANSWER
    return layer < planted.TO_ANSWER if role == "subject" else role == "ASSISTANT:" and layer >= planted.TO_ANSWER


def lit_by(result: xr.Dataset, width: int) -> np.ndarray:
    """``[site layer position]``: 1 where one of the window's layers carries the answer."""
    roles = result.role.values[0, 0]
    return np.array(
        [
            [
                [any(carries(site, own, role) for own in window(layer, width, 5, "radius")) for role in roles]
                for layer in range(planted.N_LAYERS)
            ]
            for site in result.site.values
        ],
        dtype=float,
    )


def test_the_planted_model_knows_its_facts(planted_model, asked):
    for sample in asked:
        logits = planted_model(planted_model.prepare(sample.picture(), sample.question))[:, -1]
        assert planted_model.token_strings(logits.argmax(-1)) == [planted.FACTS[sample.text_of("subject")]]


def assert_only_planted(found: xr.DataArray, lit: np.ndarray) -> None:
    for sample in range(found.sizes["sample"]):
        for metric in ("probability", "logit_difference"):
            cells = found.isel(sample=sample, tower=0).sel(metric=metric).transpose("site", "layer", "position")
            assert cells.values == pytest.approx(lit, abs=1e-4)


def test_only_the_planted_cells_light_up(planted_model, asked):
    result = window_study(planted_model, asked, (1, 2), **ASKED, sites=SITES)
    assert result.sizes["sample"] == 2
    assert result.correct.all()
    for width in (1, 2):
        lit = lit_by(result, width)
        assert 0 < lit.mean() < 0.5
        assert_only_planted(result.normalized.sel(window=width), lit)


def test_only_the_planted_cells_are_missed(planted_model, asked):
    result = constraint_trace(planted_model, asked[0], **ASKED, sites=SITES, direction="noising")
    assert_only_planted(result.normalized, 1 - lit_by(result, 1))


@pytest.mark.parametrize(("severed", "first"), [(None, 0), ("attn", 0), ("mlp", planted.FACT_LAYER)])
def test_severed_mlps_cannot_recall_the_fact(planted_model, asked, severed, first):
    """Before the planted MLP a restored word is of use only to that MLP (Meng et al. 2022, figure 3)."""
    how = {"which": "text", "scored": "own", "severed": severed, "sites": ["resid", "mlp"]}
    result = causal_trace(planted_model, asked, ReplaceTokens("subject", "star"), **how)
    lit = lit_by(result, 1)
    word = result.role.values[0, 0].tolist().index("subject")
    assert lit[0, :first, word].all()
    lit[0, :first, word] = 0
    found = result.normalized.sel(metric="probability", tower="language_model")
    assert close(found.transpose("sample", "site", "layer", "position"), np.stack([lit] * 2), atol=1e-4)


# What it is -----------------------------------------------------------------------------------------------------------


def test_it_is_a_causal_trace_with_replaced_tokens(llava, mixed):
    how = {"sites": ["attn", "mlp"], "scored": "own", "convention": "radius"}
    result = constraint_trace(llava, mixed[:1], **ASKED, scored="own")
    whole = causal_trace(llava, mixed[:1], ReplaceTokens("subject", "star"), which="all", **how)
    image = prepared(llava, mixed[0]).spans["image"][0]
    text = [place for place in whole.position.values if place not in image]
    assert result.position.values.tolist() == sorted([image[-1], *text])
    for name in ("patched", "effect", "clean", "corrupted"):
        expected = whole[name].sel(position=result.position) if name in ("patched", "effect") else whole[name]
        assert close(result[name], expected.transpose(*result[name].dims))
    assert result.token.sel(position=image[-1]).item() == whole.token.sel(position=image[-1]).item()
    assert result.answer.item() == whole.answer.item()


@pytest.mark.parametrize("positions", ["text", "all"])
def test_other_positions(llava, mixed, positions):
    result = constraint_trace(llava, mixed[0], **ASKED, sites=["mlp"], positions=positions)
    image = set(prepared(llava, mixed[0]).spans["image"][0])
    assert len(image & set(result.position.values.tolist())) == (36 if positions == "all" else 0)


def test_the_default_asks_and_replaces_as_the_paper(planted_model):
    """By default the question goes on with "Answer in a few words.", and the constraint becomes "Paris"."""
    sample = shapes(1, seed=7, kinds=("color",))[0]
    sample = replace(sample, spans={"constraint": sample.spans["subject"]})
    with pytest.raises(SampleError, match="'Paris' has no tokens"):  # of the toys' 61 words it is none
        constraint_trace(planted_model, sample)
    result = constraint_trace(planted_model, sample, by="star", positions="text")
    assert result.attrs["prompt"] == "{question} Answer in a few words."
    words = result.token.values.ravel().tolist()
    assert words[words.index("?") + 1] == "<unk>"
    assert result.constraint.item() == sample.text_of("constraint")


def test_the_drop_fraction_is_of_the_clean_probability(studied):
    clean, corrupted = (studied[name].sel(metric="probability") for name in ("clean", "corrupted"))
    assert close(studied.drop_fraction, (clean - corrupted) / clean)
    assert (abs(studied.drop_fraction) > 0.5).any()


def test_the_answer_is_the_models_own_or_the_samples(planted_model, asked):
    """The square is blue, and its picture is not asked."""
    sample = replace(asked[0], answer="red", foil="blue")
    how = ASKED | {"sites": ["mlp"], "positions": "text"}
    own, given = (constraint_trace(planted_model, sample, **how, scored=scored) for scored in ("own", "given"))
    assert (own.answer.item(), own.foil.item(), own.correct.item()) == ("blue", "yellow", True)
    assert (given.answer.item(), given.foil.item(), given.correct.item()) == ("red", "blue", False)
    assert own.clean.sel(metric="probability").item() > 0.9 > 0.1 > given.clean.sel(metric="probability").item()


def test_the_same_word_changes_nothing(llava, mixed):
    """Every cell gives the clean run; nothing is lost; 0 / 0 is counted, not 0."""
    shape = mixed[1]
    result = constraint_trace(llava, shape, **ASKED | {"by": shape.text_of("subject")}, sites=["attn"])
    there = result.patched.notnull()
    assert close(result.effect.where(there, 0), 0)
    assert close(result.clean, result.corrupted)
    assert close(result.drop_fraction, 0)
    assert result.attrs["n_undefined"] == int(there.sum()) > 0
    assert bool((result.no_op | ~there.isel(metric=0)).all())


# Cells that do nothing ------------------------------------------------------------------------------------------------


def test_cells_that_do_nothing_are_marked_and_do_nothing(studied, mixed, llava):
    """Before the constraint; and in the last layer, away from the last position. No others."""
    for sample, width in ((0, 1), (0, 2), (1, 1), (1, 2)):
        inputs = prepared(llava, mixed[sample])
        first, last = inputs.spans["subject"][0][0], inputs.spans["last"][0][0]
        part = studied.isel(sample=sample, tower=0).sel(window=width)
        there = part.patched.isel(metric=0, drop=True).notnull()
        position, layer = part.position, part.layer
        unread = (layer == 4) & (width == 1) & (position != last)
        expected = ((position < first) | unread) & there
        assert bool((part.no_op == expected.transpose(*part.no_op.dims)).all())
        assert float(abs(part.effect).where(part.no_op).max()) < 1e-5
        assert 37 in part.position.values[part.no_op.all(("site", "layer"))]  # the image's last patch
    assert float(abs(studied.effect).max()) > 0.5


def test_in_a_tower_that_looks_both_ways_nothing_is_marked():
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    sample = shapes(1, seed=7, kinds=("color",))[0]
    result = constraint_trace(model, sample, **ASKED, sites=["cross_attn", "mlp"])
    assert result.tower.values.tolist() == ["question_encoder", "answer_decoder"]
    assert not result.no_op.any()
    assert float(abs(result.effect).max()) > 0.1


def test_identities_are_each_samples_own(studied, mixed, llava):
    """The last position's stream in the last layer is the clean run; it is another position in each sample."""
    for sample in range(2):
        last = prepared(llava, mixed[sample]).spans["last"][0][0]
        own = studied.isel(sample=sample, tower=0).sel(window=1)
        assert own.position.values[own.identity.any(("site", "layer"))].tolist() == [last]
        wide = studied.isel(sample=sample, tower=0)
        assert close((wide.patched - wide.clean).where(wide.identity, 0), 0, atol=1e-4)


@torch.no_grad()
def test_restoring_all_that_is_written_needs_the_embeddings_too(llava, mixed):
    """Attention and MLP of all layers, from the constraint on, are the clean run only with the words' embeddings."""
    inputs = prepared(llava, mixed[1])
    corrupted = ReplaceTokens("subject", "star")(llava, inputs).inputs
    clean, cache = llava.run_with_cache(inputs)
    words = [*range(inputs.spans["subject"][0][0], inputs.input_ids.shape[1])]
    names = [f"language_model.blocks.{layer}.hook_{kind}_out" for layer in range(5) for kind in ("attn", "mlp")]
    written = [Replace(name, cache, positions=words) for name in names]
    embedded = Replace("language_model.blocks.0.hook_resid_pre", cache, positions=words)
    assert not close(llava.patch(corrupted, written)[:, words], clean[:, words], atol=0.1)
    assert close(llava.patch(corrupted, [embedded, *written])[:, words], clean[:, words], atol=1e-4)


# Windows and groups ---------------------------------------------------------------------------------------------------


def test_a_study_holds_each_window_and_single_layers(studied, llava, mixed):
    assert studied.window.values.tolist() == [1, 2]
    for width in (1, 2):
        alone = constraint_trace(llava, mixed[0], **ASKED | {"by": "thing"}, sites=["resid", "mlp"], width=width)
        part = studied.sel(window=width, drop=True).isel(sample=[0]).sel(position=alone.position)
        for name in set(alone.data_vars) - {"noise_floor"}:  # which is of all samples
            expected = alone[name].values
            assert np.array_equal(part[name].values, expected, equal_nan=expected.dtype.kind == "f"), name
        assert alone.attrs["window"] == width
    assert not close(studied.patched.sel(window=1), studied.patched.sel(window=2))


@pytest.mark.parametrize("widths", [(1, 3), (3,)])
def test_a_window_that_does_not_fit_is_named_before_anything_runs(llava, widths):
    never = Sample("never", lambda: pytest.fail("a picture was read"), "what ?", spans={"subject": (0, 4)})
    with pytest.raises(ValueError, match=r"7 layers \(width 3, radius\) is wider than the tower, which has 5"):
        window_study(llava, never, widths, **ASKED)
    with pytest.raises(ValueError, match="at least one width"):
        window_study(llava, never, (), **ASKED)
    for tower, message in (("decoder", "no tower 'decoder'"), ("projector", "projector has no layers to trace")):
        with pytest.raises(ValueError, match=message):
            constraint_trace(llava, never, towers=[tower])
    with pytest.raises(ValueError, match="language_model has no site 'cross_attn'"):
        constraint_trace(llava, never, sites=["cross_attn"])


def test_peaks_are_means_of_each_groups_largest_effects(studied):
    result = studied.isel(sample=[0, 1, 0, 1]).assign_coords(sample=list("abcd"))
    result = result.assign_coords(group=("sample", ["single", "multi", "single", ""]))
    result["effect"] = result.effect + np.random.default_rng(0).normal(size=result.effect.shape)
    peaks = peak_by_layer(result, metric="logit_difference")
    assert peaks.group.values.tolist() == ["single", "multi", ""]
    assert peaks.n.values.tolist() == [2, 1, 1]
    for group, members in (("single", (0, 2)), ("multi", (1,)), ("", (3,))):
        for layer in range(5):
            largest = []
            for sample in members:
                own = result.isel(sample=sample, tower=0, drop=True)
                cells = own.sel(metric="logit_difference", window=1, site="mlp", layer=layer)
                largest.append(max(cells.effect.values[~cells.no_op.values & cells.effect.notnull().values]))
            found = peaks.sel(group=group, window=1, site="mlp", layer=layer, tower="language_model")
            assert float(found["mean"]) == pytest.approx(np.mean(largest))
            assert (float(found.low), float(found.high)) == pytest.approx((min(largest), max(largest)))
    last = peak_by_layer(result, roles=["ASSISTANT:"])["mean"].sel(group="multi", window=2, site="mlp").squeeze()
    cell = result.isel(sample=1, tower=0).sel(metric="probability", window=2, site="mlp")
    assert close(last, cell.effect.where(cell.role == "ASSISTANT:").max("position"))
    single = result.isel(window=1, drop=True).assign_attrs(window=2)  # as of a constraint trace
    assert peak_by_layer(single, metric="logit_difference").identical(peaks.sel(window=[2]).assign_attrs(window=2))


def test_peaks_of_what_is_not_there(studied):
    with pytest.raises(ValueError, match="no position has the role banana; there are"):
        peak_by_layer(studied, roles=["banana"])
    with pytest.raises(ValueError, match="metrics are probability, logit_difference, not 'banana'"):
        peak_by_layer(studied, metric="banana")


# Samples --------------------------------------------------------------------------------------------------------------


def test_samples_without_the_span_are_dropped_by_name(llava, mixed):
    """Also where the question has a word of the span's name."""
    without = replace(mixed[1], id="without", question="what color is the subject ?", spans={})
    result = constraint_trace(llava, [*mixed, without], **ASKED)
    assert result.sizes["sample"] == 2
    assert result.attrs["samples_dropped"] == 1
    assert "without" in result.attrs["dropped"]
    with pytest.raises(SampleError, match="without has no span 'subject'"):
        constraint_trace(llava, without, **ASKED)


@pytest.mark.usefixtures("checked")
def test_a_question_without_a_picture(llava):
    sample = Sample("text", None, "what color is the circle ?", spans={"subject": (18, 24)})
    result = constraint_trace(llava, sample, **ASKED)
    assert result.token.values.ravel().tolist()[:2] == ["<s>", "USER:"]
    assert not result.patched.isnull().any()


@pytest.mark.parametrize("wrong", [{"positions": "image"}, {"direction": "up"}, {"sites": ["x"]}, {"metrics": ["x"]}])
def test_wrong_settings(llava, mixed, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong.values()))[0]}|{next(iter(wrong.values()))}"):
        constraint_trace(llava, mixed, **ASKED, **wrong)


def test_it_says_how_it_was_made_and_loads_back_equal(studied, tmp_path):
    facts = {"method": "window_study", "corruption": "ReplaceTokens", "span": "subject", "by": "thing"}
    facts |= {"window": "[1, 2]", "window_convention": "radius", "direction": "denoising", "samples_used": 2}
    assert {name: studied.attrs[name] for name in facts} == facts
    results.save(studied, tmp_path / "study.nc")
    assert results.load(tmp_path / "study.nc").identical(studied)


# Figures --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [None, 1])
def test_heatmaps_show_each_cell(studied, sample):
    figure = constraint_trace_figure(studied, sample=sample, title="what replacing the subject takes away\n" * 2)
    shown = check_legible(figure)
    assert {"ASSISTANT:", "residual stream, one layer", "MLP, 5 layers", "residual stream, 5 layers"} <= shown
    assert ("subject" in shown) == (sample is None)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(panels) == 4
    assert all(axes.yaxis_inverted() for axes in panels)  # the first token above
    drawn = panels[1].collections[0].get_array()
    part = studied.isel(tower=0).sel(window=1, site="mlp", metric="probability").effect
    if sample is None:
        last = part.where(studied.role.isel(tower=0) == "ASSISTANT:").max("position").mean("sample")
        assert close(drawn[-1], last)
    else:
        own = part.isel(sample=sample).dropna("position").transpose("position", "layer")
        assert close(drawn, own)
    assert len({panels[place].collections[0].get_clim() for place in (1, 3)}) == 1


def test_lines_show_groups_and_intervals(studied):
    peaks = peak_by_layer(studied)
    figure = window_study_figure(peaks, title="peaks")
    assert {"exists (n=1)", "shape (n=1)", "residual stream, one layer", "MLP, 5 layers"} <= check_legible(figure)
    line = figure.axes[0].get_lines()[1]
    assert close(line.get_ydata(), peaks["mean"].isel(group=1, window=0, site=0, tower=0))


def test_figures_of_what_is_not_there(studied):
    for draw, message in (
        (lambda: constraint_trace_figure(studied, tower="x"), "no tower 'x'; it has language_model"),
        (lambda: constraint_trace_figure(studied, metric="x"), "metrics are"),
        (lambda: constraint_trace_figure(studied, sample=2), "there is no sample 2"),
        (lambda: constraint_trace_figure(studied.drop_vars("role")), "no roles"),
    ):
        with pytest.raises(ValueError, match=message):
            draw()

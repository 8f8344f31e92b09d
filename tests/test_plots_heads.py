"""Figures of modules and heads: what stands where, in which shade, and that nothing is cut."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.patches import Rectangle

from hooked_vlm import HookedVLM
from hooked_vlm.data import shapes
from hooked_vlm.experiments.head_function import head_function, head_summary
from hooked_vlm.experiments.notice import notice
from hooked_vlm.experiments.parts.heads import Head, select_heads, universal_heads
from hooked_vlm.experiments.parts.roles import by_role
from hooked_vlm.plots.head_looks import attention_overlay_figure, head_function_figure
from hooked_vlm.plots.heads import head_grid_figure, selection_matrix_figure
from hooked_vlm.plots.roles import role_figure
from tests.test_plots import check_legible

LD = "logit_difference"
COLORS = shapes(3, seed=7, kinds=("color",))
HEADS = [Head("question_encoder", "cross_attn", 3, number) for number in (0, 1)]


@pytest.fixture(scope="module")
def model():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture(scope="module")
def looks(model):
    return head_function(model, COLORS, HEADS, query="subject", controls=1)


def meshes(figure) -> list[QuadMesh]:
    """Of the panels, without the color bars."""
    found = [(axes, drawn) for axes in figure.axes for drawn in axes.collections if isinstance(drawn, QuadMesh)]
    return [drawn for axes, drawn in found if axes.bbox.width > 30]


def outlined(axes) -> list[tuple[int, int]]:
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    return [(int(box.get_y()), int(box.get_x())) for box in boxes]


def selection(shape=(12, 12), chosen=((5, 3), (3, 0)), attention=("attn", "cross_attn"), seed=0) -> xr.Dataset:
    scores = np.random.default_rng(seed).random((1, len(attention), *shape)) / 10
    for layer, head in chosen:
        scores[0, -1, layer, head] = 2
    labels = {"tower": ["question_encoder"], "attention": [*attention]}
    labels |= {"layer": np.arange(shape[0]), "head": np.arange(shape[1])}
    dims = ("metric", "sample", "tower", "attention", "layer", "head")
    patched = xr.Dataset({"effect": (dims, scores[None, None])}, {"metric": [LD], "sample": ["a"], **labels})
    return select_heads(patched)


@pytest.fixture(scope="module")
def modules(model):
    return notice(model, [*COLORS[:2], *shapes(1, seed=8, kinds=("shape",))], "sip")


@pytest.mark.parametrize("quantity", ["normalized", "effect"])
def test_modules_by_role_are_means_over_samples(modules, quantity):
    result = modules
    figure = role_figure(result, quantity=quantity, title="SIP")
    shown = check_legible(figure)
    assert {"[CLS]", "what", "subject", "(all)", "color (2)", "object (1)", "shape (1)"} <= shown
    assert {"MLP", "self-attention", "cross-attention", "layer", "question encoder"} <= shown
    assert any("mean over 3 samples" in text for text in shown)
    means = by_role(result)[quantity].sel(metric=LD).mean("sample").isel(tower=0)
    for mesh, site in zip(meshes(figure), ("mlp", "attn", "cross_attn"), strict=True):
        assert np.allclose(mesh.get_array(), means.sel(site=site).transpose("role", "layer"))
        assert mesh.get_clim()[0] == -mesh.get_clim()[1]


@pytest.mark.parametrize(("shape", "attention"), [((12, 12), ("attn", "cross_attn")), ((32, 32), ("attn",))])
def test_selected_heads_are_outlined_where_they_are(shape, attention):
    made = selection(shape, attention=attention)
    figure = head_grid_figure(made, title="toy, SIP")
    shown = check_legible(figure)
    assert {"layer", "head", "mean |·| of\nΔ logit\ndifference"} <= shown
    assert any("2 of" in text and "1 samples" in text for text in shown)
    drawn = meshes(figure)
    assert len(drawn) == len(attention)
    assert np.allclose(drawn[-1].get_array(), made.score[0, -1])
    assert sorted(outlined(drawn[-1].axes)) == [(3, 0), (5, 3)]
    assert all(outlined(mesh.axes) == [] for mesh in drawn[:-1])


def test_a_matrix_of_tasks_and_modalities():
    places = {("states", "sip"): [(5, 3), (1, 1)], ("states", "str"): [(5, 3)]}
    places |= {("faces", "sip"): [(5, 3), (3, 0)], ("faces", "str"): [(5, 3), (1, 1)]}
    matrix = universal_heads({key: selection(chosen=own) for key, own in places.items()})
    figure = selection_matrix_figure(matrix, title="toy")
    shown = check_legible(figure)
    name = "question_encoder.L5.cross_attn.H3"
    assert {"L1.H1", "L3.H0", "L5.H3 ★", "states", "faces", "picture (SIP)", "question (STR)"} <= shown
    assert not any(name in text for text in shown), "one tower and kind need not be said"
    (mesh,) = meshes(figure)
    # Columns: states and faces under SIP, then under STR.
    assert sorted(outlined(mesh.axes)) == [(0, 0), (0, 3), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]
    with pytest.raises(ValueError, match="no head is selected"):
        selection_matrix_figure(matrix.assign(selected=matrix.selected & False))


def test_attention_lies_where_it_looks(looks):
    figure = attention_overlay_figure(looks, COLORS[:2].samples, title="toy")
    shown = check_legible(figure)
    assert {"× uniform"} <= shown
    assert any(text.startswith("L3.H1  ×3") for text in shown)
    assert any("from “triangle”" in text for text in shown)
    panels = [axes for axes in figure.axes if any(isinstance(one, PolyCollection) for one in axes.collections)]
    assert len(panels) == 4
    for place, axes in enumerate(panels):
        row, number = divmod(place, 2)
        (patches,) = (one for one in axes.collections if isinstance(one, PolyCollection))
        red, blue = patches.get_facecolor()[:, 0], patches.get_facecolor()[:, 2]
        part = looks.isel(sample=row, head=number)
        factors = part.attention / part.attention.mean()
        assert (red[factors.values > 1.2] > blue[factors.values > 1.2]).all()
        assert (red[factors.values < 0.8] < blue[factors.values < 0.8]).all()
        if number == 1:
            assert np.flatnonzero(red > blue).tolist() == np.flatnonzero(part.in_region).tolist()
        corners = [path.get_extents().bounds for path in patches.get_paths()]
        assert np.allclose(corners[8], (31.5, 15.5, 16, 16)), "patch 8, of six a row"


def test_a_box_is_outlined_as_a_box(looks):
    boxed = replace(COLORS[0], regions={"object": (10, 20, 30, 50)})
    figure = attention_overlay_figure(looks, boxed, heads=[str(HEADS[1])], against="mean")
    assert "× mean of\nall heads" in check_legible(figure)
    boxes = [patch for axes in figure.axes[:2] for patch in axes.patches]
    assert [box.get_bbox().bounds for box in boxes] == [(9.5, 19.5, 20, 30)] * 2


def test_overlays_need_samples_and_heads_of_the_result(looks):
    with pytest.raises(ValueError, match="no head 'L9.H9'"):
        attention_overlay_figure(looks, COLORS[0], heads=["L9.H9"])
    with pytest.raises(ValueError, match="no sample 'other'"):
        attention_overlay_figure(looks, replace(COLORS[0], id="other"))
    with pytest.raises(ValueError, match="see no picture"):
        attention_overlay_figure(looks.assign_coords(box=looks.box * np.nan), COLORS[0])


@pytest.mark.parametrize("with_cuts", [True, False])
def test_measures_stand_beside_their_controls(looks, with_cuts):
    summary = head_summary(looks if with_cuts else looks.drop_vars(["cut_effect", "clean"]))
    figure = head_function_figure(summary, title="toy")
    shown = check_legible(figure)
    assert {"L3.H0", "L3.H1", "enrichment on the region", "AUROC against the region", "detection"} <= shown
    assert ("Δ logit difference, attention cut" in shown) == with_cuts
    assert len(figure.axes) == 2 + with_cuts
    for axes, quantity in zip(figure.axes, ("enrichment", "auroc", "cut_region"), strict=False):
        drawn = [
            points.get_offsets() for points in axes.collections if len(getattr(points, "get_offsets", list)()) == 2
        ]
        assert np.allclose(drawn[-1][:, 0], summary["mean"].sel(quantity=quantity))
        assert drawn[-1][:, 1].tolist() == [0, 1]

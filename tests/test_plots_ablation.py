"""Figures of ablations and paths: each node's number in its cell, on a scale that is white at 0; all of it legible."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from hooked_vlm.experiments.parts.components import Node, over_nodes
from hooked_vlm.plots.ablation import RANDOM, SELECTED, ablated_sets_figure, ablation_grid_figure, path_patch_figure
from hooked_vlm.statistics import bootstrap
from tests.test_plots import check_legible

METRIC = "logit_difference"
TITLE = "llava-hf/llava-1.5-7b-hf, “what color is the circle ?”, another picture (SIP)"


def node_names(n_layers=4, n_heads=4, tower="language_model", cross=False) -> list[str]:
    kinds = ["attn", *(["cross_attn"] if cross else [])]
    heads = [
        f"{tower}.L{layer}.{kind}.H{head}" for layer in range(n_layers) for kind in kinds for head in range(n_heads)
    ]
    return [*heads, *(f"{tower}.L{layer}.mlp" for layer in range(n_layers))]


def swept(names: list[str]) -> xr.Dataset:
    random = np.random.default_rng(0)
    effect = random.normal(size=(1, 3, len(names)))
    coords = {"metric": [METRIC], "sample": ["a", "b", "c"], "set": names}
    made = xr.Dataset({"effect": (("metric", "sample", "set"), effect), "noise_floor": ("metric", [1e-6])}, coords)
    return over_nodes(made, "set").assign_attrs(how="mean", dtype="float32")


def paths(senders: list[str], receivers: list[str], is_path=None) -> xr.Dataset:
    random = np.random.default_rng(0)
    dims = ("metric", "sample", "sender", "receiver")
    shape = (len(senders), len(receivers))
    return xr.Dataset(
        {
            "relative": (dims, random.normal(size=(1, 2, *shape))),
            "is_path": (dims[2:], np.ones(shape, bool) if is_path is None else is_path),
            "noise_floor": ("metric", [1e-6]),
        },
        {"metric": [METRIC], "sample": ["a", "b"], "sender": senders, "receiver": receivers},
        {"direction": "noising", "mlps": "frozen", "dtype": "float32"},
    )


def sets_of(effect: np.ndarray, names: list[str], control_of: list[str]) -> xr.Dataset:
    return xr.Dataset(
        {"effect": (("metric", "sample", "set"), effect[None]), "noise_floor": ("metric", [1e-6])},
        {"metric": [METRIC], "sample": np.arange(len(effect)), "set": names, "control_of": ("set", control_of)},
        {"how": "mean", "dtype": "float32"},
    )


def meshes(figure) -> dict[str, QuadMesh]:
    """Cells by the title of their panel; the color bar has none on its left."""
    found = {}
    for axes in figure.axes:
        own = [artist for artist in axes.collections if isinstance(artist, QuadMesh)]
        title = axes.get_title(loc="left")
        if own and not title.startswith("Δ"):
            found[title] = own[0]
    return found


@pytest.mark.parametrize(("layers", "heads", "cross"), [(4, 4, False), (4, 4, True), (12, 12, True), (32, 32, False)])
def test_each_head_and_mlp_has_its_cell(layers, heads, cross):
    names = [*node_names(layers, heads, cross=cross), *node_names(3, 4, "vision_encoder")]
    result = swept(names)
    figure = ablation_grid_figure(result, title=TITLE)
    shown = check_legible(figure)
    assert {"language model", "vision encoder", "self-attention", "MLP", "layer", "Δ logit difference"} <= shown
    assert ("cross-attention" in shown) == cross
    assert str(layers - 1) in shown
    mesh = meshes(figure)["language model"]
    cells = mesh.get_array()
    assert cells.shape == (layers, heads * (1 + cross) + 1)
    means = result.effect.sel(metric=METRIC, tower="language_model").mean("sample")
    assert np.allclose(cells[:, :heads], means.sel(kind="attn").isel(layer=slice(layers), head=slice(heads)))
    assert np.allclose(cells[:, -1], means.sel(kind="mlp", head=-1).isel(layer=slice(layers)))
    low, high = mesh.get_clim()
    assert -low == high == pytest.approx(float(abs(result.effect.mean("sample")).max()))
    assert mesh.cmap(mesh.norm(-high))[0] > mesh.cmap(mesh.norm(-high))[2]  # what hurts is red


def test_paths_are_in_per_cent_and_where_there_is_none_it_is_hatched():
    senders = ["projector", "language_model.embed", *node_names()]
    receivers = ["language_model.L2.attn.H1.q", "language_model.out"]
    is_path = np.array([[Node.of(name).layer < 2, True] for name in senders])
    result = paths(senders, receivers, is_path)
    figure = path_patch_figure(result, title=TITLE)
    shown = check_legible(figure)
    assert {"image", "words", "0", "3"} <= shown
    assert any("% of the two" in text for text in shown)
    first, second = meshes(figure).values()
    share = 100 * result.relative.isel(metric=0).mean("sample")
    for name in senders:
        _, kind, layer, head = Node.of(name)
        row = {"projector": 0, "embed": 1}.get(kind, layer + 2)
        column = slice(0, 5) if layer < 0 else 4 if kind == "mlp" else head
        assert np.allclose(second.get_array()[row, column], share.sel(sender=name).isel(receiver=1)), name
        assert bool(np.ma.getmaskarray(first.get_array())[row, column].any()) == (layer >= 2), name
    (axes,) = (one for one in figure.axes if "H1.q" in one.get_title(loc="left"))
    assert len([patch for patch in axes.findobj(Rectangle) if patch.get_hatch()]) == 2 * 5


def test_towers_of_senders_stand_below_each_other_and_what_nothing_connects_is_left_out():
    senders = [*node_names(3, tower="vision_encoder"), *node_names(cross=True, tower="question_encoder")]
    receivers = ["question_encoder.L3.cross_attn.H1.v", "question_encoder.L3.mlp", "vision_encoder.L2.mlp"]
    is_path = np.zeros((len(senders), 3), bool)
    is_path[:15, 0] = is_path[15:, 1] = True
    figure = path_patch_figure(paths(senders, receivers, is_path), title=TITLE)
    check_legible(figure)
    assert list(meshes(figure)) == [
        "vision encoder\n→ question_encoder.L3.cross_attn.H1.v",
        "question encoder\n→ question_encoder.L3.mlp",
    ]
    is_path[:, 2] = True
    figure = path_patch_figure(paths(senders, receivers, is_path))
    check_legible(figure)
    upper, lower = (
        next(axes for axes in figure.axes if axes.get_title(loc="left") == f"{tower}\n→ vision_encoder.L2.mlp")
        for tower in ("vision encoder", "question encoder")
    )
    assert upper.get_position().x0 == lower.get_position().x0
    assert upper.get_position().y0 > lower.get_position().y1


def test_sets_of_senders_have_no_cell():
    with pytest.raises(ValueError, match="sets of senders have no place"):
        path_patch_figure(paths(["movers"], ["language_model.out"]))


def test_sets_stand_beside_their_controls():
    random = np.random.default_rng(0)
    names = [
        "selected",
        "selected (random 0)",
        "selected (random 1)",
        "MLPs of the last two layers, a long name indeed",
    ]
    effect = random.normal(-2, 1, size=(12, 4))
    figure = ablated_sets_figure(sets_of(effect, names, ["", "selected", "selected", ""]), title=TITLE)
    shown = check_legible(figure)
    assert {"selected", "2 random sets", "Δ logit difference"} <= shown
    assert any(text.endswith("…") for text in shown)
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    expected = [effect[:, 0].mean(), effect[:, 1:3].mean(), effect[:, 3].mean()]
    assert [bar.get_width() for bar in bars] == pytest.approx(expected)
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [SELECTED, to_hex(RANDOM), SELECTED]
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert sorted(x for line in dots for x in line.get_xdata()) == pytest.approx(sorted(effect[:, 1:3].mean(0)))
    interval = bootstrap(effect[:, :1])
    ends = figure.axes[0].collections[0].get_segments()[0][:, 0]
    assert sorted(ends) == pytest.approx([float(interval.low[0]), float(interval.high[0])])

"""Every figure. Each function draws one and returns it; :func:`save_figure` writes PNG and PDF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hooked_vlm import results
from hooked_vlm.files import whole_file

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SITE_TITLES = {
    "resid": "residual stream",
    "attn": "self-attention",
    "cross_attn": "cross-attention",
    "mlp": "MLP",
}
COLOR_MAPS = {"resid": "Purples", "attn": "Greens", "cross_attn": "Oranges", "mlp": "Blues"}

Quantity = Literal["patched", "effect", "normalized"]
RowHeight = 0.27
"""Inches of one token's row."""


def causal_trace_figure(
    result: xr.Dataset,
    *,
    sample: int = 0,
    metric: Literal["probability", "logit_difference"] = "probability",
    quantity: Quantity = "patched",
    images: Sequence[tuple[str, Any]] = (),
    title: str = "",
) -> Figure:
    """Heatmaps as in Palit et al. 2023: tokens down, layers across, one panel a site, one row of panels a tower.

    Positions of single patches are left to :func:`patch_trace_figure`. ``quantity="patched"`` shows the metric itself, on a scale from the corrupted to the clean run. Hatched cells give
    the source run by construction.

    Args:
        images: (caption, picture) pairs, shown on the left.
    """
    from matplotlib.figure import Figure

    towers = [_without_patches(results.tower(result, name, sample)) for name in result.tower.values]
    n_sites = max(part.sizes["site"] for part in towers)
    heights = [max(0.8, RowHeight * part.sizes["position"]) for part in towers]
    pictures_width = 2.0 if images else 0.0
    figure = Figure(figsize=(pictures_width + 1.1 + 2.35 * n_sites, sum(heights) + 0.9 * len(towers) + 0.75))
    right: Any = figure
    if images:
        panels: Any = figure.subfigures(1, 2, width_ratios=[pictures_width, 1.1 + 2.35 * n_sites])
        _draw_images(panels[0], images)
        right = panels[1]
    grid = right.subplots(
        len(towers), n_sites, squeeze=False, gridspec_kw={"height_ratios": heights, "hspace": 0.9 / np.mean(heights)}
    )
    ends = [float(result[end].sel(metric=metric).isel(sample=sample)) for end in ("corrupted", "clean")]
    for part, axes_row in zip(towers, grid, strict=True):
        for axes in axes_row[part.sizes["site"] :]:
            axes.remove()
        for axes, site in zip(axes_row, part.site.values, strict=False):
            _draw_heatmap(axes, part.sel(site=site, metric=metric), str(site), quantity, metric, ends)
            # One panel names the rows of all beside it.
            axes.tick_params(labelleft=axes is axes_row[0])
        axes_row[0].set_ylabel(str(part.tower.values).replace("_", " "), fontsize=9)
    # Margins in inches: room for token names on the left and the title above.
    width, height = right.bbox.width / figure.dpi, figure.get_figheight()
    right.subplots_adjust(
        left=0.95 / width, right=1 - 0.45 / width, top=1 - 0.85 / height, bottom=0.5 / height, wspace=0.36
    )
    figure.suptitle(title, fontsize=10, x=0.02, ha="left", y=1 - 0.12 / height, va="top")
    return figure


def patch_trace_figure(
    result: xr.Dataset,
    image: Any,
    *,
    sample: int = 0,
    picture: int = 0,
    metric: Literal["probability", "logit_difference"] = "probability",
    quantity: Quantity = "patched",
    layers: Sequence[int] | None = None,
    title: str = "",
) -> Figure:
    """A trace of image positions, drawn over the picture: one row a site, one column a layer.

    Each patch is tinted by what patching its position alone does. Where tiles overlap (LLaVA-NeXT), the finer ones
    cover the coarser.

    Args:
        image: the picture that was traced, as it was given.
        picture: which of the row's pictures, where there are several.
        layers: by default all, or eight evenly spaced ones of more.

    Raises:
        ValueError: a result that holds no positions of such a picture.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    part = _patches_of(result, sample, picture)
    every = part.layer.values
    chosen = every[np.linspace(0, len(every) - 1, min(8, len(every))).round().astype(int)] if layers is None else layers
    part = part.sel(layer=list(chosen), metric=metric)
    sites = [str(site) for site in part.site.values]
    ends = [float(result[end].sel(metric=metric).isel(sample=sample)) for end in ("corrupted", "clean")]
    size, bar = 1.35, 0.75
    figure = Figure(figsize=(0.9 + size * len(chosen) + bar, 0.85 + (size + 0.12) * len(sites)))
    grid = figure.subplots(len(sites), len(chosen), squeeze=False)
    width, height = figure.get_size_inches()
    right = 1 - bar / width
    figure.subplots_adjust(
        left=0.35 / width, right=right, top=1 - 0.8 / height, bottom=0.05 / height, wspace=0.06, hspace=0.1
    )
    for place, (site, row) in enumerate(zip(sites, grid, strict=True)):
        values = part.sel(site=site)[quantity].transpose("layer", "position").values
        low, high = _scale(values, quantity, ends)
        for axes, layer, shades in zip(row, chosen, values, strict=True):
            mesh = _draw_over(axes, image, part.box.values, shades, (low, high), COLOR_MAPS.get(site, "Greys"))
            if place == 0:
                axes.set_title(f"layer {layer}", fontsize=8, pad=3)
        row[0].set_ylabel(SITE_TITLES.get(site, site), fontsize=8)
        box = row[-1].get_position()
        bar_axes = figure.add_axes((right + 0.1 / width, box.y0, 0.1 / width, box.height))
        figure.colorbar(ScalarMappable(mesh.norm, mesh.cmap), cax=bar_axes).ax.tick_params(labelsize=7)
        if place == 0:
            bar_axes.set_title(_bar_title(part, quantity, metric), fontsize=8, pad=5)
    figure.suptitle(title, fontsize=9, x=0.02, ha="left", y=1 - 0.08 / height, va="top")
    return figure


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write ``path`` with the endings ``.png`` (200 dots an inch) and ``.pdf``; returns both paths."""
    written = []
    for ending in (".png", ".pdf"):
        target = Path(path).with_suffix(ending)
        with whole_file(target) as temporary:
            figure.savefig(temporary, dpi=200)
        written.append(target)
    return written


def _without_patches(part: xr.Dataset) -> xr.Dataset:
    """A tower's part of a result, without positions that each hold a piece of an image."""
    return part.isel(position=np.flatnonzero(part.picture.values < 0)) if "picture" in part.coords else part


def _patches_of(result: xr.Dataset, sample: int, picture: int) -> xr.Dataset:
    """The positions that see a part of a picture, in the one tower that has such."""
    for name in result.tower.values if "picture" in result.coords else ():
        part = results.tower(result, name, sample)
        sees = (part.picture.values == picture) & ~np.isnan(part.box.values).any(-1)
        if sees.any():
            return part.isel(position=np.flatnonzero(sees))
    raise ValueError(f"the result holds no positions of picture {picture} of sample {sample}")


def _draw_over(
    axes: Axes, image: Any, boxes: np.ndarray, values: np.ndarray, ends: tuple[float, float], color_map: str
) -> Any:
    """Tinted boxes over a picture in grey; returns what a colour bar is made of."""
    from matplotlib.collections import PolyCollection

    axes.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
    # Patches that do nothing stay clear, so that what they show can be seen.
    share = np.clip((values - ends[0]) / max(ends[1] - ends[0], 1e-12), 0, 1)
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    tint = PolyCollection(list(corners), cmap=color_map, alpha=0.1 + 0.7 * share, edgecolors="none")
    tint.set_array(values)
    tint.set_clim(*ends)
    axes.add_collection(tint, autolim=False)
    axes.set_xticks([])
    axes.set_yticks([])
    return tint


def _draw_images(figure: Any, images: Sequence[tuple[str, Any]]) -> None:
    column = figure.subplots(max(2, len(images)), 1, squeeze=False)[:, 0]
    for axes in column[len(images) :]:
        axes.remove()
    for axes, (caption, image) in zip(column, images, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])


def _draw_heatmap(
    axes: Axes, part: xr.Dataset, site: str, quantity: Quantity, metric: str, ends: Sequence[float]
) -> None:
    values = part[quantity].transpose("position", "layer").values
    low, high = _scale(values, quantity, ends)
    mesh = axes.pcolormesh(values, cmap=COLOR_MAPS.get(site, "Greys"), vmin=low, vmax=high)
    _hatch(axes, part.identity.transpose("position", "layer").values)
    axes.invert_yaxis()
    axes.set_title(SITE_TITLES.get(site, site), fontsize=9, loc="left")
    axes.set_xlabel("layer", fontsize=8)
    axes.set_xticks(np.arange(part.sizes["layer"]) + 0.5, part.layer.values)
    axes.set_yticks(np.arange(part.sizes["position"]) + 0.5, part.token.values)
    axes.tick_params(labelsize=8, length=2)
    # As high as the heatmap, however high that is: its title must stand above both.
    slender = max(20.0, RowHeight * part.sizes["position"] / 0.13)
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.08, pad=0.05, aspect=slender)
    bar.ax.tick_params(labelsize=7)
    bar.ax.set_title(_bar_title(part, quantity, metric), fontsize=8, pad=5)


def _scale(values: np.ndarray, quantity: Quantity, ends: Sequence[float]) -> tuple[float, float]:
    """From the corrupted run to the clean one, wider where cells lie outside."""
    known = {"patched": list(ends), "effect": [0.0, ends[1] - ends[0]], "normalized": [0.0, 1.0]}[quantity]
    finite = [*values[np.isfinite(values)], *known]
    return min(finite), max(finite)


def _bar_title(part: xr.Dataset, quantity: Quantity, metric: str) -> str:
    answer, foil = str(part.answer.values), str(part.foil.values)
    score = f"p({answer})" if metric == "probability" else f"{answer} − {foil}"
    return {"patched": score, "effect": f"Δ {score}", "normalized": f"{score}, norm."}[quantity]


def _hatch(axes: Axes, marked: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for row, column in zip(*np.nonzero(marked), strict=True):
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0))

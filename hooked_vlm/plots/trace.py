"""Figures of causal traces: heatmaps over tokens, and maps over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hooked_vlm import results
from hooked_vlm.plots.style import (
    COLOR_MAPS,
    LONGEST_ANSWER,
    SITE_TITLES,
    RowHeight,
    TitleLine,
    TitleTop,
    draw_images,
    hatch,
    n_lines,
    shortened,
    with_noise_floor,
    wrapped,
    write_title,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity = Literal["patched", "effect", "normalized"]


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

    ``quantity="patched"`` shows the metric itself, on a scale from the corrupted to the clean run. Hatched cells give
    the source run by construction. Positions of single patches are left to :func:`patch_trace_figure`.

    Args:
        images: (caption, picture) pairs, shown on the left.

    Raises:
        ValueError: a result that holds nothing but single patches.
    """
    from matplotlib.figure import Figure

    towers = [_without_patches(results.tower(result, name, sample)) for name in result.tower.values]
    towers = [part for part in towers if part.sizes["position"]]
    if not towers:
        raise ValueError("the result holds single patches of an image alone: they are drawn by patch_trace_figure")
    n_sites = max(part.sizes["site"] for part in towers)
    heights = [max(0.8, RowHeight * part.sizes["position"]) for part in towers]
    longest = max(len(shortened(token)) for part in towers for token in part.token.values)
    left = max(0.95, 0.45 + 0.062 * longest)
    pictures_width, panels_width = (2.0 if images else 0.0), left + 0.15 + 2.35 * n_sites
    title = wrapped(with_noise_floor(title, result, metric), pictures_width + panels_width)
    top = TitleTop + TitleLine * max(2, n_lines(title)) + 0.39
    height = top + max(sum(heights) + 0.9 * len(towers) - 0.1, 1.6 * len(images))
    figure = Figure(figsize=(pictures_width + panels_width, height))
    right: Any = figure
    if images:
        panels: Any = figure.subfigures(1, 2, width_ratios=[pictures_width, panels_width])
        draw_images(panels[0], images, top=1 - (top - 0.1) / height)
        right = panels[1]
    grid = right.subplots(
        len(towers), n_sites, squeeze=False, gridspec_kw={"height_ratios": heights, "hspace": 0.9 / np.mean(heights)}
    )
    for part, axes_row in zip(towers, grid, strict=True):
        for axes in axes_row[part.sizes["site"] :]:
            axes.remove()
        for axes, site in zip(axes_row, part.site.values, strict=False):
            _draw_heatmap(axes, part.sel(site=site, metric=metric), str(site), quantity, metric)
            # One panel names the rows of all beside it.
            axes.tick_params(labelleft=axes is axes_row[0])
        axes_row[0].set_ylabel(str(part.tower.values).replace("_", " "), fontsize=9)
    # Margins in inches: room for token names on the left and the title above.
    right.subplots_adjust(
        left=left / panels_width,
        right=1 - 0.45 / panels_width,
        top=1 - top / height,
        bottom=0.5 / height,
        wspace=0.36,
    )
    write_title(figure, title)
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

    Each patch is tinted by what patching its position alone does, and is clear where that is nothing. Where tiles
    overlap (LLaVA-NeXT), the finer ones are drawn over the coarser. Parts that no patch sees (cropped off, say) are
    bare.

    Args:
        image: the picture that was traced, as it was given.
        picture: which of the row's pictures, where there are several.
        layers: by default all, or eight evenly spaced ones of more.

    Raises:
        ValueError: a result that holds no positions of such a picture.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    from hooked_vlm.processing import load_image

    part = _patches_of(result, sample, picture)
    every = part.layer.values
    chosen = every[np.linspace(0, len(every) - 1, min(8, len(every))).round().astype(int)] if layers is None else layers
    part = part.sel(layer=list(chosen), metric=metric)
    shown = load_image(image).convert("L")
    sites = [str(site) for site in part.site.values]
    # Inches; a panel is as the picture is, within reason.
    across, down = 1.35, 1.35 * min(max(shown.height / shown.width, 0.65), 1.6)
    left, gap_across, gap_down, bottom = 0.4, 0.08, 0.12, 0.08
    bar_title = _bar_title(part, quantity, metric)
    bar = max(0.75, 0.2 + 0.065 * max(map(len, bar_title.splitlines())))
    width = left + len(chosen) * (across + gap_across) + bar
    title = wrapped(with_noise_floor(title, result, metric), width)
    top = TitleTop + TitleLine * max(1, n_lines(title)) + 0.35
    height = top + len(sites) * (down + gap_down) - gap_down + bottom
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(len(sites), len(chosen), squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - (bar + gap_across) / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=gap_across / across,
        hspace=gap_down / down,
    )
    for place, (site, row) in enumerate(zip(sites, grid, strict=True)):
        values = part.sel(site=site)[quantity].transpose("layer", "position").values
        tint = _Tint(COLOR_MAPS.get(site, "Greys"), values, _ends(part, quantity))
        for axes, layer, shades in zip(row, chosen, values, strict=True):
            _draw_over(axes, shown, part.box.values, shades, tint)
            if place == 0:
                axes.set_title(f"layer {layer}", fontsize=8, pad=3)
        row[0].set_ylabel(SITE_TITLES.get(site, site), fontsize=8)
        box = row[-1].get_position(original=True)
        bar_axes = figure.add_axes((1 - bar / width, box.y0, 0.1 / width, box.height))
        figure.colorbar(ScalarMappable(tint.norm, tint.on_white), cax=bar_axes).ax.tick_params(labelsize=7)
        if place == 0:
            bar_axes.set_title(bar_title, fontsize=8, pad=5, loc="left", parse_math=False)
    write_title(figure, title)
    return figure


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


class _Tint:
    """A color map that is clear where patching does nothing, and the denser the more it does."""

    def __init__(self, color_map: str, values: np.ndarray, ends: tuple[float, float]) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap, Normalize

        low, high = _scale(values, ends)
        self.norm = Normalize(low, high)
        levels = np.linspace(0, 1, 256)
        far = abs(low + levels * (high - low) - ends[0])
        colors = colormaps[color_map](levels if ends[0] <= ends[1] else levels[::-1])
        colors[:, 3] = 0.85 * far / max(far.max(), 1e-12)
        self.clear = ListedColormap(colors)
        self.on_white = ListedColormap(1 - colors[:, 3:] * (1 - colors[:, :3]))


def _draw_over(axes: Axes, image: Any, boxes: np.ndarray, values: np.ndarray, tint: _Tint) -> None:
    """Tinted boxes over a picture in light grey."""
    from matplotlib.collections import PolyCollection

    axes.imshow(image, cmap="gray", vmin=-160, vmax=255)
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    patches = PolyCollection(list(corners), cmap=tint.clear, norm=tint.norm, edgecolors="none")
    patches.set_array(values)
    axes.add_collection(patches, autolim=False)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_heatmap(axes: Axes, part: xr.Dataset, site: str, quantity: Quantity, metric: str) -> None:
    values = part[quantity].transpose("position", "layer").values
    low, high = _scale(values, _ends(part, quantity))
    mesh = axes.pcolormesh(values, cmap=COLOR_MAPS.get(site, "Greys"), vmin=low, vmax=high)
    hatch(axes, part.identity.transpose("position", "layer").values)
    axes.invert_yaxis()
    axes.set_title(SITE_TITLES.get(site, site), fontsize=9, loc="left")
    axes.set_xlabel("layer", fontsize=8)
    layers = part.layer.values
    step = next(step for step in (1, 2, 5, 10, len(layers)) if len(layers) <= 10 * step)
    axes.set_xticks(np.arange(0, len(layers), step) + 0.5, layers[::step])
    axes.set_yticks(np.arange(part.sizes["position"]) + 0.5, map(shortened, part.token.values), parse_math=False)
    axes.tick_params(labelsize=8, length=2)
    # As high as the heatmap, however high that is: its title must stand above both.
    slender = max(20.0, RowHeight * part.sizes["position"] / 0.13)
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.08, pad=0.05, aspect=slender)
    bar.ax.tick_params(labelsize=7)
    bar.ax.set_title(_bar_title(part, quantity, metric), fontsize=8, pad=5, parse_math=False)


def _ends(part: xr.Dataset, quantity: Quantity) -> tuple[float, float]:
    """Where nothing is done, and where the source run is reached."""
    ends = float(part.corrupted), float(part.clean)
    is_noising = part.attrs.get("direction") == "noising"
    start, goal = ends[::-1] if is_noising else ends
    if quantity == "normalized":
        return (1.0, 0.0) if is_noising else (0.0, 1.0)
    return (start, goal) if quantity == "patched" else (0.0, goal - start)


def _scale(values: np.ndarray, ends: tuple[float, float]) -> tuple[float, float]:
    """From one run to the other, wider where cells lie outside."""
    finite = [*values[np.isfinite(values)], *ends]
    return min(finite), max(finite)


def _bar_title(part: xr.Dataset, quantity: Quantity, metric: str) -> str:
    answer, foil = (shortened(name.values, LONGEST_ANSWER) for name in (part.answer, part.foil))
    break_ = "\n" if len(answer) + len(foil) > LONGEST_ANSWER else " "
    score = f"p({answer})" if metric == "probability" else f"{answer}{break_}− {foil}"
    return {"patched": score, "effect": f"Δ {score}", "normalized": f"norm. {score}"}[quantity]

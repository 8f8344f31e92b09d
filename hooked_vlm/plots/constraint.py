"""Figures of constraint tracing: heatmaps of windows, lines of peaks, and what attention carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from hooked_vlm.experiments.parts.roles import by_role
from hooked_vlm.experiments.parts.sites import window
from hooked_vlm.plots.style import (
    COLOR_MAPS,
    SITE_TITLES,
    RowHeight,
    TitleLine,
    TitleTop,
    hatch,
    n_lines,
    shortened,
    wrapped,
    write_title,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRIC_TITLES = {
    "probability": "p(answer)",
    "log_probability": "log p(answer)",
    "logit_difference": "answer − foil",
    "kl_divergence": "KL divergence",
}
BAR_TITLES = {"patched": "{}", "effect": "Δ {}", "normalized": "norm. {}"}
_IMAGE, _REST = "(image)", "(rest of image)"
"""Rows that sum a picture's positions: of the source's patches, if those are some of it, and of the others."""
LINE_COLORS = ("#1b6ca8", "#c8553d", "#5b8e3e", "#7a5195", "#8c6d1f", "#444444")


def constraint_trace_figure(
    result: xr.Dataset,
    *,
    sample: int | None = None,
    tower: str | None = None,
    metric: str = "probability",
    quantity: Literal["patched", "effect", "normalized"] = "effect",
    title: str = "",
) -> Figure:
    """Heatmaps: tokens or roles down, layers across; a column of panels for each site, a row for each window.

    All panels of a site have one scale, so that windows can be compared. Hatched cells change nothing whatever the
    model (``no_op``).

    Args:
        result: of :func:`~hooked_vlm.experiments.constraint_trace.constraint_trace` or ``window_study``.
        sample: which one's tokens are shown; None for the mean over all, by role.
        tower: by default the first.

    Raises:
        ValueError: a tower, metric or sample that the result does not have.
    """
    from matplotlib.figure import Figure

    part = _chosen(result, tower, metric)
    part = _mean_by_role(part, quantity) if sample is None else _of_sample(part, sample, quantity)
    names = [shortened(name) for name in part.row.values]
    sites, widths = part.site.values.tolist(), part.window.values.tolist()
    panel = max(0.8, RowHeight * len(names))
    left, bar, across = 0.55 + 0.065 * max(map(len, names)), 0.85, max(1.5, 0.22 * part.sizes["layer"])
    width = left + len(sites) * (across + bar)
    title = wrapped(title, width)
    top, between, bottom = TitleTop + TitleLine * n_lines(title) + 0.5, 0.62, 0.5
    height = top + len(widths) * (panel + between) - between + bottom
    figure = Figure(figsize=(width, height))
    for down, size in enumerate(widths):
        for place, site in enumerate(sites):
            x, y = left + place * (across + bar), height - top - down * (panel + between) - panel
            axes = figure.add_axes((x / width, y / height, across / width, panel / height))
            own = part.sel(site=site)
            mesh = _heatmap(axes, own.sel(window=size), names if not place else (), COLOR_MAPS.get(site, "Greys"))
            mesh.set_clim(*_limits(own))
            where = f"{SITE_TITLES.get(site, site)}, {_window_name(part, size)}"
            axes.set_title(where, fontsize=8, loc="left")
            if down == len(widths) - 1:
                axes.set_xlabel("layer", fontsize=8)
            bar_axes = figure.add_axes(((x + across + 0.08) / width, y / height, 0.09 / width, panel / height))
            figure.colorbar(mesh, cax=bar_axes).ax.tick_params(labelsize=7)
            bar_title = BAR_TITLES[quantity].format(METRIC_TITLES.get(metric, metric))
            bar_axes.set_ylabel(bar_title, fontsize=7, labelpad=2)
    write_title(figure, title)
    return figure


def window_study_figure(peaks: xr.Dataset, *, tower: str | None = None, title: str = "") -> Figure:
    """The largest effect in each layer: a column of panels for each window, a row for each site, a line a group.

    Shades are bootstrap intervals over samples.

    Args:
        peaks: of :func:`~hooked_vlm.experiments.constraint_trace.peak_by_layer`.
        tower: by default the first.

    Raises:
        ValueError: a tower that the result does not have.
    """
    from matplotlib.figure import Figure

    part = _of_tower(peaks, tower).dropna("layer", how="all", subset=["mean"])
    sites, widths = part.site.values.tolist(), part.window.values.tolist()
    across, down, left, right, bottom, gap = 1.9, 1.25, 0.75, 0.15, 0.85, 0.45
    width = left + len(widths) * (across + 0.2) - 0.2 + right
    title = wrapped(title, width)
    top = TitleTop + TitleLine * n_lines(title) + 0.4
    height = top + len(sites) * (down + gap) - gap + bottom
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(len(sites), len(widths), squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=0.2 / across,
        hspace=gap / down,
    )
    for site, row in zip(sites, grid, strict=True):
        for size, axes in zip(widths, row, strict=True):
            _lines(axes, part.sel(site=site, window=size))
            axes.set_title(f"{SITE_TITLES.get(site, site)}, {_window_name(part, size)}", fontsize=8, loc="left")
        label = BAR_TITLES[part.attrs["quantity"]].format(METRIC_TITLES.get(part.attrs["metric"], ""))
        row[0].set_ylabel(f"peak {label}", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("layer", fontsize=8)
    lines = grid[0, 0].get_lines()[: part.sizes["group"]]
    figure.legend(
        lines,
        [f"{name or 'all'} (n={count})" for name, count in zip(part.group.values, part.n.values, strict=True)],
        loc="lower left",
        bbox_to_anchor=(0.3 / width, 0.02 / height),
        ncols=max(1, int(width / 1.6)),
        fontsize=8,
        frameon=False,
    )
    write_title(figure, title)
    return figure


def contribution_figure(result: xr.Dataset, *, sample: int | None = None, title: str = "") -> Figure:
    """A heatmap of what each token contributes to the target in each layer; a picture's patches are one row, their sum.

    The source's tokens are marked by an arrow. A picture's patches are two rows where the source is some of them.

    Args:
        result: of :func:`~hooked_vlm.experiments.attention_contribution.attention_contribution`.
        sample: which one's tokens are shown; None for the mean over all, by role.

    Raises:
        ValueError: a sample that the result does not have; means over inputs, whose positions have no roles.
    """
    from matplotlib.figure import Figure

    rows = _contribution_rows(result, sample)
    names = [f"{'▸ ' if row.is_source else ''}{shortened(row.name)}" for row in rows]
    values = np.stack([row.values for row in rows])
    left, bar, across = 0.6 + 0.065 * max(map(len, names)), 0.85, max(1.8, 0.24 * values.shape[1])
    width, panel, bottom = left + across + bar, max(0.8, RowHeight * len(names)), 0.5
    title = wrapped(title, width)
    top = TitleTop + TitleLine * n_lines(title) + 0.35
    height = top + panel + bottom
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, across / width, panel / height))
    mesh = axes.pcolormesh(values, cmap="Greens", vmin=0)
    _ticks(axes, names, result.layer.values)
    tower, _, attention = result.reader.item().rpartition(".")
    axes.set_xlabel(f"layer of the {tower.replace('_', ' ')}'s {SITE_TITLES[attention]}", fontsize=8)
    axes.set_title(f"to {result.attrs['target']}", fontsize=8, loc="left", parse_math=False)
    bar_axes = figure.add_axes(((left + across + 0.08) / width, bottom / height, 0.09 / width, panel / height))
    figure.colorbar(mesh, cax=bar_axes).ax.tick_params(labelsize=7)
    bar_axes.set_title("norm", fontsize=8, pad=5)
    write_title(figure, title)
    return figure


def _of_tower(result: xr.Dataset, tower: str | None) -> xr.Dataset:
    towers = result.tower.values.tolist()
    if tower is not None and tower not in towers:
        raise ValueError(f"the result has no tower {tower!r}; it has {', '.join(towers)}")
    return result.sel(tower=tower or towers[0])


def _chosen(result: xr.Dataset, tower: str | None, metric: str) -> xr.Dataset:
    if metric not in result.metric.values:
        raise ValueError(f"the result's metrics are {', '.join(result.metric.values)}, not {metric!r}")
    if "window" not in result.dims:
        result = result.expand_dims(window=[int(result.attrs["window"])])
    return _of_tower(result, tower).sel(metric=metric)


def _of_sample(part: xr.Dataset, sample: int, quantity: str) -> xr.Dataset:
    """A sample's cells, its tokens along ``row``."""
    _check_sample(part, sample)
    own = part.isel(sample=sample)[[quantity, "no_op", "token"]]
    own = own.isel(position=np.flatnonzero(own.token.values != "")).dropna("layer", how="all", subset=[quantity])
    own = own.rename({quantity: "shown", "position": "row"}).assign_coords(row=own.token.values)
    return own.assign_attrs(part.attrs)


def _mean_by_role(part: xr.Dataset, quantity: str) -> xr.Dataset:
    """Means over samples, their roles along ``row``."""
    if "role" not in part.coords:
        raise ValueError("this result has no roles: give the sample to show")
    cells = by_role(part[[quantity, "no_op"]].assign_coords(role=part.role))
    known = cells[quantity].notnull()
    # Where it does nothing in every sample that has it.
    no_op = (cells.no_op | ~known).all("sample") & known.any("sample")
    own = cells[[quantity]].mean("sample").assign(no_op=no_op).rename({quantity: "shown", "role": "row"})
    return own.dropna("row", how="all", subset=["shown"]).assign_attrs(part.attrs)


def _check_sample(part: xr.Dataset, sample: int) -> None:
    if not -part.sizes["sample"] <= sample < part.sizes["sample"]:
        raise ValueError(f"the result has {part.sizes['sample']} samples; there is no sample {sample}")


def _limits(part: xr.Dataset) -> tuple[float, float]:
    finite = part.shown.values[np.isfinite(part.shown.values)]
    return min(0.0, *finite), max(1e-6, *finite)


def _heatmap(axes: Axes, part: xr.Dataset, names: Sequence[str], color_map: str) -> Any:
    cells = part.transpose("row", "layer")
    mesh = axes.pcolormesh(cells.shown.values, cmap=color_map)
    hatch(axes, cells.no_op.values)
    _ticks(axes, names, cells.layer.values)
    return mesh


def _ticks(axes: Axes, names: Sequence[str], layers: np.ndarray) -> None:
    """Names down, layers across."""
    step = next(step for step in (1, 2, 5, 10, len(layers)) if len(layers) <= 10 * step)
    axes.invert_yaxis()
    axes.set_xticks(np.arange(0, len(layers), step) + 0.5, layers[::step])
    axes.set_yticks(np.arange(len(names)) + 0.5, names, parse_math=False)
    axes.tick_params(labelsize=8, length=2)


def _window_name(part: xr.Dataset, width: int) -> str:
    """How many layers a window has in the middle of a tower."""
    n_restored = len(window(10**6, width, 2 * 10**6, part.attrs["window_convention"]))
    return "one layer" if n_restored == 1 else f"{n_restored} layers"


def _lines(axes: Axes, part: xr.Dataset) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, group in enumerate(part.group.values):
        own, color = part.sel(group=group), LINE_COLORS[place % len(LINE_COLORS)]
        style = ("-", "--", ":")[place // len(LINE_COLORS) % 3]
        axes.plot(own.layer, own["mean"], style, color=color, linewidth=1.4, marker="o", markersize=2.5)
        axes.fill_between(own.layer, own.low, own.high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(0, color="0.7", linewidth=0.6, zorder=0)
    axes.tick_params(labelsize=8, length=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


class _Row(NamedTuple):
    """One row of a heatmap of contributions."""

    name: str
    is_source: bool
    values: np.ndarray


def _contribution_rows(result: xr.Dataset, sample: int | None) -> list[_Row]:
    """Tokens of a sample, or roles, in their order; all positions of a picture in one row."""
    if sample is not None:
        _check_sample(result, sample)
        result = result.isel(sample=[sample])
    elif "role" not in result.coords:
        raise ValueError("contributions of inputs have no roles: give the sample to show")
    part = result.isel(tower=0).transpose("sample", "position", "layer", ...)
    tokens, is_image = part.token.values, part.is_image.values
    is_seen = is_image & part.is_source.values
    of_image = np.where(is_seen | ~is_seen.any(), _IMAGE, _REST)
    keys = part.role.values if sample is None else np.broadcast_to(part.position.values.astype(str), tokens.shape)
    keys = np.where(tokens == "", "", np.where(is_image, of_image, keys))
    places: dict[str, list[int]] = {}
    for one, place in np.argwhere(keys != ""):
        places.setdefault(str(keys[one, place]), []).append(place)
    rows = []
    for key in sorted(places, key=lambda key: float(np.mean(places[key]))):
        own = keys == key
        total, count = np.where(own[..., None], part.contribution.values, 0).sum(1), own.sum(1, keepdims=True)
        is_sum = key in (_IMAGE, _REST)
        values = total if is_sum else total / np.maximum(count, 1)
        name = key if sample is None or is_sum else str(tokens[0, int(key)])
        rows.append(_Row(name, bool(part.is_source.values[own].any()), values[count[:, 0] > 0].mean(0)))
    return rows

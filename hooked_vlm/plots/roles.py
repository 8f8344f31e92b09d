"""Heatmaps of means over samples: roles of the words down, layers across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_vlm.experiments.parts.roles import by_role
from hooked_vlm.plots.style import (
    SITE_TITLES,
    RowHeight,
    TitleLine,
    TitleTop,
    add_bar,
    draw_cells,
    hatch,
    in_words,
    n_lines,
    number,
    reach,
    shortened,
    with_noise_floor,
    wrapped,
    write_title,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Quantity = Literal["patched", "effect", "normalized"]


class _Panel(NamedTuple):
    """One heatmap."""

    title: str
    values: Float[np.ndarray, "role layer"]
    is_identity: Bool[np.ndarray, "role layer"]


class _Row(NamedTuple):
    """Heatmaps of the same roles."""

    name: str
    roles: list[str]
    panels: list[_Panel]


def role_figure(
    result: xr.Dataset, *, metric: str = "logit_difference", quantity: Quantity = "normalized", title: str = ""
) -> Figure:
    """A trace of samples, as in Golovanevsky et al. 2025: one row of panels a tower, one panel a site.

    Means over samples, on one scale for all panels, white where patching does nothing. A role that not all samples have
    says how many do; cells that none has are grey. Hatched cells give the source run by construction.

    Args:
        result: of :func:`~hooked_vlm.experiments.causal_trace` or :func:`~hooked_vlm.experiments.notice`, over samples.
    """
    means = by_role(result).sel(metric=metric)
    n = result.sizes["sample"]
    rows = []
    for tower in result.tower.values.tolist():
        part = means.sel(tower=tower).dropna("site", how="all", subset=[quantity])
        sites = [SITE_TITLES.get(site, site) for site in part.site.values.tolist()]
        rows.append(_row(tower, [part.sel(site=site) for site in part.site], sites, quantity, n))
    told = with_noise_floor(f"{title}{'; ' if title else ''}mean over {n} samples", result, metric)
    return _figure(rows, result.layer.values, "layer", in_words(quantity, metric), told)


def comparison_figure(compared: xr.Dataset, *, tower: str | None = None, title: str = "") -> Figure:
    """Runs side by side: one column of panels a run, one row a site; and how far their cells agree.

    Args:
        compared: of :func:`~hooked_vlm.experiments.compare.compare`.
        tower: by default the first.

    Raises:
        ValueError: a tower that the result does not have.
    """
    towers = compared.tower.values.tolist()
    tower = towers[0] if tower is None else tower
    if tower not in towers:
        raise ValueError(f"no tower {tower!r} was compared; there are {', '.join(towers)}")
    quantity, metric = str(compared.attrs["compared"]).split(" of ")
    part = compared.sel(tower=tower, metric=metric)
    across = "depth" if "depth" in part.dims else "layer"
    part = part.rename({across: "layer"}).dropna("site", how="all", subset=[quantity])
    runs, n = part.run.values.tolist(), compared.sizes["sample"]
    rows = [
        _row(
            SITE_TITLES.get(site, site),
            [part.sel(site=site, run=run) for run in runs],
            runs,
            quantity,
            n,
        )
        for site in part.site.values.tolist()
    ]
    agreements = [
        f"{one} and {other} {float(part.rank_correlation.sel(run=one, other=other)):.2f} "
        f"[{float(part.low.sel(run=one, other=other)):.2f}, {float(part.high.sel(run=one, other=other)):.2f}]"
        for place, one in enumerate(runs)
        for other in runs[place + 1 :]
    ]
    said = f"{tower.replace('_', ' ')}, mean over {n} samples; rank correlation of cells: {'; '.join(agreements)}"
    layers = part.layer.values
    return _figure(
        rows,
        layers if across == "layer" else np.array([f"{depth:.1f}" for depth in layers]),
        "layer" if across == "layer" else "relative depth",
        in_words(quantity, metric),
        f"{title}{'; ' if title else ''}{said}",
    )


def _row(name: str, parts: Sequence[xr.Dataset], titles: Sequence[str], quantity: str, n: int) -> _Row:
    """Panels with the roles that any of them has."""
    values = [part[quantity].transpose("sample", "role", "layer") for part in parts]
    counts: Int[np.ndarray, " role"] = np.max([own.notnull().any("layer").sum("sample") for own in values], axis=0)
    kept = np.flatnonzero(counts)
    labels = [
        shortened(role) + (f" ({count})" if count < n else "")
        for role, count in zip(parts[0].role.values[kept], counts[kept], strict=True)
    ]
    identities = [_identities(part)[kept] for part in parts]
    panels = [
        _Panel(title, own.mean("sample").values[kept], marked)
        for title, own, marked in zip(titles, values, identities, strict=True)
    ]
    return _Row(name.replace("_", " "), labels, panels)


def _identities(part: xr.Dataset) -> Bool[np.ndarray, "role layer"]:
    if "identity" not in part:
        return np.zeros((part.sizes["role"], part.sizes["layer"]), dtype=bool)
    marked = part.identity.fillna(0).astype(bool)
    return (marked.any("sample") if "sample" in marked.dims else marked).transpose("role", "layer").values


def _figure(rows: Sequence[_Row], layers: np.ndarray, across: str, bar_title: str, title: str) -> Figure:
    from matplotlib.figure import Figure

    n_columns = max(len(row.panels) for row in rows)
    heights = [max(0.8, RowHeight * len(row.roles)) for row in rows]
    left = 0.45 + 0.068 * max(len(label) for row in rows for label in row.roles)
    width = left + 1.9 * n_columns + 1.0
    title = wrapped(title, width)
    top, gap, bottom = TitleTop + TitleLine * n_lines(title) + 0.35, 0.75, 0.5
    height = top + sum(heights) + gap * (len(rows) - 1) + bottom
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(len(rows), n_columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.subplots_adjust(
        left=left / width,
        right=1 - 1.0 / width,
        top=1 - top / height,
        bottom=bottom / height,
        hspace=gap / float(np.mean(heights)),
        wspace=0.12,
    )
    far = max(reach(panel.values) for row in rows for panel in row.panels)
    for row, axes_row in zip(rows, grid, strict=True):
        for axes in axes_row[len(row.panels) :]:
            axes.set_visible(False)
        for panel, axes in zip(row.panels, axes_row, strict=False):
            mesh = draw_cells(axes, panel.values, far)
            hatch(axes, panel.is_identity)
            number(axes.xaxis, layers)
            axes.set_xlabel(across, fontsize=8)
            axes.set_title(panel.title, fontsize=9, loc="left")
            axes.set_yticks([])
        axes_row[0].set_yticks(np.arange(len(row.roles)) + 0.5, row.roles, parse_math=False)
        axes_row[0].set_ylabel(row.name, fontsize=9)
    add_bar(figure, grid, mesh, bar_title)
    write_title(figure, title)
    return figure

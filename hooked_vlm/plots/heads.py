"""Figures of heads that were patched: head by head, and task by task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from hooked_vlm.experiments.parts.heads import HEAD_DIMS, heads_of
from hooked_vlm.plots.style import (
    SITE_TITLES,
    RowHeight,
    TitleLine,
    TitleTop,
    add_bar,
    in_words,
    n_lines,
    number,
    wrapped,
    write_title,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODALITIES = {"sip": "picture (SIP)", "str": "question (STR)"}


def head_grid_figure(selection: xr.Dataset, *, title: str = "") -> Figure:
    """Every head's score, layers down and heads across; those that are selected are outlined.

    Args:
        selection: of :func:`~hooked_vlm.experiments.parts.heads.select_heads`.
    """
    from matplotlib.figure import Figure

    scores = selection.score.transpose(*HEAD_DIMS)
    parts = [
        (scores.sel(tower=tower, attention=attention), selection.selected.sel(tower=tower, attention=attention))
        for tower in selection.tower.values.tolist()
        for attention in selection.attention.values.tolist()
    ]
    parts = [(score, chosen) for score, chosen in parts if bool(score.notnull().any())]
    across, down = (max(1.5, cell * scores.sizes[dim]) for cell, dim in ((0.24, "head"), (0.24, "layer")))
    left, bottom, right, gap = 0.65, 0.55, 1.05, 0.55
    width = left + len(parts) * (across + gap) - gap + right
    facts = selection.attrs
    said = (
        f"{facts['n_selected']} of {facts['n_heads']} heads reach the mean + {facts['k']:g} sd = "
        f"{facts['threshold']:.3g}; {facts['samples_used']} samples"
    )
    title = wrapped(f"{title}{'; ' if title else ''}{said}", width)
    top = TitleTop + TitleLine * n_lines(title) + 0.4
    height = top + down + bottom
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(1, len(parts), squeeze=False)
    figure.subplots_adjust(
        **{"left": left / width, "right": 1 - right / width, "top": 1 - top / height, "bottom": bottom / height},
        wspace=gap / across,
    )
    highest = float(scores.max())
    for axes, (score, chosen) in zip(grid[0], parts, strict=True):
        values = score.transpose("layer", "head").values
        mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap="Purples", vmin=0, vmax=highest or 1)
        axes.set_facecolor("0.9")
        _outline(axes, chosen.transpose("layer", "head").values)
        axes.invert_yaxis()
        number(axes.xaxis, selection["head"].values)
        number(axes.yaxis, selection["layer"].values)
        axes.set_xlabel("head", fontsize=8)
        tower, kind = (str(score[name].values) for name in ("tower", "attention"))
        axes.set_title(f"{tower.replace('_', ' ')}\n{SITE_TITLES[kind]}", fontsize=8, loc="left")
    grid[0][0].set_ylabel("layer", fontsize=8)
    add_bar(figure, grid, mesh, f"mean |·| of\n{in_words(facts['quantity'], facts['metric'])}")
    write_title(figure, title)
    return figure


def selection_matrix_figure(matrix: xr.Dataset, *, title: str = "") -> Figure:
    """Heads that are selected anywhere, down; tasks and modalities across. Shades say how far a head stands out.

    Selected cells are outlined; universal heads are marked with a star.

    Args:
        matrix: of :func:`~hooked_vlm.experiments.parts.heads.universal_heads`.

    Raises:
        ValueError: no head is selected for anything.
    """
    from matplotlib.figure import Figure

    heads = heads_of(matrix.selected.any(("task", "modality")))
    if not heads:
        raise ValueError("no head is selected for any task: there is nothing to draw")
    columns = [(task, modality) for modality in matrix.modality.values.tolist() for task in matrix.task.values.tolist()]
    spread = (matrix.score - matrix.score.mean(HEAD_DIMS)) / matrix.score.std(HEAD_DIMS)
    universal = set(heads_of(matrix.universal))
    cells, chosen = (
        np.array(
            [
                [table.sel(task=task, modality=modality).sel(dict(zip(HEAD_DIMS, head, strict=True))).item()]
                for head in heads
                for task, modality in columns
            ]
        ).reshape(len(heads), len(columns))
        for table in (spread, matrix.selected)
    )
    several = len({head[:2] for head in heads}) > 1
    names = [f"{head if several else head.label}{' ★' if head in universal else ''}" for head in heads]
    left, right = 0.35 + 0.068 * max(map(len, names)), 0.95
    width = max(3.4, left + 0.62 * len(columns) + right)
    said = f"{len(heads)} heads are selected, {len(universal)} for all (★)"
    title = wrapped(f"{title}{'; ' if title else ''}{said}", width)
    top, bottom = TitleTop + TitleLine * n_lines(title) + 0.35, 0.3 + 0.062 * max(len(task) for task, _ in columns)
    down = max(1.2, RowHeight * len(heads))
    height = top + down + bottom
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, down / height),
    )
    far = float(np.nanmax(np.abs(cells)))
    mesh = axes.pcolormesh(np.ma.masked_invalid(cells), cmap="PuOr_r", vmin=-far, vmax=far)
    _outline(axes, chosen.astype(bool))
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(heads)) + 0.5, names, fontsize=8)
    axes.set_xticks(np.arange(len(columns)) + 0.5, [task for task, _ in columns], rotation=90, fontsize=8)
    n_tasks = matrix.sizes["task"]
    for place, modality in enumerate(matrix.modality.values.tolist()):
        middle = ((place + 0.5) * n_tasks, 0)
        words: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(MODALITIES.get(modality, modality), middle, **words)
        if place:
            axes.axvline(place * n_tasks, color="black", linewidth=1)
    add_bar(figure, np.array([[axes]]), mesh, "score, sd\nover mean")
    write_title(figure, title)
    return figure


def _outline(axes: Axes, chosen: Bool[np.ndarray, "row column"]) -> None:
    from matplotlib.patches import Rectangle

    # A little inside of the cell, so that neighbours are told apart.
    for row, column in zip(*np.nonzero(chosen), strict=True):
        corner = (column + 0.06, row + 0.06)
        axes.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor="black", linewidth=1.4))

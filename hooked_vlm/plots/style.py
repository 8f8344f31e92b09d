"""What all figures share: words, colors, titles, pictures beside them, and how they are written."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

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

RowHeight = 0.27
"""Inches of one token's row."""
TitleSize, TitleTop, TitleLine = 10, 0.12, 0.17
"""Of a figure's title: points, inches above it, inches a line."""
LONGEST_LABEL, LONGEST_ANSWER = 24, 11
"""Letters of a token beside a row, and above a color bar."""


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write ``path`` with the endings ``.png`` (200 dots an inch) and ``.pdf``; returns both paths."""
    written = []
    for ending in (".png", ".pdf"):
        target, buffer = Path(path).with_suffix(ending), BytesIO()
        # In memory first: where a disk is full, the writer of PDFs says something else.
        figure.savefig(buffer, format=ending[1:], dpi=200)
        with whole_file(target) as temporary:
            temporary.write_bytes(buffer.getbuffer())
        written.append(target)
    return written


def draw_images(figure: Any, images: Sequence[tuple[str, Any]], *, top: float) -> None:
    """Pictures with captions, one under the other."""
    column = figure.subplots(max(2, len(images)), 1, squeeze=False, gridspec_kw={"top": top, "hspace": 0.25})[:, 0]
    for axes in column[len(images) :]:
        axes.remove()
    for axes, (caption, image) in zip(column, images, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])


def hatch(axes: Axes, marked: np.ndarray) -> None:
    """Mark cells of a heatmap ``[row column]``."""
    from matplotlib.patches import Rectangle

    for row, column in zip(*np.nonzero(marked), strict=True):
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0))


def shortened(token: Any, longest: int = LONGEST_LABEL) -> str:
    """A label that fits beside a row."""
    text = str(token)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def with_noise_floor(title: str, result: xr.Dataset, metric: str) -> str:
    """A title that says below what a difference is rounding."""
    if "noise_floor" not in result:
        return title
    floor = float(result.noise_floor.sel(metric=metric))
    return f"{title}{'; ' if title else ''}noise floor {floor:.0g} ({result.attrs['dtype']})"


def wrapped(title: str, width: float) -> str:
    """A title in lines that fit into ``width`` inches."""
    letters = int((width - 0.4) * 72 / (0.62 * TitleSize))
    return "\n".join(
        part for line in title.splitlines() for part in textwrap.wrap(line, letters, break_on_hyphens=False) or [""]
    )


def n_lines(title: str) -> int:
    """Lines of a title that is wrapped."""
    return title.count("\n") + 1


def write_title(figure: Figure, title: str) -> None:
    """Put a title over a figure, from its left."""
    width, height = figure.get_size_inches()
    place = {"x": 0.2 / width, "ha": "left", "y": 1 - TitleTop / height, "va": "top"}
    figure.suptitle(title, fontsize=TitleSize, parse_math=False, **place)


def in_words(quantity: str, metric: str) -> str:
    """A quantity of a metric, a word a line."""
    sign = {"patched": "", "effect": "Δ ", "normalized": "norm. "}[quantity]
    return sign + metric.replace("_", "\n")


def reach(values: Float[np.ndarray, "..."]) -> float:
    """How far values go from 0; 1 where they are all 0."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def draw_cells(axes: Axes, values: Float[np.ndarray, "row layer"], far: float) -> Any:
    """A heatmap, white at 0; what is NaN is grey. The first row is on top."""
    axes.set_facecolor("0.9")
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap="RdBu_r", vmin=-far, vmax=far)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8, length=2)
    return mesh


def number(axis: Any, labels: np.ndarray) -> None:
    """Tick labels, at most about ten."""
    step = next(step for step in (1, 2, 5, 10, 20, len(labels)) if len(labels) <= 10 * step)
    axis.set_ticks(np.arange(0, len(labels), step) + 0.5, labels[::step])
    axis.set_tick_params(labelsize=8, length=2)


def add_bar(figure: Figure, grid: np.ndarray, mesh: Any, what: str) -> None:
    """One color bar for all panels, at their right."""
    width, height = figure.get_size_inches()
    boxes = [axes.get_position(original=True) for axes in grid.ravel()]
    right, low = max(box.x1 for box in boxes), min(box.y0 for box in boxes)
    room = 0.16 * (what.count("\n") + 1)
    axes = figure.add_axes(
        (right + 0.15 / width, low, 0.11 / width, max(box.y1 for box in boxes) - low - (room - 0.1) / height)
    )
    figure.colorbar(mesh, cax=axes).ax.tick_params(labelsize=7)
    axes.set_title(what, fontsize=8, pad=5, loc="left", parse_math=False)

"""What all figures share: words, colors, titles, pictures beside them, and how they are written."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
        target = Path(path).with_suffix(ending)
        with whole_file(target) as temporary:
            figure.savefig(temporary, dpi=200)
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

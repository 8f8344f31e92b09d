"""Figures of visual tokens: what ablating them does, and which they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hooked_vlm.plots.flow import LINE_COLORS
from hooked_vlm.plots.style import TitleLine, TitleTop, n_lines, shortened, wrapped, write_title
from hooked_vlm.statistics import bootstrap

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTHING = "nothing"
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")


def visual_tokens_figure(
    result: xr.Dataset,
    *,
    quantity: Literal["lost", "identified"] = "lost",
    conditions: Sequence[str] | None = None,
    title: str = "",
    level: float = 0.95,
) -> Figure:
    """How many objects are lost where tokens are ablated: a group of bars a condition, one an evaluation.

    Beside each condition stands how many tokens it has, in the mean, and of how many samples where not of all.

    Args:
        quantity: ``"lost"``, of the objects identified without ablation those that no longer are; or ``"identified"``,
            those identified, of all.
        conditions: some of the result's, in this order.

    Raises:
        ValueError: an unknown quantity or condition.
    """
    from matplotlib.figure import Figure

    if quantity not in ("lost", "identified"):
        raise ValueError(f"the quantity is 'lost' or 'identified', not {quantity!r}")
    shown = _conditions(result, conditions, without_nothing=quantity == "lost")
    ways = shown.evaluation.values.tolist()
    labels = _labels(shown, quantity)
    left = max(0.8, 0.35 + 0.068 * max(map(len, labels)))
    width = left + 3.9
    told = f"tokens replaced by {_replacement(result)}; {_numbers(shown[quantity])}"
    title = wrapped(f"{title}; {told}" if title else told, width)
    top, bottom = TitleTop + TitleLine * n_lines(title) + 0.36, 0.5
    height = top + len(labels) * max(0.3, 0.16 * len(ways) + 0.1) + bottom
    figure = Figure(figsize=(width, height))
    axes: Any = figure.subplots()
    figure.subplots_adjust(left=left / width, right=1 - 0.25 / width, top=1 - top / height, bottom=bottom / height)
    places, bar = np.arange(len(labels)), 0.8 / len(ways)
    for number, way in enumerate(ways):
        values = 100 * shown[quantity].sel(evaluation=way).transpose("sample", "condition").values
        interval = bootstrap(values, level=level)
        errors = [interval.estimate - interval.low, interval.high - interval.estimate]
        axes.barh(
            places + (number - (len(ways) - 1) / 2) * bar,
            interval.estimate,
            0.94 * bar,
            xerr=errors,
            color=LINE_COLORS[number % len(LINE_COLORS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white",
            linewidth=0.5,
            ecolor="0.25",
            capsize=2,
            error_kw={"elinewidth": 0.9},
            label=way,
        )
    axes.set_yticks(places, labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.set_xlim(0, 103)
    axes.set_xlabel({"lost": "lost, of those identified (%)", "identified": "identified (%)"}[quantity], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(
        loc="upper right",
        bbox_to_anchor=(1 - 0.2 / width, 1 - (top - 0.3) / height),
        ncols=len(ways),
        fontsize=8,
        frameon=False,
        borderaxespad=0.0,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_title(figure, title)
    return figure


def ablated_tokens_figure(
    result: xr.Dataset,
    image: Any,
    *,
    sample: int = 0,
    conditions: Sequence[str] | None = None,
    evaluation: str | None = None,
    columns: int = 4,
    title: str = "",
) -> Figure:
    """Which tokens of a picture were ablated, a panel a condition, and what the model then said.

    Tokens that see no part of the picture are not shown. Where tiles overlap (LLaVA-NeXT), a part of the picture is the
    darker the more of its tokens were ablated.

    Args:
        image: the picture, as it was given.
        evaluation: whose answers are quoted; by default the last one's.

    Raises:
        ValueError: an unknown condition or evaluation.
    """
    from matplotlib.figure import Figure

    from hooked_vlm.processing import load_image

    shown = _conditions(result, conditions, without_nothing=False).isel(sample=sample)
    ways = result.evaluation.values.tolist()
    way = ways[-1] if evaluation is None else evaluation
    if way not in ways:
        raise ValueError(f"the result has no evaluation {way!r}; it has {', '.join(ways)}")
    picture, names = load_image(image).convert("L"), shown.condition.values.tolist()
    n_columns = min(columns, len(names))
    n_rows = -(-len(names) // n_columns)
    across, down = 1.75, 1.75 * min(max(picture.height / picture.width, 0.65), 1.6)
    width = 0.2 + n_columns * (across + 0.15)
    title = wrapped(title or str(shown.question.values if "question" in shown.coords else ""), width)
    top, above = TitleTop + TitleLine * n_lines(title) + 0.05, 0.42
    height = top + n_rows * (down + above + 0.06)
    figure = Figure(figsize=(width, height))
    for number, name in enumerate(names):
        row, column = divmod(number, n_columns)
        left, low = 0.2 + column * (across + 0.15), height - top - (row + 1) * (down + above + 0.06) + 0.06
        axes = figure.add_axes((left / width, low / height, across / width, down / height))
        part = shown.sel(condition=name)
        _draw_tokens(axes, picture, part.box.values[part.ablated.values])
        said = str(part.text.sel(evaluation=way).values)
        verdict = "not run" if np.isnan(float(part.identified.sel(evaluation=way))) else f"“{shortened(said, 22)}”"
        axes.set_title(
            f"{name}: {_tokens(int(part.n_tokens))}\n{verdict}", fontsize=8, loc="left", pad=3, parse_math=False
        )
    write_title(figure, title)
    return figure


def _numbers(values: xr.DataArray) -> str:
    """How many samples there are, in each evaluation where that differs."""
    used = values.notnull().any("condition").sum("sample")
    counts = dict(zip(used.evaluation.values.tolist(), used.values.tolist(), strict=True))
    if len(set(counts.values())) == 1:
        return f"n = {next(iter(counts.values()))}"
    return "n = " + ", ".join(f"{count} ({way})" for way, count in counts.items())


def _labels(shown: xr.Dataset, quantity: str) -> list[str]:
    """Conditions, each with its number of tokens, and of samples where some have no such tokens."""
    labels = []
    most = int(shown[quantity].notnull().sum("sample").max())
    for name in shown.condition.values.tolist():
        part = shown.sel(condition=name)
        counts, used = part.n_tokens.values, int(part[quantity].notnull().sum("sample").max())
        facts = [_tokens(counts[counts > 0].mean())] if (counts > 0).any() else []
        facts += [f"n = {used}"] if used < most else []
        labels.append(f"{name} ({'; '.join(facts)})" if facts else name)
    return labels


def _tokens(count: float) -> str:
    return f"{count:.3g} token{'' if count == 1 else 's'}"


def _draw_tokens(axes: Axes, picture: Any, boxes: np.ndarray) -> None:
    """A picture in grey, with parts of it covered."""
    from matplotlib.collections import PolyCollection

    axes.imshow(picture, cmap="gray", vmin=-60, vmax=255)
    seen = boxes[~np.isnan(boxes).any(1)]
    corners = seen[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    covers = PolyCollection(
        list(corners), facecolors=(0.84, 0.37, 0.0, 0.55), edgecolors=(0.45, 0.18, 0.0), linewidths=0.5
    )
    axes.add_collection(covers, autolim=False)
    axes.set_xticks([])
    axes.set_yticks([])


def _conditions(result: xr.Dataset, chosen: Sequence[str] | None, *, without_nothing: bool) -> xr.Dataset:
    known = result.condition.values.tolist()
    names = [name for name in known if name != NOTHING or not without_nothing] if chosen is None else list(chosen)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the result has no condition {unknown[0]!r}; it has {', '.join(known)}")
    return result.sel(condition=names)


def _replacement(result: xr.Dataset) -> str:
    return {"mean": "a mean", "zero": "zeros", "resample": "another picture's"}.get(
        str(result.attrs.get("replace_by")), "others"
    )

"""Figures of information flow: what blocking an edge does in each layer, and how likely each layer makes the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from hooked_vlm.plots.style import TitleLine, TitleTop, n_lines, with_noise_floor, wrapped, write_title
from hooked_vlm.statistics import bootstrap

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C6D31")
"""Of Okabe and Ito, and one more: told apart by who does not see red or green, and mostly in grey."""
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
LABELS = {
    "probability": "p(answer)",
    "log_probability": "log p(answer) (nats)",
    "logit_difference": "logit difference",
    "kl_divergence": "KL from the clean run (nats)",
}
LegendLine = 0.19
"""Inches of a line of the legend."""


def information_flow_figure(
    result: xr.Dataset,
    *,
    quantity: Literal["relative", "change"] = "relative",
    metric: str = "probability",
    edges: Sequence[str] | None = None,
    title: str = "",
    level: float = 0.95,
) -> Figure:
    """What becomes of the answer where an edge is blocked: a line an edge, layers across (Zhang et al. 2025, figure 3).

    Each point is the mean over samples, with its bootstrap interval.

    Args:
        quantity: ``"relative"``, the change of the answer's probability in per cent of it; or the ``"change"`` of
            ``metric``.
        edges: some of the result's, by name.

    Raises:
        ValueError: a result without that quantity, metric or edge.
    """
    if quantity not in ("relative", "change") or quantity not in result:
        raise ValueError(f"the result has no quantity {quantity!r}; it has {', '.join(map(str, result.data_vars))}")
    _check("edge", edges or (), result.edge.values)
    if quantity == "change":
        _check("metric", [metric], result.metric.values)
    shown = result if edges is None else result.sel(edge=list(edges))
    values = shown.relative if quantity == "relative" else shown.change.sel(metric=metric)
    values = values.transpose("sample", "edge", "layer")
    label = "change of p(answer) (%)" if quantity == "relative" else f"change of {LABELS.get(metric, metric)}"
    lines = {str(name).replace(" - ", " − "): values.sel(edge=name).values for name in shown.edge.values}
    told = f"{title}{'; ' if title else ''}{_blocked_at_once(result)}, n = {result.sizes['sample']}"
    told = with_noise_floor(told, result, metric) if quantity == "change" else told
    figure, axes = _lines_figure(lines, [str(layer) for layer in result.layer.values], label, told, level)
    axes.axhline(0, color="0.4", linewidth=0.8, zorder=1)
    single = int(result.attrs.get("window", 1)) == 1
    grouped = result.layer.dtype.kind in "UO"
    what = "blocked layers" if grouped else "blocked layer" if single else "middle of the blocked layers"
    axes.set_xlabel(what, fontsize=9)
    return figure


def answer_by_layer_figure(result: xr.Dataset, *, title: str = "", level: float = 0.95) -> Figure:
    """How likely each layer's stream makes answer and foil: a line for each way of writing them (Zhang et al., fig. 7).

    Ways that are the same tokens in all samples are one line.
    """
    lines: dict[str, np.ndarray] = {}
    for target in result.target.values:
        ways: dict[tuple[str, ...], list[str]] = {}
        for form in result.form.values:
            tokens = tuple(result.token.sel(target=target, form=form).values.tolist())
            if any(tokens):
                ways.setdefault(tokens, []).append(str(form))
        for forms in ways.values():
            values = result.probability.sel(target=target, form=forms[0]).transpose("sample", "layer").values
            name = str(target) if len(ways) == 1 else f"{target}, {' or '.join(forms)}"
            lines[name] = values
    norm = "" if result.attrs.get("norm", "true") == "true" else ", streams not normalised"
    told = f"{title}{'; ' if title else ''}n = {result.sizes['sample']}{norm}"
    figure, axes = _lines_figure(lines, [str(layer) for layer in result.layer.values], "probability", told, level)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("layer (0: what the first one reads)", fontsize=9)
    return figure


def _lines_figure(
    lines: dict[str, Float[np.ndarray, "sample x"]], ticks: Sequence[str], label: str, title: str, level: float
) -> tuple[Figure, Axes]:
    """Means over samples with their intervals, the legend below."""
    from matplotlib.figure import Figure

    n_columns = 2 if max(map(len, lines)) < 36 and len(lines) > 1 else 1
    n_rows = -(-len(lines) // n_columns)
    width = max(5.2, 1.3 + 0.16 * len(ticks), n_columns * (0.75 + 0.075 * max(map(len, lines))))
    title = wrapped(title, width)
    top, bottom = TitleTop + TitleLine * n_lines(title) + 0.12, 0.62 + LegendLine * n_rows
    slanted = max(map(len, ticks)) > 4
    bottom += 0.06 + 0.026 * max(map(len, ticks)) if slanted else 0
    height = top + 2.7 + bottom
    figure = Figure(figsize=(width, height))
    axes: Any = figure.subplots()
    figure.subplots_adjust(left=0.85 / width, right=1 - 0.2 / width, top=1 - top / height, bottom=bottom / height)
    places = np.arange(len(ticks))
    for number, (name, values) in enumerate(lines.items()):
        interval = bootstrap(values, level=level)
        color = LINE_COLORS[number % len(LINE_COLORS)]
        style = LINE_STYLES[number % len(LINE_STYLES)]
        marker = MARKERS[number % len(MARKERS)]
        # Thinner and thinner, so that lines which lie on each other are all seen.
        thick = 1 - number / len(lines)
        axes.fill_between(places, interval.low, interval.high, color=color, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(
            places,
            interval.estimate,
            color=color,
            linestyle=style,
            linewidth=1.1 + 1.2 * thick,
            marker=marker,
            markersize=(3.5 + 3.5 * thick) * (1 if len(ticks) <= 20 else 0.7),
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=name,
            zorder=3,
        )
    step = next(step for step in (1, 2, 5, 10, len(ticks)) if len(ticks) <= 21 * step)
    axes.set_xticks(places[::step], ticks[::step], rotation=20 if slanted else 0, ha="right" if slanted else "center")
    axes.set_xlim(-0.4, len(ticks) - 0.6)
    axes.tick_params(labelsize=8)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(0.2 / width, 0.06 / height),
        ncols=n_columns,
        fontsize=8,
        frameon=False,
        borderaxespad=0.0,
        handlelength=3.2,
        labelspacing=0.35,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_title(figure, title)
    return figure, axes


def _blocked_at_once(result: xr.Dataset) -> str:
    if result.attrs.get("layers", "every one") != "every one":
        return "groups of layers blocked together"
    width = int(result.attrs.get("window", 1))
    if width == 1:
        return "one layer blocked at a time"
    if result.attrs.get("window_convention") == "radius":
        return f"layers up to {width} away blocked together"
    return f"windows of {width} layers blocked together"


def _check(what: str, wanted: Sequence[str], known: np.ndarray) -> None:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"the result has no {what} {unknown[0]!r}; it has {', '.join(map(str, known))}")

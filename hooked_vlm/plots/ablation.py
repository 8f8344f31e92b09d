"""Figures of ablations and of path patching: every head and MLP of a tower, and sets beside their random controls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_vlm.experiments.parts.components import ATTENTIONS, Node
from hooked_vlm.plots.style import (
    SITE_TITLES,
    RowHeight,
    TitleLine,
    TitleTop,
    hatch,
    n_lines,
    shortened,
    with_noise_floor,
    wrapped,
    write_title,
)
from hooked_vlm.statistics import bootstrap

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 0.25
"""Inches of one head."""
SELECTED, RANDOM = "#b2182b", "0.6"


def ablation_grid_figure(result: xr.Dataset, *, metric: str = "logit_difference", title: str = "") -> Figure:
    """Every head and MLP of a sweep: layers down, heads across, one panel a tower; red where ablation hurts.

    Means over samples, on one scale for all panels, white where ablation does nothing.

    Args:
        result: of :func:`~hooked_vlm.experiments.ablate.ablation_sweep`.
    """
    means = result.effect.sel(metric=metric).mean("sample")
    cells = means.stack(node=["tower", "kind", "layer", "head"]).dropna("node").to_series()
    values = {Node(*map(_plain, node)): value for node, value in cells.items()}
    towers = [_Tower.of(str(tower), values) for tower in result.tower.values]
    said = f"{result.attrs.get('how', '')} ablation, mean over {result.sizes['sample']} samples"
    title = with_noise_floor(f"{title}{'; ' if title else ''}{said}", result, metric)
    panels = [_Panel(tower.name.replace("_", " "), tower, values) for tower in towers]
    return _grid([panels], f"Δ {_named(metric)}", title)


def path_patch_figure(result: xr.Dataset, *, metric: str = "logit_difference", title: str = "") -> Figure:
    """What senders tell receivers, in per cent of what lies between the two runs: one panel a receiver.

    Senders are placed as in :func:`ablation_grid_figure`, with embeddings above. Means over samples; hatched where no
    path leads from a sender to the receiver. Receivers stand side by side, towers of their senders below each other;
    what no path connects is left out.

    Args:
        result: of :func:`~hooked_vlm.experiments.path_patch.path_patch`, whose senders are single nodes.

    Raises:
        ValueError: senders that are sets of nodes.
    """
    try:
        nodes = {str(name): Node.of(str(name)) for name in result.sender.values}
    except ValueError as error:
        raise ValueError(f"sets of senders have no place in a grid of nodes: {error}") from error
    share = 100 * result.relative.sel(metric=metric).mean("sample")
    towers = [_Tower.of(name, nodes.values()) for name in dict.fromkeys(map(_place, nodes.values()))]
    columns = []
    for receiver in result.receiver.values:
        own = dict(zip(nodes.values(), share.sel(receiver=receiver).values.tolist(), strict=True))
        is_path = dict(zip(nodes.values(), result.is_path.sel(receiver=receiver).values.tolist(), strict=True))
        column = []
        for tower in towers:
            no_path = {node for node, own in is_path.items() if _place(node) == tower.name and not own}
            if any(own for node, own in is_path.items() if _place(node) == tower.name):
                words = f"{tower.name.replace('_', ' ')}\n→ {shortened(receiver, 40)}"
                column.append(_Panel(words, tower, own, no_path))
        columns += [column] if column else []
    said = f"{result.attrs['direction']}, MLPs {result.attrs['mlps']}, mean over {result.sizes['sample']} samples"
    title = with_noise_floor(f"{title}{'; ' if title else ''}{said}", result, metric)
    return _grid(columns, f"Δ {_named(metric)},\n% of the two\nruns' distance", title)


def ablated_sets_figure(
    result: xr.Dataset, *, metric: str = "logit_difference", level: float = 0.95, seed: int = 0, title: str = ""
) -> Figure:
    """The effect of each named set, and of the random sets of equal size beside it, with bootstrap intervals.

    The interval of a set is over samples. Of its controls, the bar and the interval are those of their mean, and each
    dot is one of them.

    Args:
        result: of :func:`~hooked_vlm.experiments.ablate.ablate`.
        level: of the intervals, drawn by ``seed``.
    """
    from matplotlib.figure import Figure

    effect = result.effect.sel(metric=metric).transpose("sample", "set").values
    names, control_of = result["set"].values.tolist(), result.control_of.values
    bars: list[tuple[str, np.ndarray, np.ndarray]] = []
    for place, name in enumerate(names):
        controls = effect[:, control_of == name]
        if control_of[place]:
            continue
        bars.append((shortened(name, 40), effect[:, [place]], np.array([])))
        if controls.size:
            bars.append((f"{controls.shape[1]} random sets", controls, controls.mean(0)))
    left, right, bottom, row = 0.35 + 0.072 * max(len(label) for label, *_ in bars), 0.3, 0.6, 0.3
    width, said = left + 4.0 + right, f"{result.attrs['how']} ablation, mean over {result.sizes['sample']} samples"
    said = f"{said}, {100 * level:g} % intervals"
    title = wrapped(with_noise_floor(f"{title}{'; ' if title else ''}{said}", result, metric), width)
    top = TitleTop + TitleLine * n_lines(title) + 0.15
    height = top + row * len(bars) + bottom
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, 4.0 / width, row * len(bars) / height))
    for y, (_, values, dots) in enumerate(bars):
        mean, low, high = bootstrap(values.mean(1, keepdims=True), level=level, seed=seed)
        errors = np.abs(np.array([mean - low, high - mean]))
        axes.barh(y, mean, height=0.7, color=RANDOM if dots.size else SELECTED, xerr=errors, error_kw={"linewidth": 1})
        axes.plot(dots, np.full(len(dots), y), "o", color="black", markersize=2.5, alpha=0.6, zorder=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], parse_math=False, fontsize=8)
    axes.tick_params(labelsize=8, length=2)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel(f"Δ {_named(metric)}", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    write_title(figure, title)
    return figure


@dataclass(frozen=True)
class _Tower:
    """Which rows and columns a tower's panel has."""

    name: str
    kinds: tuple[str, ...]
    """Of columns: attentions, and the MLP."""
    heads: int
    layers: tuple[int, ...]
    extra: tuple[tuple[str, str], ...]
    """Rows for what is in no layer: (kind, tower) of a node."""

    @classmethod
    def of(cls, name: str, nodes: Iterable[Node]) -> _Tower:
        own = [node for node in nodes if _place(node) == name]
        layered = [node for node in own if node.layer >= 0]
        kinds = tuple(kind for kind in (*ATTENTIONS, "mlp") if any(node.kind == kind for node in layered))
        layers = range(1 + max((node.layer for node in layered), default=-1))
        extra = tuple(dict.fromkeys((node.kind, node.tower) for node in own if node.layer < 0))
        return cls(name, kinds, 1 + max((node.head for node in layered), default=-1), tuple(layers), extra)

    @property
    def columns(self) -> list[tuple[str, int]]:
        """(kind, head); one for an MLP."""
        return [(kind, head) for kind in self.kinds for head in ([-1] if kind == "mlp" else range(self.heads))]

    @property
    def rows(self) -> list[str]:
        words = {"embed": "words", "projector": "image", "out": "output"}
        is_llava = any(kind == "projector" for kind, _ in self.extra)
        named = [words[kind] if kind != "embed" or is_llava else "embeddings" for kind, _ in self.extra]
        return [*named, *map(str, self.layers)]

    def matrix(self, values: Mapping[Node, float]) -> np.ndarray:
        """Rows of what is in no layer are of one value."""
        columns = self.columns or [("", -1)]
        cells = np.full((len(self.rows), len(columns)), np.nan)
        for row, (kind, tower) in enumerate(self.extra):
            cells[row] = values.get(Node(tower, kind), np.nan)
        for row, layer in enumerate(self.layers, start=len(self.extra)):
            for column, (kind, head) in enumerate(self.columns):
                cells[row, column] = values.get(Node(self.name, kind, layer, head), np.nan)
        return cells

    @property
    def size(self) -> tuple[float, float]:
        """Inches across and down."""
        return max(1.6, CELL * len(self.columns)), max(0.5, RowHeight * len(self.rows))


@dataclass(frozen=True)
class _Panel:
    title: str
    tower: _Tower
    values: Mapping[Node, float]
    no_path: Collection[Node] = ()

    @property
    def width(self) -> float:
        """Inches that it and its title take."""
        return max(self.tower.size[0], 0.062 * max(map(len, self.title.splitlines()))) + 0.15


def _grid(columns: Sequence[Sequence[_Panel]], bar_title: str, title: str) -> Figure:
    """Columns of panels, on one scale that is white at 0."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    every = [panel for column in columns for panel in column]
    left = 0.5 + 0.062 * max(len(label) for panel in every for label in panel.tower.rows)
    right, bottom, gap = 0.3 + 0.07 * max(map(len, bar_title.splitlines())), 0.55, 0.95
    widths = [left + max(panel.width for panel in column) for column in columns]
    downs = [sum(panel.tower.size[1] for panel in column) + gap * (len(column) - 1) for column in columns]
    title = wrapped(title, sum(widths) + right)
    caption = 0.25 + 0.14 * max(n_lines(text) for text in (bar_title, *(panel.title for panel in every)))
    top = TitleTop + TitleLine * n_lines(title) + caption
    width, height = sum(widths) + right, top + max(downs) + bottom
    figure = Figure(figsize=(width, height))
    far = float(np.nanmax([0.0, *(abs(value) for panel in every for value in panel.values.values())])) or 1.0
    for column, x in zip(columns, np.cumsum([0.0, *widths]), strict=False):
        y = height - top
        for panel in column:
            across, down = panel.tower.size
            y -= down
            _draw(figure.add_axes(((x + left) / width, y / height, across / width, down / height)), panel, far)
            y -= gap
    tall = min(max(downs), 2.5)
    place = ((width - right + 0.2) / width, (height - top - tall) / height, 0.12 / width, tall / height)
    bar = figure.colorbar(ScalarMappable(Normalize(-far, far), "RdBu"), cax=figure.add_axes(place))
    bar.ax.tick_params(labelsize=7)
    bar.ax.set_title(bar_title, fontsize=8, pad=5, loc="left", parse_math=False)
    write_title(figure, title)
    return figure


def _draw(axes: Axes, panel: _Panel, far: float) -> None:
    tower, cells = panel.tower, panel.tower.matrix(panel.values)
    hidden = tower.matrix(dict.fromkeys(panel.no_path, 1.0)) == 1
    axes.pcolormesh(np.ma.masked_invalid(np.where(hidden, np.nan, cells)), cmap="RdBu", vmin=-far, vmax=far)
    axes.set_facecolor("0.93")
    hatch(axes, hidden)
    axes.invert_yaxis()
    axes.set_title(panel.title, fontsize=8, loc="left", parse_math=False)
    axes.set_yticks(np.arange(len(tower.rows)) + 0.5, tower.rows)
    step = 1 if tower.heads <= 12 else 4
    kept = [place for place, (_, head) in enumerate(tower.columns) if head >= 0 and head % step == 0]
    axes.set_xticks([place + 0.5 for place in kept], [str(tower.columns[place][1]) for place in kept])
    axes.tick_params(labelsize=7.5, length=2)
    first = len(tower.extra)
    lines: dict[str, Any] = {"color": "black", "linewidth": 0.8}
    if tower.layers:
        axes.hlines(range(1, first + 1), 0, max(1, len(tower.columns)), **lines)
        beside: dict[str, Any] = {"xytext": (-19, 0), "textcoords": "offset points", "ha": "center", "va": "center"}
        middle = (first + len(tower.rows)) / 2
        axes.annotate("layer", (0, middle), rotation=90, fontsize=7.5, annotation_clip=False, **beside)
    for kind in tower.kinds:
        places = [place for place, (own, _) in enumerate(tower.columns) if own == kind]
        if places[0]:
            axes.vlines(places[0], first, len(tower.rows), **lines)
        below: dict[str, Any] = {"xytext": (0, -17), "textcoords": "offset points", "ha": "center", "va": "top"}
        where: dict[str, Any] = {"xy": ((places[0] + places[-1] + 1) / 2, 0), "xycoords": axes.get_xaxis_transform()}
        axes.annotate(SITE_TITLES.get(kind, kind), **where, fontsize=7.5, annotation_clip=False, **below)


def _place(node: Node) -> str:
    """The tower in whose panel a node is shown: of LLaVA's projector, that which reads it."""
    return "language_model" if node.kind == "projector" else node.tower


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label


def _named(metric: str) -> str:
    return metric.replace("_", " ")

"""Figures of what heads look at: attention over the picture, and its measures with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from hooked_vlm.data.samples import Sample
from hooked_vlm.plots.style import SITE_TITLES, RowHeight, TitleLine, TitleTop, n_lines, wrapped, write_title

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FUNCTION_COLORS = {"detection": "tab:red", "suppression": "tab:blue", "neither": "0.45"}


def attention_overlay_figure(
    result: xr.Dataset,
    samples: Sample | Sequence[Sample],
    *,
    heads: Sequence[str] | None = None,
    against: Literal["uniform", "mean"] = "uniform",
    title: str = "",
) -> Figure:
    """Where heads look, over the picture: a row a sample, a column a head, the region outlined.

    A token is red where a head looks at it more than at the others in the mean, blue where less, on a scale of factors;
    each panel says the head's enrichment on the region.

    Args:
        result: of :func:`~hooked_vlm.experiments.head_function.head_function`.
        samples: some of those that it is of.
        heads: as the result's ``head`` names them; by default all, or the eight with the most enrichment of more.
        against: ``"mean"``: more than the mean over all heads, in place of more than at other tokens.

    Raises:
        ValueError: a sample or head that the result does not have; a result whose tokens see no picture.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    listed = [samples] if isinstance(samples, Sample) else list(samples)
    shown = _shown(result, listed, heads)
    names = shown["head"].values.tolist()
    pictures = [sample.picture() for sample in listed]
    across, left, right, gap = 1.35, 0.2, 0.95, 0.08
    downs = [across * min(max(picture.height / picture.width, 0.65), 1.6) for picture in pictures]
    width = left + (1 + len(names)) * (across + gap) + right
    kind = SITE_TITLES[str(shown.attention_kind.values[0])]
    said = f"{kind} of the {str(shown.tower.values[0]).replace('_', ' ')}; × enrichment on the region, outlined"
    title = wrapped(f"{title}{'; ' if title else ''}{said}", width)
    row_gap = 0.5
    top = TitleTop + TitleLine * n_lines(title) + 0.5
    height = top + sum(downs) + row_gap * (len(listed) - 1) + 0.1
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(len(listed), 1 + len(names), squeeze=False, gridspec_kw={"height_ratios": downs})
    figure.subplots_adjust(
        **{"left": left / width, "right": 1 - (right + gap) / width, "top": 1 - top / height, "bottom": 0.1 / height},
        wspace=gap / across,
        hspace=row_gap / float(np.mean(downs)),
    )
    factors = [_factors(shown.isel(sample=row), against) for row in range(len(listed))]
    far = max(2.0, float(np.nanmax(np.concatenate([np.ravel(one) for one in factors]))))
    norm = LogNorm(1 / far, far, clip=True)
    for row, (sample, picture) in enumerate(zip(listed, pictures, strict=True)):
        part = shown.isel(sample=row)
        first, *others = grid[row]
        _draw_picture(first, picture, None)
        caption = f"{_short(sample.question)}\nfrom “{_short(str(part.words.values), 22)}”"
        first.set_title(caption, fontsize=7, pad=3, parse_math=False)
        for axes, name, values in zip(others, names, factors[row], strict=True):
            _draw_picture(axes, picture.convert("L"), (part.box.values, values, norm))
            words = f"{_label(part, name)}  ×{float(part.enrichment.sel(head=name)):.2g}"
            axes.set_title(words, fontsize=8, pad=3)
        for axes in grid[row]:
            _outline_region(axes, sample, str(result.attrs["region"]), picture)
    box = grid[0][-1].get_position(original=True)
    bar = figure.add_axes((1 - right / width, box.y0, 0.1 / width, box.height))
    drawn = figure.colorbar(ScalarMappable(norm, "RdBu_r"), cax=bar)
    powers = _powers(far)
    drawn.set_ticks([2.0**power for power in powers], labels=[_fraction(power) for power in powers])
    drawn.ax.minorticks_off()
    drawn.ax.tick_params(labelsize=7)
    words = "× uniform" if against == "uniform" else "× mean of\nall heads"
    bar.set_title(words, fontsize=8, pad=5, loc="left")
    write_title(figure, title)
    return figure


def head_function_figure(summary: xr.Dataset, *, title: str = "") -> Figure:
    """Heads down; enrichment, AUROC and what the answer loses across, with the controls as hollow marks.

    Args:
        summary: of :func:`~hooked_vlm.experiments.head_function.head_summary`.
    """
    from matplotlib.figure import Figure

    has_cuts = "cut_region" in summary.quantity.values
    metric = str(summary.attrs["metric"]).replace("_", " ")
    panels = [("enrichment", "enrichment_shuffled", "enrichment on the region", 1.0)]
    panels += [("auroc", "auroc_shuffled", "AUROC against the region", 0.5)]
    panels += [("cut_region", "cut_random", f"Δ {metric}, attention cut", 0.0)] if has_cuts else []
    n_heads = summary.sizes["head"]
    left, across, gap, bottom = 0.75, 2.2, 0.25, 0.75
    width = left + len(panels) * (across + gap) + 0.1
    said = (
        f"{int(summary.n.max())} samples, {100 * summary.attrs['level']:g} % intervals; hollow: regions of other "
        "samples, and as many random tokens"
    )
    title = wrapped(f"{title}{'; ' if title else ''}{said}", width)
    top = TitleTop + TitleLine * n_lines(title) + 0.2
    height = top + max(1.0, 0.8 * RowHeight * n_heads) + bottom
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(
        **{"left": left / width, "right": 1 - 0.15 / width, "top": 1 - top / height, "bottom": bottom / height},
        wspace=gap / across,
    )
    places = np.arange(n_heads)
    colors = [FUNCTION_COLORS[label] for label in summary.label.values.tolist()]
    for axes, (quantity, control, words, nothing) in zip(grid, panels, strict=True):
        axes.axvline(nothing, color="0.8", linewidth=1, zorder=0)
        for name, filled in ((control, False), (quantity, True)):
            own = summary.sel(quantity=name)
            face: Any = colors if filled else "white"
            axes.hlines(places, own.low, own.high, colors=colors if filled else "0.6", linewidth=1.2)
            axes.scatter(own["mean"], places, s=18, facecolors=face, edgecolors=colors if filled else "0.6", zorder=3)
        axes.set_yticks(places, [_label(summary, name) for name in summary["head"].values] if axes is grid[0] else [])
        axes.set_ylim(n_heads - 0.5, -0.5)
        axes.tick_params(labelsize=8, length=2)
        axes.set_xlabel(words, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [grid[0].scatter([], [], s=18, color=color, label=name) for name, color in FUNCTION_COLORS.items()]
    figure.legend(handles=handles, loc="lower left", ncols=3, fontsize=8, frameon=False, bbox_to_anchor=(0.01, 0.0))
    write_title(figure, title)
    return figure


def _shown(result: xr.Dataset, samples: Sequence[Sample], heads: Sequence[str] | None) -> xr.Dataset:
    ids = [sample.id for sample in samples]
    for what, wanted in (("sample", ids), ("head", heads or [])):
        unknown = [name for name in wanted if name not in result[what].values]
        if unknown:
            known = ", ".join(map(str, result[what].values[:4]))
            raise ValueError(f"the result has no {what} {unknown[0]!r}; it has {known}, ...")
    if np.isnan(result.box.values).all():
        raise ValueError("the tokens of this result see no picture: make the inputs with model.prepare")
    if heads is None:
        strongest = np.argsort(-result.enrichment.mean("sample").values, kind="stable")[:8]
        heads = result["head"].values[np.sort(strongest)].tolist()
    return result.sel(sample=ids, head=list(heads))


def _factors(part: xr.Dataset, against: str) -> Float[np.ndarray, "head key"]:
    """Attention as a multiple of what it is held against."""
    attention = part.attention.transpose("head", "key").values
    own = attention / np.nansum(attention, axis=-1, keepdims=True)
    mean = part.mean_attention.values
    if against == "mean":
        return own / (mean / np.nansum(mean))
    return own * (~np.isnan(mean)).sum()


def _draw_picture(axes: Axes, picture: Any, over: tuple[np.ndarray, np.ndarray, Any] | None) -> None:
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection

    axes.imshow(picture, cmap="gray", vmin=-160, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    if over is None:
        return
    boxes, values, norm = over
    sees = ~np.isnan(boxes).any(1) & ~np.isnan(values)
    corners = boxes[sees][:, [[0, 1], [2, 1], [2, 3], [0, 3]]] - 0.5
    # A factor of 1 is clear.
    levels = np.asarray(norm(values[sees]))
    colors = colormaps["RdBu_r"](levels)
    colors[:, 3] = 0.1 + 1.1 * np.abs(levels - 0.5)
    axes.add_collection(PolyCollection(list(corners), facecolors=colors, edgecolors="none"), autolim=False)


def _outline_region(axes: Axes, sample: Sample, region: str, picture: Any) -> None:
    from matplotlib.patches import Rectangle

    marked = np.asarray(sample.regions[region])
    if marked.dtype == bool:
        # With an edge of nothing around it, so that a region at the picture's edge is closed.
        axes.contour(
            np.arange(-1, marked.shape[1] + 1), np.arange(-1, marked.shape[0] + 1), np.pad(marked, 1).astype(float),
            levels=[0.5], colors="black", linewidths=1.2,
        )  # fmt: skip
        axes.set_xlim(-0.5, picture.width - 0.5)
        axes.set_ylim(picture.height - 0.5, -0.5)
        return
    left, top, right, bottom = marked.astype(float).tolist()
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, linewidth=1.2))


def _label(part: xr.Dataset, head: str) -> str:
    own = part.sel(head=head)
    return f"L{int(own['layer'])}.H{int(own['number'])}"


def _powers(far: float) -> list[int]:
    """Powers of two on either side of 1, up to a factor, about seven."""
    furthest = int(np.log2(far) + 1e-9)
    step = max(1, round(furthest / 3))
    return list(range(-(furthest // step) * step, furthest + 1, step))


def _fraction(power: int) -> str:
    return str(2**power) if power >= 0 else f"1/{2**-power}"


def _short(question: str, longest: int = 28) -> str:
    return question if len(question) <= longest else question[: longest - 1] + "…"

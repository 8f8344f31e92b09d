"""What heads look at, in numbers (after Golovanevsky et al. 2025, section 4, who name heads by eye).

``A`` is a head's attention from some words to the image's tokens, ``M`` the tokens of a region. A head that detects
looks at M more than at as many tokens elsewhere, one that suppresses less; and if the look matters, the answer suffers
when it is cut, more than when as many other tokens are.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.edits import BlockAttention
from hooked_vlm.experiments.notice import list_heads
from hooked_vlm.experiments.parts.cases import QUESTION, Case, Scored, ready
from hooked_vlm.experiments.parts.heads import Head, where_heads_read
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.region_measures import enrichment, share
from hooked_vlm.experiments.parts.scores import DEFAULT_METRICS, metrics_of
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import SpanError, VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.selection import positions_of
from hooked_vlm.statistics import auroc, bootstrap
from hooked_vlm.sweep import sweep

if TYPE_CHECKING:
    import xarray as xr

Cut = Literal["query", "all"]
CUTS = ("region", "random", "rest", "outliers")
"""What a head is kept from reading: the region; as many tokens outside of it, drawn at random; all outside of it; the
outliers."""
OUTLIER = 2.0
"""Standard deviations above the mean beyond which a token's norm makes it an outlier."""


@torch.no_grad()
def head_function(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    heads: Sequence[Head] | None = None,
    *,
    region: str = "object",
    query: str | None = None,
    image: str = "image",
    cut: Cut = "all",
    controls: int = 3,
    shuffles: int = 10,
    seed: int = 0,
    metrics: Sequence[str] = DEFAULT_METRICS,
    prompt: str = QUESTION,
    scored: Scored = "given",
    progress: bool = False,
) -> xr.Dataset:
    """Where heads look, and what becomes of the answer if they may not look there.

    Args:
        heads: of one tower, that attend to the image; by default all that the text tower has of them.
        region: of the samples.
        query: the words that look: a span, or an expression of spans, over whose positions attention is averaged. By
            default as of :func:`~hooked_vlm.experiments.notice.patch_heads`.
        image: the tokens that are looked at, as a span; BLIP's class token is none of them.
        cut: whether a head may no longer look from the ``"query"`` alone, or from ``"all"`` positions.
        controls: how often as many tokens are drawn outside of the region; 0 leaves out all cuts.
        shuffles: of how many other samples each head is held against the regions.
        seed: of what is drawn.

    Returns:
        Over ``(sample, head)``:

        - ``image_share``: attention to the image, of all attention;
        - ``enrichment``: ``(A in M / A) / (tokens in M / tokens)``; 1 for a head that does not care;
        - ``relative_enrichment``: the same against the mean over all heads of this kind in the tower in place of a
          uniform one: the map that the paper draws, in one number;
        - ``auroc`` of A against M; NaN if M is all of the image;
        - ``outlier_share``: of A, on tokens whose stream, from which keys are made, has a norm over mean + 2 standard
          deviations of the image's; ``outlier_enrichment``: the same as of M (NaN without outliers);
        - ``enrichment_shuffled``, ``auroc_shuffled``: the means for the regions of other samples whose image tokens
          stand at the same positions; about 1 and .5 if the head follows what the sample's own picture shows.

        ``cut_effect`` over ``(metric, sample, head, cut)``: the metric with that head's attention cut, less ``clean``
        over ``(metric, sample)``. ``attention`` over ``(sample, head, key)``, the share of all attention on each image
        token; ``mean_attention`` of all heads; ``in_region``, ``is_outlier``; ``box`` says which part of the picture a
        token sees, ``words`` which tokens look. :func:`head_summary` averages.

    Raises:
        SampleError: a single sample that cannot be used; of several, such are dropped and counted.
        ValueError: heads of several towers, or that do not attend to the image; a query in another tower.
    """
    if cut not in ("query", "all"):
        raise ValueError(f"cut is 'query' or 'all', not {cut!r}")
    if heads is not None and not heads:
        raise ValueError("there are no heads to look at")

    def one(sample: Sample) -> xr.Dataset:
        case = ready(model, sample, prompt=prompt, scored=scored)
        look = _looked(model, case, heads, region, query, image)
        result = _described(look)
        words = model.position_labels(case.clean, look.heads[0].tower)[0]
        result["words"] = ("sample", [" ".join(words[position] for position in look.queries)[:64]])
        if controls:
            queries = look.queries if cut == "query" else None
            effects = _cut_effects(model, case, look, queries, controls, seed, metrics)
            result = result.merge(effects)
        result["answer"] = ("sample", model.token_strings(case.answer))
        result["foil"] = ("sample", model.token_strings(case.foil))
        result["correct"] = ("sample", [case.is_correct])
        return result

    settings = {"region": region, "query": query or "default", "image": image, "cut": cut, "controls": controls}
    asked = {"shuffles": shuffles, "seed": seed, "metrics": list(metrics), "prompt": prompt, "scored": scored}
    found = over_samples(model, samples, "head_function", one, progress=progress, **settings, **asked)
    return _with_shuffled(found, shuffles, seed)


def head_summary(
    result: xr.Dataset,
    *,
    delta: float = 0.1,
    metric: str = "logit_difference",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Means over samples with bootstrap intervals, and what a head is called by them.

    Args:
        delta: a head is called ``detection`` if the interval of its enrichment lies above ``1 + delta``,
            ``suppression`` if it lies below ``1 - delta``, else ``neither``. Intervals are each head's own: of many
            heads some will seem to be something.
        metric: of the cuts.
        level, resamples, seed: of :func:`~hooked_vlm.statistics.bootstrap`.

    Returns:
        ``mean``, ``low``, ``high`` and ``n`` (samples with a number) over ``(quantity, head)``: the quantities of
        :func:`head_function`, ``cut_region`` and so on, and ``cut_excess``, the cut region less the random cut, in the
        same samples. ``label`` over ``head``.
    """
    import xarray as xr

    columns = {name: result[name] for name in result.data_vars if result[name].dims == ("sample", "head")}
    if "cut_effect" in result:
        effects = result.cut_effect.sel(metric=metric)
        columns |= {f"cut_{name}": effects.sel(cut=name, drop=True) for name in CUTS}
        columns["cut_excess"] = columns["cut_region"] - columns["cut_random"]
    quantities = [name for name, values in columns.items() if values.dtype.kind == "f"]
    values = np.stack([columns[name].transpose("sample", "head").values for name in quantities], axis=1)
    interval = bootstrap(values.astype(float), level=level, resamples=resamples, seed=seed)
    dims = ("quantity", "head")
    summary = xr.Dataset(
        {
            **{name: (dims, found) for name, found in zip(("mean", "low", "high"), interval, strict=True)},
            "n": (dims, (~np.isnan(values)).sum(0)),
        },
        {"quantity": quantities, **{name: result[name] for name in ("head", "tower", "attention_kind", *_PLACE)}},
    )
    own = summary.sel(quantity="enrichment", drop=True)
    label = xr.where(own.low > 1 + delta, "detection", xr.where(own.high < 1 - delta, "suppression", "neither"))
    summary["label"] = label.astype(str)
    facts = {"delta": delta, "metric": metric, "level": level, "resamples": resamples, "bootstrap_seed": seed}
    return summary.assign_attrs({**result.attrs, **facts})


_PLACE = ("layer", "number")


@dataclass(frozen=True, eq=False)
class _Look:
    """One sample's heads, and the image's tokens as they see them."""

    heads: list[Head]
    queries: list[int]
    keys: list[int]
    boxes: Float[np.ndarray, "key 4"]
    attention: Float[np.ndarray, "head key"]
    mean_attention: Float[np.ndarray, " key"]
    in_region: Bool[np.ndarray, " key"]
    is_outlier: Bool[np.ndarray, "head key"]


def _looked(
    model: HookedVLM, case: Case, heads: Sequence[Head] | None, region: str, query: str | None, image: str
) -> _Look:
    clean, sample = case.clean, case.sample
    looking, seen = where_heads_read(sample, clean, query), _image_tokens(sample, clean, image)
    chosen = _reading_heads(model, seen.tower, looking.tower) if heads is None else list(heads)
    tower, kind = _one_kind(chosen)
    reads = positions_of(model.hook_dict[f"{chosen[0].site}.hook_pattern"], "k", model.towers)
    if reads != seen.tower or looking.tower != tower:
        raise ValueError(
            f"{chosen[0]} looks from {tower} at {reads}; the query {query or 'by default'!r} is in {looking.tower}, "
            f"the image in {seen.tower}"
        )
    if f"image.{region}" not in clean.spans:
        raise SampleError(f"{sample.id} has no region {region!r}", f"no region {region!r}")
    queries, keys = list(looking[0]), list(seen[0])
    patterns, norms = _patterns(model, clean, tower, kind, queries, keys)
    far = norms > (norms.mean(-1) + OUTLIER * norms.std(-1))[:, None]
    layers, numbers = [head.layer for head in chosen], [head.number for head in chosen]
    return _Look(
        chosen,
        queries,
        keys,
        _boxes(clean, seen.tower, keys),
        attention=patterns[layers, numbers],
        mean_attention=patterns.mean((0, 1)),
        in_region=np.isin(keys, clean.spans[f"image.{region}"][0]),
        is_outlier=far[layers],
    )


def _image_tokens(sample: Sample, clean: VLMInputs, image: str) -> Any:
    try:
        return clean.positions(image)
    except SpanError as error:
        raise SampleError(f"{sample.id}: {error}", f"no span {image!r}") from error


def _reading_heads(model: HookedVLM, image_tower: str, tower: str) -> list[Head]:
    """Those of a tower that attend to the tower that holds the image."""
    found = [
        head
        for head in list_heads(model, [tower])
        if positions_of(model.hook_dict[f"{head.site}.hook_pattern"], "k", model.towers) == image_tower
    ]
    if not found:
        raise ValueError(f"no head of {tower} attends to {image_tower}, where the image is")
    return found


def _one_kind(heads: Sequence[Head]) -> tuple[str, str]:
    kinds = {head[:2] for head in heads}
    if len(kinds) > 1:
        raise ValueError(f"heads of one tower and kind of attention at a time, not of {sorted(kinds)}")
    return kinds.pop()


def _patterns(
    model: HookedVLM, clean: VLMInputs, tower: str, kind: str, queries: Sequence[int], keys: Sequence[int]
) -> tuple[Float[np.ndarray, "layer head key"], Float[np.ndarray, "layer key"]]:
    """All heads' attention to some keys, the mean over some queries; and the norms of what the keys are made from."""
    n_layers = len(model.get_submodule(tower).blocks)  # type: ignore[arg-type]
    patterns, streams = [], []

    def look(pattern: Tensor, hook: HookPoint) -> None:
        patterns.append(pattern[0][:, list(queries)][..., list(keys)].float().mean(1).cpu())

    def measure(stream: Tensor, hook: HookPoint) -> None:
        streams.append(stream[0, list(keys)].float().norm(dim=-1).cpu())

    own = kind == "attn"
    read = f"{tower}.blocks.*.hook_resid_pre" if own else f"{model.towers[model.towers.index(tower) - 1]}.hook_out"
    model.run_with_hooks(clean, fwd_hooks=[(f"{tower}.blocks.*.{kind}.hook_pattern", look), (read, measure)])
    norms = torch.stack(streams).expand(n_layers, -1)
    return torch.stack(patterns).double().numpy(), norms.double().numpy()


def _boxes(clean: VLMInputs, tower: str, keys: Sequence[int]) -> Float[np.ndarray, "key 4"]:
    boxes = np.full((len(keys), 4), np.nan)
    column_of = {position: column for column, position in enumerate(keys)}
    for grid in clean.patch_grid:
        for position, box in zip(grid.positions, grid.boxes, strict=True):
            if grid.tower == tower and position in column_of:
                boxes[column_of[position]] = box
    return boxes


def _described(look: _Look) -> xr.Dataset:
    import xarray as xr

    per_head, per_key, both = ("sample", "head"), ("sample", "key"), ("sample", "head", "key")
    attention, region = look.attention, look.in_region
    result = xr.Dataset(
        {
            "image_share": (per_head, attention.sum(-1)[None]),
            "enrichment": (per_head, enrichment(attention, region)[None]),
            "relative_enrichment": (
                per_head,
                (enrichment(attention, region) / enrichment(look.mean_attention, region))[None],
            ),
            "auroc": (per_head, auroc(attention, region)[None]),
            "outlier_share": (per_head, share(attention, look.is_outlier)[None]),
            "outlier_enrichment": (per_head, enrichment(attention, look.is_outlier)[None]),
            "attention": (both, attention[None]),
            "mean_attention": (per_key, look.mean_attention[None]),
            "in_region": (per_key, region[None]),
            "is_outlier": (both, look.is_outlier[None]),
        },
        {
            "sample": [0],
            "head": [str(head) for head in look.heads],
            "tower": ("head", [head.tower for head in look.heads]),
            "attention_kind": ("head", [head.attention for head in look.heads]),
            "layer": ("head", [head.layer for head in look.heads]),
            "number": ("head", [head.number for head in look.heads]),
            "key": look.keys,
            "side": ["left", "top", "right", "bottom"],
            "box": (("sample", "key", "side"), look.boxes[None]),
        },
    )
    return result


def _cut_effects(
    model: HookedVLM,
    case: Case,
    look: _Look,
    queries: list[int] | None,
    controls: int,
    seed: int,
    metrics: Sequence[str],
) -> xr.Dataset:
    """What cutting each head's attention does to the answer, in one sweep; NaN where there is nothing to cut."""
    import xarray as xr

    keys = np.array(look.keys)
    # By the sample's name, so that neither its place nor its neighbours change what is drawn.
    random = np.random.default_rng((seed, zlib.crc32(case.sample.id.encode())))
    rest = keys[~look.in_region]
    n = min(int(look.in_region.sum()), len(rest))
    drawn = [random.choice(rest, n, replace=False) for _ in range(controls)]
    cuts: list[tuple[int, int, Int[np.ndarray, " cut"]]] = []
    for place in range(len(look.heads)):
        cuts += [(place, 0, keys[look.in_region]), *((place, 1, one) for one in drawn), (place, 2, rest)]
        cuts += [(place, 3, keys[look.is_outlier[place]])]
    cuts = [(place, column, chosen) for place, column, chosen in cuts if len(chosen)]
    metric = metrics_of(metrics, case.answer, case.foil, case.clean_logits[:, None])
    clean = metric(case.clean_logits[:, None])[0].double().cpu().numpy()
    sets = [
        [BlockAttention(head.site, positions=queries, heads=head.number, keys=chosen.tolist())]
        for place, _, chosen in cuts
        for head in [look.heads[place]]
    ]
    scores = sweep(model, case.clean, sets, metric, progress=False)
    sums, counts = np.zeros((len(metrics), len(look.heads), len(CUTS))), np.zeros((len(look.heads), len(CUTS)))
    for (place, column, _), score in zip(cuts, scores[:, 0].double().cpu().numpy(), strict=True):
        sums[:, place, column] += score - clean
        counts[place, column] += 1
    effects = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return xr.Dataset(
        {
            "cut_effect": (("metric", "sample", "head", "cut"), effects[:, None]),
            "clean": (("metric", "sample"), clean[:, None]),
            "noise_floor": ("metric", scores.noise_floor.double().cpu().numpy()),
        },
        {"metric": list(metrics), "sample": [0], "head": [str(head) for head in look.heads], "cut": list(CUTS)},
    )


def _with_shuffled(result: xr.Dataset, shuffles: int, seed: int) -> xr.Dataset:
    """The same heads against regions of other samples, whose image tokens are where these are."""
    attention = result.attention.transpose("sample", "head", "key").values
    regions = result.in_region.transpose("sample", "key").values
    there = ~np.isnan(result.mean_attention.transpose("sample", "key").values)
    found = {name: np.full(attention.shape[:2], np.nan) for name in ("enrichment", "auroc")}
    random = np.random.default_rng(seed)
    for place, keys in enumerate(there):
        alike = np.flatnonzero((there == keys).all(1) & (np.arange(len(there)) != place))
        others = random.choice(alike, min(shuffles, len(alike)), replace=False)
        own = attention[place][:, keys]
        for name, measure in (("enrichment", enrichment), ("auroc", auroc)):
            if len(others):
                found[name][place] = np.mean([measure(own, regions[other, keys]) for other in others], axis=0)
    shuffled = {f"{name}_shuffled": (("sample", "head"), values) for name, values in found.items()}
    return result.assign(shuffled)

"""Attention heads that a rule picks out: by their scores, in halves of the data, under several tasks and modalities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.statistics import rank_correlation, split_half

if TYPE_CHECKING:
    import xarray as xr

AttentionKind = Literal["attn", "cross_attn"]
ATTENTION_KINDS: tuple[AttentionKind, ...] = ("attn", "cross_attn")
HEAD_DIMS = ("tower", "attention", "layer", "head")
"""The axes that name a head, in results."""


class Head(NamedTuple):
    """One attention head of a model."""

    tower: str
    attention: str
    """``"attn"`` or ``"cross_attn"``."""
    layer: int
    number: int

    @property
    def site(self) -> str:
        """Its attention layer, as :class:`~hooked_vlm.edits.BlockAttention` takes it."""
        return f"{self.tower}.blocks.{self.layer}.{self.attention}"

    @property
    def label(self) -> str:
        """Its layer and number, as papers write them: ``L3.H1``."""
        return f"L{self.layer}.H{self.number}"

    def __str__(self) -> str:
        """Its name among the nodes of a model, as :func:`~hooked_vlm.experiments.ablate.ablate` takes it."""
        return f"{self.tower}.L{self.layer}.{self.attention}.H{self.number}"


class Agreement(NamedTuple):
    """How far two selections among the same heads agree."""

    shared: int
    n_one: int
    n_other: int
    expected: float
    """Heads that two selections of these sizes share by chance, in the mean."""
    p_value: float
    """The chance that they share as many or more (hypergeometric)."""
    jaccard: float
    """Shared heads, of those in either; NaN where both are empty."""
    rank_correlation: float
    """Spearman's, of the scores of all heads."""


def select_heads(
    result: xr.Dataset,
    k: float = 2.0,
    *,
    metric: str = "logit_difference",
    quantity: Literal["patched", "effect", "normalized"] = "effect",
    allow_empty: bool = False,
) -> xr.Dataset:
    """Heads whose score is k standard deviations above the mean of all heads' (Golovanevsky et al. 2025, section 3).

    A head's score is the mean over samples of ``|quantity|``, without those in which it is NaN. The heads compared are
    all that the result has: for the paper's 144, give it ``result.sel(attention=["cross_attn"])``.

    Args:
        result: of :func:`~hooked_vlm.experiments.notice.patch_heads`, without an axis of positions or roles.
        quantity: ``"effect"`` by default, because a ratio whose denominator may be small has means that one sample
            decides.
        allow_empty: a selection without heads is no error.

    Returns:
        ``score`` and ``selected`` over ``(tower, attention, layer, head)``. The attributes say ``threshold``, its
        ``mean`` and ``std``, ``n_heads`` compared, ``n_selected``, and ``n_undefined``, the cells that are NaN.

    Raises:
        ValueError: a result of another form; a metric or quantity that it does not hold; heads without any score; an
            empty selection.
    """
    import xarray as xr

    values = _values(result, metric, quantity)
    there = values.notnull().any("sample")
    # In order of size, so that the order of samples does not move a sum by its last bit.
    scores = np.sort(np.abs(values.transpose("sample", *HEAD_DIMS).values), axis=0)
    score = xr.DataArray(np.full(scores.shape[1:], np.nan), dims=HEAD_DIMS, coords=there.coords)
    score.values[there.values] = np.nanmean(scores[:, there.values], axis=0)
    known = np.sort(score.values[there.values])
    mean, std = float(known.mean()), float(known.std())
    # Heads that are all alike do not stand out, whatever rounding says.
    stands_out = std > 1e-12 * abs(mean)
    selected = (score >= mean + k * std) & (score > mean) & stands_out
    if not bool(selected.any()) and not allow_empty:
        raise ValueError(
            f"no head's score is {k} standard deviations above the mean of {len(known)} heads ({mean:.3g} + {k} * "
            f"{std:.3g}; the highest is {known[-1]:.3g}); give a smaller k, or allow_empty=True"
        )
    facts = {"threshold": mean + k * std, "mean": mean, "std": std, "k": float(k), "metric": metric}
    counts = {
        "n_heads": len(known),
        "n_selected": int(selected.sum()),
        "n_undefined": int((values.isnull() & there).sum()),
        "samples_used": result.sizes["sample"],
    }
    return xr.Dataset({"score": score, "selected": selected}).assign_attrs(
        {**result.attrs, **facts, **counts, "quantity": quantity, "selected_from": result.attrs.get("method", "")}
    )


def heads_of(selection: xr.Dataset | xr.DataArray) -> tuple[Head, ...]:
    """The heads of a selection, highest score first; or those where an array over heads is true, in their order."""
    from xarray import Dataset

    chosen = selection.selected if isinstance(selection, Dataset) else selection
    chosen = chosen.transpose(*HEAD_DIMS)
    labels = [chosen[dim].values for dim in HEAD_DIMS]
    places = np.argwhere(chosen.values)
    if isinstance(selection, Dataset) and "score" in selection:
        scores = selection.score.transpose(*HEAD_DIMS).values[tuple(places.T)]
        places = places[np.argsort(-scores, kind="stable")]
    heads = []
    for place in places:
        tower, attention, layer, number = (label[at].item() for label, at in zip(labels, place, strict=True))
        heads.append(Head(tower, attention, layer, number))
    return tuple(heads)


def universal_heads(selections: Mapping[tuple[str, str], xr.Dataset]) -> xr.Dataset:
    """Which heads are selected for which task and modality: a head is universal if it is for all of them.

    Args:
        selections: by task and modality (``"sip"``, ``"str"``): every task under every modality.

    Returns:
        ``score`` and ``selected`` over ``(task, modality, tower, attention, layer, head)``; ``in_all_tasks`` without
        the task, ``universal`` over heads alone. A head that is in all tasks under one modality only is what the paper
        calls a vision or a text head: ``in_all_tasks.sel(modality="sip") & ~in_all_tasks.sel(modality="str")``.

    Raises:
        ValueError: no selections; a task without a modality; selections of other heads.
    """
    import xarray as xr

    if not selections:
        raise ValueError("there are no selections to compare")
    tasks, modalities = (list(dict.fromkeys(key[place] for key in selections)) for place in (0, 1))
    missing = [(task, modality) for task in tasks for modality in modalities if (task, modality) not in selections]
    if missing:
        raise ValueError(f"every task needs every modality; there is no selection for {missing}")
    first = next(iter(selections.values()))
    for key, selection in selections.items():
        if not _same_heads(first, selection):
            raise ValueError(f"the selection for {key} is of other heads than that for {next(iter(selections))}")
    rows = [
        xr.concat([selections[task, modality][["score", "selected"]] for modality in modalities], "modality")
        for task in tasks
    ]
    matrix = xr.concat(rows, "task", combine_attrs="drop").assign_coords(task=tasks, modality=modalities)
    matrix["in_all_tasks"] = matrix.selected.all("task")
    matrix["universal"] = matrix.selected.all(("task", "modality"))
    shared = {name: value for name, value in first.attrs.items() if _in_all(name, value, selections)}
    return matrix.assign_attrs(shared)


def agreement(one: xr.Dataset, other: xr.Dataset) -> Agreement:
    """How far two selections agree: of two halves of the data, say, or of SIP and STR.

    Raises:
        ValueError: selections among other heads.
    """
    if not _same_heads(one, other):
        raise ValueError("the selections are of other heads, so they cannot agree")
    there = one.score.notnull().values & other.score.notnull().values
    chosen, others = (selection.selected.values[there] for selection in (one, other))
    n, n_one, n_other = int(there.sum()), int(chosen.sum()), int(others.sum())
    shared, either = int((chosen & others).sum()), int((chosen | others).sum())
    at_least = sum(math.comb(n_one, i) * math.comb(n - n_one, n_other - i) for i in range(shared, n_other + 1))
    return Agreement(
        shared,
        n_one,
        n_other,
        expected=n_one * n_other / n,
        p_value=at_least / math.comb(n, n_other),
        jaccard=shared / either if either else math.nan,
        rank_correlation=rank_correlation(_numbers(one, there), _numbers(other, there)),
    )


def split_half_agreement(
    result: xr.Dataset,
    k: float = 2.0,
    *,
    splits: int = 20,
    seed: int = 0,
    metric: str = "logit_difference",
    quantity: Literal["patched", "effect", "normalized"] = "effect",
) -> xr.Dataset:
    """Whether the heads selected on one half of the samples are selected on the other.

    Args:
        splits: how often the samples are split at random, from ``seed``.

    Returns:
        The fields of :class:`Agreement` over ``split``; ``frequency`` over heads, in how many of the halves each is
        selected.

    Raises:
        ValueError: fewer than two samples; and as :func:`select_heads`.
    """
    import xarray as xr

    def selected(half: Int[np.ndarray, " n"]) -> xr.Dataset:
        return select_heads(result.isel(sample=half), k, metric=metric, quantity=quantity, allow_empty=True)

    selections = split_half(
        result.sizes["sample"], lambda *halves: [selected(half) for half in halves], splits=splits, seed=seed
    )
    agreements = [agreement(*halves) for halves in selections]
    found = {name: ("split", [getattr(one, name) for one in agreements]) for name in Agreement._fields}
    frequency = xr.concat([half.selected for halves in selections for half in halves], "half").mean("half")
    facts = {"splits": splits, "split_seed": seed, "k": float(k), "metric": metric, "quantity": quantity}
    return xr.Dataset({**found, "frequency": frequency}).assign_attrs({**result.attrs, **facts})


def where_heads_read(sample: Sample, clean: VLMInputs, where: str | None) -> Span:
    """The positions where heads are patched or looked at.

    By default those of the correct answer among the words (the span ``answer``); in a model that reads the image among
    its tokens (LLaVA) the last position.

    Raises:
        SampleError: a sample without such a span.
    """
    if where is None:
        image = clean.spans.get("image")
        where = "last" if image is not None and image.tower == clean.text_tower else "answer"
        if where not in clean.spans:
            raise SampleError(
                f"{sample.id} has no span {where!r}: say which positions; there are {', '.join(clean.spans)}",
                f"no span {where!r}",
            )
    try:
        return clean.positions(where)
    except SpanError as error:
        raise SampleError(f"{sample.id}: {error}", f"no span {where!r}") from error


def attention_kinds(model: HookedVLM, tower: str) -> tuple[AttentionKind, ...]:
    """The kinds of attention that a tower has."""
    return tuple(kind for kind in ATTENTION_KINDS if f"{tower}.blocks.0.{kind}.hook_z" in model.hook_dict)


def _values(result: xr.Dataset, metric: str, quantity: str) -> xr.DataArray:
    if quantity not in ("patched", "effect", "normalized"):
        raise ValueError(f"quantity is 'patched', 'effect' or 'normalized', not {quantity!r}")
    if quantity not in result or not {"sample", "metric", *HEAD_DIMS} <= {*result[quantity].dims}:
        raise ValueError("heads are selected from what patch_heads returns, over samples, metrics and heads")
    if metric not in result.metric.values:
        raise ValueError(f"the result has no metric {metric!r}; it has {', '.join(result.metric.values)}")
    values = result[quantity].sel(metric=metric)
    others = {*values.dims} - {"sample", *HEAD_DIMS}
    if others:
        raise ValueError(
            f"the result has an axis of {', '.join(map(str, others))}: pick one, as result.sel(position=3) or "
            'by_role(result).sel(role="answer")'
        )
    if not bool(values.notnull().any()):
        raise ValueError(f"no head has a {quantity} {metric}: all of them are NaN")
    return values


def _same_heads(one: xr.Dataset, other: xr.Dataset) -> bool:
    return all(np.array_equal(one[dim].values, other[dim].values) for dim in HEAD_DIMS)


def _numbers(selection: xr.Dataset, there: np.ndarray) -> Float[np.ndarray, " heads"]:
    return selection.score.values[there]


def _in_all(name: str, value: object, selections: Mapping[tuple[str, str], xr.Dataset]) -> bool:
    own: Sequence[object] = [selection.attrs.get(name) for selection in selections.values()]
    return all(other == value for other in own)

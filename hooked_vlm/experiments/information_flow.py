"""Cross-modal information flow by attention knockout (Zhang et al. 2025, section 3; Geva et al. 2023).

An edge leads from some tokens to others: from a picture's patches to the question, from the question to the last
position. Where the targets may not read the sources, in a window of layers, and the answer becomes less likely, that is
where the edge carries it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.edits import BlockAttention
from hooked_vlm.experiments.parts.cases import QUESTION, Scored, first_tokens, ready
from hooked_vlm.experiments.parts.cells import n_layers
from hooked_vlm.experiments.parts.identification import Likeliest
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.picture_parts import picked, with_picture_spans
from hooked_vlm.experiments.parts.scores import DEFAULT_METRICS, metrics_of
from hooked_vlm.experiments.parts.sites import WindowConvention, window
from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.metrics import Together, at
from hooked_vlm.models import HookedVLM
from hooked_vlm.results import provenance
from hooked_vlm.sweep import sweep

if TYPE_CHECKING:
    import xarray as xr

Edge: TypeAlias = tuple[str, str]
"""Source and target, each a span by name, text or expression: what the target reads of the source is blocked."""

Layers: TypeAlias = Mapping[str, tuple[int, int]] | Sequence[tuple[int, int]]
"""Groups of layers, each (first, last), with names or without."""

SpanOf: TypeAlias = Callable[[HookedVLM, VLMInputs], Span]
"""A span made of a sample's inputs, whose regions are among their spans."""

EDGES: tuple[Edge, ...] = (
    ("question", "last"),
    ("image", "last"),
    ("last", "last"),
    ("image", "question"),
    ("image.object", "question"),
    ("image - image.object", "question"),
)
"""Those of the paper. In a BLIP, whose decoder sees no picture, all but that from the image to the last position."""

_GROUPS = {"early": (0, 10), "early-mid": (5, 15), "mid": (11, 21), "mid-late": (15, 25), "late": (21, 32)}


def layer_groups(n_layers: int) -> dict[str, tuple[int, int]]:
    """The overlapping groups of layers in which Neo et al. (2025, section 5) block attention, each (first, last).

    Theirs are of 32 layers, 0-9, 5-14, 11-20, 15-24 and 21-31; those of another depth lie in the same proportions.
    """
    groups = {}
    for name, (first, end) in _GROUPS.items():
        start = min(round(first * n_layers / 32), n_layers - 1)
        groups[name] = (start, max(start, round(end * n_layers / 32) - 1))
    return {**groups, "all": (0, n_layers - 1)}


@dataclass(frozen=True)
class Route:
    """An edge in a model: which attention reads which positions where."""

    attention: str
    """As in ``question_encoder.blocks.*.cross_attn``."""
    n_layers: int
    source: Span
    target: Span

    def blocked(self, layers: Iterable[int]) -> list[BlockAttention]:
        """What blocks it, in some layers."""
        return [
            BlockAttention(self.attention.replace("*", str(layer)), positions=self.target, keys=self.source)
            for layer in layers
        ]


@torch.no_grad()
def information_flow(
    model: HookedVLM,
    samples: VLMInputs | Sample | Sequence[Sample],
    edges: Sequence[Edge] | None = None,
    *,
    width: int = 1,
    convention: WindowConvention = "centered",
    layers: Layers | None = None,
    spans: Mapping[str, SpanOf] | None = None,
    padding: bool = False,
    metrics: Sequence[str] = DEFAULT_METRICS,
    answer: Int[Tensor, " b"] | None = None,
    foil: Int[Tensor, " b"] | None = None,
    prompt: str = QUESTION,
    scored: Scored = "own",
    progress: bool = False,
) -> xr.Dataset:
    """Block each edge in a window of layers around each, and see what becomes of the answer.

    In a LLaVA edges are blocked in the language model's self-attention. In a BLIP from ``image`` in the question
    encoder's cross-attention, within the question in its self-attention, and from the question to ``last``, which is
    the answer decoder's ``[DEC]``, in the decoder's cross-attention.

    Args:
        edges: pairs of spans, source and target; by default :data:`EDGES`, of samples with a region ``object``. Besides
            the sample's own spans and regions (``image.NAME``) and the inputs': ``rest``, ``image.seen``,
            ``image.padding``, ``image.class``, see
            :func:`~hooked_vlm.experiments.parts.picture_parts.with_picture_spans`; and expressions such as
            ``"image - image.object"``, the other patches that see the picture.
        width: how many layers are blocked together around each; ``convention`` as in :func:`window`. The paper's are 9
            of 40 and 7 of 32 layers.
        layers: groups of layers to block together, in place of windows: ``{"early": (0, 9)}``, or without names.
        spans: more names for edges: functions of the model and a sample's inputs that give positions.
        padding: count patches that see no picture into what is left of it.
        metrics: of :data:`~hooked_vlm.experiments.parts.scores.METRICS`.
        answer, foil: of inputs: the tokens scored; by default the two that the clean run finds likeliest.
        prompt: of samples: what is asked, around the question.
        scored: of samples: ``"own"``, the answer that the model itself begins with, as in the paper, or the ``"given"``
            one; as of :func:`~hooked_vlm.experiments.parts.cases.ready`. The paper keeps only samples that the model
            answers rightly: :func:`hooked_vlm.data.keep_correct`.

    Returns:
        Over ``(metric, sample, edge, layer)``: ``blocked``, and ``change``, that less ``base``, the clean run. Over
        ``(sample, edge, layer)``: ``relative``, the change of the answer's probability in per cent of it, where that is
        among the metrics (NaN where it is 0: counted in ``n_undefined``); and ``kept``, 1 where the scored answer is
        the likeliest in the blocked run too, and else 0. ``layer`` is a window's centre, or a group; ``first_layer``
        and ``last_layer`` say what it reaches over; NaN and -1 for layers that an edge's tower does not have.
        ``n_source`` and ``n_target`` count tokens. ``noise_floor`` over ``metric``: rounding. Of samples, ``correct``
        says whether the clean run's likeliest token begins the given answer.

    Raises:
        SampleError: a single sample that cannot be used: it lacks a span or region, or that is outside the picture, or
            an edge has no tokens at one end; of several, such are dropped and counted.
        ValueError: an edge that no attention carries; a window wider than its tower; groups of layers that it lacks; a
            model that predicts no tokens.
    """
    if edges is None:
        edges = [edge for edge in EDGES if edge != ("image", "last") or "language_model" in model.towers]
    plan = _Plan(tuple(edges), width, convention, layers, spans or {}, padding, tuple(metrics))
    plan.check()
    if f"{model.towers[-1]}.hook_logits" not in model.hook_dict:
        raise ValueError(f"{type(model).__name__} predicts no tokens, so that there is no answer to score")
    if isinstance(samples, VLMInputs):
        inputs = samples.to(model.device)
        logits = at(model(inputs), -1)
        likeliest = logits.topk(2).indices
        answer = likeliest[:, 0] if answer is None else answer.to(model.device)
        foil = likeliest[:, 1] if foil is None else foil.to(model.device)
        found = _flow(model, inputs, plan, answer, foil, logits, progress=progress)
        attributes = provenance(model, "information_flow", **plan.settings, samples_used=len(inputs))
        return _count_undefined(found.assign_attrs(attributes))

    def one(sample: Sample) -> xr.Dataset:
        case = ready(model, sample, prompt=prompt, scored=scored)
        try:
            found = _flow(model, case.clean, plan, case.answer, case.foil, case.clean_logits)
        except SpanError as error:
            raise SampleError(f"{sample.id}: {error}", "an edge without tokens") from error
        found["correct"] = ("sample", [_is_correct(model, sample, case.clean_logits)])
        return found

    asked = {"prompt": prompt, "scored": scored}
    return _count_undefined(
        over_samples(model, samples, "information_flow", one, progress=progress, **plan.settings, **asked)
    )


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is blocked, and what is measured."""

    edges: tuple[Edge, ...]
    width: int
    convention: WindowConvention
    layers: Layers | None
    spans: Mapping[str, SpanOf]
    padding: bool
    metrics: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """For a result's provenance."""
        return {
            "window": self.width,
            "window_convention": self.convention,
            "layers": "every one" if self.layers is None else _named(self.layers),
            "spans": {name: getattr(make, "__qualname__", repr(make)) for name, make in self.spans.items()},
            "padding": self.padding,
            "metrics": list(self.metrics),
        }

    def check(self) -> None:
        """That edges are pairs, and none is given twice; that layers are given in one way."""
        pairs = [isinstance(edge, tuple | list) and [type(end) for end in edge] == [str, str] for edge in self.edges]
        if not pairs or not all(pairs):
            raise ValueError(f"edges are a list of pairs (source, target) of spans' names, not {list(self.edges)!r}")
        twice = [edge for place, edge in enumerate(self.edges) if edge in self.edges[:place]]
        if twice:
            raise ValueError(f"the edge {twice[0]!r} is given twice")
        if self.layers is not None and (self.width, self.convention) != (1, "centered"):
            raise ValueError("layers are given in groups or in windows: leave out layers, or width and convention")

    def reaches(self, own: Route) -> dict[int | str, range]:
        """The layers that are blocked together on a route, by what they are called."""
        if self.layers is None:
            return {layer: window(layer, self.width, own.n_layers, self.convention) for layer in range(own.n_layers)}
        for name, (first, last) in _named(self.layers).items():
            if not 0 <= first <= last < own.n_layers:
                raise ValueError(
                    f"the group {name!r} is layers {first} to {last}, and {own.attention} has 0 to {own.n_layers - 1}"
                )
        return {name: range(first, last + 1) for name, (first, last) in _named(self.layers).items()}


def route(model: HookedVLM, inputs: VLMInputs, edge: Edge, *, padding: bool = False) -> Route:
    """Where an edge runs, in inputs that have picture spans.

    Raises:
        SpanError: positions that there are none of.
        ValueError: ends between which there is no attention.
    """
    source, target = (picked(inputs, words, padding=padding) for words in edge)
    for words, span in zip(edge, (source, target), strict=True):
        if not all(span.rows):
            raise SpanError(f"{words!r} has no tokens in row {[bool(row) for row in span.rows].index(False)}")
    places = [model.towers.index(span.tower) for span in (source, target)]
    kind = {0: "attn", 1: "cross_attn"}.get(places[1] - places[0], "")
    if f"{target.tower}.blocks.0.{kind}.hook_attn_scores" not in model.hook_dict:
        raise ValueError(
            f"no attention leads from {edge[0]!r} to {edge[1]!r}: {target.tower} does not read {source.tower}"
            + (" again" if source.tower == target.tower else "")
        )
    return Route(f"{target.tower}.blocks.*.{kind}", n_layers(model, target.tower), source, target)


def _flow(
    model: HookedVLM,
    inputs: VLMInputs,
    plan: _Plan,
    answer: Int[Tensor, " b"],
    foil: Int[Tensor, " b"],
    logits: Float[Tensor, "b d_vocab"],
    *,
    progress: bool = False,
) -> xr.Dataset:
    import xarray as xr

    inputs = with_picture_spans(inputs)
    inputs = replace(inputs, spans={**inputs.spans, **{name: make(model, inputs) for name, make in plan.spans.items()}})
    edges, metrics = plan.edges, plan.metrics
    routes = [route(model, inputs, edge, padding=plan.padding) for edge in edges]
    reaches = [plan.reaches(own) for own in routes]
    labels = list(dict.fromkeys(label for reach in reaches for label in reach))
    cells = [(edge, label) for edge, reach in enumerate(reaches) for label in reach]
    metric = Together((*metrics_of(metrics, answer, foil, logits[:, None]).metrics, Likeliest()))
    sets = [routes[edge].blocked(reaches[edge][label]) for edge, label in cells]
    blocked = sweep(model, inputs, sets, metric, progress=progress)

    grid = np.full((len(metrics) + 1, len(inputs), len(edges), len(labels)), np.nan)
    ends = np.full((2, len(edges), len(labels)), -1)
    for (edge, label), values in zip(cells, blocked.double().cpu().numpy(), strict=True):
        column = labels.index(label)
        grid[:, :, edge, column] = values.T
        ends[:, edge, column] = reaches[edge][label][0], reaches[edge][label][-1]
    base = rearrange(metric(logits[:, None]), "b metric -> metric b").double().cpu().numpy()
    kept = np.where(np.isnan(grid[-1]), np.nan, grid[-1] == answer.cpu().numpy()[:, None, None])
    counts = [[[len(row) for row in span.rows] for span in (own.source, own.target)] for own in routes]
    n_tokens = np.array(counts).transpose(1, 2, 0)
    result = xr.Dataset(
        {
            "blocked": (("metric", "sample", "edge", "layer"), grid[:-1]),
            "base": (("metric", "sample"), base[:-1]),
            "kept": (("sample", "edge", "layer"), kept),
            "n_source": (("sample", "edge"), n_tokens[0]),
            "n_target": (("sample", "edge"), n_tokens[1]),
            "answer": ("sample", model.token_strings(answer)),
            "foil": ("sample", model.token_strings(foil)),
            "noise_floor": ("metric", blocked.noise_floor[:-1].double().cpu().numpy()),
        },
        coords={
            "metric": list(metrics),
            "sample": np.arange(len(inputs)),
            "edge": [f"{source} → {target}" for source, target in edges],
            "layer": labels,
            "attention": ("edge", [own.attention for own in routes]),
            "first_layer": (("edge", "layer"), ends[0]),
            "last_layer": (("edge", "layer"), ends[1]),
        },
    )
    result["change"] = result.blocked - result.base
    if "probability" in metrics:
        probability = result.base.sel(metric="probability", drop=True)
        change = result.change.sel(metric="probability", drop=True)
        result["relative"] = 100 * change / probability.where(probability > 0)
    return result


def _named(layers: Layers) -> dict[str, tuple[int, int]]:
    if isinstance(layers, Mapping):
        groups = dict(layers)
    else:
        groups = {f"{first}–{last}": (first, last) for first, last in layers}
    if not groups:
        raise ValueError("there are no groups of layers")
    return groups


def _is_correct(model: HookedVLM, sample: Sample, logits: Float[Tensor, "1 d_vocab"]) -> bool:
    return sample.answer is not None and int(logits.argmax(-1)) in first_tokens(model, sample.answer).values()


def _count_undefined(result: xr.Dataset) -> xr.Dataset:
    if "relative" not in result:
        return result
    undefined = result.relative.isnull() & result.blocked.isel(metric=0).notnull()
    return result.assign_attrs(n_undefined=int(undefined.sum()))

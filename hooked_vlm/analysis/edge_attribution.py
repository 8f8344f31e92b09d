"""Edge attribution patching, EAP (Syed et al. 2023), and its integrated-gradients forms, EAP-IG (Hanna et al. 2024).

What an edge u -> v does, to first order: the change in what u writes, taken along the stream to what v reads, times the
gradient of the metric there. Axes: b row, p position, s senders, n receivers of one place, m d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.circuits import Circuit, How, check_corruption, find_circuit, measure_circuits, with_areas
from hooked_vlm.analysis.edge_patching import image_mask
from hooked_vlm.analysis.graph import MERGED, Graph, Receivers, Renorm, Senders, build_graph
from hooked_vlm.analysis.runs import Direction, Runs, towers_of
from hooked_vlm.corruptions import Corrupted, Corruption, describe
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.hooks import match_names
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import Metric
from hooked_vlm.models import HookedVLM
from hooked_vlm.results import provenance

if TYPE_CHECKING:
    import xarray as xr

Method = Literal["eap", "ig_inputs", "ig_activations", "clean_corrupted"]
Rule = Literal["left", "right", "midpoint"]
METHODS = ("eap", "ig_inputs", "ig_activations", "clean_corrupted")


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """The score of every edge, and what was scored."""

    graph: Graph
    runs: Runs
    values: Float[Tensor, "b sender receiver"]
    """0 where there is no edge."""
    attributes: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"EdgeScores({self.attributes['method']}, {len(self.values)} rows, {self.graph!r})"

    @property
    def mean(self) -> Float[Tensor, "sender receiver"]:
        """Over the rows."""
        return self.values.mean(0)

    def circuit(self, n: int, how: How = "top") -> Circuit:
        """The circuit of at most ``n`` edges that the mean scores say, see :func:`find_circuit`."""
        return find_circuit(self.graph, self.mean, n, how)

    def faithfulness(self, circuits: Circuit | Sequence[Circuit]) -> xr.Dataset:
        """How faithful circuits are on the rows that were scored, see :func:`faithfulness`."""
        return measure_circuits(self.runs, circuits).assign_attrs(self.attributes)

    def curve(self, sizes: Sequence[int] | None = None, how: How = "top") -> xr.Dataset:
        """Faithfulness of circuits of growing size, and the areas ``cpr`` and ``cmd`` (MIB).

        ``sizes``: by default none, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50 and 100 per cent of the edges, as in MIB.
        """
        total = int(self.graph.edges.sum())
        if sizes is None:
            sizes = [round(total * share) for share in (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)]
        curve = self.faithfulness([self.circuit(n, how) for n in sizes])
        return with_areas(curve.assign_coords(asked=("circuit", np.array(sizes)))).assign_attrs(how=how)

    def dataset(self) -> xr.Dataset:
        """``score`` over ``(sample, sender, receiver)``, NaN where there is no edge; nodes by name."""
        import xarray as xr

        scores = self.values.masked_fill(~self.graph.edges.to(self.values.device), torch.nan)
        senders = [(name, one.layer) for one in self.graph.stages(Senders) for name in one.nodes]
        receivers = [(name, one.layer, one.kind) for one in self.graph.stages(Receivers) for name in one.inputs]
        return xr.Dataset(
            {"score": (("sample", "sender", "receiver"), scores.cpu().numpy())},
            coords={
                "sample": np.arange(len(scores)),
                "sender": list(self.graph.senders),
                "receiver": list(self.graph.receivers),
                "sender_layer": ("sender", [layer for _, layer in senders]),
                "receiver_layer": ("receiver", [layer for _, layer, _ in receivers]),
                "receiver_kind": ("receiver", [kind for _, _, kind in receivers]),
            },
            attrs=dict(self.attributes),
        )


@torch.no_grad()
def eap(
    model: HookedVLM,
    clean: VLMInputs,
    corruption: Corruption,
    metric: Metric,
    *,
    method: Method = "eap",
    steps: int = 5,
    rule: Rule = "midpoint",
    towers: Sequence[str] | None = None,
    direction: Direction = "noising",
) -> EdgeScores:
    """The effect on ``metric`` of every edge of a model carrying the other run's activation, approximately.

    Args:
        method: ``"eap"``: the gradient of the run that is patched; two forwards and a backward.
            ``"clean_corrupted"``: the mean of both runs' gradients. ``"ig_inputs"``: the mean over inputs between the
            two runs', ``steps`` forwards and backwards. ``"ig_activations"``: of a sender's edges the mean over its
            own outputs between the two, its attention's heads together; so many for every place that writes. (The
            authors' code gives every edge the mean over all of these passes, wherever the interpolation is.)
        rule: where on the way the steps lie, as of a Riemann sum from the corrupted run to the clean one: ``"left"``
            takes the corrupted end in and leaves the clean one out, ``"right"`` the reverse.
        towers: by default all that a corruption does not edit inside; what they read of others is an input.
        direction: ``"noising"``: corrupted activations in the clean run. ``"denoising"``: the reverse.

    Raises:
        ValueError: an unknown method, rule, tower or direction; no steps; a corruption that edits activations inside
            the graph; a metric that is not one number a row or not differentiable; a vision encoder whose rows are
            not the batch's, or that is read at several layers.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    shares = _shares(steps, rule)
    runs = Runs.of(model, clean, corruption, metric)
    graph = build_graph(model, towers_of(model, clean, towers or _untouched(runs)))
    check_corruption(runs, graph)
    start, source = runs.directed(direction)
    # Shares are of the clean run; a step goes so far from the run that is patched towards the other.
    away = [1 - share if direction == "noising" else share for share in shares]
    scores = _scores(graph, runs, start, source, method, away)
    parameters = {"steps": steps, "rule": rule} if method.startswith("ig_") else {}
    attributes = provenance(
        model,
        method,
        **describe(corruption),
        **parameters,
        metric=type(metric).__name__,
        direction=direction,
        towers=list(graph.towers),
        samples_used=len(clean),
    )
    return EdgeScores(graph, runs, runs.mean_of_draws(scores), attributes)


def _shares(steps: int, rule: Rule) -> list[float]:
    offsets = {"left": 0.0, "midpoint": 0.5, "right": 1.0}
    if rule not in offsets:
        raise ValueError(f"rule must be one of {', '.join(offsets)}, not {rule!r}")
    if steps < 1:
        raise ValueError(f"integrated gradients need at least one step, not {steps}")
    return [(step + offsets[rule]) / steps for step in range(steps)]


def _untouched(runs: Runs) -> list[str]:
    """Towers after the last that a corruption edits inside; all, where it changes the inputs alone."""
    model = runs.model
    edited = [name for edit in runs.corrupted.edits for name in match_names(edit.site, model.hook_names)]
    inside = [name for name in edited if name.endswith(MERGED) or not name.endswith("embed")]
    # LLaVA's merged embeddings are what its projector puts out.
    last = max((model.towers.index(name.split(".")[0]) - name.endswith(MERGED) for name in inside), default=-1)
    return [tower for tower in towers_of(model, runs.clean.inputs, None) if model.towers.index(tower) > last]


def _scores(
    graph: Graph, runs: Runs, start: Corrupted, source: Corrupted, method: Method, away: Sequence[float]
) -> Float[Tensor, "rows sender receiver"]:
    senders: list[Senders] = graph.stages(Senders)
    _, other = runs.activations(source, graph.sender_sites)
    if method == "eap":
        return _scored(graph, runs, start, other)
    _, here = runs.activations(start, graph.sender_sites)
    scored = partial(_scored, graph, runs, other=other, changes=_changes(here, other))
    if method == "clean_corrupted":
        return (scored(run=start) + scored(run=source)) / 2
    if method == "ig_inputs":
        inputs = [one for one in senders if bool(graph.is_input[graph.columns(one)].any())]
        return torch.stack([scored(run=start, moved=inputs, far=far) for far in away]).mean(0)
    own = [torch.stack([scored(run=start, moved=[one], far=far, only=one) for far in away]).mean(0) for one in senders]
    return torch.stack(own).sum(0)


def _changes(here: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {site: other[site] - here[site] for site in other}


def _scored(
    graph: Graph,
    runs: Runs,
    run: Corrupted,
    other: Mapping[str, Tensor],
    changes: Mapping[str, Tensor] | None = None,
    moved: Sequence[Senders] = (),
    far: float = 0.0,
    only: Senders | None = None,
) -> Float[Tensor, "rows sender receiver"]:
    """Scores by the gradients of one run, in which what ``moved`` write is ``far`` on its way to the other run's.

    ``changes`` at senders are of this run to the other, unless they are given.
    """
    is_image = image_mask(runs.model, run.inputs)

    def move(activation: Tensor, hook: HookPoint, senders: Senders) -> Tensor:
        change, is_input = other[hook.name] - activation.detach(), graph.is_input[graph.columns(senders)]
        if bool(is_input.any()) and not bool(is_input.all()):
            # Of LLaVA's merged embeddings the text's alone: the projector's follow from its own input.
            change = senders.write(change, is_image)[:, :, is_input.to(change.device)].sum(2)
        return activation + far * change

    hooks = [(one.site, partial(move, senders=one)) for one in moved]
    reads = list(dict.fromkeys(one.site for one in graph.stages(Receivers)))
    with runs.tape(run, graph.names, reads, fwd_hooks=hooks) as tape:
        gradients = tape.backward()
    changes = changes or _changes(tape.activations, other)
    scores = torch.zeros(len(run.inputs), *graph.edges.shape, device=runs.model.device)
    for senders, columns, gradient in gradients_at_senders(graph, gradients, tape.activations):
        if only in (None, senders):
            written = senders.write(changes[senders.site], is_image).float()
            block = einsum(written, gradient.to(written), "b p s m, b p n m -> b s n")
            scores[:, graph.columns(senders), columns] = block.to(scores)
    return scores


def gradients_at_senders(
    graph: Graph, gradients: Mapping[str, Tensor], activations: Mapping[str, Tensor]
) -> Iterator[tuple[Senders, list[int], Float[Tensor, "b p n m"]]]:
    """At each place that writes to a stream, the gradient of what receivers read, along the stream alone.

    With each the receivers' columns; a pair of sender and receiver occurs once.
    """
    for stream in graph.streams:
        receivers = [one for one in stream.stages if isinstance(one, Receivers) and one.site in gradients]
        # LayerNorms on the way are passed by all receivers together; where there are none, one at a time holds less.
        has_norms = any(isinstance(one, Renorm) for one in stream.stages)
        for some in [receivers] if has_norms else [[one] for one in receivers]:
            carried: Tensor | None = None
            columns: list[int] = []
            for stage in reversed(stream.stages):
                if isinstance(stage, Receivers):
                    if stage in some:
                        own = _at_input(stage, gradients[stage.site], activations)
                        carried = own if carried is None else torch.cat([carried, own.to(carried)], dim=2)
                        columns += range(*graph.columns(stage).indices(len(graph.receivers)))
                elif carried is None:
                    continue
                elif isinstance(stage, Renorm):
                    carried = _through_norm(stage, activations[stage.site], carried)
                else:
                    yield stage, columns, carried


def _at_input(
    receivers: Receivers, gradient: Float[Tensor, "b p *features"], activations: Mapping[str, Tensor]
) -> Float[Tensor, "b p n m"]:
    """The gradient at each receiver's own copy of the stream."""
    if receivers.attention is None:
        own = gradient.unsqueeze(2)
    else:
        own = einsum(gradient, receivers.weight.to(gradient), "b p n d, n m d -> b p n m")
    return own if receivers.norm is None else _through_norm(receivers.norm, activations[receivers.norm.site], own)


@torch.enable_grad()
def _through_norm(
    renorm: Renorm, stream: Float[Tensor, "b p m"], gradient: Float[Tensor, "b p n m"]
) -> Float[Tensor, "b p n m"]:
    """Each receiver's gradient before the LayerNorm, of the one after it."""
    copies = stream.detach().unsqueeze(2).expand(-1, -1, gradient.shape[2], -1).clone().requires_grad_()
    (before,) = torch.autograd.grad(renorm.norm.normalize(copies), copies, gradient.to(copies))
    return before

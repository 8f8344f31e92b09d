"""Path patching (Goldowsky-Dill et al. 2023; Wang et al. 2023, section 3.1): what parts of a model tell other parts.

1. Run the original inputs, and the new ones.
2. In the original run, let the senders write what they write in the new one. Every other head writes what it did, and
   so does every other MLP, unless they are free. What do the receivers read then?
3. Run the original inputs again, the receivers reading that, and all that comes after them as it may.

Since heads are frozen, step 2 needs no forward (:mod:`hooked_vlm.experiments.parts.paths`), and step 3 is one sweep.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.analysis.circuits import check_corruption
from hooked_vlm.analysis.graph import PROJECTOR, Graph, Receivers, build_graph
from hooked_vlm.analysis.runs import Direction, Runs, towers_of
from hooked_vlm.cache import ActivationCache
from hooked_vlm.corruptions import Corrupted
from hooked_vlm.data.samples import Sample
from hooked_vlm.edits import Edit, Replace, edit_hooks
from hooked_vlm.experiments.parts.cases import QUESTION, Case, CorruptionOf, Scored, described, ready
from hooked_vlm.experiments.parts.components import check_spans, listed, matching
from hooked_vlm.experiments.parts.heads import Head
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.paths import Paths
from hooked_vlm.experiments.parts.scores import DEFAULT_METRICS, metrics_of
from hooked_vlm.models import HookedVLM
from hooked_vlm.selection import Positions
from hooked_vlm.sweep import Effects, sweep

if TYPE_CHECKING:
    import xarray as xr

Named = Sequence[str | Head] | Mapping[str, Sequence[str | Head]]
"""Nodes, or patterns of their names: each alone, or together as sets by name."""

MLPs = Literal["frozen", "free"]

HELD = 2**26
"""Numbers of changed streams that are held together, at most: 256 MiB in float32."""


@torch.no_grad()
def path_patch(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    corruption: CorruptionOf,
    *,
    senders: Named | None = None,
    receivers: Named | None = None,
    mlps: MLPs = "frozen",
    direction: Direction = "noising",
    positions: Positions = None,
    receiver_positions: Positions = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    prompt: str = QUESTION,
    scored: Scored = "given",
    progress: bool = False,
) -> xr.Dataset:
    """Patch the paths from senders to receivers, past no other head.

    Args:
        corruption: ``"sip"``, ``"str"``, a :class:`~hooked_vlm.corruptions.Corruption`, or a function that makes one of
            each sample.
        senders: names of nodes (:mod:`hooked_vlm.analysis.graph`), or patterns of them: ``{tower}.L3.attn.H1``,
            ``....cross_attn.H1``, ``....mlp``, ``{tower}.embed``, ``projector``, and ``{tower}.out`` for all that a
            tower puts out. Of a list each sends alone; of a mapping, those of each name together. By default all that
            have a path to a receiver, in the receivers' own towers.
        receivers: inputs of nodes: ``....H1.q``, ``.k``, ``.v`` (``KV1.k`` where heads share keys), ``....mlp``,
            ``projector``, and ``{tower}.out``, of which logits are made. In cross-attention ``.k`` and ``.v`` read the
            other tower. A list or a mapping, as of senders; by default the end of the last tower: direct effects on
            the logits.
        mlps: ``"frozen"``, so that paths are those of residual connections alone, as edges of
            :func:`~hooked_vlm.analysis.eap`; or ``"free"``, so that they go through MLPs too (and LLaVA's projector).
        direction: ``"noising"``: the clean run is the original one and the corrupted the new; ``"denoising"``: the
            reverse.
        positions: where senders are patched; by default everywhere.
        receiver_positions: where receivers read it; by default everywhere.
        metrics: of :data:`~hooked_vlm.experiments.parts.scores.METRICS`.
        prompt, scored: as of :func:`~hooked_vlm.experiments.parts.cases.ready`.

    Returns:
        Over ``(metric, sample, sender, receiver)``: ``patched``, the metric; ``effect``, that less the original run's;
        ``relative``, the effect in units of how far the two runs lie apart: noising, -1 is all that the corruption
        does, and negative says that the path supports the answer. NaN where they do not differ: counted in
        ``n_undefined``. ``is_path`` over ``(sender, receiver)``; where there is none, the effect is 0. ``clean`` and
        ``corrupted`` over ``(metric, sample)``; ``noise_floor`` over ``metric``.

    Raises:
        ValueError: no senders or receivers, or no path between them; an unknown name; a corruption that edits
            activations inside the towers that the paths are in; a vision encoder with several feature layers, or whose
            rows are not the batch's.
        SampleError: a single sample that cannot be used; of several, such are dropped and counted.
    """
    wires = Wiring.of(model, senders, receivers, mlps)
    sites = (wires.names, wires.graph.sender_sites)
    of_clean, of_corrupted = sites if direction == "noising" else sites[::-1]

    def one(sample: Sample) -> xr.Dataset:
        case = ready(model, sample, corruption, prompt=prompt, scored=scored, keep=of_clean)
        check_spans(sample, case.clean, [positions, receiver_positions])
        runs = _runs(model, case, wires.graph, metrics)
        start, _ = runs.directed(direction)
        clean, clean_cache = _repeated(case, runs.draws)
        corrupted, corrupted_cache = _run(model, runs.corrupted, of_corrupted)
        here, other = clean_cache, corrupted_cache
        if direction == "denoising":
            here, other = other, here
        paths = Paths(model, wires.graph, start.inputs, here, other, positions, free=mlps == "free")
        found = []
        for some in wires.sent.split(_at_once(here)):
            rerouted = _rerouted(wires, paths, some, receiver_positions)
            found.append(sweep(model, start.inputs, rerouted, runs.metric, base=start.edits, progress=False))
        ends = [runs.metric(logits) for logits in (clean, corrupted)]
        result = _scored(wires, found, ends, runs.draws, list(metrics))
        result["correct"] = ("sample", [case.is_correct])
        for name, token in (("answer", case.answer), ("foil", case.foil)):
            result[name] = ("sample", model.token_strings(token))
        return result

    settings = {"mlps": mlps, "direction": direction, "senders": wires.senders, "receivers": wires.receivers}
    where = {"positions": listed(positions), "receiver_positions": listed(receiver_positions)}
    asked = {"metrics": list(metrics), "prompt": prompt, "scored": scored}
    found = over_samples(
        model, samples, "path_patch", one, progress=progress, **described(corruption), **settings, **where, **asked
    )
    return found.assign_attrs(n_undefined=int((found.relative.isnull() & found.patched.notnull()).sum()))


@dataclass(frozen=True, eq=False)
class Wiring:
    """Sets of senders and of receivers in a graph, and which of them paths connect."""

    graph: Graph
    senders: Mapping[str, Sequence[str]]
    receivers: Mapping[str, Sequence[str]]
    reach: Bool[Tensor, "sender receiver"]
    """Which nodes a path leads from, to which inputs."""
    free: bool

    @classmethod
    def of(cls, model: HookedVLM, senders: Named | None, receivers: Named | None, mlps: MLPs) -> Wiring:
        """Raises ValueError: unknown names; no senders, receivers or paths."""
        if mlps not in ("frozen", "free"):
            raise ValueError(f"mlps are 'frozen' or 'free', not {mlps!r}")
        receivers = [f"{model.towers[-1]}.out"] if receivers is None else receivers
        graph = build_graph(model, _towers(model, senders, receivers))
        reach, reading = _reach(graph, mlps), _sets(receivers, graph.receivers, "receiver")
        if senders is None:
            leads = _leads(reach, _members(reading, graph.receivers).T).any(1).tolist()
            senders = [name for name, own in zip(graph.senders, leads, strict=True) if own]
        wires = cls(graph, _sets(senders, graph.senders, "sender"), reading, reach, mlps == "free")
        if not bool(wires.is_path.any()):
            raise ValueError(
                f"no path leads from {', '.join(wires.senders)} to {', '.join(reading)}, past no other head and with "
                f"MLPs {mlps}"
            )
        return wires

    @cached_property
    def sent(self) -> Bool[Tensor, "sets sender"]:
        return _members(self.senders, self.graph.senders)

    @cached_property
    def read(self) -> Bool[Tensor, "sets receiver"]:
        return _members(self.receivers, self.graph.receivers)

    @cached_property
    def is_path(self) -> Bool[Tensor, "sets other_sets"]:
        return _leads(_leads(self.sent, self.reach), self.read.T)

    @property
    def names(self) -> list[str]:
        """What must be known of the run that is patched."""
        stages: list[Receivers] = self.graph.stages(Receivers)
        own = [one.site for one in stages if bool(self.read[:, self.graph.columns(one)].any())]
        answering = [one.site for one in stages if self.free and one.attention is None]
        return list(dict.fromkeys([*self.graph.names, *own, *answering]))


def _rerouted(wires: Wiring, paths: Paths, sent: Bool[Tensor, "s sender"], positions: Positions) -> list[list[Edit]]:
    """Step 2: for each of some sets of senders, and each of receivers, what lets these read what they read then."""
    cells: list[list[list[Edit]]] = [[[] for _ in wires.read] for _ in sent]
    reached, last = _leads(sent, wires.reach), f"{paths.model.towers[-1]}.hook_out"
    for place, change in paths.changes(sent, wires.read.any(0)):
        here = paths.here[place.site]
        change, weight = change.to(here), None if place.attention is None else place.weight.to(here)
        for head, column in enumerate(range(*wires.graph.columns(place).indices(len(wires.graph.receivers)))):
            readers, senders = (own[:, column].nonzero()[:, 0].tolist() for own in (wires.read, reached))
            if not readers or not senders:
                continue
            value, where = _value(here, change[senders], weight, head), positions
            if place.site == last and positions is None:
                value, where = value[:, :, -1:], [-1]  # the answer is read there and nowhere else
            for s, own in zip(senders, value, strict=True):
                for r in readers:
                    edit = Replace(place.site, own, heads=None if weight is None else head, positions=where)
                    cells[s][r].append(edit)
    return [edits for row in cells for edits in row]


def _value(
    here: Float[Tensor, "b p ..."], change: Float[Tensor, "s b p m"], weight: Float[Tensor, "n m d"] | None, index: int
) -> Float[Tensor, "s b p ..."]:
    """What a receiver reads: a head what it makes of it, as q, k or v."""
    if weight is None:
        return here + change
    return here[:, :, index, None] + einsum(change, weight[index], "s b p m, m d -> s b p d").unsqueeze(3)


def _sets(chosen: Named, known: Sequence[str], what: str) -> dict[str, list[str]]:
    if isinstance(chosen, Mapping):
        if not chosen:
            raise ValueError(f"no {what} is named; give at least one")
        return {name: matching(own, known, what) for name, own in chosen.items()}
    return {name: [name] for name in matching(chosen, known, what)}


def _members(sets: Mapping[str, Sequence[str]], known: Sequence[str]) -> Bool[Tensor, "sets known"]:
    return torch.tensor([[name in own for name in known] for own in map(set, sets.values())])


def _leads(one: Bool[Tensor, "i j"], other: Bool[Tensor, "j k"]) -> Bool[Tensor, "i k"]:
    """Whether any j leads from i to k."""
    return one.float() @ other.float() > 0


def _reach(graph: Graph, mlps: MLPs) -> Bool[Tensor, "sender receiver"]:
    """Which senders a path leads from, and to which receivers."""
    if mlps == "frozen" or PROJECTOR not in graph.receivers or PROJECTOR not in graph.senders:
        return graph.edges
    into, out = graph.edges[:, graph.receivers.index(PROJECTOR)], graph.edges[graph.senders.index(PROJECTOR)]
    return graph.edges | (into[:, None] & out)


def _towers(model: HookedVLM, senders: Named | None, receivers: Named) -> list[str]:
    """The towers that are named, and those between; what one puts out is not in it, but read by the next."""
    reading = _patterns(receivers)
    named = [*reading, *(name for name in _patterns(senders or ()) if not name.endswith(".out"))]
    layered = [tower for tower in model.towers if tower != PROJECTOR]
    ends = {
        place
        for place, tower in enumerate(layered)
        if any(fnmatch.fnmatch(tower, name.split(".")[0]) for name in named)
    }
    if PROJECTOR in named:
        ends |= {len(layered) - 1} | ({0} if PROJECTOR in reading else set())
    return layered[min(ends) : max(ends) + 1] if ends else layered


def _patterns(chosen: Named) -> list[str]:
    if isinstance(chosen, str):
        return [chosen]
    listed = [name for own in chosen.values() for name in own] if isinstance(chosen, Mapping) else list(chosen)
    return list(map(str, listed))


def _runs(model: HookedVLM, case: Case, graph: Graph, metrics: Sequence[str]) -> Runs:
    """Both runs of a sample, checked to fit the graph."""
    assert case.corrupted is not None
    towers_of(model, case.clean, graph.towers)
    draws = case.corrupted.draws
    metric = metrics_of(metrics, case.answer, case.foil, case.clean_logits[:, None], draws)
    runs = Runs(model, Corrupted(case.clean.repeat(draws), draws=draws), case.corrupted, metric)
    check_corruption(runs, graph)
    return runs


def _repeated(case: Case, draws: int) -> tuple[Float[Tensor, "draws 1 d_vocab"], Mapping[str, Tensor]]:
    """The clean run, once for each draw: what it predicts, and what was kept of it."""
    cache = {name: activation.repeat_interleave(draws, 0) for name, activation in case.clean_cache.items()}
    return case.clean_logits[:, None].repeat_interleave(draws, 0), case.clean_cache if draws == 1 else cache


def _run(model: HookedVLM, run: Corrupted, names: Sequence[str]) -> tuple[Tensor, ActivationCache]:
    with model.hooks(edit_hooks(model, run.inputs, run.edits)):
        return model.run_with_cache(run.inputs, names_filter=list(names))


def _at_once(here: Mapping[str, Tensor]) -> int:
    """How many sets of senders are taken along the stream together."""
    return max(1, HELD // max(activation.numel() for activation in here.values()))


def _mean_draws(scores: Float[Tensor, "n rows metric"], draws: int) -> Float[Tensor, "n b metric"]:
    return reduce(scores.double().cpu(), "n (b draws) metric -> n b metric", "mean", draws=draws)


def _scored(
    wires: Wiring,
    found: Sequence[Effects],
    ends: Sequence[Float[Tensor, "rows metric"]],
    draws: int,
    metrics: list[str],
) -> xr.Dataset:
    import xarray as xr

    patched = torch.cat([_mean_draws(effects, draws) for effects in found])
    grid = rearrange(patched, "(s r) b metric -> metric b s r", s=len(wires.senders))
    start, clean, corrupted = (_mean_draws(own[None], draws)[0].T for own in (found[0].base, *ends))
    effect, apart = grid - start[..., None, None], (clean - corrupted).abs()
    undefined = apart <= 1e-6 * torch.maximum(clean.abs(), corrupted.abs())
    relative = effect / apart.masked_fill(undefined, torch.nan)[..., None, None]
    dims = ("metric", "sample", "sender", "receiver")
    cells, ends_of = {"patched": grid, "effect": effect, "relative": relative}, {"clean": clean, "corrupted": corrupted}
    floor = torch.stack([own.noise_floor for own in found]).amax(0)
    return xr.Dataset(
        {
            **{name: (dims, own.numpy()) for name, own in cells.items()},
            **{name: (dims[:2], own.numpy()) for name, own in ends_of.items()},
            "is_path": (dims[2:], wires.is_path.numpy()),
            "noise_floor": (dims[0], floor.double().cpu().numpy()),
        },
        coords={"metric": metrics, "sender": list(wires.senders), "receiver": list(wires.receivers)},
    )

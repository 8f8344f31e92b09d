"""How well cheap attributions do: held against exact patching of the same nodes or edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.attribution import atp
from hooked_vlm.analysis.edge_attribution import EdgeScores
from hooked_vlm.analysis.edge_patching import patch_each_edge
from hooked_vlm.analysis.nodes import Site, find_sites
from hooked_vlm.analysis.runs import Direction, Runs, towers_of
from hooked_vlm.corruptions import Corruption
from hooked_vlm.edits import Replace
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import Metric
from hooked_vlm.models import HookedVLM
from hooked_vlm.statistics import rank_correlation
from hooked_vlm.sweep import sweep

if TYPE_CHECKING:
    import xarray as xr

ROUNDING = 1e-6
"""Of the metric, in the larger of the two runs: smaller effects are rounding, and rank as equal."""

_FIELDS = {
    **{"position": "positions", "query": "positions", "key": "positions"},
    **{"head": "heads", "kv_head": "heads", "neuron": "neurons"},
}
"""What an edit calls the axes that tell nodes apart."""


def compare_nodes(
    model: HookedVLM,
    clean: VLMInputs,
    corruption: Corruption,
    metric: Metric,
    *,
    nodes: Sequence[str] | str = ("resid", "sublayers", "heads"),
    towers: Sequence[str] | None = None,
    direction: Direction = "noising",
    qk_fix: bool = False,
    grad_drop: bool = False,
    n: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """:func:`atp`, and activation patching of the same nodes by an exact sweep.

    Args:
        n: so many nodes of each kind, drawn by ``seed``; by default all.

    Returns:
        ``approximate`` and ``exact`` effects (absolute ones with ``grad_drop``) over ``(node, sample)``; ``kind``,
        ``tower``, ``layer`` and the rest say which node, -1 where it has no such axis. Over ``group``, each kind and
        ``"all"``, with all rows together: ``rank_correlation`` (Spearman's), ``same_sign`` (the share of effects
        beyond rounding whose sign is right) and ``n_effects``. :func:`worst` lists what is most wrong.

    Raises:
        ValueError: as :func:`atp`.
    """
    effects = atp(
        model,
        clean,
        corruption,
        metric,
        nodes=nodes,
        towers=towers,
        direction=direction,
        qk_fix=qk_fix,
        grad_drop=grad_drop,
    )
    sites = {
        (site.kind, site.tower, site.layer): site for site in find_sites(model, nodes, towers_of(model, clean, towers))
    }
    generator = np.random.default_rng(seed)
    kinds = dict.fromkeys(kind for kind, _, _ in sites)
    cells = [cell for kind in kinds for cell in _cells(effects, kind, n, generator)]
    runs = Runs.of(model, clean, corruption, metric)
    start, source = runs.directed(direction)
    before, _ = runs.activations(start, [next(iter(sites.values())).name])
    after, cache = runs.activations(source, [site.name for site in sites.values()])
    patches = [[_patch(sites[cell["kind"], cell["tower"], cell.get("layer")], cell, cache)] for cell in cells]
    # Of a metric that it knows, a sweep need not compute what the metric does not read.
    measure = metric if runs.draws == 1 else runs.measure
    patched = sweep(model, start.inputs, patches, measure, base=start.edits, progress=progress)
    exact = patched - before
    if grad_drop:
        exact = exact.abs()
    exact = runs.mean_of_draws(exact.T).T
    approximate = np.stack([effects[cell["kind"]].sel(_place(cell)).values for cell in cells])
    axes = dict.fromkeys(axis for cell in cells for axis in cell)
    labels = {axis: np.array([cell.get(axis, -1) for cell in cells]) for axis in axes}
    of_kind = labels.pop("kind")
    rounding = _rounding(runs, before, after)
    return _compared("node", approximate, _array(exact), labels, of_kind, rounding).assign_attrs(effects.attrs)


def compare_edges(scores: EdgeScores, *, n: int | None = None, seed: int = 0, batch: int = 64) -> xr.Dataset:
    """Edge scores, and exact patching of the same edges, each alone (:mod:`hooked_vlm.analysis.edge_patching`).

    Args:
        n: so many edges, drawn by ``seed``; by default all.
        batch: runs that are made together.

    Returns:
        As :func:`compare_nodes`, over ``(edge, sample)``, with ``sender`` and ``receiver``; kinds are what the receiver
        is: ``q``, ``cross_k``, ``mlp``, ``out``, ...
    """
    graph, runs = scores.graph, scores.runs
    edges = graph.edges.nonzero()
    if n is not None and n < len(edges):
        edges = edges[np.sort(np.random.default_rng(seed).choice(len(edges), n, replace=False))]
    start, source = runs.directed(scores.attributes["direction"])
    before, _ = runs.activations(start, graph.sender_sites[:1])
    after, cache = runs.activations(source, graph.sender_sites)
    exact = patch_each_edge(runs, start, cache, graph, edges, batch) - before
    receivers = [graph.receivers[v] for v in edges[:, 1].tolist()]
    return _compared(
        "edge",
        _array(scores.values[:, edges[:, 0], edges[:, 1]].T),
        _array(runs.mean_of_draws(exact.T).T),
        {"sender": np.array([graph.senders[u] for u in edges[:, 0].tolist()]), "receiver": np.array(receivers)},
        np.array([_edge_kind(name) for name in receivers]),
        _rounding(runs, before, after),
    ).assign_attrs(scores.attributes)


def worst(compared: xr.Dataset, n: int = 10) -> xr.Dataset:
    """The ``n`` nodes or edges whose approximation is most wrong, in the mean of absolute errors over samples."""
    dim = "node" if "node" in compared.dims else "edge"
    errors = abs(compared.approximate - compared.exact).mean("sample")
    return compared.assign(error=errors).isel({dim: np.argsort(-errors.values, kind="stable")[:n]}).drop_dims("group")


def _cells(effects: xr.Dataset, kind: str, n: int | None, generator: np.random.Generator) -> list[dict[str, Any]]:
    """The nodes of a kind that some row has, or ``n`` of them: its axes' values, the kind's own name among them."""
    there = effects[kind].notnull().any("sample")
    places = np.argwhere(there.values)
    if n is not None and n < len(places):
        places = places[np.sort(generator.choice(len(places), n, replace=False))]
    cells: list[dict[str, Any]] = [
        {"kind": kind, **dict(zip(map(str, there.dims), place, strict=True))} for place in places.tolist()
    ]
    return [{**cell, "tower": str(effects.tower.values[cell["tower"]])} for cell in cells]


def _patch(site: Site, cell: Mapping[str, Any], cache: Mapping[str, Tensor]) -> Replace:
    """The edit that puts one node in."""
    fields = {**_FIELDS, "key": "neurons"} if "query" in site.axes else _FIELDS
    return Replace(site.name, cache[site.name], **{fields[axis]: cell[axis] for axis in site.axes})


def _array(values: Float[Tensor, "cells b"]) -> Float[np.ndarray, "cells b"]:
    return values.double().cpu().numpy()


def _rounding(runs: Runs, one: Float[Tensor, " rows"], other: Float[Tensor, " rows"]) -> Float[np.ndarray, " b"]:
    return (ROUNDING * runs.mean_of_draws(torch.maximum(one.abs(), other.abs()))).double().cpu().numpy()


def _place(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name != "kind"}


def _edge_kind(receiver: str) -> str:
    place, _, kind = receiver.rpartition(".")
    if kind in ("mlp", "out"):
        return kind
    return "out" if not place else f"{'cross_' if '.cross_attn.' in receiver else ''}{kind}"


def _compared(
    dim: str,
    approximate: Float[np.ndarray, "cells b"],
    exact: Float[np.ndarray, "cells b"],
    labels: Mapping[str, np.ndarray],
    kinds: np.ndarray,
    rounding: Float[np.ndarray, " b"],
) -> xr.Dataset:
    import xarray as xr

    there = ~np.isnan(approximate)
    exact = np.where(there, exact, np.nan)
    approximate_or_0, exact_or_0 = (
        np.where(np.abs(values) <= rounding, 0.0, values).astype(np.float64) for values in (approximate, exact)
    )
    found: dict[str, list[float]] = {"rank_correlation": [], "same_sign": [], "n_effects": []}
    every = list(dict.fromkeys(kinds.tolist()))
    for kind in [*every, "all"]:
        own = there & (np.full(len(kinds), True) if kind == "all" else kinds == kind)[:, None]
        one, other = approximate_or_0[own], exact_or_0[own]
        found["rank_correlation"].append(rank_correlation(one, other))
        is_large = other != 0
        is_right = np.sign(one[is_large]) == np.sign(other[is_large])
        found["same_sign"].append(float(is_right.mean()) if len(is_right) else float("nan"))
        found["n_effects"].append(int(own.sum()))
    return xr.Dataset(
        {
            "approximate": ((dim, "sample"), approximate),
            "exact": ((dim, "sample"), exact),
            **{name: ("group", values) for name, values in found.items()},
        },
        coords={
            "sample": np.arange(approximate.shape[1]),
            "kind": (dim, kinds),
            "group": [*every, "all"],
            **{name: (dim, values) for name, values in labels.items()},
        },
    )

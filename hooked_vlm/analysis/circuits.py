"""Circuits: sub-graphs that should do what the model does, and how faithful they are.

Edges outside a circuit carry the corrupted run's activations (Hanna et al. 2024, section 2).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.analysis.edge_patching import patch_edges
from hooked_vlm.analysis.graph import MERGED, Graph
from hooked_vlm.analysis.runs import Runs
from hooked_vlm.corruptions import Corruption, describe
from hooked_vlm.hooks import match_names
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import Metric, normalized
from hooked_vlm.models import HookedVLM
from hooked_vlm.results import provenance

if TYPE_CHECKING:
    import xarray as xr

How = Literal["top", "greedy"]


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph."""

    graph: Graph
    edges: Bool[Tensor, "sender receiver"]

    def __len__(self) -> int:
        return int(self.edges.sum())

    @property
    def named_edges(self) -> list[tuple[str, str]]:
        """Each edge as the node that writes and the input that reads."""
        return [(self.graph.senders[u], self.graph.receivers[v]) for u, v in self.edges.nonzero().tolist()]

    @property
    def nodes(self) -> list[str]:
        """The nodes that write along some edge, in forward order."""
        return [self.graph.senders[u] for u in self.edges.any(1).nonzero().flatten().tolist()]

    def pruned(self) -> Circuit:
        """Without the edges that are on no path from an input to an output."""
        edges = self.edges
        while True:
            reads = self.graph.is_input | (self.graph.owned & edges.any(0)).any(1)
            is_read = self.graph.is_output | (self.graph.owned & edges.any(1)[:, None]).any(0)
            kept = edges & reads[:, None] & is_read[None]
            if torch.equal(kept, edges):
                return Circuit(self.graph, edges)
            edges = kept

    def __repr__(self) -> str:
        return f"Circuit({len(self)} of {int(self.graph.edges.sum())} edges, {len(self.nodes)} nodes)"


def find_circuit(graph: Graph, scores: Float[Tensor, "sender receiver"], n: int, how: How = "top") -> Circuit:
    """A circuit of at most ``n`` edges: the largest in absolute score, or, ``"greedy"``, grown from the outputs by the
    largest edge into what is there already. Edges that connect no input with an output are pruned.

    Raises:
        ValueError: a negative number; another ``how``.
    """
    if n < 0:
        raise ValueError(f"a circuit has no {n} edges")
    if how not in ("top", "greedy"):
        raise ValueError(f"how must be 'top' or 'greedy', not {how!r}")
    sizes = scores.abs().double().cpu().masked_fill(~graph.edges, -1.0)
    n = min(n, int(graph.edges.sum()))
    if how == "greedy":
        return Circuit(graph, _grown(graph, sizes, n)).pruned()
    chosen = torch.zeros_like(graph.edges).flatten()
    chosen[sizes.flatten().topk(n).indices] = True
    return Circuit(graph, chosen.view_as(graph.edges)).pruned()


def _grown(graph: Graph, sizes: Float[Tensor, "sender receiver"], n: int) -> Bool[Tensor, "sender receiver"]:
    chosen = torch.zeros_like(graph.edges)
    heap: list[tuple[float, int, int]] = []
    reached: set[int] = set()

    def reach(receivers: list[int]) -> None:
        for v in set(receivers) - reached:
            reached.add(v)
            for u in graph.edges[:, v].nonzero().flatten().tolist():
                heapq.heappush(heap, (-float(sizes[u, v]), u, v))

    reach(graph.is_output.nonzero().flatten().tolist())
    for _ in range(n):
        if not heap:
            break
        _, u, v = heapq.heappop(heap)
        chosen[u, v] = True
        reach(graph.owned[u].nonzero().flatten().tolist())
    return chosen


def faithfulness(
    model: HookedVLM, clean: VLMInputs, corruption: Corruption, metric: Metric, circuits: Circuit | Sequence[Circuit]
) -> xr.Dataset:
    """How much of the metric circuits keep, where every other edge carries the corrupted run's activations.

    Returns:
        Over ``(circuit, sample)``: ``metric``, and ``faithfulness``, (m(C) - m(none)) / (m(all) - m(none)), 1 for the
        whole graph and 0 for none of it; NaN where the two do not differ. ``mean_faithfulness`` over ``circuit`` is
        that of the samples' mean metrics. ``n_edges`` and ``share`` say how large each circuit is; ``whole`` and
        ``empty`` are the metric of the graph's two ends.

    Raises:
        ValueError: no circuits, or circuits of several graphs.
    """
    result = measure_circuits(Runs.of(model, clean, corruption, metric), circuits)
    return result.assign_attrs(
        provenance(model, "faithfulness", **describe(corruption), metric=type(metric).__name__, samples_used=len(clean))
    )


def measure_circuits(runs: Runs, circuits: Circuit | Sequence[Circuit]) -> xr.Dataset:
    """:func:`faithfulness`, of runs that are made already."""
    import xarray as xr

    circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    if not circuits or any(circuit.graph is not circuits[0].graph for circuit in circuits):
        raise ValueError("faithfulness needs circuits, all of one graph")
    graph = circuits[0].graph
    check_corruption(runs, graph)
    _, source = runs.activations(runs.corrupted, graph.sender_sites)

    def measured(edges: Bool[Tensor, "sender receiver"]) -> Float[Tensor, " b"]:
        return runs.mean_of_draws(patch_edges(runs, runs.clean, source, graph, graph.edges & ~edges)).double().cpu()

    whole, empty = measured(graph.edges), measured(torch.zeros_like(graph.edges))
    values = torch.stack([measured(circuit.edges) for circuit in circuits])
    sizes = np.array([len(circuit) for circuit in circuits])
    return xr.Dataset(
        {
            "metric": (("circuit", "sample"), values.numpy()),
            "faithfulness": (("circuit", "sample"), normalized(values, whole, empty).numpy()),
            "mean_faithfulness": ("circuit", normalized(values.mean(1), whole.mean(), empty.mean()).numpy()),
            "whole": ("sample", whole.numpy()),
            "empty": ("sample", empty.numpy()),
        },
        coords={
            "circuit": np.arange(len(circuits)),
            "sample": np.arange(values.shape[1]),
            "n_edges": ("circuit", sizes),
            "share": ("circuit", sizes / int(graph.edges.sum())),
        },
    )


def with_areas(curve: xr.Dataset) -> xr.Dataset:
    """A curve of faithfulness over the share of edges, with its areas (MIB, Mueller et al. 2025): ``cpr``, under the
    curve, and ``cmd``, between it and 1."""
    share, values = curve["share"].values, curve["mean_faithfulness"].values
    widths = np.diff(share)
    areas = {
        name: float((widths * (heights[1:] + heights[:-1]) / 2).sum())
        for name, heights in (("cpr", values), ("cmd", np.abs(1 - values)))
    }
    return curve.assign({name: ((), area) for name, area in areas.items()})


def check_corruption(runs: Runs, graph: Graph) -> None:
    """That a corruption does its work before the graph's inputs, so that the inputs carry all of it.

    Raises:
        ValueError: it edits activations inside the graph, or after it.
    """
    model, first = runs.model, list(runs.model.towers).index(graph.towers[0])
    edited = [name for edit in runs.corrupted.edits for name in match_names(edit.site, model.hook_names)]
    for name in edited:
        tower, start = name.split(".")[0], graph.first_site(name.split(".")[0])
        is_before = tower in model.towers and model.towers.index(tower) < first
        is_at_start = start is not None and model.hook_names.index(name) <= model.hook_names.index(start)
        is_projected = name.endswith(MERGED) and "vision_encoder" in graph.towers
        if is_projected or not (is_before or is_at_start):
            raise ValueError(
                f"the corruption edits {name}, which is not before the graph of {', '.join(graph.towers)}, so that its "
                "edges cannot carry what it does: leave out with towers=[...] what comes before"
            )

"""Runs in which chosen edges carry what another run sent along them, and all others what this run sends.

Exact, and what edge scores approximate: what a receiver reads is made anew of its senders, of each the value that its
edge carries. In a pre-LN stream that adds the senders' differences; in a post-LN stream the LayerNorms between are
computed anew for each receiver. Downstream of a receiver everything follows. (Path patching of single edges,
Goldowsky-Dill et al. 2023; the evaluation of circuits of Hanna et al. 2024.)

Axes: b row, p position, s senders, n receivers of one place, m d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vlm.analysis.graph import Graph, Receivers, Renorm
from hooked_vlm.analysis.runs import Runs
from hooked_vlm.corruptions import Corrupted
from hooked_vlm.edits import edit_hooks
from hooked_vlm.hook_point import HookFunction, HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM


def image_mask(model: HookedVLM, inputs: VLMInputs) -> Bool[Tensor, "b p"] | None:
    """Which positions hold an image, in a model that reads images among its tokens."""
    image_token_id = getattr(model.config, "image_token_id", None)
    if image_token_id is None or inputs.input_ids is None:
        return None
    return inputs.input_ids.to(model.device) == image_token_id


def edge_hooks(
    graph: Graph,
    patched: Bool[Tensor, "#b sender receiver"],
    source: Mapping[str, Tensor],
    is_image: Bool[Tensor, "b _"] | None,
) -> list[tuple[str, HookFunction]]:
    """Hooks of a run in which the ``patched`` edges carry what ``source`` has of their senders.

    Receivers none of whose edges are patched are left alone, to the bit.
    """
    found: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: HookPoint) -> None:
        found[hook.name] = activation

    def receive(activation: Tensor, hook: HookPoint, receivers: Receivers) -> Tensor | None:
        own = patched[:, :, graph.columns(receivers)]
        if not bool(own.any()):
            return None
        change = _change_read(graph, receivers, own, found, source, is_image)
        if change is None:
            return None
        change = change.to(activation)
        if receivers.attention is None:
            return activation + change.squeeze(2)
        return activation + einsum(change, receivers.weight.to(change), "b p n m, n m d -> b p n d")

    reading = [(name, keep) for name in graph.names]
    return [*reading, *((one.site, partial(receive, receivers=one)) for one in graph.stages(Receivers))]


def _change_read(
    graph: Graph,
    receivers: Receivers,
    patched: Bool[Tensor, "#b sender n"],
    found: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    is_image: Bool[Tensor, "b _"] | None,
) -> Float[Tensor, "b p n m"] | None:
    """What is other in what each receiver reads than in what this run's stream holds."""
    change: Tensor | None = None
    for stage in [*graph.below(receivers), *([] if receivers.norm is None else [receivers.norm])]:
        if isinstance(stage, Renorm):
            if change is not None:
                stream = found[stage.site].unsqueeze(2)
                change = change.to(stream)
                change = stage.norm.normalize(stream + change) - stage.norm.normalize(stream)
            continue
        own = patched[:, graph.columns(stage)]
        if bool(own.any()):
            written = stage.write(source[stage.site] - found[stage.site], is_image)
            added = einsum(written, own.expand(len(written), -1, -1).to(written), "b p s m, b s n -> b p n m")
            change = added if change is None else change.to(added) + added
    return change


@torch.no_grad()
def patch_edges(
    runs: Runs,
    run: Corrupted,
    source: Mapping[str, Tensor],
    graph: Graph,
    patched: Bool[Tensor, "sender receiver"],
) -> Float[Tensor, " rows"]:
    """The metric of ``run`` where the ``patched`` edges carry what ``source`` has."""
    hooks = edge_hooks(graph, patched[None].to(runs.model.device), source, image_mask(runs.model, run.inputs))
    with runs.model.hooks([*edit_hooks(runs.model, run.inputs, run.edits), *hooks]):
        return runs.measure(runs.model(run.inputs))


@torch.no_grad()
def patch_each_edge(
    runs: Runs,
    run: Corrupted,
    source: Mapping[str, Tensor],
    graph: Graph,
    edges: Int[Tensor, "n 2"],
    batch: int = 64,
) -> Float[Tensor, "n rows"]:
    """The metric for each of ``edges`` (sender, receiver) patched alone; ``batch`` runs are made together.

    Raises:
        ValueError: a pair that is no edge.
    """
    if not bool(graph.edges[edges[:, 0], edges[:, 1]].all()):
        raise ValueError("some of these pairs of a sender and a receiver are no edges")
    if run.edits:  # made for these rows, and no copies of them
        return torch.stack([patch_edges(runs, run, source, graph, _alone(graph, edge)) for edge in edges])
    return torch.cat([_together(runs, run, source, graph, some) for some in edges.split(max(1, batch))])


def _together(
    runs: Runs, run: Corrupted, source: Mapping[str, Tensor], graph: Graph, edges: Int[Tensor, "n 2"]
) -> Float[Tensor, "n rows"]:
    """Each row stands once for each edge, copies beside each other."""
    n, rows = len(edges), len(run.inputs)
    patched = torch.stack([_alone(graph, edge) for edge in edges]).repeat(rows, 1, 1)
    inputs = run.inputs.repeat(n)
    copies = _Copies(source, n)
    hooks = edge_hooks(graph, patched.to(runs.model.device), copies, image_mask(runs.model, inputs))
    with runs.model.hooks(hooks):
        logits = runs.model(inputs)
    return torch.stack([runs.measure(logits[edge::n]) for edge in range(n)])


class _Copies(Mapping[str, Tensor]):
    """A source's rows, each several times, made when they are asked for."""

    def __init__(self, source: Mapping[str, Tensor], times: int) -> None:
        self.source, self.times = source, times

    def __getitem__(self, name: str) -> Tensor:
        return self.source[name].repeat_interleave(self.times, dim=0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def _alone(graph: Graph, edge: Int[Tensor, " 2"] | Sequence[int]) -> Bool[Tensor, "sender receiver"]:
    patched = torch.zeros_like(graph.edges)
    patched[int(edge[0]), int(edge[1])] = True
    return patched

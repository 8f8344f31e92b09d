"""TransformerLens 4: a ``TransformerBridge`` over HF's LLaVA, one ``run_with_hooks`` a cell.

Its ``patching`` functions take tokens only, and its ``start_at_layer`` runs every layer all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import CannotError
from benchmarks.rivals.twin import twin
from benchmarks.sweeps.cells import Cell, Knockout, Patch
from benchmarks.sweeps.grids import Grid

Hook = tuple[str, Callable[..., Tensor]]


class Bridge:
    """The bridge does what HF does, with hooks; states come from its own clean run."""

    at_once = 1

    def __init__(self, grid: Grid, batch: int) -> None:
        self.grid, self.bridge = grid, bridge(grid)
        names = {_name(cell) for cell in grid.cells if isinstance(cell, Patch)}
        self.clean: dict[str, Tensor] = {}
        with torch.no_grad():
            self._run(grid.subject.clean, [(name, _keeping(name, self.clean)) for name in names])

    def prepare(self) -> None:
        """Nothing is kept but the clean run."""

    @torch.no_grad()
    def scores(self, cells: Sequence[Cell]) -> Tensor:
        metric = self.grid.subject.metric
        return torch.cat([metric(self._run(self.grid.corrupted, self._hooks(cell))[:, -1:]) for cell in cells])

    def _run(self, tensors: Any, hooks: list[Hook]) -> Tensor:
        rest = {name: tensor for name, tensor in tensors.items() if name != "input_ids"}
        return self.bridge.run_with_hooks(tensors["input_ids"], fwd_hooks=hooks, **rest)

    def _hooks(self, cell: Cell) -> list[Hook]:
        if isinstance(cell, Knockout):
            return [(f"blocks.{layer}.attn.hook_attn_scores", _blocking(cell)) for layer in cell.layers]
        return [(_name(cell), _restoring(cell, self.clean[_name(cell)]))]


def bridge(grid: Grid) -> Any:
    """What ``boot_transformers`` makes of a model in memory.

    That itself wants a tokenizer and a processor, looks for them on the hub, and where the processor does not load
    installs torchvision into the environment that it runs in.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers_driver import TransformersDriver
    from transformer_lens.utilities.attn_implementation import force_eager_attention

    subject = grid.subject
    model, architecture = twin(subject.hf_model), subject.size.architecture
    config = build_bridge_config_from_hf(copy.deepcopy(model.config), architecture, architecture, subject.dtype)
    try:
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        raise CannotError(str(error).splitlines()[0]) from None
    adapter.cfg.device = subject.device
    force_eager_attention(model)
    adapter.prepare_model(model)
    return TransformerBridge(model, adapter, None, driver=TransformersDriver(model, adapter, None))


def _name(cell: Patch) -> str:
    ending = "attn.hook_z" if cell.heads else {"resid": "hook_resid_post"}.get(cell.site, f"hook_{cell.site}_out")
    return f"blocks.{cell.layer}.{ending}"


def _keeping(name: str, into: dict[str, Tensor]) -> Callable[..., Tensor]:
    def keep(activation: Tensor, hook: Any) -> Tensor:
        into[name] = activation.clone()
        return activation

    return keep


def _restoring(cell: Patch, clean: Tensor) -> Callable[..., Tensor]:
    def restore(activation: Tensor, hook: Any) -> Tensor:
        part: Any = (slice(None), cell.position, *([list(cell.heads)] if cell.heads else []))
        activation[part] = clean[part]
        return activation

    return restore


def _blocking(cell: Knockout) -> Callable[..., Tensor]:
    def block(scores: Tensor, hook: Any) -> Tensor:
        queries, keys = (torch.tensor(positions, device=scores.device) for positions in (cell.queries, cell.keys))
        scores[:, :, queries[:, None], keys] = torch.finfo(scores.dtype).min
        return scores

    return block

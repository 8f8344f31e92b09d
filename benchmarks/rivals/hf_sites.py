"""Cells on HF's modules: where each state lies, and hooks that put it back or block attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models import BlipSize
from benchmarks.sweeps.cells import Cell, Knockout, Patch
from benchmarks.sweeps.grids import Grid


class Place(NamedTuple):
    """What goes into a module, or comes out of it."""

    path: str
    is_input: bool = False


LAYERS = {
    "question_encoder": "text_encoder.encoder.layer",
    "answer_decoder": "text_decoder.bert.encoder.layer",
    "language_model": "model.language_model.layers",
}
"""HF's lists of layers."""

BERT_WRITES = {"attn": ".attention.output.dense", "cross_attn": ".crossattention.output.dense", "mlp": ".output.dense"}
LLAMA_WRITES = {"attn": ".self_attn.o_proj", "mlp": ".mlp"}
"""Within a layer, the module whose output is a sub-layer's write; an attention's heads are its input."""


def place(cell: Patch) -> Place:
    """Where HF has the state that a cell puts back, as ``[b p d]``."""
    layer = f"{LAYERS[cell.tower]}.{cell.layer}"
    writes = LLAMA_WRITES if cell.tower == "language_model" else BERT_WRITES
    return Place(layer) if cell.site == "resid" else Place(layer + writes[cell.site], is_input=bool(cell.heads))


def features(cell: Patch, grid: Grid, width: int) -> Tensor:
    """Which of a state's features a cell puts back: all, or those of its heads."""
    if not cell.heads:
        return torch.arange(width)
    d_head = width // grid.subject.size.n_heads
    return torch.cat([torch.arange(head * d_head, (head + 1) * d_head) for head in cell.heads])


def sources(grid: Grid) -> dict[Place, Tensor]:
    """The clean run's state at every place that the grid's cells patch."""
    found: dict[Place, Tensor] = {}
    places = {place(cell) for cell in grid.cells if isinstance(cell, Patch)}
    model = grid.subject.hf_model
    with ExitStack() as stack, torch.no_grad():
        for where in places:
            stack.enter_context(hooked_at(model, where, partial(found.__setitem__, where)))
        logits(grid, grid.subject.clean)
    return found


def logits(grid: Grid, tensors: Mapping[str, Tensor]) -> Tensor:
    """HF's own forward, of everything: ``[b 1 d_vocab]`` at the last position."""
    return grid.subject.size.logits(grid.subject.hf_model, dict(tensors))[:, -1:]


@contextmanager
def hooked_at(model: nn.Module, where: Place, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """With a hook at a place."""
    module = model.get_submodule(where.path)
    if where.is_input:
        handle = module.register_forward_pre_hook(lambda _module, inputs: change(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def noised(grid: Grid, rows: slice = slice(None)) -> Iterator[None]:
    """With the grid's noise on the image embeddings of some rows."""

    def add(_module: nn.Module, _inputs: Any, output: Any) -> None:
        embeddings = output.last_hidden_state.clone()
        embeddings[rows] += grid.noise
        output.last_hidden_state = embeddings

    if grid.noise is None:
        yield
        return
    handle = grid.subject.hf_model.vision_model.register_forward_hook(add)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edited(grid: Grid, cells: Mapping[int, Cell], n_rows: int, clean: Mapping[Place, Tensor] | None) -> Iterator[None]:
    """With each row's cell carried out. ``clean``: states to put back; without, those of the batch's own row 0."""
    patches: dict[Place, list[tuple[int, Patch]]] = defaultdict(list)
    knockouts: dict[int, dict[int, Knockout]] = defaultdict(dict)
    for row, cell in cells.items():
        if isinstance(cell, Patch):
            patches[place(cell)].append((row, cell))
        else:
            for layer in cell.layers:
                knockouts[layer][row] = cell
    model = grid.subject.hf_model
    with ExitStack() as stack:
        for where, of_rows in patches.items():
            stack.enter_context(
                hooked_at(model, where, _restoring(grid, of_rows, None if clean is None else clean[where]))
            )
        masks: dict[tuple[int, ...], Tensor] = {}
        for layer, blocked in knockouts.items():
            key = tuple(blocked)
            if key not in masks:
                masks[key] = blocking_mask(grid, blocked, n_rows)
            stack.enter_context(_masked(model, layer, masks[key]))
        yield


def _restoring(
    grid: Grid, of_rows: Sequence[tuple[int, Patch]], clean: Tensor | None
) -> Callable[[Tensor], Tensor | None]:
    def restore(state: Tensor) -> Tensor:
        state = state.clone()
        source = state[:1] if clean is None else clean
        for row, cell in of_rows:
            chosen = features(cell, grid, state.shape[-1]).to(state.device)
            state[row, cell.position, chosen] = source[0, cell.position, chosen]
        return state

    return restore


def blocking_mask(grid: Grid, blocked: Mapping[int, Knockout], n_rows: int) -> Tensor:
    """A causal mask with each row's edge blocked, to be added to scores: ``[b 1 q k]``."""
    assert not isinstance(grid.subject.size, BlipSize)
    n_positions = grid.subject.clean["input_ids"].shape[1]
    lowest = torch.finfo(grid.subject.dtype).min
    mask = torch.full((n_positions, n_positions), lowest, device=grid.subject.device, dtype=grid.subject.dtype)
    mask = mask.triu(1).repeat(n_rows, 1, 1, 1)
    for row, cell in blocked.items():
        queries, keys = (torch.tensor(positions, device=mask.device) for positions in (cell.queries, cell.keys))
        mask[row, 0, queries[:, None], keys] = lowest
    return mask


@contextmanager
def _masked(model: nn.Module, layer: int, mask: Tensor) -> Iterator[None]:
    """With one layer's attention mask replaced (the code of Geva et al. 2023)."""

    def replace(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    attention = model.get_submodule(f"{LAYERS['language_model']}.{layer}.self_attn")
    handle = attention.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

"""nnsight: one ``trace`` of HF's model a cell."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import BlipSize
from benchmarks.rivals.hf_sites import blocking_mask, features, place, sources
from benchmarks.rivals.twin import twin
from benchmarks.sweeps.cells import Cell, Knockout, Patch
from benchmarks.sweeps.grids import Grid


class Traces:
    """The patch is written in the trace's body."""

    at_once = 1

    def __init__(self, grid: Grid, batch: int) -> None:
        from nnsight import NNsight

        self.grid, self.clean = grid, sources(grid)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # BLIP's modules named "output" are called E_output
            self.model: Any = NNsight(twin(grid.subject.hf_model))
        is_blip = isinstance(grid.subject.size, BlipSize)
        self.reads: Any = self.model.text_decoder if is_blip else self.model

    def prepare(self) -> None:
        """Nothing is kept but the clean run."""

    @torch.no_grad()
    def scores(self, cells: Sequence[Cell]) -> Tensor:
        logits = [self._block(cell) if isinstance(cell, Knockout) else self._restore(cell) for cell in cells]
        return torch.cat([self.grid.subject.metric(last) for last in logits])

    def _restore(self, cell: Patch) -> Tensor:
        where, noise, reads = place(cell), self.grid.noise, self.reads
        chosen = features(cell, self.grid, self.clean[where].shape[-1]).to(self.grid.subject.device)
        source = self.clean[where][:, cell.position, chosen]
        module = self.model.get(where.path.replace(".output.", ".E_output."))
        with self.model.trace(**self.grid.corrupted):
            if noise is not None:
                self.model.vision_model.output.last_hidden_state[:] += noise
            if where.is_input:
                module.input[:, cell.position, chosen] = source
            else:
                module.output[:, cell.position, chosen] = source
            logits = reads.output.logits[:, -1:].save()
        return logits

    def _block(self, cell: Knockout) -> Tensor:
        mask, reads = blocking_mask(self.grid, {0: cell}, 1), self.reads
        attentions = [self.model.get(f"model.language_model.layers.{layer}.self_attn") for layer in cell.layers]
        with self.model.trace(**self.grid.corrupted):
            for attention in attentions:
                given, named = attention.inputs
                attention.inputs = (given, {**named, "attention_mask": mask})
            logits = reads.output.logits[:, -1:].save()
        return logits

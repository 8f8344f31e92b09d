"""HF's model with forward hooks, one full forward a cell: the papers' way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.rivals import CannotError
from benchmarks.rivals.hf_sites import edited, logits, noised, sources
from benchmarks.sweeps.cells import Cell
from benchmarks.sweeps.grids import Grid


class OneRow:
    """A forward of one row for each cell, the clean run's states being kept."""

    at_once = 1

    def __init__(self, grid: Grid, batch: int) -> None:
        self.grid, self.clean = grid, sources(grid)

    def prepare(self) -> None:
        """Nothing is kept but the clean run."""

    @torch.no_grad()
    def scores(self, cells: Sequence[Cell]) -> Tensor:
        return torch.cat([self._score(cell) for cell in cells])

    def _score(self, cell: Cell) -> Tensor:
        with noised(self.grid), edited(self.grid, {0: cell}, 1, self.clean):
            return self.grid.subject.metric(logits(self.grid, self.grid.corrupted))


class Published:
    """As the papers' own code: each cell's forward has the clean row in it again, and for NOTICE the corrupted one.

    LLaVA's three forwards a cell are one of three rows here.
    """

    at_once = 1

    def __init__(self, grid: Grid, batch: int) -> None:
        if grid.rows == 1:
            raise CannotError("the published code runs one row a cell: see there")
        self.grid = grid
        clean, corrupted = grid.subject.clean, grid.corrupted
        self.tensors = {name: torch.cat([clean[name], *[corrupted[name]] * (grid.rows - 1)]) for name in clean}

    def prepare(self) -> None:
        """Nothing is kept."""

    @torch.no_grad()
    def scores(self, cells: Sequence[Cell]) -> Tensor:
        return torch.cat([self._score(cell) for cell in cells])

    def _score(self, cell: Cell) -> Tensor:
        last = self.grid.rows - 1
        with noised(self.grid, slice(1, None)), edited(self.grid, {last: cell}, self.grid.rows, None):
            return self.grid.subject.metric(logits(self.grid, self.tensors))[-1:]

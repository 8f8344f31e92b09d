"""What a sweep costs as its cells grow in number."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.common import quartiles
from benchmarks.sweeps.contest import Effort, Ours, in_turn, seconds
from benchmarks.sweeps.counting import peak_memory
from benchmarks.sweeps.grids import Grid

COUNTS = (1, 10, 100, 1000, 10_000)


@dataclass(frozen=True)
class Point:
    """A number of cells: seconds of all of them, and bytes at the worst."""

    n_cells: int
    seconds: tuple[float, ...]
    memory: int

    def record(self) -> dict[str, Any]:
        return {"grid": "growth", **asdict(self)}


@torch.no_grad()
def growth(grid: Grid, effort: Effort, counts: Sequence[int] = COUNTS) -> list[Point]:
    """Ours, over more and more of a grid's cells."""
    ours = Ours(grid)
    calls = {
        str(count): partial(ours.scores, grid.cells[:count]) for count in sorted(counts) if count <= len(grid.cells)
    }
    memory = {count: peak_memory(call, grid.subject.device) for count, call in calls.items()}
    times = in_turn({count: partial(seconds, call, effort, grid) for count, call in calls.items()}, effort.repeats)
    return [Point(int(count), times[count], memory[count]) for count in calls]


def rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Each with what a cell takes beyond those of the row above."""
    table: list[tuple[str, ...]] = []
    for before, point in zip([None, *points], points, strict=False):
        low, middle, high = quartiles(point.seconds)
        further = ""
        if before is not None:
            later = middle - statistics.median(before.seconds)
            further = f"{1e3 * later / (point.n_cells - before.n_cells):.1f} ms"
        table.append(
            (
                f"{point.n_cells:,}",
                "",
                f"{middle:.2f} s",
                f"{low:.2f} to {high:.2f} s",
                f"{1e3 * middle / point.n_cells:.1f} ms",
                further,
                f"{point.memory / 2**20:.1f} MiB",
            )
        )
    return table

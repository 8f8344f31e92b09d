"""Ways to run a grid, held against each other: the same numbers first, then their times, in turn."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Timing, quartiles
from benchmarks.rivals import PEERS, RIVALS, CannotError, Contender, rival
from benchmarks.sweeps.cells import Cell, Patch
from benchmarks.sweeps.counting import flops, synchronize
from benchmarks.sweeps.grids import Grid
from hooked_vlm import VLMInputs
from hooked_vlm.sweep import sweep

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Of a metric, relative: where two ways to run a cell differ by more, they do not run the same cell.

In fp32 also a tenth of what a grid's cells do at most, where that is less.
"""


class Ours:
    """The whole of a grid in one call."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.model = grid, grid.subject.model
        self.corrupted = VLMInputs.of(grid.corrupted)
        self.noise_floor: float | None = None
        names = {cell.hook_name(self.model) for cell in grid.cells if isinstance(cell, Patch)}
        self.clean = self.model.run_with_cache(VLMInputs.of(grid.subject.clean), names_filter=list(names))[1]

    def scores(self, cells: Sequence[Cell]) -> Tensor:
        edits = [cell.edits(self.model, self.clean) for cell in cells]
        effects = sweep(self.model, self.corrupted, edits, self.grid.subject.metric, base=self.grid.base)
        self.noise_floor = float(effects.noise_floor)
        return effects[:, 0]

    def unedited(self) -> Tensor:
        """The metric of the run that every cell is a change of."""
        return self.grid.subject.metric(self.model.patch(self.corrupted, self.grid.base))


@dataclass(frozen=True)
class Effort:
    """How much is measured. ``sample``: cells of one-at-a-time contenders; ``batches``: of batched ones."""

    repeats: int
    sample: int
    batches: int
    batch: int
    timing: Timing


@dataclass(frozen=True)
class Entry:
    """A contender's figures on a grid. Seconds are of the whole grid; a sample's time is scaled by its count."""

    name: str
    n_cells: int
    measured: int
    flops: float
    """A cell."""
    seconds: tuple[float, ...]
    difference: float = 0.0
    """From ours, at most, relative to the metric."""
    effect: float = 0.0
    """How far the cells looked at move the metric, at most, relative to it."""

    @property
    def a_cell(self) -> float:
        return statistics.median(self.seconds) / self.n_cells


@dataclass(frozen=True)
class Outcome:
    """A grid's entries, ours first; ``first_cell``: seconds of ours for one cell. ``cannot``: who did not, and why."""

    grid: Grid
    entries: tuple[Entry, ...]
    first_cell: tuple[float, ...]
    cannot: dict[str, str]
    noise_floor: float | None
    """Of ours, as it states it itself."""

    @property
    def ours(self) -> Entry:
        return self.entries[0]

    def ratios(self, entry: Entry) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of a contender's time over ours, repeat by repeat."""
        pairs = zip(entry.seconds, self.ours.seconds, strict=True)
        return quartiles([theirs / ours for theirs, ours in pairs])

    def further(self, entry: Entry) -> float | None:
        """A contender's time a cell over that of each cell that ours runs besides the first.

        Of a grid's cells none can be worth more than their number: all of them together need one full run.
        """
        later = statistics.median(self.ours.seconds) - statistics.median(self.first_cell)
        return entry.a_cell * (self.ours.n_cells - 1) / later if later > 0 and self.ours.n_cells > 1 else None

    def goal(self, entry: Entry) -> float | None:
        return (self.grid.goals or {}).get(entry.name)

    def records(self) -> list[dict[str, Any]]:
        """For a file: every single time."""
        return [
            {
                "grid": self.grid.title,
                "contender": entry.name,
                "cells": entry.n_cells,
                "cells_measured": entry.measured,
                "flops_a_cell": entry.flops,
                "seconds": entry.seconds,
                "difference": entry.difference,
                "effect": entry.effect,
                "ratio": self.ratios(entry)[1],
                "ratio_quartiles": self.ratios(entry)[::2],
                "ratio_past_the_first_cell": self.further(entry),
                "goal": self.goal(entry),
                **({"noise_floor": self.noise_floor} if entry is self.ours else {}),
            }
            for entry in self.entries
        ] + [{"grid": self.grid.title, "contender": name, "cannot": why} for name, why in self.cannot.items()]


@torch.no_grad()
def contest(grid: Grid, rivals: Sequence[str], effort: Effort) -> Outcome:
    """Ours, whole, against a sample of each rival's."""
    ours = Ours(grid)
    unedited = ours.unedited()  # also makes the metric, which is no part of a sweep
    expected, our_flops = flops(partial(ours.scores, grid.cells))
    entrants, cannot = _enter(grid, rivals, effort, expected, unedited)

    timed: dict[str, Callable[[], float]] = {
        "ours": partial(seconds, partial(ours.scores, grid.cells), effort, grid),
        "first": partial(seconds, partial(ours.scores, grid.cells[-1:]), effort, grid),
        **{name: entrant.whole_grid for name, entrant in entrants.items()},
    }
    times = in_turn(timed, effort.repeats)
    n_cells = len(grid.cells)
    entries = [
        Entry("ours", n_cells, n_cells, our_flops / n_cells, times["ours"], effect=_effect(expected, unedited)),
        *(
            Entry(name, n_cells, len(entrant.cells), entrant.flops, times[name], entrant.difference, entrant.effect)
            for name, entrant in entrants.items()
        ),
    ]
    return Outcome(grid, tuple(entries), times["first"], cannot, ours.noise_floor)


@dataclass(frozen=True)
class _Entrant:
    """A rival whose numbers are ours."""

    contender: Contender
    grid: Grid
    cells: Sequence[Cell]
    effort: Effort
    flops: float
    difference: float
    effect: float

    def whole_grid(self) -> float:
        """Seconds, those of what is done once included."""
        once = seconds(self.contender.prepare, self.effort, self.grid)
        sampled = seconds(partial(self.contender.scores, self.cells), self.effort, self.grid)
        return once + sampled * len(self.grid.cells) / len(self.cells)


def _enter(
    grid: Grid, rivals: Sequence[str], effort: Effort, expected: Tensor, unedited: Tensor
) -> tuple[dict[str, _Entrant], dict[str, str]]:
    """Those rivals that run the grid, once their numbers are known to be ours; and why others do not."""
    entrants: dict[str, _Entrant] = {}
    cannot: dict[str, str] = {}
    allowed = TOLERANCE[grid.subject.dtype]
    if grid.subject.dtype == torch.float32:
        allowed = min(allowed, _effect(expected, unedited) / 10)
    for name in rivals:
        try:
            contender = rival(name, grid, effort.batch)
            places = _sampled(len(grid.cells), contender.at_once, effort)
            cells = [grid.cells[place] for place in places]
            _, once = flops(contender.prepare)
            got, operations = flops(partial(contender.scores, cells))
        except CannotError as reason:
            cannot[name] = str(reason)
            continue
        except Exception as error:  # a version of a peer that none of us has seen
            if name not in PEERS:
                raise
            cannot[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        ours = expected[places].to(got)
        difference = float(((got - ours) / ours).abs().max())
        if not difference <= allowed:
            raise SystemExit(
                f"{RIVALS[name][0]} does not give our numbers ({grid.title}): off by {difference:.1e} of the metric, "
                f"and {allowed:.1e} is allowed"
            )
        effect = _effect(got, unedited)
        a_cell = operations / len(cells) + once / len(grid.cells)
        entrants[name] = _Entrant(contender, grid, cells, effort, a_cell, difference, effect)
    return entrants, cannot


def _effect(scores: Tensor, unedited: Tensor) -> float:
    """How far cells move the metric, at most, relative to it."""
    return float(((scores - unedited) / unedited).abs().max())


def _sampled(n_cells: int, at_once: int, effort: Effort) -> list[int]:
    """Which cells a contender runs: the same for all that run as many."""
    count = effort.sample if at_once == 1 else effort.batches * at_once
    return random.Random(0).sample(range(n_cells), min(n_cells, count))


def in_turn(timed: dict[str, Callable[[], float]], repeats: int) -> dict[str, tuple[float, ...]]:
    """All of them in each repeat, the order reversed from one to the next."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    order = list(timed)
    for _ in range(repeats):
        gc.collect()
        for name in order:
            times[name].append(timed[name]())
        order.reverse()
    return {name: tuple(taken) for name, taken in times.items()}


def seconds(call: Callable[[], object], effort: Effort, grid: Grid) -> float:
    """One call, which has run before."""
    gc.disable()
    try:
        synchronize(grid.subject.device)
        start = effort.timing.clock()
        call()
        synchronize(grid.subject.device)
        return effort.timing.clock() - start
    finally:
        gc.enable()

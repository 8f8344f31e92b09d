"""What a sweep over the grids of published methods costs, against the ways in which others run them.

``python -m benchmarks.sweep [--grid palit notice llava-text knockout llava-image growth] [--rivals ...]
[--size base | small | llava-7b] [--device cuda --dtype bfloat16] [--sample N] [--repeats N] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.common import ONE_THREAD, ONE_THREAD_HELP, WALL, machine, parser, report
from benchmarks.rivals import PEERS, RIVALS
from benchmarks.sweeps.contest import Effort, Outcome, contest
from benchmarks.sweeps.counting import matmul_rate
from benchmarks.sweeps.grids import GRIDS, Grid, many
from benchmarks.sweeps.growth import growth
from benchmarks.sweeps.growth import rows as growth_rows
from benchmarks.sweeps.subject import SUBJECTS, Subject

COLUMNS = (
    "run by",
    "cells run",
    "a cell",
    "GFLOP a cell",
    "the grid",
    "ratio",
    "middle half",
    "goal",
    "past the first cell",
    "numbers differ by",
)
GROWTH_COLUMNS = ("cells", "", "time", "middle half", "a cell", "a further cell", "tensors at the peak")


@dataclass(frozen=True)
class Plan:
    """How much is run of a family's grids: cells one at a time, and in batches; of image positions, which."""

    sample: int
    batch: int
    batches: int
    every: int = 1


PLANS: dict[str, dict[str, Plan]] = {
    "base": {"blip": Plan(sample=12, batch=16, batches=2), "llava": Plan(sample=3, batch=4, batches=1, every=96)},
    "small": {"blip": Plan(sample=8, batch=8, batches=2), "llava": Plan(sample=8, batch=8, batches=2, every=4)},
    "llava-7b": {"llava": Plan(sample=20, batch=32, batches=2, every=24)},
}


def main() -> None:
    """Run the grids asked for, and print a table of each."""
    chosen = arguments()
    timing = ONE_THREAD if chosen.device == "cpu" and (chosen.one_thread or chosen.size == "small") else WALL
    dtype = getattr(torch, chosen.dtype)
    families = {family: Subject(size, chosen.device, dtype) for family, size in SUBJECTS[chosen.size].items()}
    records: list[dict[str, Any]] = []
    with timing.threaded():
        rate = 0.0
        for family, grid in grids(chosen, families):
            outcome = contest(grid, chosen.rivals, effort(chosen, family, timing))
            rate = max(rate, matmul_rate(chosen.device, dtype))
            described = [*notes(outcome, rate), timed_how(timing)]
            report(title(chosen, grid), COLUMNS, list(rows(outcome)), [], described, None)
            records += outcome.records()
        if "growth" in chosen.grid:
            family = next(iter(families))
            grid = many(families[family])
            points = growth(grid, effort(chosen, family, timing))
            described = ["Tensors: made by the sweep, alive together.", timed_how(timing)]
            report(title(chosen, grid), GROWTH_COLUMNS, growth_rows(points), [], described, None)
            records += [point.record() for point in points]
    if chosen.json is not None:
        written = {"machine": machine(), "matmul_rate": rate, "options": vars(chosen), "rows": records}
        chosen.json.write_text(json.dumps(written, indent=2, default=str) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """What is asked for."""
    options = parser("Sweeps, side by side.", repeats=5)
    names = [*GRIDS, "growth"]
    options.add_argument("--grid", nargs="+", choices=names, default=names, help="by default all that the size has")
    options.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=list(RIVALS), help="by default all")
    options.add_argument("--size", choices=list(SUBJECTS), default="base", help="(%(default)s)")
    options.add_argument("--device", default="cpu", help="(%(default)s)")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(%(default)s)")
    options.add_argument("--sample", type=int, help="cells that a one-at-a-time rival runs; its time is scaled")
    options.add_argument("--batch", type=int, help="rows of the batched rival")
    options.add_argument("--batches", type=int, help="how many of them it runs; its time is scaled")
    options.add_argument("--every", type=int, help="patch every so manieth image position")
    options.add_argument("--cells", type=int, help="only so many cells of each grid, at random: a look, no figure")
    options.add_argument("--one-thread", action="store_true", help=ONE_THREAD_HELP)
    return options.parse_args()


def grids(chosen: argparse.Namespace, families: dict[str, Subject]) -> Iterator[tuple[str, Grid]]:
    """The grids asked for that the size has a model for, each with its family."""
    for name in chosen.grid:
        if name == "growth" or GRIDS[name][0] not in families:
            continue
        family, make = GRIDS[name]
        for grid in make(families[family], plan(chosen, family).every):
            if chosen.cells is not None and chosen.cells < len(grid.cells):
                grid = replace(grid, cells=random.Random(1).sample(grid.cells, chosen.cells))
            yield family, grid


def plan(chosen: argparse.Namespace, family: str) -> Plan:
    """The size's, but for what is asked for otherwise."""
    own = {what: getattr(chosen, what) for what in ("sample", "batch", "batches", "every")}
    return replace(PLANS[chosen.size][family], **{what: value for what, value in own.items() if value is not None})


def effort(chosen: argparse.Namespace, family: str, timing: Any) -> Effort:
    """How much is measured of a grid."""
    planned = plan(chosen, family)
    return Effort(chosen.repeats, planned.sample, planned.batches, planned.batch, timing)


def title(chosen: argparse.Namespace, grid: Grid) -> str:
    """What a table shows."""
    return f"{grid.title}: {len(grid.cells)} cells, {chosen.size}, {chosen.dtype}, {chosen.device}"


def timed_how(timing: Any) -> str:
    """By which clock."""
    return "Wall time, all threads." if timing is WALL else "CPU time, one thread."


def rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    """A grid's rows, ours first."""
    for entry in outcome.entries:
        low, middle, high = outcome.ratios(entry)
        further, goal = outcome.further(entry), outcome.goal(entry)
        is_ours = entry is outcome.ours
        yield (
            "ours" if is_ours else RIVALS[entry.name][0],
            f"{entry.measured} of {entry.n_cells}",
            f"{1e3 * entry.a_cell:.4g} ms",
            f"{entry.flops / 1e9:.3g}",
            f"{statistics.median(entry.seconds):.4g} s",
            "" if is_ours else f"{middle:.1f}",
            "" if is_ours else f"{low:.1f} to {high:.1f}",
            "" if goal is None else f"{goal:.0f}",
            "" if further is None or is_ours else f"{further:.1f}",
            "" if is_ours else f"{entry.difference:.0e}",
        )


def notes(outcome: Outcome, rate: float) -> list[str]:
    """Who cannot, and what ours did."""
    ours = outcome.ours
    taken, operations = statistics.median(ours.seconds), ours.flops * ours.n_cells
    first = statistics.median(outcome.first_cell)
    floor = "" if outcome.noise_floor is None else f" Its own noise floor: {outcome.noise_floor:.0e}."
    return [
        *(f"{RIVALS[name][0]} cannot: {why}" for name, why in outcome.cannot.items()),
        f"Ours: {operations / 1e9:.4g} GFLOP at {operations / taken / rate:.0%} of the rate of a large matrix product "
        f"({rate / 1e12:.3g} TFLOP/s); a sweep of one cell takes {first:.3g} s. Cells move the probability by up to "
        f"{ours.effect:.2g} of itself.{floor}",
        f"Rivals: {', '.join(installed(package) for package in PEERS)}.",
    ]


def installed(package: str) -> str:
    """A package with its version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


if __name__ == "__main__":
    main()

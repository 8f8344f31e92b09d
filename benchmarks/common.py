"""What the benchmarks share: models of known size, side-by-side timing, the machine, one table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Comparison:
    """Two ways to do the same, measured in turn. ``times`` and ``reference_times`` are seconds, pair by pair."""

    what: str
    reference: str
    times: tuple[float, ...]
    reference_times: tuple[float, ...]
    goal: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.times, self.reference_times, strict=True)]

    def row(self) -> tuple[str, ...]:
        low, middle, high = quartiles(self.ratios)
        return (
            self.what,
            self.reference,
            milliseconds(self.times),
            milliseconds(self.reference_times),
            f"{middle:.3f}",
            f"{low:.3f} to {high:.3f}",
            "" if self.goal is None else f"{self.goal:g}",
        )

    def record(self) -> dict[str, Any]:
        low, middle, high = quartiles(self.ratios)
        return {**asdict(self), "ratio": middle, "ratio_quartiles": [low, high]}


COMPARISON_COLUMNS = ("this", "against", "this, ms", "against, ms", "ratio", "half of the ratios", "goal")


def compare(
    what: str,
    call: Callable[[], Any],
    reference: str,
    reference_call: Callable[[], Any],
    *,
    repeats: int,
    calls: int = 1,
    goal: float | None = None,
) -> Comparison:
    """Time two functions side by side: one pair a repeat, which of the two comes first taking turns.

    Each sample is ``calls`` calls in a row, after one that is not timed: what the other of the pair left behind
    (memory given back, caches cold) is not this one's fault.
    """
    times: dict[Callable[[], Any], list[float]] = {call: [], reference_call: []}
    pair = [call, reference_call]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for timed in pair:
                times[timed].append(seconds(timed, calls))
                gc.collect()
            pair.reverse()
    finally:
        if collecting:
            gc.enable()
    return Comparison(what, reference, tuple(times[call]), tuple(times[reference_call]), goal)


def seconds(call: Callable[[], Any], calls: int) -> float:
    """Wall time of one call, as the mean of ``calls`` after a first one."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def milliseconds(times: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(times):.3g}"


def machine() -> dict[str, str]:
    """What the figures depend on; no name and no path."""
    import torch

    versions = {"Python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    return {
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    records: Sequence[dict[str, Any]],
    notes: Sequence[str],
    file: Path | None,
) -> None:
    """Print the table, under it the notes and the machine; write all of it to ``file`` as JSON."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140)
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    described = machine()
    console.print("; ".join(f"{name}: {value}" for name, value in described.items()), highlight=False)
    if file is not None:
        written = {"title": title, "machine": described, "notes": list(notes), "rows": list(records)}
        file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def parser(description: str, *, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--repeats", type=int, default=repeats, help="pairs measured (%(default)s)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures, and every single time, here too")
    return made

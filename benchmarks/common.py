"""What the benchmarks share: side-by-side timing, the machine, one table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

PACKAGES = ("torch", "transformers", "safetensors")


UNITS = {"ms": 1e-3, "MiB": 2.0**20, "tok/s": 1.0}


@dataclass(frozen=True)
class Comparison:
    """Two things measured in turn, pair by pair, in seconds, bytes or tokens a second; shown in ``unit``."""

    what: str
    against: str
    values: tuple[float, ...]
    reference_values: tuple[float, ...]
    goal: float | None = None
    unit: Literal["ms", "MiB", "tok/s"] = "ms"

    columns: ClassVar[tuple[str, ...]] = ("", "against", "this", "that", "ratio", "middle half", "goal")

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratio of each pair."""
        return quartiles([value / other for value, other in zip(self.values, self.reference_values, strict=True)])

    def row(self) -> tuple[str, ...]:
        low, middle, high = self.ratios
        digits = 3 if middle >= 0.01 else 5
        medians = (statistics.median(values) / UNITS[self.unit] for values in (self.values, self.reference_values))
        return (
            self.what,
            self.against,
            *(f"{value:.{0 if value >= 100 else 1}f} {self.unit}" for value in medians),
            f"{middle:.{digits}f}",
            f"{low:.{digits}f} to {high:.{digits}f}",
            "" if self.goal is None else f"{self.goal:.3g}",
        )

    def record(self) -> dict[str, Any]:
        low, middle, high = self.ratios
        return {**asdict(self), "ratio": middle, "ratio_quartiles": [low, high]}


@dataclass(frozen=True)
class Timing:
    """How time is taken: on how many threads (None: all), by which clock."""

    threads: int | None
    clock: Callable[[], float]

    @contextmanager
    def threaded(self) -> Iterator[None]:
        """On its threads."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


WALL = Timing(None, time.perf_counter)
# Small models are measured for their Python: a pool of threads, or who else uses the machine, is noise.
ONE_THREAD = Timing(1, time.process_time)
ONE_THREAD_HELP = "large sizes too by CPU time on one thread, for a machine that does other work"


def timing_note(walled: Sequence[str]) -> str:
    """The line that says which sizes were measured how."""
    others = "other sizes" if walled else "all sizes"
    return f"{', '.join(walled)}: wall time, all threads; " * bool(walled) + f"{others}: CPU time, one thread."


def compare(
    what: str,
    measure: Callable[[], float],
    reference: str,
    measure_reference: Callable[[], float],
    *,
    repeats: int,
    goal: float | None = None,
) -> Comparison:
    """Measure two things side by side: a pair a repeat, which of the two comes first taking turns."""
    times: list[float] = []
    reference_times: list[float] = []
    pair = [(measure, times), (measure_reference, reference_times)]
    for _ in range(repeats):
        for measured, into in pair:
            into.append(measured())
        pair.reverse()
    return Comparison(what, reference, tuple(times), tuple(reference_times), goal)


def seconds(call: Callable[[], Any], calls: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call: the mean of ``calls`` in a row, after one that is not timed.

    What was measured before (memory given back, caches cold) is not this one's fault.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        call()
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls
    finally:
        if collecting:
            gc.enable()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine() -> dict[str, str]:
    """What the figures depend on; no name and no path."""
    import torch

    versions = {"Python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
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

"""Runs over datasets: what keeping each sample costs over bare calls, on disk too; and how soon a long run goes on.

``python -m benchmarks.runs [--size SIZE ...] [--samples N] [--repeats N] [--finished N] [--workers N]``

A sample is causal tracing of the text towers under noise on the picture, 10 draws. Pairs of one bare call and one kept
one, over the same samples and in turn. Wall time, because what is written must reach the disk; and, because that is
little and time on a busy machine is not, what keeping a sample's result takes by itself: the claim, the record, its
way through to the disk.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Comparison, compare, machine, parser, report
from benchmarks.samples import TOY, subject_of
from hooked_vlm import HookedVLM
from hooked_vlm.data import Sample, shapes
from hooked_vlm.runs import Experiment
from hooked_vlm.runs.experiment import Step
from hooked_vlm.runs.folder import Folder
from hooked_vlm.runs.kept import KeptLoop
from hooked_vlm.runs.records import Kept, Records, encoded
from hooked_vlm.runs.run import carried_out, run

GOAL = 1.03
RESUME_GOAL = 5.0
FILE = """
title = "causal tracing, for a benchmark"
model = "{model}"
samples = {{ shapes = {samples}, seed = 7, kinds = ["color"] }}

[methods.trace]
use = "causal_trace"
corruption = {{ kind = "AdditiveGaussian", draws = 10 }}
"""
SAMPLES = {"toy": 60, "vqa-base": 2}
PAIRS = {"toy": 7, "vqa-base": 3}


def main() -> None:
    """Measure what was asked for, and print tables."""
    options = parser("Runs over datasets.", repeats=0)
    options.add_argument("--size", nargs="+", choices=list(SAMPLES), default=list(SAMPLES), help="by default both")
    options.add_argument("--samples", type=int, help="of each call")
    options.add_argument(
        "--finished", type=int, default=10_000, help="samples of the run that is resumed; 0: leave out"
    )
    options.add_argument("--workers", type=int, default=2, help="to compare with one; 1: leave out")
    chosen = options.parse_args()
    written: dict[str, Any] = {"machine": machine(), "options": vars(chosen)}
    with one_thread():
        kept = [overhead(name, chosen.samples or SAMPLES[name], chosen.repeats or PAIRS[name]) for name in chosen.size]
        columns = (*Comparison.columns, "to keep one", "samples an hour", "on disk a sample")
        note = "One thread, wall time; the first sample's warming up is nobody's."
        report("Keeping each sample, against bare calls", columns, [one["row"] for one in kept], [], [note], None)
        written["kept"] = kept
        if chosen.workers > 1:
            shared = throughput(chosen.samples or 200, chosen.workers)
            columns = ("workers", "seconds", "samples an hour")
            report(f"{TOY}, a whole run", columns, shared, [], ["With its start and its report."], None)
            written["workers"] = shared
        if chosen.finished:
            again = resumed(chosen.finished)
            rows = [(name, f"{value:.2f} s", goal) for name, value, goal in again]
            report(f"{chosen.finished:,} finished samples", ("", "seconds", "goal"), rows, [], [], None)
            written["resumed"] = again
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(written, indent=2, default=str) + "\n", encoding="utf-8")


@contextmanager
def one_thread() -> Iterator[None]:
    """As on a machine whose other cores have other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def overhead(name: str, n: int, pairs: int) -> dict[str, Any]:
    """A step over ``n`` samples, kept and bare."""
    _, _, model = subject_of(name)
    step = step_of(n)
    samples = shapes(n, seed=7, kinds=("color",))
    step.method.call(model, samples[:1], **step.arguments)
    room = Path(tempfile.mkdtemp(dir="."))
    try:
        numbers = iter(range(2 * pairs))

        def keeping() -> float:
            loop = KeptLoop(room / str(next(numbers)))
            return timed(lambda: carried_out(step, model, samples, loop)) / n

        bare = lambda: timed(lambda: step.method.call(model, samples, **step.arguments)) / n  # noqa: E731
        found = compare(f"{name}, {n} samples", keeping, "bare", bare, repeats=pairs, goal=GOAL)
        alone = keeping_alone(room / "0", room / "alone")
        files = [path.stat().st_size for path in (room / "0").rglob("*.record")]
    finally:
        shutil.rmtree(room)
    an_hour, size = 3600 / float(np.median(found.values)), sum(files) / len(files)
    row = (*found.row(), f"{1000 * alone:.2f} ms", f"{an_hour:,.0f}", f"{size / 1000:.1f} kB")
    return {
        **found.record(),
        "row": row,
        "keeping": alone,
        "samples_an_hour": an_hour,
        "bytes_a_sample": sum(files) / len(files),
    }


def keeping_alone(made: Path, room: Path) -> float:
    """Seconds to claim a sample and to keep its result, the median of many."""
    kept, records, taken = Records(made).read(0), Records(room), []

    def keep(number: int) -> None:
        with records.claim(number):
            records.write(number, encoded(kept))

    for number in range(200):
        taken.append(timed(partial(keep, number)))
    return float(np.median(taken))


def throughput(n: int, workers: int) -> list[tuple[str, str, str]]:
    """A whole run by one process and by several, its start, tables, figures and report included."""
    rows = []
    for count in (1, workers):
        with folder() as out:
            experiment = Experiment.parse(FILE.format(model=TOY, samples=n))
            taken = timed(partial(run, experiment, out, workers=count))
        rows.append((str(count), f"{taken:.1f}", f"{3600 * n / taken:,.0f}"))
    return rows


def resumed(n: int) -> list[tuple[str, float, str]]:
    """A run of ``n`` samples whose results are copies of one's, resumed: until the next sample could begin, and all."""
    experiment = Experiment.parse(FILE.format(model=TOY, samples=2))
    listed = Experiment.parse(FILE.format(model=TOY, samples=n))
    with folder() as out:
        run(experiment, out)
        (known,) = experiment.steps
        records = Records(Folder(out).records(known.name))
        first = records.read(0)
        samples = listed.read_samples()
        for number, sample in enumerate(samples):
            path = records.path(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(Kept(first.outcome.labelled(sample), first.seconds)))  # type: ignore[union-attr]
        rows = [("until the samples are read", timed(listed.read_samples), "")]
        loop = _Stopping(Folder(out).records(known.name))
        going_on = partial(loop.outcomes, "", [*samples, replace(samples[0], id="another")], _stop)
        rows.append(("until the next sample begins", timed(going_on), f"{RESUME_GOAL:g}"))
        model = HookedVLM.from_pretrained(TOY)
        loop = KeptLoop(Folder(out).records(known.name))
        rows.append(("until the whole result is there", timed(partial(carried_out, known, model, samples, loop)), ""))
        rows.append(("until the report is there", timed(partial(run, listed, out, resume=True)), ""))
    return rows


class _Stopping(KeptLoop):
    def carried_out(self, records: Any, missing: Any, one: Any) -> Iterator[Any]:
        """The next sample would begin here."""
        assert len(missing) == 1
        yield from ((number, Kept(records.read(0).outcome, 0.0)) for number in missing)


def _stop(sample: Sample) -> Any:
    raise AssertionError("a finished sample was begun again")


def step_of(n: int) -> Step:
    """The benchmark's."""
    return Experiment.parse(FILE.format(model=TOY, samples=n)).steps[0]


def timed(call: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for a run, on the disk of the working folder: one for temporary files may be in memory."""
    room = Path(tempfile.mkdtemp(dir="."))
    try:
        yield room / "run"
    finally:
        shutil.rmtree(room)


if __name__ == "__main__":
    main()

"""What loading costs: ``HookedVLM.from_pretrained`` against HF's, in time and memory, each in a fresh process.

``python -m benchmarks.loading [--size vqa-base small tiny] [--repeats N] [--json FILE]``
"""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Comparison, parser, report
from benchmarks.models import SIZES

SAMPLED_EVERY = 5e-4  # seconds


@dataclass(frozen=True)
class Load:
    """A process that imports, loads and answers once: seconds, and bytes above what there was before loading."""

    imports: float
    load: float
    answer: float
    peak_anonymous: int
    peak_resident: int

    @property
    def whole(self) -> float:
        return self.imports + self.load + self.answer


def main() -> None:
    """Write a checkpoint, load it many times, and print one table."""
    options = parser("Loads of a checkpoint, side by side.", repeats=9)
    options.add_argument("--size", choices=list(SIZES), default="vqa-base")
    chosen = options.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("memory is read from /proc, which Linux has")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command("write", chosen.size, folder), check=True)
        n_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        loads: dict[str, list[Load]] = {"ours": [], "hf": []}
        for repeat in range(chosen.repeats + 1):
            for whose in ("ours", "hf") if repeat % 2 else ("hf", "ours"):
                load = watch(command(whose, chosen.size, folder))
                if repeat:  # the first pair brings the files into the page cache
                    loads[whose].append(load)
    rows = comparisons(loads["ours"], loads["hf"], n_bytes)
    report(
        f"Loading {chosen.size} from safetensors, {n_bytes / 2**20:.0f} MiB in float32",
        Comparison.columns,
        [row.row() for row in rows],
        [row.record() for row in rows],
        [
            "Wall time; every load in a process of its own, the file in the page cache.",
            "Anonymous memory is what a process really takes; mapped pages of the file are the system's to drop.",
        ],
        chosen.json,
    )


def comparisons(ours: Sequence[Load], theirs: Sequence[Load], n_bytes: int) -> list[Comparison]:
    """The rows of the table."""

    def against_hf(what: str, seconds: Callable[[Load], float]) -> Comparison:
        return Comparison(what, "HF's", tuple(map(seconds, ours)), tuple(map(seconds, theirs)))

    def against_weights(
        what: str, loads: Sequence[Load], n_extra: Callable[[Load], int], goal: float | None
    ) -> Comparison:
        return Comparison(what, "weights", tuple(map(n_extra, loads)), (n_bytes,) * len(loads), goal, "MiB")

    return [
        against_hf("from_pretrained", lambda load: load.load),
        against_hf("first forward after it", lambda load: load.answer),
        against_hf("a script: imports, load, one forward", lambda load: load.whole),
        against_weights("peak anonymous memory in loading", ours, lambda load: load.peak_anonymous, 0.05),
        against_weights("the same, HF's", theirs, lambda load: load.peak_anonymous, None),
        against_weights("peak resident memory in loading", ours, lambda load: load.peak_resident, None),
        against_weights("the same, HF's", theirs, lambda load: load.peak_resident, None),
    ]


def command(action: str, size: str, folder: str) -> list[str]:
    """What starts a process of :mod:`benchmarks.load_once`."""
    return [sys.executable, "-m", "benchmarks.load_once", action, size, folder]


def watch(arguments: list[str]) -> Load:
    """Run one load, step by step, and sample its memory from outside while it goes on."""
    start = time.perf_counter()
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        imports = time.perf_counter() - start
        before = memory(process.pid)
        anonymous = [before["RssAnon"]]
        Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
        print(file=process.stdin, flush=True)
        while not select.select([process.stdout], [], [], SAMPLED_EVERY)[0]:
            anonymous.append(memory(process.pid)["RssAnon"])
        load = float(process.stdout.readline())
        after = memory(process.pid)
        process.stdout.readline()
        print(file=process.stdin, flush=True)
        answer = float(process.stdout.readline())
    peak_anonymous = max(*anonymous, after["RssAnon"]) - before["RssAnon"]
    return Load(imports, load, answer, peak_anonymous, after["VmHWM"] - before["VmRSS"])


def memory(process: int) -> dict[str, int]:
    """Bytes that a process holds: ``RssAnon``, ``VmRSS``, and ``VmHWM``, the most that ``VmRSS`` has been."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("RssAnon", "VmRSS", "VmHWM")}


if __name__ == "__main__":
    main()

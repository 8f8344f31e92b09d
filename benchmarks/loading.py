"""What loading costs: ``HookedVLM.from_pretrained`` against HF's, in time and memory, each in a fresh process.

``python -m benchmarks.loading [--size vqa-base ... llava-7b] [--cold] [--repeats N] [--json FILE]``
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Comparison, parser, report
from benchmarks.models import SIZES, LlavaSize

MOST_ANONYMOUS = 2**29
"""Bytes that our loading may take for itself, whatever the model."""


@dataclass(frozen=True)
class Step:
    """What one step of a process took: seconds, bytes above what it held before loading; what shape came of it."""

    seconds: float
    peak_anonymous: int
    peak_resident: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """A process that imports, loads, and perhaps answers once."""

    imports: float
    load: Step
    answer: Step | None

    @property
    def whole(self) -> float | None:
        """Seconds of all that it does, where it answers."""
        return None if self.answer is None else self.imports + self.load.seconds + self.answer.seconds


def main() -> None:
    """Write a checkpoint, load it many times, and print one table."""
    options = parser("Loads of a checkpoint, side by side.", repeats=9)
    options.add_argument("--size", "--shape", choices=list(SIZES), default="vqa-base")
    options.add_argument("--answers", type=int, help="pairs that run a forward too (llava-7b: 1; else all)")
    options.add_argument("--cold", action="store_true", help="drop the files from the page cache before every load")
    options.add_argument("--folder", type=Path, help="write the checkpoint here, or use the one that lies here")
    chosen = options.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("memory is read from /proc, which Linux has")
    if chosen.answers is None:
        chosen.answers = 1 if chosen.size == "llava-7b" else chosen.repeats
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "config.json").exists():
            subprocess.run(command("write", chosen.size, folder), check=True)
        files = list(folder.glob("*.safetensors"))
        n_bytes = sum(file.stat().st_size for file in files)
        loads: dict[str, list[Load]] = {"ours": [], "hf": []}
        for repeat in range(chosen.repeats):
            for whose in ("ours", "hf") if repeat % 2 else ("hf", "ours"):
                for file in files:
                    (drop if chosen.cold else read)(file)
                load = watch(command(whose, chosen.size, folder), answers=repeat >= chosen.repeats - chosen.answers)
                loads[whose].append(load)
    rows = comparisons(loads["ours"], loads["hf"], n_bytes)
    dtype = getattr(SIZES[chosen.size], "dtype", "float32")
    report(
        f"Loading {chosen.size} from safetensors, {n_bytes / 2**20:.0f} MiB in {str(dtype).removeprefix('torch.')}",
        Comparison.columns,
        [row.row() for row in rows],
        [row.record() for row in rows],
        notes(chosen.size, loads["ours"], cold=chosen.cold),
        chosen.json,
    )
    most = max(load.load.peak_anonymous for load in loads["ours"])
    if most > MOST_ANONYMOUS:
        raise SystemExit(f"our loading took {most / 2**20:.0f} MiB for itself, more than {MOST_ANONYMOUS / 2**20:.0f}")


def comparisons(ours: Sequence[Load], theirs: Sequence[Load], n_bytes: int) -> list[Comparison]:
    """The rows of the table."""
    rows = []
    times: list[tuple[str, Callable[[Load], float | None], float | None]] = [
        ("from_pretrained", lambda load: load.load.seconds, 1.2),
        ("first forward after it", lambda load: load.answer.seconds if load.answer else None, None),
        ("a script: imports, load, one forward", lambda load: load.whole, None),
    ]
    for what, seconds, goal in times:
        both = [tuple(taken for load in loads if (taken := seconds(load)) is not None) for loads in (ours, theirs)]
        rows.append(Comparison(what, "HF's", both[0], both[1], goal))
    steps: list[tuple[str, Callable[[Load], Step | None]]] = [
        ("loading", lambda load: load.load),
        ("that forward", lambda load: load.answer),
    ]
    for doing, step_of in steps:
        for kind in ("anonymous", "resident"):
            goal = min(0.05, MOST_ANONYMOUS / n_bytes) if (doing, kind) == ("loading", "anonymous") else None
            for what, loads, wanted in (
                (f"peak {kind} memory in {doing}", ours, goal),
                ("the same, HF's", theirs, None),
            ):
                peaks = tuple(getattr(step, f"peak_{kind}") for load in loads if (step := step_of(load)))
                rows.append(Comparison(what, "weights", peaks, (n_bytes,) * len(peaks), wanted, "MiB"))
    return [row for row in rows if row.values]


def notes(size: str, ours: Sequence[Load], *, cold: bool) -> list[str]:
    """What stands under the table."""
    before = "dropped from the page cache" if cold else "read through, into the page cache"
    said = [
        f"Wall time; every load in a process of its own, before which the files were {before}.",
        "Anonymous memory is what a process really takes; mapped pages of the file are the system's to drop.",
    ]
    shapes = {load.answer.shape for load in ours if load.answer is not None}
    if isinstance(SIZES[size], LlavaSize) and shapes:
        said.append(
            "Our forward keeps the language model's hook_resid_post at the last position (run_with_cache); HF's is a "
            f"plain one. Our logits: {shapes.pop()}."
        )
    return said


def command(action: str, size: str, folder: Path) -> list[str]:
    """What starts a process of :mod:`benchmarks.load_once`."""
    return [sys.executable, "-m", "benchmarks.load_once", action, size, str(folder)]


def read(file: Path) -> None:
    """Bring a file into the page cache."""
    with file.open("rb", buffering=0) as opened:
        while opened.read(2**24):
            pass


def drop(file: Path) -> None:
    """Drop a file from the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(arguments: list[str], *, answers: bool) -> Load:
    """Run one load, step by step, and sample its memory from outside while it goes on."""
    start = time.perf_counter()
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        imports = time.perf_counter() - start
        before = memory(process.pid)
        load = watch_step(process, before)
        process.stdout.readline()
        answer = watch_step(process, before) if answers else None
        process.communicate()
    return Load(imports, load, answer)


def watch_step(process: subprocess.Popen[str], before: dict[str, int]) -> Step:
    """Let the process take its next step."""
    assert process.stdin is not None
    assert process.stdout is not None
    anonymous = [memory(process.pid)["RssAnon"]]
    Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    start = time.perf_counter()
    print(file=process.stdin, flush=True)
    # Twice a millisecond; in long steps less often, for it takes time from what is measured.
    while not select.select([process.stdout], [], [], min(max(5e-4, (time.perf_counter() - start) / 1000), 5e-3))[0]:
        anonymous.append(memory(process.pid)["RssAnon"])
    line = process.stdout.readline()
    if not line:
        raise SystemExit("the process that loads has ended early")
    after = memory(process.pid)
    said = json.loads(line)
    return Step(
        said["seconds"],
        max(*anonymous, after["RssAnon"]) - before["RssAnon"],
        after["VmHWM"] - before["VmRSS"],
        tuple(said["shape"]),
    )


def memory(process: int) -> dict[str, int]:
    """Bytes that a process holds: ``RssAnon``, ``VmRSS``, and ``VmHWM``, the most that ``VmRSS`` has been."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("RssAnon", "VmRSS", "VmHWM")}


if __name__ == "__main__":
    main()

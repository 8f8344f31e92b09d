"""Runs that are killed, at any moment, and gone on with: the same values as undisturbed, and nothing done twice."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hooked_vlm.runs.records import Records
from tests.runs.disturbed import carry_out, ended, leftovers, started, tables, turns, values_of, wait_until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are forked, and killed")

KILLED = -signal.SIGKILL
FULL = OSError(errno.ENOSPC, "No space left on device")
FLOW = {
    "model": "toy-llava",
    "samples": {"shapes": 60, "seed": 5, "kinds": ["color", "exists"]},
    "keep_correct": True,
    "methods": {"flow": {"use": "information_flow", "edges": [["question", "last"]]}},
    "statistics": {"resamples": 20, "permutations": 20},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The values of a run that nobody disturbs."""
    known: dict[str, dict[str, Any]] = {}

    def values(given: dict[str, Any]) -> dict[str, Any]:
        if str(given) not in known:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            assert ended(started(carry_out, given, out)) == 0
            known[str(given)] = values_of(out)
        return known[str(given)]

    return values


def finished(out: Path) -> dict[Path, int]:
    """Records, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.record") if not path.name.startswith(".")}


# Killed ---------------------------------------------------------------------------------------------------------------


def test_sixty_samples_killed_at_twenty_random_moments(undisturbed: Any, tmp_path: Path) -> None:
    """While samples are done, for the most part; and while the run begins, and results are written."""
    drawn, log, out = random.Random(0), tmp_path / "log", tmp_path / "run"
    given, kills = tables(log, seconds=0.005), 0
    while kills < 20:
        process = started(carry_out, given, out, resume=True)
        if kills < 14:
            wanted = len(turns(log)) + drawn.randrange(8)
            wait_until(lambda: len(turns(log)) >= wanted or len(turns(log, "ends")) >= 60, pause=0.0005)  # noqa: B023
            time.sleep(drawn.uniform(0, 0.02))
        else:
            time.sleep(drawn.uniform(0, 1.0))
        process.kill()
        kills += ended(process) == KILLED
    assert ended(started(carry_out, given, out, resume=True)) == 0
    assert values_of(out) == undisturbed(tables())
    assert leftovers(out) == []
    begun, done = (Counter(turn.sample for turn in turns(log, what)) for what in ("begins", "ends"))
    assert len(done) == 60
    # A kill cuts one turn short, or falls between its end and its record; no other is done again.
    assert 60 < begun.total() <= 60 + kills
    assert done.total() <= 60 + kills


def test_a_method_and_its_gate_killed_at_random_moments(undisturbed: Any, tmp_path: Path) -> None:
    drawn, out = random.Random(1), tmp_path / "run"
    before: dict[Path, int] = {}
    for _ in range(9):
        process = started(carry_out, FLOW, out, resume=True)
        wanted = len(before) + drawn.randrange(16)
        wait_until(lambda: len(finished(out)) >= wanted or not process.is_alive())  # noqa: B023
        time.sleep(drawn.uniform(0, 0.1))
        process.kill()
        ended(process)
        now = finished(out)
        assert now.items() >= before.items()
        before = now
    steps = Counter(path.parts[-3] for path in before)
    assert steps["keep_correct"] == 60
    assert 0 < steps["flow"] < 60
    assert ended(started(carry_out, FLOW, out, resume=True)) == 0
    assert finished(out).items() >= before.items()
    assert values_of(out) == undisturbed(FLOW)


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_wherever_files_change(every: int, undisturbed: Any, tmp_path: Path) -> None:
    """Before and after each call that makes a file, puts it in its place, or removes it; each time a call later."""
    log, out = tmp_path / "log", tmp_path / "run"
    given, call = tables(log, samples=4), 1
    while (code := ended(started(carry_out, given, out, before=partial(kill_at, call), resume=True))) == KILLED:
        call += every
    assert code == 0
    assert call > 40
    assert values_of(out) == undisturbed(tables(samples=4))
    assert leftovers(out) == []
    assert len(turns(log, "begins")) <= 4 + call // every


def kill_at(call: int) -> None:
    """Die before or after a call: of all that change files, the so manieth."""
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == call:
            os.kill(os.getpid(), signal.SIGKILL)

    wire(lambda function, arguments: (event(), function(*arguments[0], **arguments[1]), event())[1])


def wire(around: Callable[[Callable[..., Any], tuple[Any, Any]], Any]) -> None:
    """Put something around each call that changes files."""

    def wired(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **options: around(function, (given, options))

    for module, name in ((tempfile, "mkstemp"), (Path, "write_bytes"), (os, "fsync"), (os, "replace"), (os, "unlink")):
        setattr(module, name, wired(getattr(module, name)))


# Several processes ----------------------------------------------------------------------------------------------------


def meet(folder: Path, number: int) -> None:
    """Go on when so many processes are here."""
    (folder / f"here-{os.getpid()}").touch()
    wait_until(lambda: len(list(folder.glob("here-*"))) >= number, pause=0.0)


def hold(folder: Path) -> None:
    """Claim a sample, begin to write its record, and hang."""
    records = Records(folder)
    with records.claim(3):
        (records.path(3).parent / ".000003-abcd1234.record").touch()
        time.sleep(60)


def test_a_claim_lives_as_long_as_its_process(tmp_path: Path) -> None:
    records, half = Records(tmp_path), tmp_path / "000" / ".000003-abcd1234.record"
    process = started(hold, tmp_path)
    wait_until(half.exists)
    for stop in (0, signal.SIGSTOP):
        os.kill(process.pid or 0, stop)
        records.tidy()
        assert half.exists()
        with records.claim(3) as is_ours:
            assert not is_ours
    process.kill()
    ended(process)
    with records.claim(3) as is_ours:
        assert is_ours
    records.tidy()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("number", "limits"), [(3, [None]), (2, [30, None])])
def test_processes_share_a_run(number: int, limits: list[int | None], undisturbed: Any, tmp_path: Path) -> None:
    """A new one, which one of them begins; and one that has been begun, and grows."""
    log, out, said = tmp_path / "log", tmp_path / "run", tmp_path / "said"
    given, together = tables(log, seconds=0.005, crowd=number), partial(meet, tmp_path, number)
    for limit in limits:
        processes = [
            started(carry_out, given, out, before=together, resume=True, limit=limit, said=said) for _ in range(number)
        ]
        assert [ended(process) for process in processes] == [0] * number
        assert said.read_text() == ""
    assert values_of(out) == undisturbed(tables())
    assert leftovers(out) == []
    done = turns(log, "ends")
    assert len(done) == len(turns(log, "begins")) == len({turn.sample for turn in done}) == 60
    assert len({turn.process for turn in done}) >= number


def test_of_two_that_begin_a_run_one_is_refused(undisturbed: Any, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    given, together = tables(log), partial(meet, tmp_path, 2)
    processes = [started(carry_out, given, out, before=together, said=tmp_path / f"said-{one}") for one in (0, 1)]
    codes = [ended(process) for process in processes]
    assert sorted(codes) == [0, 1]  # type: ignore[type-var]
    refusal = (tmp_path / f"said-{codes.index(1)}").read_text()
    assert refusal == f"ResumeError: {out} holds a run already: go on with it (--resume), or choose another folder"
    assert len(turns(log, "begins")) == len(turns(log, "ends")) == 60
    assert values_of(out) == undisturbed(tables())


def test_a_process_that_sleeps_keeps_its_sample_and_one_that_is_killed_does_not(
    undisturbed: Any, tmp_path: Path
) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    given = tables(log, samples=4, seconds=0.2)
    sleeper = started(carry_out, given, out)
    wait_until(lambda: len(turns(log)) == 3)  # its second sample
    assert sleeper.pid is not None
    os.kill(sleeper.pid, signal.SIGSTOP)
    other = started(carry_out, given, out, resume=True)
    wait_until(lambda: len(turns(log, "ends")) == 3)
    time.sleep(0.5)
    assert other.is_alive()
    assert len(turns(log, "begins")) == 4
    sleeper.kill()
    killed = time.monotonic()
    wait_until(lambda: len(turns(log, "begins")) == 5)
    assert time.monotonic() - killed < 2
    assert [ended(sleeper), ended(other)] == [KILLED, 0]
    first, again = turns(log, "begins")[1], turns(log, "begins")[4]
    assert first.sample == again.sample
    assert len(turns(log, "ends")) == 4
    assert values_of(out) == undisturbed(tables(samples=4))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked for in /proc")
def test_workers_that_are_killed_or_whose_run_is(undisturbed: Any, tmp_path: Path) -> None:
    """A run that is killed takes its workers along, at once; what they were at is done by those of the next."""
    log, out, said = tmp_path / "log", tmp_path / "run", tmp_path / "said"
    given = tables(log, samples=8, crowd=5)  # so that no turn ends before the second run's workers have begun, too
    run = started(carry_out, given, out, workers=3)
    wait_until(lambda: len({turn.process for turn in turns(log)}) == 3)
    one, other = {turn.process for turn in turns(log)} - {run.pid}
    os.kill(one, signal.SIGKILL)
    run.kill()
    assert ended(run) == KILLED
    gone = time.monotonic()
    wait_until(lambda: not is_at_work(other))
    assert time.monotonic() - gone < 2
    assert ended(started(carry_out, given, out, workers=2, resume=True, said=said)) == 0
    assert said.read_text() == ""
    assert values_of(out) == undisturbed(tables(samples=8))
    assert len(turns(log, "begins")) == 8 + 3
    assert len({turn.process for turn in turns(log, "ends")}) == 2


def is_at_work(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# A full disk ----------------------------------------------------------------------------------------------------------


def full_from(call: int) -> None:
    """There is no room any more from the so manieth call on that takes some."""
    calls = 0

    def around(function: Callable[..., Any], given: tuple[Any, Any]) -> Any:
        nonlocal calls
        calls += function.__name__ != "unlink"
        if calls >= call and function.__name__ != "unlink":
            raise OSError(*FULL.args)
        return function(*given[0], **given[1])

    wire(around)


def test_a_disk_that_is_full(undisturbed: Any, tmp_path: Path) -> None:
    """From one call on, each time a later one: the run ends, says so, leaves nothing by halves, and goes on."""
    log, out, said = tmp_path / "log", tmp_path / "run", tmp_path / "said"
    given, call, so_far = tables(log, samples=4), 1, -1
    while (code := ended(started(carry_out, given, out, before=partial(full_from, call), resume=True, said=said))) == 1:
        assert said.read_text() == f"OSError: {FULL}"
        assert leftovers(out) == []
        assert len(finished(out)) >= so_far
        call, so_far = call + 5, len(finished(out))
    assert (code, said.read_text()) == (0, "")
    assert call > 25
    assert values_of(out) == undisturbed(tables(samples=4))
    assert '"failed"' not in (out / "samples.json").read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of a size that may be changed, if we may mount one."""
    place = tmp_path / "disk"
    place.mkdir()

    def of_size(size: str) -> Path:
        how = f"remount,size={size}" if place.is_mount() else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
        return place

    yield of_size
    if place.is_mount():
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("size", ["120k", "285k"])  # full of records; of results
def test_a_small_disk_that_fills(size: str, small_disk: Any, undisturbed: Any, tmp_path: Path) -> None:
    out, said = small_disk(size) / "run", tmp_path / "said"
    given = tables(tmp_path / "log")
    assert ended(started(carry_out, given, out, said=said)) == 1
    assert said.read_text().startswith("OSError: [Errno 28]")
    assert leftovers(out) == []
    n_done = len(finished(out))
    assert (n_done == 60) == (size == "285k")
    small_disk("8m")
    assert ended(started(carry_out, given, out, resume=True, said=said)) == 0
    assert said.read_text() == ""
    assert values_of(out) == undisturbed(tables())
    assert len(turns(tmp_path / "log", "ends")) <= 61

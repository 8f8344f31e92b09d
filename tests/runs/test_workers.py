"""Processes that help a run along: on which devices, and how they end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hooked_vlm.runs import Experiment, workers
from hooked_vlm.runs.folder import Folder
from hooked_vlm.runs.workers import helpers
from tests.runs.disturbed import tables, wait_until

WAITS = "import time; time.sleep(60)"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, subprocess.Popen[bytes]]]:
    """The devices and the processes of helpers, which do what ``code`` says in place of a run's samples."""
    known: list[tuple[str | None, subprocess.Popen[bytes]]] = []

    def started(folder: Folder, experiment: Experiment, device: str | None) -> subprocess.Popen[bytes]:
        code = "raise SystemExit(3)" if device == "cuda:1" else WAITS
        known.append((device, subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)))
        return known[-1][1]

    monkeypatch.setattr(workers, "_started", started)
    return known


def of(device: str | None) -> Experiment:
    return Experiment.of({**tables(), "model": {"name": "toy-blip-vqa", **({"device": device} if device else {})}})


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        (None, 0, [None, None]),
        ("cpu", 4, ["cpu", "cpu"]),
        ("cuda", 3, ["cuda:1", "cuda:2"]),
        ("cuda:2", 3, ["cuda:0", "cuda:1"]),
        ("cuda", 1, ["cuda:0", "cuda:0"]),
    ],
)
def test_each_has_a_gpu_of_its_own_where_there_are_so_many(
    device: str | None, gpus: int, expected: list[Any], begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with helpers(Folder(Path()), of(device), 3, lambda message: None):
        assert [device for device, _ in begun] == expected


def test_they_end_with_the_block_and_one_that_died_before_is_told_of(
    begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    told: list[str] = []
    started = time.monotonic()
    with helpers(Folder(Path()), of("cuda"), 3, told.append):
        (_, dies), (_, lives) = begun
        wait_until(lambda: dies.poll() is not None)
        assert lives.poll() is None
    assert time.monotonic() - started < 5
    assert lives.poll() is not None
    assert told == ["a worker ended with exit code 3; its samples were done by others"]


def test_they_end_with_a_run_that_is_stopped(begun: Any) -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), helpers(Folder(Path()), of(None), 2, told.append):
        raise KeyboardInterrupt
    assert begun[0][1].poll() is not None
    assert told == []


def test_one_worker_is_this_process(begun: Any) -> None:
    with helpers(Folder(Path()), of(None), 1, lambda message: None):
        assert begun == []

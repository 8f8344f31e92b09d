"""The benchmarks run, at their smallest. What they measure is nobody's to assert."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from benchmarks.models import SIZES

ROOT = Path(__file__).resolve().parents[1]

GRIDS = (
    "Palit",
    "NOTICE",
    "LLaVA, text positions",
    "LLaVA, 2 of 9 image positions",
    "Knockout, image and question to last",
    "Knockout, image to question",
)


Figures = Callable[[str], Any]


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, unchecked: None) -> Figures:
    """What a benchmark writes, once it has printed a table.

    It runs as ``python -m`` would run it, but in this process: another would take longer to start than to measure.
    """
    verbosity = logging.get_verbosity()

    def run(command: str) -> Any:
        name, *options = command.split()
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [name, *options, "--repeats", "1", "--json", str(file)])
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        assert "ratio" in capsys.readouterr().out
        return json.loads(file.read_text())

    yield run
    logging.set_verbosity(verbosity)


@pytest.mark.parametrize(
    "command",
    [
        "forward --size tiny llava-tiny --one-thread",
        "generation --size llava-tiny --batch 1 3 --padded --tokens 4",
        "importing",
    ],
)
def test_runs_and_prints_its_table(figures: Figures, command: str) -> None:
    assert figures(command)


def test_runs_are_kept_and_resumed(figures: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = figures("runs --size toy --samples 2 --finished 3 --workers 1")
    assert found["kept"][0]["bytes_a_sample"] > 1000
    assert [name for name, *_ in found["resumed"]][1] == "until the next sample begins"
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_loads_what_lies_in_a_folder(figures: Figures, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    SIZES["llava-tiny"].write(tmp_path / "checkpoint")
    assert figures(f"loading --shape llava-tiny --cold --answers 0 --folder {tmp_path / 'checkpoint'}")


def test_is_a_command(tmp_path: Path) -> None:
    """The one that has others write and load, itself in a process of its own."""
    command = [sys.executable, "-m", *"benchmarks.loading --size tiny --repeats 1 --json".split()]
    done = subprocess.run([*command, str(tmp_path / "figures.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout
    assert json.loads((tmp_path / "figures.json").read_text())


def test_sweeps_and_hf_with_hooks_give_the_same_numbers(figures: Figures) -> None:
    rows = figures("sweep --size small --sample 6 --rivals papers hooks batched")["rows"]
    compared = [row for row in rows if "difference" in row]
    assert {(row["grid"], row["contender"]) for row in compared} == {
        *((grid, way) for grid in GRIDS for way in ("ours", "hooks", "batched")),
        *((grid, "papers") for grid in GRIDS if not grid.startswith("Knockout")),
    }
    assert all(row["difference"] < 1e-4 for row in compared)
    assert all(row["effect"] > 1e-2 for row in compared if row["contender"] == "ours")
    assert [row["n_cells"] for row in rows if row["grid"] == "growth"] == [1, 10, 100]

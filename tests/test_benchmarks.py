"""The benchmarks run, at their smallest. What they measure is nobody's to assert."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

GRIDS = (
    "Palit",
    "NOTICE",
    "LLaVA, text positions",
    "LLaVA, 2 of 9 image positions",
    "Knockout, image and question to last",
    "Knockout, image to question",
)


@pytest.mark.parametrize(
    "command",
    [
        "forward --size tiny llava-tiny --one-thread",
        "loading --size tiny",
        "loading --shape llava-tiny --cold --answers 0",
        "generation --size llava-tiny --batch 1 3 --padded --tokens 4",
        "importing",
    ],
)
def test_runs_and_prints_its_table(command: str, tmp_path: Path) -> None:
    assert figures(command, tmp_path)


def test_sweeps_and_hf_with_hooks_give_the_same_numbers(tmp_path: Path) -> None:
    rows = figures("sweep --size small --sample 6 --rivals papers hooks batched", tmp_path)["rows"]
    compared = [row for row in rows if "difference" in row]
    assert {(row["grid"], row["contender"]) for row in compared} == {
        *((grid, way) for grid in GRIDS for way in ("ours", "hooks", "batched")),
        *((grid, "papers") for grid in GRIDS if not grid.startswith("Knockout")),
    }
    assert all(row["difference"] < 1e-4 for row in compared)
    assert all(row["effect"] > 1e-2 for row in compared if row["contender"] == "ours")
    assert [row["n_cells"] for row in rows if row["grid"] == "growth"] == [1, 10, 100]


def figures(command: str, folder: Path) -> Any:
    """What a benchmark writes, once it has printed a table."""
    # In a process of its own: the suite's checks of every signature would be what is measured.
    run = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{command} --repeats 1 --json".split(), str(folder / "figures.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "ratio" in run.stdout
    return json.loads((folder / "figures.json").read_text())

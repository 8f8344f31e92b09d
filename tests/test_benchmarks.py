"""The benchmarks run, at their smallest. What they measure is nobody's to assert."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
    # In a process of its own: the suite's checks of every signature would be what is measured.
    run = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{command} --repeats 1 --json".split(), str(tmp_path / "figures.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "ratio" in run.stdout
    assert json.loads((tmp_path / "figures.json").read_text())

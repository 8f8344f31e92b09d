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
        ("benchmarks.forward", "--size", "tiny", "--repeats", "1"),
        ("benchmarks.loading", "--size", "tiny", "--repeats", "1"),
        ("benchmarks.importing", "--repeats", "1"),
    ],
    ids=lambda command: command[0],
)
def test_runs_and_prints_its_table(command: tuple[str, ...], tmp_path: Path) -> None:
    # In a process of its own: the suite's checks of every signature would be what is measured.
    run = subprocess.run(
        [sys.executable, "-m", *command, "--json", str(tmp_path / "figures.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "ratio" in run.stdout
    assert json.loads((tmp_path / "figures.json").read_text())

"""``hooked-vlm run``: exit codes, what it says in one line, and how it is stopped."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from hooked_vlm.cli import app
from tests.runs.disturbed import carry_out, command, ended, leftovers, started, tables, turns, values_of, wait_until
from tests.runs.test_interrupted import full_from


def toml(folder: Path, given: dict[str, Any]) -> Path:
    (folder / "mine.toml").write_text(tomli_w.dumps(given), encoding="utf-8")
    return folder / "mine.toml"


def refused(*arguments: object) -> str:
    """What is said of what cannot be done: a line, with exit code 2."""
    found = CliRunner().invoke(app, ["run", *map(str, arguments)])
    assert found.exit_code == 2
    line, nothing = found.output.split("\n")
    assert not nothing
    return line


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_is_stopped_by_hand_and_gone_on_with(stop: int, code: int, tmp_path: Path) -> None:
    log, out, said = tmp_path / "log", tmp_path / "run", tmp_path / "said"
    given = tables(log, samples=5, seconds=0.3)
    arguments = ["run", str(toml(tmp_path, given)), "--out", str(out)]
    process = started(command, arguments, said)
    wait_until(lambda: len(turns(log)) == 5)  # in the third sample's turn
    os.kill(process.pid or 0, stop)
    assert ended(process) == code
    assert said.read_text() == f"hooked-vlm: stopped; what is done is in {out}: go on with --resume\n"
    assert leftovers(out) == []
    # In time for the third, or on a machine that has much to do for a later one.
    assert 2 <= len(turns(log, "ends")) == len(list(out.rglob("*.record"))) < 5
    assert ended(started(command, [*arguments, "--resume"], said)) == 0
    rows = [line.split() for line in said.read_text().splitlines()]
    assert ["numbers", "5", "0", "0"] in rows
    assert f"toy-blip-vqa; the report is {out / 'report.html'}".split() in rows
    assert len(turns(log, "ends")) == 5
    assert ended(started(carry_out, given, tmp_path / "other")) == 0
    assert values_of(out) == values_of(tmp_path / "other")


def test_a_full_disk_is_a_line(tmp_path: Path) -> None:
    said = tmp_path / "said"
    arguments = ["run", str(toml(tmp_path, tables(samples=3))), "--out", str(tmp_path / "run")]
    assert ended(started(command, arguments, said, partial(full_from, 20))) == 2
    assert said.read_text() == "hooked-vlm: [Errno 28] No space left on device\n"


def test_a_run_all_of_whose_samples_fail_has_a_report_and_a_code_of_its_own(tmp_path: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    odd = {f"shapes-5-{number}-color": "failed" if number else "dropped" for number in range(3)}
    given = tables(samples=3, odd=odd)
    assert ended(started(command, ["run", str(toml(tmp_path, given)), "--out", str(out)], said)) == 1
    assert "numbers can use none of 3 samples; the first: shapes-5-0-color is odd" in said.read_text()
    rows = [line.split() for line in said.read_text().splitlines()]
    assert ["numbers", "0", "1", "2", *"odd samples: 1, RuntimeError: 2".split()] in rows
    step = json.loads((out / "summary.json").read_text())["steps"]["numbers"]
    assert (step["used"], step["dropped"], step["failed"]) == (0, 1, 2)
    assert (out / "report.html").is_file()


def test_what_cannot_be_begun_is_said_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooked_vlm.runs.Experiment.load_model", None)
    monkeypatch.chdir(tmp_path)
    file = toml(tmp_path, tables())
    assert refused(file, "--limit", 0) == "hooked-vlm: a run takes at least one sample, not 0"
    assert refused(file, "--workers", 0) == "hooked-vlm: a run takes at least one worker, not 0"
    assert refused("missing.toml").startswith("hooked-vlm: there is no file missing.toml; ready experiments are basu, ")
    (tmp_path / "file").touch()
    assert refused(file, "--out", "file") == "hooked-vlm: file is a file; a run has a folder of its own"
    for options in ([], ["--resume"]):
        assert refused(file, "--out", ".", *options) == "hooked-vlm: . is not empty, and holds no run"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{")
    told = refused(file, "--resume")
    assert told.startswith("hooked-vlm: mine/run.json is damaged (Expecting property name")
    assert told.endswith("put back what it was, or choose another folder")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    said = tmp_path / "said"
    arguments = ["run", str(toml(tmp_path, tables(samples=1))), "--out", str(tmp_path / "mine.toml" / "run")]
    assert ended(started(command, arguments, said)) == 2
    assert said.read_text() == f"hooked-vlm: [Errno 20] Not a directory: '{tmp_path / 'mine.toml' / 'run'}'\n"


def test_the_file_is_shown(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["run", str(toml(tmp_path, tables())), "--show"])
    assert (found.exit_code, found.output) == (0, tomli_w.dumps(tables()))

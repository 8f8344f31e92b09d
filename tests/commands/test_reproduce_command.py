"""``hooked-vlm reproduce``: the ready experiments, with another model and other samples."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hooked_vlm import results, toys
from hooked_vlm.cli import app
from hooked_vlm.corruptions import Scaled
from hooked_vlm.data import shapes, write_manifest
from hooked_vlm.runs import Experiment


def reproduce(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["reproduce", *arguments])
    return found.exit_code, found.output


def test_without_options_it_is_the_ready_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """Into a folder of the paper's name, in which it is gone on with."""
    monkeypatch.chdir(tmp_path)
    code, output = reproduce("zhang", "--limit", "1")
    assert code == 0, output
    assert "Zhang et al. 2025" in output
    assert (tmp_path / "zhang" / "experiment.toml").read_text() == Experiment.load("zhang").text
    assert (tmp_path / "zhang" / "report.html").is_file()
    code, output = reproduce("zhang", "--limit", "2")
    assert code == 2
    assert "--resume" in output
    code, output = reproduce("zhang", "--limit", "2", "--resume")
    assert code == 0, output
    assert results.load(tmp_path / "zhang" / "results" / "flow.nc").attrs["samples_used"] == 2


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples, the second with a wrong answer."""
    folder = tmp_path_factory.mktemp("samples")
    samples = [replace(one, spans={"answer": one.spans["subject"]}) for one in shapes(3, seed=7, kinds=("color",))]
    samples[1] = replace(samples[1], answer="green" if samples[1].answer != "green" else "red")
    write_manifest(samples, folder / "shapes.jsonl", pictures=folder / "pictures")
    return folder / "shapes.jsonl"


def of(manifest: Path) -> list[str]:
    return ["--samples", str(manifest), "--format", "manifest"]


def test_samples_of_ones_own_are_kept_where_the_model_is_right(manifest: Path, tmp_path: Path, unchecked: None) -> None:
    code, output = reproduce("zhang", *of(manifest), "--out", str(tmp_path / "run"))
    assert code == 0, output
    assert "a wrong answer: 1" in output
    assert results.load(tmp_path / "run" / "results" / "flow.nc").attrs["samples_used"] == 2


def test_what_was_done_is_in_the_folder_as_a_file_that_can_be_run(
    manifest: Path, tmp_path: Path, unchecked: None
) -> None:
    # The toy under a name that is not embedded.
    blip = str(shutil.copytree(toys.folder("toy-blip-vqa"), tmp_path / "blip"))
    options = ["--dtype", "float32", "--attention", "eager", "--skip-bad-rows"]
    code, output = reproduce("palit", "--model", blip, *of(manifest), *options, "--out", str(tmp_path / "run"))
    assert code == 0, output
    trace = results.load(tmp_path / "run" / "results" / "scaled.nc")
    assert trace.attrs["samples_used"] == 3, "Palit et al. trace what the model says, right or wrong"
    assert (trace.attrs["corruption"], trace.attrs["attention"]) == ("Scaled", "eager")
    written = Experiment.load(tmp_path / "run" / "experiment.toml")
    assert written.model == {"name": blip, "dtype": "float32", "attention": "eager"}
    assert written.samples == {"file": str(manifest), "format": "manifest", "on_bad_row": "skip"}
    assert written.steps[0].arguments["corruption"] == Scaled(0.7691), "as no embedded model is named"
    of_run = json.loads((tmp_path / "run" / "run.json").read_text())["experiment"]
    assert of_run == json.loads(json.dumps(written.tables()))


def test_all_samples_are_kept_if_asked_for(manifest: Path, tmp_path: Path, unchecked: None) -> None:
    code, output = reproduce("zhang", *of(manifest), "--keep-all", "--limit", "2", "--out", str(tmp_path / "run"))
    assert code == 0, output
    assert results.load(tmp_path / "run" / "results" / "flow.nc").attrs["samples_used"] == 2
    assert Experiment.load(tmp_path / "run" / "experiment.toml").keep_correct is None


def test_the_papers_arguments_are_not_bent_to_fit(manifest: Path, tmp_path: Path) -> None:
    shutil.copytree(toys.folder("toy-llava"), tmp_path / "llava")
    model = ["--model", str(tmp_path / "llava")]
    code, output = reproduce("zhang", *model, *of(manifest), "--keep-all", "--out", str(tmp_path / "run"))
    assert code == 1, "no sample can be used where the paper's window of 9 layers does not fit"
    assert "wider than the tower" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["notise"], "no paper is called 'notise'; there are basu, neo, notice, palit, zhang; did you mean 'notice'?"),
        (["neo", "--images", "somewhere"], "--skip-bad-rows say how --samples is read"),
        (["neo", "--format", "manifest"], "--skip-bad-rows say how --samples is read"),
        (["neo", "--skip-bad-rows"], "--skip-bad-rows say how --samples is read"),
        (["neo", "--samples", "gone.json"], "gone.json"),
        (["neo", "--samples", "gone.json", "--format", "manifesto"], "no format is called 'manifesto'"),
        (["neo", "--model", "toy-lava"], "toy-lava"),
        (["neo", "--limit", "0"], "at least one sample"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = reproduce(*arguments)
    assert code == 2
    assert message in " ".join(output.split())
    assert not list(tmp_path.iterdir())

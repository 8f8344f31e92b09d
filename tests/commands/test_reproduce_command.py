"""``hooked-vlm reproduce``: each paper's experiment, on the toys and on files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hooked_vlm import results
from hooked_vlm.cli import app
from hooked_vlm.data import shapes, write_manifest
from hooked_vlm.data.readers import READERS
from hooked_vlm.papers import PAPERS


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["reproduce", *arguments])
    return found.exit_code, found.output


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_runs_on_the_toys(paper: str, tmp_path: Path) -> None:
    code, output = run(paper, "--limit", "2", "--out", str(tmp_path / "found"))
    assert code == 0, output
    assert PAPERS[paper].title.split(":")[0] in " ".join(output.split())
    files = sorted((tmp_path / "found").iterdir())
    assert {file.suffix for file in files} == {".nc", ".png", ".pdf"}
    for file in files:
        if file.suffix == ".nc":
            assert results.load(file).attrs["samples_used"] == 2
        else:
            assert file.stat().st_size > 5000


def test_papers_name_readers_that_exist() -> None:
    assert {paper.format for paper in PAPERS.values()} <= set(READERS)


def test_a_file_of_ones_own_is_kept_where_the_model_is_right(tmp_path: Path) -> None:
    samples = [replace(one, spans={"answer": one.spans["subject"]}) for one in shapes(3, seed=7, kinds=("color",))]
    samples[1] = replace(samples[1], answer="green" if samples[1].answer != "green" else "red")
    write_manifest(samples, tmp_path / "shapes.jsonl", pictures=tmp_path / "pictures")
    file = ["--samples", str(tmp_path / "shapes.jsonl"), "--format", "manifest"]
    code, output = run("notice", "--model", "toy-blip-vqa", *file, "--out", str(tmp_path / "notice"))
    assert code == 0, output
    assert "a wrong answer: 1" in output
    assert results.load(tmp_path / "notice" / "heads_sip.nc").attrs["samples_used"] == 2
    code, output = run("palit", "--model", "toy-blip-vqa", *file, "--out", str(tmp_path / "palit"))
    assert code == 0, output
    trace = results.load(tmp_path / "palit" / "trace.nc")
    assert trace.attrs["samples_used"] == 3, "Palit et al. trace what the model says, right or wrong"
    assert trace.attrs["corruption"] == "Scaled"
    code, output = run("zhang", "--model", "toy-llava", *file, "--keep-all", "--out", str(tmp_path / "zhang"))
    assert code == 2, "the paper's window of 9 layers does not fit"
    assert "wider than the tower" in output
    assert not (tmp_path / "zhang").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["notise"], "no paper is called 'notise'"),
        (["neo", "--images", "somewhere"], "--images and --format say how --samples is read"),
        (["neo", "--samples", "gone.json"], "gone.json"),
        (["neo", "--model", "toy-lava"], "toy-lava"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = run(*arguments)
    assert code == 2
    assert message in output
    assert not list(tmp_path.iterdir())

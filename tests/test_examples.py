"""The example scripts run as they stand, and show what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from hooked_vlm import results

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run a script with arguments, in an empty folder; returns the lines that it prints."""
    monkeypatch.chdir(tmp_path)

    def run_script(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_script


def test_every_example_is_tested() -> None:
    tested = {"attention_knockout", "causal_trace", "image_knockout", "patch_heads"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_causal_trace(run, tmp_path: Path) -> None:
    first, *found, last = run("causal_trace.py", "figures")
    assert first == "what color is the circle ? red"
    assert last == "figures and results are in figures"
    assert [line.split(":")[0].strip() for line in found] == ["noise", "image", "question"]
    assert all(float(line.split()[-1]) > 0.5 for line in found)
    # Until the first layer has spread it, the word that was replaced is in its own position alone.
    assert "question_encoder resid of layer 0 at circle" in found[2]
    for name in ("noise", "image", "question"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
        assert results.load(tmp_path / "figures" / f"{name}.nc").attrs["method"] == "causal_trace"


def test_patch_heads(run) -> None:
    header, *rows, strongest = run("patch_heads.py", "6")
    assert header.split() == ["head", "0", "head", "1", "head", "2", "head", "3"]
    table = {site: [float(part) for part in parts] for site, *parts in map(str.split, rows)}
    assert len(table) == 8
    last = table["question_encoder.blocks.3.cross_attn.hook_z"]
    assert max(last) == max(map(max, table.values())) > 0.3
    assert strongest == (
        f"strongest: head {last.index(max(last))} at question_encoder.blocks.3.cross_attn.hook_z, mean over 6 pictures"
    )


def test_attention_knockout(run) -> None:
    clean, header, *rows = run("attention_knockout.py", "12")
    assert float(clean.split()[-1]) > 0.97
    assert header.split() == ["no", "reading", "in", "the", "object", "all", "else"]
    table = {layer: (float(shut), float(only)) for layer, shut, only in map(str.split, rows)}
    assert len(table) == 5
    # The last layer reads the object, and nothing else; without any look at it the answer is a guess.
    shut, only = table["question_encoder.blocks.3.cross_attn"]
    assert shut < 0.5 < 0.9 < only
    assert table["question_encoder.blocks.*.cross_attn"][0] < 0.5


def test_image_knockout(run) -> None:
    first, clean, header, *rows = run("image_knockout.py", "12")
    assert first == "what color is the circle ? red; without a look at position 6: yellow"
    assert float(clean.split()[-1]) > 0.97
    assert header.split() == "the last position does not read the object another the image the question".split()
    table = {layer: [float(score) for score in scores] for layer, *scores in map(str.split, rows)}
    assert len(table) == 6
    # One layer reads the object, and nothing else of the image.
    shut, another, image, _ = table["language_model.blocks.1.attn"]
    assert max(shut, image) < 0.5 < 0.9 < another
    for layer in (0, 2, 3, 4):
        assert min(table[f"language_model.blocks.{layer}.attn"][:3]) > 0.9
    # And the question has come to that position one layer before.
    assert table["language_model.blocks.0.attn"][3] < 0.9 < table["language_model.blocks.2.attn"][3]

"""``hooked-vlm trace`` and ``hooked-vlm answer``, as a user runs them."""

import stat

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hooked_vlm import results, toys
from hooked_vlm.cli import app

FILES = ("trace.nc", "trace.pdf", "trace.png")
FAST = ["--site", "cross_attn", "--tower", "answer_decoder", "--draws", "2"]


def run(*arguments: str):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    toys.demo_sample().image.save(path)
    return path


def test_no_arguments_trace_the_embedded_model(tmp_path):
    result = run("trace", "--out", tmp_path / "out", "--draws", "1")
    assert result.exit_code == 0, result.output
    sample = toys.demo_sample()
    assert f"question   {sample.question}" in result.output
    assert f"answer     {sample.answer}" in result.output
    assert "p(answer)  clean" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(FILES)
    for name in FILES:
        assert str(tmp_path / "out" / name) in result.output
    trace = results.load(tmp_path / "out" / "trace.nc")
    assert set(trace.tower.values) == {"question_encoder", "answer_decoder"}
    assert set(trace.site.values) == {"resid", "attn", "cross_attn", "mlp"}
    # Five cells, the strongest first, none of them an identity.
    cells = [line for line in result.output.splitlines() if "_encoder" in line or "_decoder" in line]
    assert len(cells) == 5
    with Image.open(tmp_path / "out" / "trace.png") as figure:
        assert min(figure.size) > 600
    assert (tmp_path / "out" / "trace.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("corrupt", ["gaussian:2", "multiplicative", "scale:0.5", "pixels:0.5", "sip", "str"])
def test_corruptions(tmp_path, corrupt):
    result = run("trace", "--out", tmp_path / "out", "--corrupt", corrupt, *FAST)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "trace.png").exists()


def test_own_picture_question_and_counterfactuals(tmp_path, picture):
    sample = toys.demo_sample()
    sample.sip.image.save(tmp_path / "other.png")
    common = ["trace", "--image", picture, "--question", sample.question, "--window", "2", *FAST]
    own = run(*common, "--out", tmp_path / "a", "--corrupt", f"image:{tmp_path / 'other.png'}")
    embedded = run("trace", "--window", "2", *FAST, "--out", tmp_path / "b", "--corrupt", "sip")
    assert own.exit_code == embedded.exit_code == 0, own.output + embedded.output
    first, second = (results.load(tmp_path / name / "trace.nc") for name in "ab")
    assert np.array_equal(first.patched, second.patched, equal_nan=True)
    reworded = run(*common, "--out", tmp_path / "c", "--corrupt", f"question:{sample.str_.question}")
    assert reworded.exit_code == 0, reworded.output


def test_same_seed_same_result(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("trace", "--out", tmp_path / name, "--seed", seed, *FAST).exit_code == 0
    a, b, c = (results.load(tmp_path / name / "trace.nc").patched for name in "abc")
    assert a.identical(b)
    assert not a.identical(c)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "no embedded model"),
        (["--image", "missing.png", "--question", "what ?"], "missing.png does not exist"),
        (["--image", "missing.png"], "--image needs a --question"),
        (["--corrupt", "lightning"], "is none of"),
        (["--corrupt", "gaussian:much"], "'much' is not a number"),
        (["--corrupt", "image:"], "needs something after the colon"),
        (["--corrupt", "question:how many red objects are there in the picture ?"], "positions would not align"),
        (["--site", "banana"], "no site 'banana'; there are resid, attn, cross_attn, mlp"),
        (["--tower", "basement"], "no tower 'basement'; this model has vision_encoder"),
        (["--window", "0"], "at least one layer"),
        (["--question", " "], "is empty"),
        (["--question", "red " * 200], "has 202 tokens, more than the model's 32"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, arguments, message):
    result = run("trace", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_out_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    result = run("trace", "--out", blocked / "out", *FAST)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_out_without_permission(tmp_path, monkeypatch):
    # Root may write anywhere, so the refusal is played.
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr("hooked_vlm.files.tempfile.mkdtemp", refuse)
    result = run("trace", "--out", tmp_path / "out", *FAST)
    assert result.exit_code == 2
    assert "Permission denied" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    result = run("trace", "--out", tmp_path / "out", *FAST)
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_older_result_survives_a_failed_run(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run("trace", "--out", out, *FAST).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert run("trace", "--out", out, "--seed", "9", *FAST).exit_code == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_files_are_as_readable_as_others(tmp_path):
    assert run("trace", "--out", tmp_path / "out", *FAST).exit_code == 0
    plain = tmp_path / "plain"
    plain.touch()
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode), path.name


def test_answer(picture):
    sample = toys.demo_sample()
    for options in ([], ["--beams", "3"], ["--attention", "sdpa"]):
        result = run("answer", "toy-blip-vqa", picture, sample.question, *options)
        assert result.exit_code == 0, result.output
        assert result.output.strip() == sample.answer


def test_answer_needs_a_question(picture):
    result = run("answer", "toy-blip-vqa", picture)
    assert result.exit_code == 2
    assert "needs a question" in result.stderr

"""``hooked-vlm trace``, as a user runs it."""

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


# LLaVA, whose trace is drawn over the picture too ---------------------------------------------------------------------

LLAVA = ["trace", "--model", "toy-llava"]
WORDS = [*LLAVA, "--site", "attn", "--positions", "text", "--draws", "1"]
PATCHES = ("patches.pdf", "patches.png")


def is_picture(path) -> bool:
    if path.suffix == ".pdf":
        return path.read_bytes().startswith(b"%PDF")
    with Image.open(path) as figure:
        return min(figure.size) > 300 and len(figure.convert("RGB").getcolors(2**24)) > 50


@pytest.fixture
def quick(unchecked, monkeypatch):
    """Figures are drawn, and saved in a coarser way."""

    def save(figure, path):
        figure.savefig(path, dpi=20)

    monkeypatch.setattr("hooked_vlm.plots.save_figure", save)


def test_a_llava_is_traced_over_its_picture(tmp_path, unchecked):
    result = run(*LLAVA, "--site", "resid", "--corrupt", "sip", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    files = sorted((*PATCHES, *FILES))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert [line for line in result.output.splitlines() if line.startswith(str(tmp_path))] == [
        str(tmp_path / "out" / name) for name in ("trace.png", "trace.pdf", *PATCHES[::-1], "trace.nc")
    ]
    for name in files:
        assert name == "trace.nc" or is_picture(tmp_path / "out" / name), name
    assert f"answer     {toys.demo_sample().answer}" in result.output
    # The red circle is in the first row and the fifth column; it is what the question asks about.
    cells = [line.replace("│", " ").split() for line in result.output.splitlines() if "language_model" in line]
    assert len(cells) == 5
    assert any(cell[:4] == ["language_model", "resid", "0", "0,4"] for cell in cells)
    trace = results.load(tmp_path / "out" / "trace.nc")
    assert trace.tower.values.tolist() == ["language_model"]
    assert int((trace.picture == 0).sum()) == 36
    assert trace.token.values[0, 0, -2:].tolist() == ["(image)", "(all)"]


def test_figures_of_an_earlier_run_do_not_stay(tmp_path, quick):
    out = tmp_path / "out"
    other = [*LLAVA, "--site", "mlp", "--draws", "1", "--positions"]
    assert run(*other, "image", "--out", out).exit_code == 0
    assert (out / "patches.png").exists()
    (out / "notes.txt").write_text("mine")
    result = run(*other, "text", "--out", out)
    assert "patches" not in result.output
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "trace.nc", "trace.png"]


OPTIONS = [
    (["--corrupt", "gaussian:2", "--draws", "2", "--seed", "3"], {"std": 2.0, "draws": 2, "seed": 3}),
    (["--corrupt", "multiplicative:3"], {"corruption": "MultiplicativeGaussian", "std": 3.0, "draws": 1, "seed": 0}),
    (["--corrupt", "scale:0.5"], {"corruption": "Scaled", "factor": 0.5}),
    (["--corrupt", "pixels:0.5"], {"corruption": "PixelNoise", "std": 0.5}),
    (["--corrupt", "sip", "--metric", "logit_difference"], {"corruption": "CounterfactualImage"}),
    (["--corrupt", "str"], {"questions": toys.demo_sample().str_.question}),
    (["--corrupt", "question:what color is the star ?"], {"questions": "what color is the star ?"}),
    (["--window", "3", "--direction", "noising"], {"window": 3, "direction": "noising"}),
    (["--dtype", "bfloat16", "--attention", "eager"], {"dtype": "bfloat16", "attention": "eager"}),
    (["--tower", "language_model", "--device", "cpu"], {"device": "cpu", "model": "toy-llava"}),
]


@pytest.mark.parametrize(("options", "facts"), OPTIONS, ids=[" ".join(options) for options, _ in OPTIONS])
def test_every_option_reaches_the_trace(tmp_path, quick, options, facts):
    result = run(*WORDS, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    trace = results.load(tmp_path / "out" / "trace.nc")
    assert {name: trace.attrs[name] for name in facts} == facts
    assert trace.site.values.tolist() == ["attn"]
    assert "picture" not in trace.coords
    title = "logit difference" if "logit_difference" in options else "probability"
    assert any(title in line for line in result.output.splitlines())


def test_a_llavas_own_picture_question_and_counterfactual(tmp_path, quick, picture):
    sample = toys.demo_sample()
    sample.sip.image.save(tmp_path / "other.png")
    own = ["--image", picture, "--question", sample.question, "--corrupt", f"image:{tmp_path / 'other.png'}"]
    for name, options in (("a", own), ("b", ["--corrupt", "sip"]), ("c", [*own[:2], "--question", "is it red ?"])):
        result = run(*WORDS, *options, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    first, second, third = (results.load(tmp_path / name / "trace.nc") for name in "abc")
    assert first.drop_attrs().identical(second.drop_attrs())
    assert first.attrs["images"] == f'["{tmp_path / "other.png"}"]'
    assert third.token.values[0, 0].tolist()[3:-2] == ["is", "it", "red", "?", "ASSISTANT:"]


def test_words_in_square_brackets_are_no_markup(tmp_path, quick):
    question = "what [bold] color is the [/the] circle ?"
    result = run(*WORDS, "--question", question, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"question   {question}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tower", "projector"], "projector has no layers to trace"),
        (["--tower", "answer_decoder"], "no tower 'answer_decoder'; this model has vision_encoder, projector, languag"),
        (["--site", "cross_attn"], "language_model has no site 'cross_attn'"),
        (["--corrupt", "question:is it red ?"], "positions would not align"),
        (["--corrupt", "image:missing.png"], "missing.png does not exist"),
        (["--image", "missing.png", "--question", "is it ?"], "missing.png does not exist"),
        (["--question", " "], "text 0 is empty"),
        (["--question", "red " * 300], "more than the model's context of 256"),
        (["--question", "USER: <image> <image> is it red ?"], "1 images were given, and the texts have places for 2"),
        (["--question", "is it red ?", "--corrupt", "str"], "positions would not align"),
        (["--draws", "0"], "needs at least one draw, not 0"),
    ],
)
def test_bad_input_for_a_llava(tmp_path, unchecked, arguments, message):
    result = run(*WORDS, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_last_figure_leaves_nothing(tmp_path, unchecked, monkeypatch):
    from hooked_vlm import plots

    def save(figure, path):
        if path.name == "patches.png":
            raise OSError(28, "No space left on device")
        path.touch()

    monkeypatch.setattr(plots, "save_figure", save)
    settings = ["--site", "mlp", "--draws", "1", "--positions", "image"]
    result = run(*LLAVA, *settings, "--out", tmp_path / "out")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "No space left on device" in result.stderr

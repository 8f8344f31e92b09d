"""``hooked-vlm answer``: what ``generate`` finds, told as it is found."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hooked_vlm import HookedVLM, toys
from hooked_vlm.cli import app
from tests import llava_processors

SAMPLE = toys.demo_sample()


def run(*arguments):
    return CliRunner().invoke(app, ["answer", *map(str, arguments)])


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    SAMPLE.image.save(path)
    return path


@pytest.mark.parametrize("model", ["toy-blip-vqa", "toy-llava"])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--beams", "3"],
        ["--attention", "sdpa"],
        ["--attention", "eager"],
        ["--dtype", "bfloat16"],
        ["--device", "cpu"],
        ["--max-new-tokens", "1"],
    ],
    ids=" ".join,
)
def test_the_toys_answer(picture, unchecked, model, options):
    result = run(model, picture, SAMPLE.question, *options)
    assert result.exit_code == 0, result.output
    assert result.output == f"{SAMPLE.answer}\n"


def test_a_whole_prompt(picture, unchecked):
    result = run("toy-llava", picture, "USER: <image>\nis there a red circle ? ASSISTANT:")
    assert result.output == "yes\n"


@pytest.fixture
def told(monkeypatch):
    """What is printed, piece by piece, of a model whose answers are many tokens long."""
    model = llava_processors.model("words")
    pieces = []

    def echo(message="", nl=True, err=False):
        pieces.append(message + "\n" * nl)

    monkeypatch.setattr("hooked_vlm.commands.answer.load_model", lambda *_: model)
    monkeypatch.setattr("hooked_vlm.commands.answer.typer.echo", echo)
    return model, pieces


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beams", [1, 3])
def test_pieces_make_up_what_generate_finds(tmp_path, told, seed, beams):
    model, pieces = told
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(path)
    result = run("any", path, "what is it ?", "--max-new-tokens", "9", "--beams", beams)
    assert result.exit_code == 0, result.output
    (expected,) = model.generate(model.prepare(path, "what is it ?"), max_new_tokens=9, num_beams=beams)
    assert "".join(pieces) == f"{expected}\n"
    assert len(expected.split()) > 3
    # Greedy search tells each token at once; beams are told when they are found.
    assert len(pieces) > 4 if beams == 1 else len(pieces) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy-blip-vqa", "picture"], "needs a question"),
        (["toy-llava", "picture"], "LLaVA needs a text: a question, or a whole prompt"),
        (
            ["toy-llava", "picture", "USER: what is it ?<image><image>"],
            "1 images were given, and the texts have places",
        ),
        (["toy-llava", "picture", "red " * 300], "more than the model's context of 256"),
        (["toy-llava", "picture", SAMPLE.question, "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["toy-llava", "missing.png", "is it red ?"], "missing.png does not exist"),
        (["no-such-model", "picture", "is it red ?"], "no-such-model"),
    ],
)
def test_bad_input_is_one_line(picture, unchecked, arguments, message):
    result = run(*(picture if argument == "picture" else argument for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("model", [llava_processors.clip_model, llava_processors.vit_model])
def test_a_model_that_only_looks(picture, unchecked, monkeypatch, model):
    monkeypatch.setattr("hooked_vlm.commands.answer.load_model", lambda *_: model())
    result = run("some-model", picture, "a circle")
    assert result.exit_code == 2
    assert result.stderr == f"hooked-vlm: some-model is a {type(model()).__name__}, which answers nothing\n"


def test_an_answer_is_the_models(picture):
    """With the signatures checked."""
    model = HookedVLM.from_pretrained("toy-llava")
    (expected,) = model.generate(model.prepare(SAMPLE.sip.image, SAMPLE.question))
    SAMPLE.sip.image.save(picture)
    assert run("toy-llava", picture, SAMPLE.question).output == f"{expected}\n" == f"{SAMPLE.sip.answer}\n"

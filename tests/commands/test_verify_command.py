"""``hooked-vlm verify``: what it prints, what it writes, and its exit codes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from hooked_vlm import toys
from hooked_vlm.cli import app
from hooked_vlm.verify import compare
from tests.tiny_blip import hf_blip
from tests.tiny_llava import hf_clip, hf_llava, hf_vit
from tests.weights_conversion.layouts import RESEARCH_CONFIG


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    hf_blip("vqa").save_pretrained(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_all_pass(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    done = run(folder, "--dtype", "bfloat16", "--low-memory", "--json", path)
    assert done.exit_code == 0, done.output
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith("PASS: logits equal; ")
    assert "bfloat16 on cpu, attention eager" in last
    assert f"torch {torch.__version__}" in last
    assert "answer_decoder.blocks.1.hook_normalized_resid_mid_cross" in done.stdout
    assert "text_decoder.bert.encoder.layer.1.crossattention.output.LayerNorm: input" in done.stdout
    report = json.loads(path.read_text())
    assert report["passed"]
    assert report["dtype"] == "bfloat16"


def test_a_difference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = compare.load_hf

    def changed(*args: object, **options: object) -> torch.nn.Module:
        model = load(*args, **options)
        model.text_decoder.cls.predictions.bias.data += 1e-3
        return model

    monkeypatch.setattr(compare, "load_hf", changed)
    done = run(folder)
    assert done.exit_code == 1
    assert "first difference: answer_decoder.hook_logits" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("FAIL: logits differ by 0.001; ")
    assert run(folder, "--tolerance", 0.1).exit_code == 0


@pytest.mark.parametrize("family", ["llava", "llava-next", "clip", "vit"])
def test_other_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = {"llava": hf_llava, "llava-next": partial(hf_llava, tiles=True), "clip": hf_clip, "vit": hf_vit}[family]
    make().save_pretrained(tmp_path)
    for options in ([], ["--attention", "eager", "--dtype", "bfloat16"]):
        done = run(tmp_path, *options)
        assert done.exit_code == 0, done.output
        assert done.stdout.rstrip().splitlines()[-1].startswith("PASS: logits equal; ")
    load = compare.load_hf

    def changed(*args: object, **options: object) -> torch.nn.Module:
        model = load(*args, **options)
        next(parameter for name, parameter in model.named_parameters() if "q_proj.weight" in name).data *= 1.01
        return model

    monkeypatch.setattr(compare, "load_hf", changed)
    done = run(tmp_path)
    assert done.exit_code == 1
    assert "blocks.0.attn.hook_q (" in next(line for line in done.stdout.splitlines() if "first difference: " in line)


def test_a_picture_and_a_question_and_sdpa(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    toys.demo_sample().image.save(picture)
    done = run("toy-blip-vqa", "--image", picture, "--question", "what color is the circle ?", "--attention", "sdpa")
    assert done.exit_code == 0, done.output
    assert "the picture given, 'what color is the circle ?'" in done.stdout
    assert "attention: ours sdpa, HF's eager" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no-such-model is no embedded model"),
        (["toy-blip-vqa", "--image", "no-such-picture.png"], "no-such-picture.png does not exist"),
        (["toy-blip-vqa", "--question", ""], "empty"),
        (["toy-blip-vqa", "--device", "nowhere"], "no device nowhere here"),
        (["{tmp}"], "config.json"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.exit_code == 2
    assert message in done.stderr.replace("'", "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.output


def test_a_report_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(folder, "--json", tmp_path / "file" / "report.json")
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("option", [("--dtype", "int8"), ("--attention", "flash"), ("--tolerance", "-1")])
def test_wrong_options(folder: Path, option: tuple[str, str]) -> None:
    assert run(folder, *option).exit_code == 2


def test_a_research_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RESEARCH_CONFIG))
    save_file({"model.embed_tokens.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    done = run(tmp_path)
    assert done.exit_code == 2
    assert "save_hf it, and verify that folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

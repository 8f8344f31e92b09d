"""From an HF model in memory and back to folders that HF loads: the same tensors, the same answers."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BlipConfig, BlipModel, BlipProcessor

from hooked_vlm import HookedVLM, files, toys
from tests.checkpoints import BIAS, HEAD_BIAS, TASKS, assert_same_answer, hf_answer, state_of, write_folder
from tests.tiny_blip import CLASSES, SHAPES, hf_blip, inputs
from weights_conversion import CheckpointError, family_of_config

load = HookedVLM.from_pretrained


def hf_loads(folder: Path, task: str) -> nn.Module:
    """HF's model of a folder; it misses nothing and finds nothing that it does not know."""
    hf, info = CLASSES[task].from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return hf.eval()


# From a model in memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_from_hf_shares_every_tensor(task: str) -> None:
    hf = hf_blip(task)
    model = HookedVLM.from_hf(hf)
    theirs = dict(hf.named_parameters(remove_duplicate=False))
    rules = family_of_config(model.config.hf_config).rules(model.config)
    shared = {rules.key(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert set(theirs) - set(shared) <= {BIAS}  # the same parameter as the head's bias, in HF too
    for key, parameter in shared.items():
        assert parameter.data_ptr() == theirs[key].data_ptr()
        assert parameter is theirs[key]
    assert_same_answer(model, hf, task)


def test_an_edit_in_place_is_seen_on_both_sides() -> None:
    hf = hf_blip("vqa")
    model = HookedVLM.from_hf(hf)
    batch = inputs("vqa")
    before = hf_answer(hf, "vqa", batch)
    with torch.no_grad():
        model.answer_decoder.embed.token.weight.mul_(1.5)
    assert_same_answer(model, hf, "vqa")
    with torch.no_grad():
        hf.vision_model.post_layernorm.bias.add_(1)
    assert_same_answer(model, hf, "vqa")
    assert not torch.equal(hf_answer(hf, "vqa", batch), before)


def test_equal_tensors_that_hf_holds_apart_stay_apart() -> None:
    hf = hf_blip("caption")
    hf.text_decoder.cls.predictions.decoder.weight = nn.Parameter(
        hf.text_decoder.bert.embeddings.word_embeddings.weight.clone()
    )
    model = HookedVLM.from_hf(hf)
    assert model.text_decoder.unembed.decoder.weight is hf.text_decoder.cls.predictions.decoder.weight
    with torch.no_grad():
        hf.text_decoder.cls.predictions.decoder.weight.mul_(2)
    assert_same_answer(model, hf, "caption")


def test_from_hf_leaves_the_hf_model_as_it_was() -> None:
    hf = hf_blip("vqa").train().requires_grad_(False)
    config = hf.config.to_dict()
    model = HookedVLM.from_hf(hf)
    assert hf.training
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert hf.config.to_dict() == config


def test_from_hf_knows_where_the_model_came_from(tmp_path: Path) -> None:
    hf_blip("vqa").save_pretrained(tmp_path)
    hf = hf_loads(tmp_path, "vqa")
    hf.config._commit_hash = "c" * 40
    config = HookedVLM.from_hf(hf).config
    assert (config.name_or_path, config.revision) == (str(tmp_path), "c" * 40)
    assert HookedVLM.from_hf(hf_blip("vqa")).config.revision == ""


def test_from_hf_refuses_other_models_with_those_it_takes() -> None:
    with pytest.raises(CheckpointError, match="unsupported BLIP architecture BlipModel; supported: BlipFor"):
        HookedVLM.from_hf(BlipModel(BlipConfig(vision_config=dict(SMALL), text_config=dict(SMALL))))
    with pytest.raises(CheckpointError, match="unsupported model_type 'bert'; supported: blip"):
        HookedVLM.from_hf(BertModel(BertConfig(**SMALL)))
    with pytest.raises(TypeError, match="Linear is no HF model"):
        HookedVLM.from_hf(nn.Linear(2, 2))


SMALL = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}


# To a folder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "shape"), [(task, "heads of 12") for task in TASKS] + [("caption", "narrow on wide")])
def test_what_is_saved_answers_the_same_in_hf_and_here(task: str, shape: str, tmp_path: Path) -> None:
    assert shape in SHAPES
    hf = hf_blip(task, shape)
    HookedVLM.from_hf(hf).save_hf(tmp_path / "saved")
    assert_same_answer(load(tmp_path / "saved"), hf, task)
    assert_same_answer(HookedVLM.from_hf(hf), hf_loads(tmp_path / "saved", task), task)


def test_what_was_read_is_written_back(tmp_path: Path) -> None:
    model = load("toy-blip-vqa")
    model.save_hf(tmp_path)
    again = load(tmp_path)
    assert dict(again.state_dict()).keys() == dict(model.state_dict()).keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    read, written = (
        json.loads((folder / "config.json").read_text()) for folder in (toys.folder("toy-blip-vqa"), tmp_path)
    )
    assert written == read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    HookedVLM.from_hf(hf_blip("vqa").to(dtype)).save_hf(tmp_path)
    hf = hf_loads(tmp_path, "vqa")
    assert hf.dtype == dtype
    assert load(tmp_path).dtype == dtype
    assert_same_answer(load(tmp_path), hf, "vqa")


def test_edited_weights_are_saved(tmp_path: Path) -> None:
    hf = hf_blip("vqa")
    model = load(write_folder(tmp_path / "read", state_of(hf), hf))
    with torch.no_grad():
        model.question_encoder.blocks[0].attn.W_Q.mul_(0.5)
    model.answer_decoder.blocks[1].mlp.down.weight = nn.Parameter(torch.randn(36, 50))
    model.save_hf(tmp_path / "saved")
    assert_same_answer(model, hf_loads(tmp_path / "saved", "vqa"), "vqa")
    assert not torch.equal(model(inputs("vqa")), hf_answer(hf, "vqa", inputs("vqa")))


def test_a_head_of_its_own_is_saved(tmp_path: Path) -> None:
    hf = hf_blip("vqa")
    hf.text_decoder.cls.predictions.decoder.weight = nn.Parameter(torch.randn(99, 36))
    model = HookedVLM.from_hf(hf)
    model.save_hf(tmp_path)
    assert_same_answer(model, hf_loads(tmp_path, "vqa"), "vqa")
    with pytest.warns(UserWarning, match="the two are not tied"):
        assert_same_answer(load(tmp_path), hf, "vqa")


def test_the_bias_has_both_its_names_in_hf(tmp_path: Path) -> None:
    hf = hf_blip("caption")
    HookedVLM.from_hf(hf).save_hf(tmp_path)
    again = state_of(hf_loads(tmp_path, "caption"))
    assert torch.equal(again[BIAS], again[HEAD_BIAS])
    assert again.keys() == state_of(hf).keys()


def test_the_processor_is_saved_with_it(tmp_path: Path) -> None:
    model = load("toy-blip-vqa")
    model.save_hf(tmp_path)
    sample = toys.demo_sample()
    for processor in (load(tmp_path).processor, BlipProcessor.from_pretrained(tmp_path)):
        expected = model.processor(sample.image, sample.question, return_tensors="pt")
        batch = processor(sample.image, sample.question, return_tensors="pt")
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_a_folder_without_a_processor_is_saved_without_one(tmp_path: Path) -> None:
    hf = hf_blip("vqa")
    load(write_folder(tmp_path / "read", state_of(hf), hf)).save_hf(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors"}


def test_a_folder_may_be_saved_over_the_one_that_is_mapped(tmp_path: Path) -> None:
    hf = hf_blip("vqa")
    folder = write_folder(tmp_path, state_of(hf), hf)
    (folder / "notes.txt").write_text("mine")
    for _ in range(2):
        load(folder).save_hf(folder)
        assert_same_answer(load(folder), hf, "vqa")
    assert (folder / "notes.txt").read_text() == "mine"


def test_shards_of_an_older_save_do_not_linger(tmp_path: Path) -> None:
    hf_blip("vqa", seed=1).save_pretrained(tmp_path, max_shard_size="30KB")
    hf = hf_blip("vqa")
    HookedVLM.from_hf(hf).save_hf(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same_answer(load(tmp_path), hf, "vqa")


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_others_may_read_what_is_saved_as_the_umask_says(tmp_path: Path) -> None:
    model = HookedVLM.from_hf(hf_blip("vqa"))
    before = os.umask(0o027)
    try:
        model.save_hf(tmp_path / "saved")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "saved").iterdir()} == {0o640}


# Nothing half-written -------------------------------------------------------------------------------------------------


class FullDiskError(OSError):
    """No space left on device."""


@pytest.mark.parametrize("target", ["new", "deep/er/new", "old"])
def test_a_save_that_fails_in_the_middle_leaves_nothing(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("before")
    model = load("toy-blip-vqa")

    def full(folder: Path) -> None:
        assert (Path(folder) / "model.safetensors").exists()
        raise FullDiskError

    monkeypatch.setattr(model.processor, "save_pretrained", full)
    with pytest.raises(FullDiskError):
        model.save_hf(tmp_path / target)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.name != "old"] == [
        Path("old/config.json")
    ]
    assert (tmp_path / "old" / "config.json").read_text() == "before"


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_state: object, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise FullDiskError

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full)
    with pytest.raises(FullDiskError):
        HookedVLM.from_hf(hf_blip("vqa")).save_hf(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_may_not_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(dir: Path, prefix: str) -> str:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(files.tempfile, "mkdtemp", denied)
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path))):
        HookedVLM.from_hf(hf_blip("vqa")).save_hf(tmp_path / "deep" / "new")
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder_to_save_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = HookedVLM.from_hf(hf_blip("vqa"))
    with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
        model.save_hf(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        model.save_hf(tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"

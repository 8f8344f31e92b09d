"""The research code's files: its names, its choices, and HF's numbers where the choices are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM
from tests.checkpoints import TASKS, assert_same_answer, hf_answer, research_state
from tests.tiny_blip import CLASSES, ENC, PATCH, VOCAB, Shape, hf_blip, inputs, pixels
from weights_conversion import CheckpointError

load = HookedVLM.from_pretrained

HEADS_OF_64 = Shape(text=128, text_heads=2, vision=128, vision_heads=2)
"""The research code has heads of 64 and no others; nothing in its files says so."""
GRID = 5


def hf_model(task: str, eps: float) -> PreTrainedModel:
    """HF's model over an image of another size than usual, its vision tower's LayerNorms with this eps."""
    hf = hf_blip(task, HEADS_OF_64)
    hf.vision_model.embeddings.position_embedding = nn.Parameter(torch.randn(1, GRID**2 + 1, 128))
    for module in hf.vision_model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return hf


def write(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(
        {"model": state, "optimizer": {"state": {}, "lr": 1e-5}, "epoch": 3, "config": {"image_size": 480}}, path
    )
    return path


def batch_of(task: str) -> dict[str, Tensor]:
    return inputs(task, batch=2) | {"pixel_values": pixels(2, GRID * PATCH, GRID * PATCH)}


def assert_equal(ours: HookedVLM, hf: PreTrainedModel, task: str, first: int | None) -> None:
    """The same answers, with HF's texts starting with ``first``."""
    batch = batch_of(task)
    theirs = dict(batch)
    if first is not None:
        theirs["input_ids"] = torch.cat([torch.full((2, 1), first), batch["input_ids"][:, 1:]], dim=1)
    with torch.no_grad():
        assert torch.equal(ours(batch), hf_answer(hf, task, theirs))


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
@pytest.mark.parametrize("task", TASKS)
def test_a_research_file_is_read_with_the_research_codes_choices(task: str, suffix: str, tmp_path: Path) -> None:
    hf = hf_model(task, eps=1e-6)
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file(research_state(hf), path)
    else:
        write(path, research_state(hf))
    model = load(path)
    assert_equal(model, hf, task, first=None if task == "caption" else ENC)
    config = model.config
    assert (config.task, config.variant, config.label_smoothing, config.vision.eps) == (task, "original", 0.1, 1e-6)
    assert config.vision.image_size == GRID * PATCH
    assert (config.bos_token_id, config.enc_token_id) == (VOCAB - 2, VOCAB - 1)
    assert config.name_or_path == str(path)


@pytest.mark.parametrize("task", TASKS)
def test_hf_choices_may_be_asked_for(task: str, tmp_path: Path) -> None:
    hf = hf_model(task, eps=1e-5)
    model = load(write(tmp_path / "model.pth", research_state(hf)), variant="hf")
    assert (model.config.variant, model.config.label_smoothing) == ("hf", 0.0)
    assert_equal(model, hf, task, first=None)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_saved_of_it_loads_in_hf_and_here(task: str, tmp_path: Path) -> None:
    model = load(write(tmp_path / "model.pth", research_state(hf_model(task, eps=1e-6))))
    model.save_hf(tmp_path / "saved")
    hf, info = CLASSES[task].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert hf.config.vision_config.layer_norm_eps == 1e-6
    assert hf.config.vision_config.image_size == GRID * PATCH
    assert_equal(model, hf.eval(), task, first=None if task == "caption" else ENC)
    again = load(tmp_path / "saved")
    assert again.config.variant == "original"
    with torch.no_grad():
        batch = batch_of(task)
        assert torch.equal(again(batch), model(batch))


def test_a_choice_made_when_loading_an_hf_folder_is_saved_too(tmp_path: Path) -> None:
    hf = hf_blip("vqa")
    model = HookedVLM.from_hf(hf, variant="original")
    model.save_hf(tmp_path / "original")
    assert load(tmp_path / "original").config.variant == "original"
    plain = load(tmp_path / "original", variant="hf")
    plain.save_hf(tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not [name for name in written if "variant" in name]
    HookedVLM.from_hf(hf).save_hf(tmp_path / "untouched")
    assert_same_answer(load(tmp_path / "untouched"), hf, "vqa")


def test_keys_that_do_not_fit_are_said_by_the_research_codes_names(tmp_path: Path) -> None:
    state = research_state(hf_model("vqa", eps=1e-6))
    state["visual_encoder.norm.extra"] = state.pop("visual_encoder.norm.weight")
    with pytest.raises(
        CheckpointError, match=r"1 missing: visual_encoder\.norm\.weight\. 1 unexpected: visual_encoder\.norm\.extra"
    ):
        load(write(tmp_path / "model.pth", state))


def test_a_file_too_poor_to_tell_its_sizes_is_refused(tmp_path: Path) -> None:
    state = {"visual_encoder.cls_token": torch.zeros(1, 1, 64), "visual_encoder.pos_embed": torch.zeros(1, 5, 64)}
    with pytest.raises(
        CheckpointError, match=r"research layout needs visual_encoder.patch_embed.proj.weight, .*text_decoder"
    ):
        load(write(tmp_path / "model.pth", state))


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"without config\.json must be in BLIP's research layout"):
        load(write(tmp_path / "model.pth", hf_blip("vqa").state_dict()))


def test_a_research_file_has_no_processor_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "model.pth", research_state(hf_model("vqa", eps=1e-6)))
    with pytest.raises(ValueError, match=r"no processor at .*model.pth .*pass processor="):
        _ = load(path).processor
    model = load(path, processor="toy-blip-vqa")
    prepared = model.prepare(torch.rand(3, 50, 60), "what color is the circle ?")
    assert prepared.pixel_values.shape == (1, 3, GRID * PATCH, GRID * PATCH)
    assert model(prepared).shape == (1, 1, VOCAB)

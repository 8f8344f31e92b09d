"""A CLIP or a ViT in any layout answers what HF answers over the same weights, and is saved for HF and for us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

from hooked_vlm import HookedVLM
from tests.checkpoints import state_of, write_folder
from tests.weights_conversion.layouts import (
    HF_CLASSES,
    VIT_HUB,
    clip_batch,
    hf_clip,
    hf_vit,
    renamed,
    vit_batch,
)
from weights_conversion import CheckpointError, family_of_config
from weights_conversion.clip import CLIP

load = HookedVLM.from_pretrained

MODELS: dict[str, Any] = {
    "CLIP": hf_clip,
    "ViT with a classifier": hf_vit,
    "ViT with a pooler": lambda: hf_vit(ViTModel),
    "ViT with neither": lambda: hf_vit(ViTModel, False),
}


def batch_of(hf: nn.Module) -> dict[str, Tensor]:
    return clip_batch() if type(hf).__name__ == "CLIPModel" else vit_batch()


def answer(hf: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = hf(**batch)
    for name in ("logits_per_image", "logits", "pooler_output"):
        if output.get(name) is not None:
            return output[name]
    return output.last_hidden_state


def assert_same_answer(ours: HookedVLM, hf: PreTrainedModel) -> None:
    hf.set_attn_implementation(ours.attention)
    batch = batch_of(hf)
    with torch.no_grad():
        assert torch.equal(ours(batch), answer(hf, batch))


def hf_loads(folder: Path, hf: PreTrainedModel) -> PreTrainedModel:
    """HF's model of a folder; it misses nothing but the pooler that a ViT may do without."""
    again, info = type(hf).from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith("pooler") for key in info["missing_keys"])
    if info["missing_keys"]:
        again.pooler = None
    return again.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_hf_saves_and_what_it_has_in_memory(kind: str, attention: Any, tmp_path: Path) -> None:
    hf = MODELS[kind]()
    hf.save_pretrained(tmp_path / "saved")
    assert_same_answer(load(tmp_path / "saved", attention=attention), hf)
    assert_same_answer(load(write_folder(tmp_path / "memory", state_of(hf), hf), attention=attention), hf)
    assert_same_answer(HookedVLM.from_hf(hf, attention=attention), hf)


@pytest.mark.parametrize("kind", MODELS)
def test_from_hf_shares_every_tensor(kind: str) -> None:
    hf = MODELS[kind]()
    model = HookedVLM.from_hf(hf)
    theirs = {parameter.data_ptr() for parameter in hf.parameters()}
    assert {parameter.data_ptr() for parameter in model.parameters()} == theirs


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_answers_the_same_in_hf_and_here(kind: str, tmp_path: Path) -> None:
    hf = MODELS[kind]()
    model = load(write_folder(tmp_path / "read", state_of(hf), hf))
    with torch.no_grad():
        model.vision_encoder.embed.cls.mul_(2)
        model.vision_encoder.blocks[1].attn.W_V.mul_(0.5)
    model.save_hf(tmp_path / "saved")
    again = hf_loads(tmp_path / "saved", hf)
    batch = batch_of(hf)
    assert not torch.equal(answer(again, batch), answer(hf, batch))
    assert_same_answer(model, again)
    assert_same_answer(load(tmp_path / "saved"), again)


@pytest.mark.parametrize("eos", [97, 2])
def test_where_clip_reads_a_text(eos: int, tmp_path: Path) -> None:
    hf = hf_clip(eos_token_id=eos)
    model = load(write_folder(tmp_path, state_of(hf), hf))
    assert model.config.text.eos_token_id == eos
    assert_same_answer(model, hf)


def test_the_hub_s_clip_has_positions_that_are_no_parameters(tmp_path: Path) -> None:
    hf = hf_clip()
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None] for tower in ("text", "vision")}
    assert_same_answer(load(write_folder(tmp_path, state_of(hf) | positions, hf)), hf)


@pytest.mark.parametrize("entries", [{"qkv_bias": False}, {"hidden_act": "gelu_pytorch_tanh"}])
def test_what_sets_vision_transformers_apart(entries: dict[str, Any], tmp_path: Path) -> None:
    hf = hf_vit(**entries)
    assert_same_answer(load(write_folder(tmp_path, renamed(state_of(hf), VIT_HUB), hf)), hf)


def test_either_class_of_vit_reads_the_others_files_and_leaves_its_head(tmp_path: Path) -> None:
    classifier, bare = hf_vit(), hf_vit(ViTModel)
    with_pooler = {f"vit.{key}": tensor for key, tensor in state_of(bare).items()}
    head = {"classifier.weight": torch.ones(3, 60), "classifier.bias": torch.ones(3)}
    folder = write_folder(tmp_path / "bare", renamed({**with_pooler, **head}, VIT_HUB), bare)
    assert_same_answer(load(folder), bare)
    assert_same_answer(load(folder), hf_loads_any(folder, ViTModel))
    folder = write_folder(tmp_path / "classifier", renamed({**with_pooler, **head}, VIT_HUB), classifier)
    assert_same_answer(load(folder), hf_loads_any(folder, ViTForImageClassification))


def hf_loads_any(folder: Path, cls: type[PreTrainedModel]) -> PreTrainedModel:
    return cls.from_pretrained(folder).eval()


def test_labels(tmp_path: Path) -> None:
    hf = hf_vit(id2label={0: "cat", 1: "dog", 2: "bird"}, label2id={"cat": 0, "dog": 1, "bird": 2})
    config = load(write_folder(tmp_path, state_of(hf), hf)).config
    assert (config.labels, config.n_classes, config.d_pooled) == (("cat", "dog", "bird"), 3, 0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": ["CLIPVisionModel"]}, "CLIP architecture CLIPVisionModel; supported: CLIPModel"),
        ({"text_config": {"eos_token_id": [1, 2]}}, r"eos_token_id is \[1, 2\]; CLIP reads a text at one token"),
        ({"text_config": {"hidden_act": "mish"}}, "text_config.hidden_act is 'mish'"),
        ({"vision_config": {"num_attention_heads": 7}}, "config.json is not one of a CLIP model: .*not a multiple"),
        ({"vision_config": {"image_size": [3, 4]}}, "only square images"),
    ],
)
def test_a_clip_that_cannot_be(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CLIP.config({"model_type": "clip", **entries}, {})


def test_a_vit_that_cannot_be(tmp_path: Path) -> None:
    masked = hf_vit(ViTForMaskedImageModeling)
    with pytest.raises(CheckpointError, match="ViT architecture ViTForMaskedImageModeling; supported: ViT"):
        load(write_folder(tmp_path, state_of(masked), masked))
    with pytest.raises(CheckpointError, match="unsupported model_type 'clip_vision_model'; supported: .*clip, vit"):
        family_of_config({"model_type": "clip_vision_model"})
    hf = hf_vit()
    state = renamed(state_of(hf), VIT_HUB)
    del state["vit.encoder.layer.1.output.dense.bias"]
    with pytest.raises(CheckpointError, match="1 missing: vit.encoder.layer.1.output.dense.bias"):
        load(write_folder(tmp_path / "less", state, hf))


def test_every_class_is_one_that_some_family_reads() -> None:
    for name, cls in HF_CLASSES.items():
        family_of_config({"model_type": cls.config_class.model_type, "architectures": [name]})

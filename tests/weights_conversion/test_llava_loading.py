"""A LLaVA in any layout answers what HF answers over the same weights, and is saved for HF and for us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM
from tests.checkpoints import state_of, write_folder
from tests.weights_conversion.layouts import (
    HF_CLASSES,
    KINDS,
    LLAVA_LAYOUTS,
    hf_llava,
    llava_batch,
    renamed,
)
from weights_conversion import CheckpointError

load = HookedVLM.from_pretrained

CASES = [*((kind, False) for kind in KINDS), ("llama", True), ("mistral", True)]


LLAMA_3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5},
    "original_max_position_embeddings": 24,
}


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(batch) if isinstance(model, HookedVLM) else model(**batch).logits


def assert_same_answer(ours: HookedVLM, hf: PreTrainedModel) -> None:
    hf.set_attn_implementation(ours.attention)
    batch = llava_batch(hf)
    assert torch.equal(answer(ours, batch), answer(hf, batch))


def hf_loads(folder: Path) -> PreTrainedModel:
    """HF's model of a folder; it misses nothing and finds nothing that it does not know."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    hf, info = HF_CLASSES[architecture].from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return hf.eval()


def write(folder: Path, hf: PreTrainedModel, layout: str = "hub", **changes: Any) -> Path:
    return write_folder(folder, renamed(state_of(hf), LLAVA_LAYOUTS[layout]), hf, **changes)


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "tiles"), CASES)
@pytest.mark.parametrize("layout", LLAVA_LAYOUTS)
def test_every_layout_answers_as_hf_does(layout: str, kind: str, tiles: bool, attention: Any, tmp_path: Path) -> None:
    hf = hf_llava(kind, tiles=tiles)
    assert_same_answer(load(write(tmp_path, hf, layout), attention=attention), hf)


def test_what_hf_itself_saves_and_saves_again(tmp_path: Path) -> None:
    hf = hf_llava(tiles=True)
    hf.save_pretrained(tmp_path / "new")
    assert_same_answer(load(tmp_path / "new"), hf)
    write(tmp_path / "hub", hf)
    hf_loads(tmp_path / "hub").save_pretrained(tmp_path / "again")
    assert_same_answer(load(tmp_path / "again"), hf)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards(safe: bool, tmp_path: Path) -> None:
    hf = hf_llava()
    state = renamed(state_of(hf), LLAVA_LAYOUTS["hub"])
    write(tmp_path, hf)
    (tmp_path / "model.safetensors").unlink()
    form = "model-{}.safetensors" if safe else "pytorch_model-{}.bin"
    weight_map = {key: form.format(place % 3) for place, key in enumerate(state)}
    for name in set(weight_map.values()):
        shard = {key: state[key] for key in state if weight_map[key] == name}
        save_file(shard, tmp_path / name) if safe else torch.save(shard, tmp_path / name)
    index = "model.safetensors.index.json" if safe else "pytorch_model.bin.index.json"
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_answer(load(tmp_path), hf)


@pytest.mark.parametrize("layers", [-1, 1, [0], [-2, 1], [0, 1, 2], [2, 0]])
def test_feature_layers(layers: Any, tmp_path: Path) -> None:
    hf = hf_llava(vision_feature_layer=layers)
    model = load(write(tmp_path, hf))
    assert_same_answer(model, hf)
    listed = [layers] if isinstance(layers, int) else layers
    assert model.config.vision.feature_layers == tuple(layer % 3 for layer in listed)


def test_the_class_token_among_the_features(tmp_path: Path) -> None:
    hf = hf_llava(vision_feature_select_strategy="full")
    model = load(write(tmp_path, hf))
    batch = llava_batch(hf)
    batch["input_ids"][:, 7] = hf.config.image_token_index
    assert torch.equal(answer(model, batch), answer(hf, batch))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"head_dim": 16, "sliding_window": None}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}),
        ("mistral", {"rope_parameters": LLAMA_3}),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}}),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("phi3", {"sliding_window": 6}),
    ],
)
def test_what_sets_language_models_apart(kind: str, text: dict[str, Any], tmp_path: Path) -> None:
    hf = hf_llava(kind, text_config=text)
    assert_same_answer(load(write(tmp_path, hf)), hf)


def test_an_older_config_says_theta_and_scaling(tmp_path: Path) -> None:
    hf = hf_llava(text_config={"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}})
    config = hf.config.to_dict()
    del config["text_config"]["rope_parameters"]
    older = config["text_config"] | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert_same_answer(load(write(tmp_path, hf, text_config=older)), hf)


# In memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tiles"), CASES)
def test_from_hf_shares_every_tensor(kind: str, tiles: bool) -> None:
    hf = hf_llava(kind, tiles=tiles)
    model = HookedVLM.from_hf(hf)
    theirs = {parameter.data_ptr() for parameter in hf.parameters()}
    assert {parameter.data_ptr() for parameter in model.parameters()} == theirs
    assert_same_answer(model, hf)
    with torch.no_grad():
        model.vision_encoder.embed.cls.add_(1)
        hf.model.vision_tower.embeddings.position_embedding.weight.mul_(2)
    assert_same_answer(model, hf)


# Tied embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config", "text_config"])
def test_tied_embeddings(where: str, tmp_path: Path) -> None:
    ties = {"tie_word_embeddings": True}
    hf = hf_llava("qwen2", **(ties if where == "config" else {"text_config": ties}))
    model = load(write(tmp_path, hf))
    assert model.language_model.unembed.weight is model.language_model.embed.token.weight
    assert_same_answer(model, hf)
    hf.save_pretrained(tmp_path / "without the head")
    assert_same_answer(load(tmp_path / "without the head"), hf)
    model.save_hf(tmp_path / "saved")
    assert_same_answer(model, hf_loads(tmp_path / "saved"))
    shared = HookedVLM.from_hf(hf)
    assert shared.language_model.unembed.weight is hf.lm_head.weight is shared.language_model.embed.token.weight


def test_a_head_that_differs_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    hf = hf_llava()
    folder = write(tmp_path, hf, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head.weight differs from .*embed_tokens.weight, so the two are not tied"):
        model = load(folder)
    assert_same_answer(model, hf)
    assert_same_answer(model, hf_loads(folder))


# Writing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tiles"), CASES)
@pytest.mark.parametrize("layout", ["hub", "memory"])
def test_what_is_saved_answers_the_same_in_hf_and_here(layout: str, kind: str, tiles: bool, tmp_path: Path) -> None:
    hf = hf_llava(kind, tiles=tiles)
    model = load(write(tmp_path / "read", hf, layout))
    model.save_hf(tmp_path / "saved")
    again = hf_loads(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in hf.state_dict().items())
    assert_same_answer(load(tmp_path / "saved"), again)


def test_edited_weights_are_saved(tmp_path: Path) -> None:
    hf = hf_llava("phi3", tiles=True)
    model = load(write(tmp_path / "read", hf))
    with torch.no_grad():
        model.language_model.blocks[1].attn.W_Q.mul_(0.5)
        model.vision_encoder.embed.cls.mul_(2)
        model.image_newline.add_(1)
    model.projector.up.weight = nn.Parameter(torch.randn_like(model.projector.up.weight))
    model.save_hf(tmp_path / "saved")
    batch = llava_batch(hf)
    hf.set_attn_implementation(model.attention)
    assert not torch.equal(answer(model, batch), answer(hf, batch))
    assert_same_answer(model, hf_loads(tmp_path / "saved"))
    assert_same_answer(load(tmp_path / "saved"), hf_loads(tmp_path / "saved"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    load(write(tmp_path / "read", hf_llava()), dtype=dtype).save_hf(tmp_path / "saved")
    hf = hf_loads(tmp_path / "saved")
    assert hf.dtype == dtype
    model = load(tmp_path / "saved")
    assert model.dtype == dtype
    assert_same_answer(model, hf)


# What does not fit ----------------------------------------------------------------------------------------------------


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    hf = hf_llava()
    state = renamed(state_of(hf), LLAVA_LAYOUTS["hub"])
    del state["language_model.model.layers.1.mlp.up_proj.weight"]
    state["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
    state["vision_tower.vision_model.embeddings.class_embedding"] = torch.zeros(61)
    with pytest.raises(CheckpointError) as caught:
        load(write_folder(tmp_path, state, hf))
    for told in (
        "does not fit HookedLlava",
        "1 missing: language_model.model.layers.1.mlp.up_proj.weight",
        "1 unexpected: language_model.model.layers.2.mlp.up_proj.weight",
        "1 misshapen: vision_tower.vision_model.embeddings.class_embedding: (61,), should be (60,)",
    ):
        assert told in str(caught.value)


def test_shards_of_several_dtypes_need_one_to_be_chosen(tmp_path: Path) -> None:
    hf = hf_llava()
    state = renamed(state_of(hf), LLAVA_LAYOUTS["hub"])
    write(tmp_path, hf)
    (tmp_path / "model.safetensors").unlink()
    head = {"language_model.lm_head.weight": state.pop("language_model.lm_head.weight").bfloat16()}
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(state, tmp_path / "one.safetensors")
    save_file(head, tmp_path / "two.safetensors")
    weight_map = {**dict.fromkeys(state, "one.safetensors"), **dict.fromkeys(head, "two.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    told = (
        r"several dtypes: \d+ of torch.float32 \(.* in one.*, 1 of torch.bfloat16 \(language_model.lm_head.weight in t"
    )
    with pytest.raises(CheckpointError, match=told):
        load(tmp_path)
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_frequencies_in_another_dtype_do_not_count(tmp_path: Path) -> None:
    hf = hf_llava().bfloat16()
    state = renamed(state_of(hf), LLAVA_LAYOUTS["hub"])
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    assert load(write_folder(tmp_path, state, hf)).dtype == torch.bfloat16

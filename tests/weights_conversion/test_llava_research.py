"""LLaVA's research files: their names and config, their vision tower inside or apart, and no row for ``<image>``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModel, PreTrainedModel

from hooked_vlm import HookedVLM
from tests.checkpoints import state_of, write_folder
from tests.weights_conversion.layouts import (
    HEADS_OF_64,
    HF_CLASSES,
    IMAGE_ID,
    PINPOINTS,
    RESEARCH_CONFIG,
    TILED,
    TO_RESEARCH,
    hf_clip,
    hf_llava,
    llava_batch,
    renamed,
)
from weights_conversion import CheckpointError, family_of_config
from weights_conversion.llava_research import LLAVA_RESEARCH

load = HookedVLM.from_pretrained

VOCAB = IMAGE_ID
"""HF's token for an image is the row after the research code's last."""

CONFIG = {**RESEARCH_CONFIG, "vocab_size": VOCAB}
TOWER = "model.vision_tower.vision_tower."


def hf_model(kind: str = "llama", **entries: Any) -> PreTrainedModel:
    text = {"rms_norm_eps": 1e-5, **entries.pop("text_config", {})}
    return hf_llava(kind, vision_config=HEADS_OF_64, text_config=text, **entries)


def research_state(hf: PreTrainedModel) -> dict[str, Tensor]:
    state = renamed(state_of(hf), TO_RESEARCH)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        state[key] = state[key][:VOCAB].clone()
    return state


def write(folder: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(state, folder / "model.safetensors")
    return folder


def assert_same_answer(ours: HookedVLM, hf: PreTrainedModel) -> None:
    """To the rounding of a head with another row."""
    hf.set_attn_implementation(ours.attention)
    batch = llava_batch(hf)
    with torch.no_grad():
        logits, (expected, cache) = hf(**batch).logits[..., :VOCAB], ours.run_with_cache(batch)
        states = hf.model(**batch).last_hidden_state
    assert torch.equal(cache["language_model.hook_out"], states)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("tiles", [False, True], ids=["1.5", "1.6"])
def test_a_file_with_its_vision_tower_inside(tiles: bool, kind: str, tmp_path: Path) -> None:
    hf = hf_model(kind, tiles=tiles, text_config={"sliding_window": None} if kind == "mistral" else {})
    changes = {
        **(TILED if tiles else {}),
        **({"model_type": "llava_mistral", "sliding_window": None} if kind == "mistral" else {}),
    }
    model = load(write(tmp_path, research_state(hf), **changes))
    assert_same_answer(model, hf)
    config = model.config
    assert (config.image_token_id, config.text.d_vocab, config.d_vocab) == (VOCAB, VOCAB, VOCAB)
    assert (config.eos_token_ids, config.pad_token_id) == ((2,), 0)
    assert config.architecture == type(hf).__name__
    assert config.pinpoints == (tuple(map(tuple, PINPOINTS)) if tiles else None)


@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
def test_a_vision_tower_apart_is_joined(whole: bool, tmp_path: Path) -> None:
    hf = hf_model()
    state = {key: tensor.half() for key, tensor in research_state(hf).items()}
    tower = {key.removeprefix(f"{TOWER}vision_model."): state.pop(key) for key in list(state) if key.startswith(TOWER)}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)  # as published: float32 among float16
    apart = tmp_path / "clip-vit-large-patch14-336"
    if whole:
        clip = hf_clip()
        kept = {key: tensor for key, tensor in state_of(clip).items() if not key.startswith("vision_model.")}
        kept |= {f"vision_model.{key}": tensor.float() for key, tensor in tower.items()}
        write_folder(apart, kept, clip, vision_config=HEADS_OF_64)
    else:
        vision = CLIPVisionModel(hf.config.vision_config)
        vision.load_state_dict(tower)
        vision.save_pretrained(apart)
    model = load(write(tmp_path / "llava", state, mm_vision_tower=str(apart)))
    assert model.dtype == torch.float16
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(parameter.half())
    assert_same_answer(load(tmp_path / "llava", dtype=torch.float32), hf)


@pytest.mark.parametrize("tiles", [False, True], ids=["1.5", "1.6"])
def test_what_is_saved_of_it_is_hfs_layout(tiles: bool, tmp_path: Path) -> None:
    hf = hf_model(tiles=tiles)
    model = load(write(tmp_path / "read", research_state(hf), **(TILED if tiles else {})))
    model.save_hf(tmp_path / "saved")
    written, info = HF_CLASSES[type(hf).__name__].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    # HF looks up every id, that of an image too, so it needs a row for it.
    written.resize_token_embeddings(VOCAB + 1)
    assert_same_answer(model, written.eval())
    again = load(tmp_path / "saved")
    assert again.config == load(tmp_path / "saved").config
    assert_same_answer(again, hf)
    assert again.config.image_token_id == VOCAB


def test_the_vision_tower_that_is_missing_is_named() -> None:
    state = {key: tensor for key, tensor in research_state(hf_model()).items() if not key.startswith(TOWER)}
    assert family_of_config(CONFIG) is LLAVA_RESEARCH
    assert LLAVA_RESEARCH.companion(CONFIG, state) == "openai/clip-vit-large-patch14-336"
    assert LLAVA_RESEARCH.companion(CONFIG, research_state(hf_model())) is None
    with pytest.raises(
        CheckpointError, match="no vision tower .* joined with that of openai/clip-vit-large-patch14-336"
    ):
        LLAVA_RESEARCH.config(CONFIG, state)
    with pytest.raises(
        CheckpointError, match="patch14-336 is of model_type 'siglip'; supported: clip, clip_vision_model"
    ):
        LLAVA_RESEARCH.config({**CONFIG, "companion": {"model_type": "siglip"}}, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', .* supported: mlp2x_gelu"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_projector_type": None}, "mm_projector_type is None"),
        ({"mm_vision_tower": "google/siglip-so400m-patch14-384"}, "mm_vision_tower is 'google/siglip.* OpenAI's CLIP"),
        ({"mm_vision_tower": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}, "mm_vision_tower is 'laion"),
        ({"mm_vision_tower": None}, "mm_vision_tower is ''"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls'.* supported: patch, cls_patch"),
        ({"mm_vision_select_layer": -9}, "vision_feature_layer is -9"),
        ({"image_aspect_ratio": "anyres"}, "'anyres' with mm_patch_merge_type 'flat' is not supported"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "'pad' with mm_patch_merge_type 'spatial_unpad' is not supported"),
        ({"image_aspect_ratio": "anyres_max_9"}, "'anyres_max_9' with mm_patch_merge_type 'flat' is not supported"),
        ({**TILED, "image_aspect_ratio": "anyres_max_9"}, "'anyres_max_9' with .* is not supported"),
        ({**TILED, "mm_patch_merge_type": "maxpool2x2"}, "mm_patch_merge_type 'maxpool2x2' is not supported"),
        ({**TILED, "image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints is '.1x1"),
        ({**TILED, "mm_vision_select_feature": "cls_patch"}, "'full'; a LLaVA-NeXT"),
        ({"model_type": "llava_mpt"}, "unsupported model_type 'llava_mpt'; supported: blip, llava"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    config = {**CONFIG, **changes}
    with pytest.raises(CheckpointError, match=message):
        family_of_config(config).config(config, research_state(hf_model()))


def test_a_missing_tensor_is_said_by_the_research_codes_name(tmp_path: Path) -> None:
    state = research_state(hf_model())
    del state["model.mm_projector.2.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: model\.mm_projector\.2\.bias"):
        load(write(tmp_path, state))
    del state["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="research layout needs model.embed_tokens.weight"):
        load(write(tmp_path, state))

"""Tiny models of HF's, and their tensors under the names of every layout that was ever published."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

DATA = Path(__file__).parents[1] / "data_keys"
"""Names and shapes of tiny models in each layout, as the code that wrote them had them."""

IMAGE, PATCH = 28, 14
N_IMAGE_TOKENS = (IMAGE // PATCH) ** 2
VOCAB = 99
IMAGE_ID = VOCAB - 1

VISION = {
    "model_type": "clip_vision_model",
    **{"hidden_size": 60, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 5},
    **{"image_size": IMAGE, "patch_size": PATCH, "projection_dim": 20},
}
HEADS_OF_64 = {**VISION, "hidden_size": 128, "num_attention_heads": 2}
"""As OpenAI's: the research code's files do not say how many heads there are."""

TEXT = {
    **{"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": VOCAB},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 200},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
"""Heads of 12, two query heads to one of keys."""

PINPOINTS = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
}
"""Each language model, with what sets it apart."""


def drawn(hf: PreTrainedModel) -> PreTrainedModel:
    """Every parameter at random, norms and biases too, so that no two may be swapped."""
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return hf.eval()


def hf_llava(kind: str = "llama", *, tiles: bool = False, **entries: Any) -> PreTrainedModel:
    config: dict[str, Any] = {
        "vision_config": VISION,
        "text_config": {"model_type": kind, **TEXT, **KINDS[kind], **entries.pop("text_config", {})},
        "image_token_index": IMAGE_ID,
        **({"image_grid_pinpoints": PINPOINTS} if tiles else {}),
        **entries,
    }
    if tiles:
        return drawn(LlavaNextForConditionalGeneration(LlavaNextConfig(**config)))
    return drawn(LlavaForConditionalGeneration(LlavaConfig(**config)))


def hf_clip(**text: Any) -> PreTrainedModel:
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    text_config = {name: TEXT[name] for name in kept} | {"max_position_embeddings": 12, "eos_token_id": 97} | text
    return drawn(CLIPModel(CLIPConfig(text_config=text_config, vision_config=VISION, projection_dim=20)))


def hf_vit(cls: type[PreTrainedModel] = ViTForImageClassification, *args: Any, **entries: Any) -> PreTrainedModel:
    config = {name: VISION[name] for name in VISION if name not in ("model_type", "projection_dim")}
    return drawn(cls(ViTConfig(**{**config, "num_labels": 3, **entries}), *args))


HF_CLASSES: dict[str, type[PreTrainedModel]] = {
    cls.__name__: cls
    for cls in (
        LlavaForConditionalGeneration,
        LlavaNextForConditionalGeneration,
        CLIPModel,
        ViTForImageClassification,
        ViTModel,
    )
}

TO_HUB = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.(?=multi_modal_projector|image_newline)", ""),
)
TO_RESEARCH = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"^model\.multi_modal_projector\.linear_2", "model.mm_projector.2"),
)

LLAVA_LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "hub": TO_HUB,
    "saved": (*TO_HUB, (r"^vision_tower\.vision_model\.", "vision_tower.")),
    "memory": (),
    "memory of 4.52": ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),),
}
"""From the names that transformers 5 has in memory: what to replace by what, in this order."""

VIT_HUB = (
    (r"(^|\.)layers\.", r"\1encoder.layer."),
    (r"attention\.([qkv])_proj", lambda match: f"attention.attention.{WORDS[match[1]]}"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)
WORDS = {"q": "query", "k": "key", "v": "value"}


def renamed(state: Mapping[str, Tensor], steps: tuple[tuple[str, str | Callable[..., str]], ...]) -> dict[str, Tensor]:
    made = {}
    for key, tensor in state.items():
        for pattern, replacement in steps:
            key = re.sub(pattern, replacement, key)
        made[key] = tensor
    assert len(made) == len(state)
    return made


def llava_batch(hf: nn.Module, rows: int = 2) -> dict[str, Tensor]:
    """Unpadded rows of an image and eight tokens."""
    tiles = hasattr(hf.config, "image_grid_pinpoints")
    if not tiles:
        pixels, n_tokens = torch.randn(rows, 3, IMAGE, IMAGE), N_IMAGE_TOKENS
    else:
        # A wide picture of two tiles, nothing of it padding: the base image, then 2 by 4 patches and their newlines.
        pixels, n_tokens = torch.randn(rows, 3, 3, IMAGE, IMAGE), N_IMAGE_TOKENS + 2 * 4 + 2
    ids = torch.randint(3, IMAGE_ID, (rows, n_tokens + 8))
    ids[:, 3 : 3 + n_tokens] = hf.config.image_token_index
    batch = {"pixel_values": pixels, "input_ids": ids}
    return {**batch, "image_sizes": torch.tensor([[IMAGE, 2 * IMAGE]] * rows)} if tiles else batch


def clip_batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 7))
    ids[0, 4:], ids[1, 6:] = 97, 97
    return {"pixel_values": torch.randn(3, 3, IMAGE, IMAGE), "input_ids": ids}


def vit_batch() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, IMAGE, IMAGE)}


RESEARCH_CONFIG: dict[str, Any] = {
    **{name: value for name, value in TEXT.items() if name != "vocab_size"},
    **{"vocab_size": VOCAB, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
    **{"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False},
    **{"mm_hidden_size": 128, "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "use_mm_proj": True},
    **{"mm_vision_select_feature": "patch", "mm_vision_select_layer": -2},
    **{"mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad"},
    "image_grid_pinpoints": None,
}
"""As ``liuhaotian/llava-v1.5-*`` say it."""

TILED = {
    **{"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
    "image_grid_pinpoints": [pair[::-1] for pair in PINPOINTS],
}
"""As ``liuhaotian/llava-v1.6-*`` say it: a width and then a height."""

"""LLaVA's research code: its ``config.json`` and key names, with the vision tower inside or as a checkpoint apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_vlm.config import LlavaConfig
from weights_conversion.checkpoint import COMPANION, CheckpointError
from weights_conversion.clip import vision_rules
from weights_conversion.family import Family
from weights_conversion.hf_config import parse
from weights_conversion.llama import language_rules
from weights_conversion.llava import ARCHITECTURES, LLAVA
from weights_conversion.rules import Rules

LANGUAGE_MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""The research code's ``model_type`` to HF's of the language model in it."""

TOWERS = ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower.", "vision_model.", "")
"""Where a vision tower's names begin: inside (of older and newer transformers), then in a checkpoint of its own."""

OPENAI_TOWER = re.compile(r"clip-vit-(base|large)-patch\d+(-\d+)?")

SELECT = {"patch": "default", "cls_patch": "full"}

TEXT_ENTRIES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "sliding_window"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""What the research code's flat config says of the language model."""


class ResearchLlava(Family[LlavaConfig]):
    """The research code's files. Its language model has no ``<image>`` token: here that id is the first one past it."""

    def rules(self, config: LlavaConfig) -> Rules:
        own = Rules(
            ("model.mm_projector.0.*", "projector.up.*"),
            ("model.mm_projector.2.*", "projector.down.*"),
            ("model.image_newline", "image_newline"),
            # The rest of a vision tower's own checkpoint.
            ignored=("text_model.*", "text_projection.weight", "visual_projection.weight", "logit_scale"),
        )
        return sum((vision_rules(prefix) for prefix in TOWERS), own) + language_rules("model.", "lm_head.")

    def companion(self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str | None:
        """The vision tower, where this checkpoint leaves it out, as LLaVA-1.5's does."""
        tower = _tower(hf_config)
        return None if any(key.startswith(TOWERS[1]) for key in state) else tower

    def config(
        self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor], generation: Mapping[str, Any] = {}
    ) -> LlavaConfig:
        # HF's config of the same model; it is what is written back.
        kind = "llava_next" if _has_tiles(hf_config) else "llava"
        language = LANGUAGE_MODELS[hf_config["model_type"]]
        written: dict[str, Any] = {
            "model_type": kind,
            "architectures": [ARCHITECTURES[kind]],
            "text_config": {"model_type": language, **{k: hf_config[k] for k in TEXT_ENTRIES if k in hf_config}},
            "vision_config": _vision_config(hf_config, state),
            "projector_hidden_act": _supported(hf_config, "mm_projector_type", {"mlp2x_gelu": "gelu"}, "linear"),
            "vision_feature_layer": hf_config.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": _supported(hf_config, "mm_vision_select_feature", SELECT, "patch"),
            "tie_word_embeddings": hf_config.get("tie_word_embeddings", False),
            "image_token_index": _shape(state, "model.embed_tokens.weight")[0],
        }
        if kind == "llava_next":
            # There a width and a height.
            written["image_grid_pinpoints"] = [pair[::-1] for pair in _pairs(hf_config)]
        return LLAVA.config(written, state, generation)

    def hf_config(self, config: LlavaConfig) -> dict[str, Any]:
        """The ``config.json`` of HF's layout, which is the one we write."""
        return LLAVA.hf_config(config)


def _tower(hf_config: Mapping[str, Any]) -> str:
    """The vision tower's hub id or path; OpenAI's CLIP alone is known well enough to need no config."""
    tower = str(hf_config.get("mm_vision_tower") or "")
    if not OPENAI_TOWER.fullmatch(tower.rstrip("/").split("/")[-1].lower()):
        raise CheckpointError(
            f"mm_vision_tower is {tower!r}, which is not supported; supported: OpenAI's CLIP, such as "
            "openai/clip-vit-large-patch14-336"
        )
    return tower


def _supported(hf_config: Mapping[str, Any], name: str, values: Mapping[str, str], default: str) -> str:
    """HF's word for an entry's value; ``default`` is what the research code takes where the config is silent."""
    value = hf_config.get(name, default)
    if value not in values:
        raise CheckpointError(f"{name} is {value!r}, which is not supported; supported: {', '.join(values)}")
    return values[value]


def _has_tiles(hf_config: Mapping[str, Any]) -> bool:
    """Whether an image is seen in tiles too (v1.6)."""
    aspect, merge = hf_config.get("image_aspect_ratio") or "square", hf_config.get("mm_patch_merge_type") or "flat"
    if (aspect == "anyres") != (merge == "spatial_unpad") or (aspect != "anyres" and aspect.startswith("anyres")):
        raise CheckpointError(
            f"image_aspect_ratio {aspect!r} with mm_patch_merge_type {merge!r} is not supported; supported: 'anyres' "
            "with 'spatial_unpad', and others than 'anyres' with 'flat'"
        )
    return aspect == "anyres"


def _pairs(hf_config: Mapping[str, Any]) -> list[list[int]]:
    said = hf_config.get("image_grid_pinpoints")
    if not isinstance(said, list) or not all(isinstance(pair, list) for pair in said):
        raise CheckpointError(f"image_grid_pinpoints is {said!r}; it should be a list of pairs of a width and a height")
    return said


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"a checkpoint in LLaVA's research layout needs {key}")
    return tuple(state[key].shape)


def _vision_config(hf_config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """From the tower's own config; where it is inside, from its shapes and what all of OpenAI's have in common."""
    tower = _tower(hf_config)
    if COMPANION in hf_config:
        return _companion_config(hf_config[COMPANION], tower)
    prefix = next((prefix for prefix in TOWERS if f"{prefix}embeddings.class_embedding" in state), None)
    if prefix is None:
        raise CheckpointError(f"no vision tower in this checkpoint; it should be joined with that of {tower}")
    layers = f"{prefix}encoder.layers."
    width, _, _, patch = _shape(state, f"{prefix}embeddings.patch_embedding.weight")
    n_positions, _ = _shape(state, f"{prefix}embeddings.position_embedding.weight")
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": _shape(state, f"{layers}0.mlp.fc1.weight")[0],
        "num_hidden_layers": 1 + max(int(key[len(layers) :].split(".")[0]) for key in state if key.startswith(layers)),
        "num_attention_heads": width // 64,
        "image_size": round((n_positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def _companion_config(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    kind = config.get("model_type")
    if kind == "clip":
        return parse("CLIPConfig", config, "CLIP").vision_config.to_dict()
    if kind == "clip_vision_model":
        return parse("CLIPVisionConfig", config, "CLIP").to_dict()
    raise CheckpointError(f"the vision tower {tower} is of model_type {kind!r}; supported: clip, clip_vision_model")


LLAVA_RESEARCH = ResearchLlava()

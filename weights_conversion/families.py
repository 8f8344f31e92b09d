"""Which table reads which checkpoint. A plain dict: HF's ``model_type`` to the family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hooked_vlm.config import BlipConfig, ClipConfig, LlavaConfig, ModelConfig, ViTModelConfig
from weights_conversion.blip import BLIP, BLIP_RESEARCH
from weights_conversion.blip_counterparts import BLIP_COUNTERPARTS
from weights_conversion.checkpoint import CheckpointError
from weights_conversion.clip import CLIP
from weights_conversion.clip_counterparts import clip_counterparts
from weights_conversion.counterparts import Counterparts
from weights_conversion.family import Family
from weights_conversion.llava import LLAVA
from weights_conversion.llava_counterparts import llava_counterparts
from weights_conversion.llava_research import LANGUAGE_MODELS, LLAVA_RESEARCH
from weights_conversion.vit import VIT
from weights_conversion.vit_counterparts import vit_counterparts

FAMILIES: dict[str, Family[Any]] = {"blip": BLIP, "llava": LLAVA, "llava_next": LLAVA, "clip": CLIP, "vit": VIT}


def family_of_config(hf_config: Mapping[str, Any]) -> Family[Any]:
    """The family of a ``config.json``.

    Raises:
        CheckpointError: a ``model_type`` that no family reads; lists those supported.
    """
    model_type = str(hf_config.get("model_type"))
    # The research code's LLaVA says "llava" as HF's does, and then mm_this and mm_that.
    if model_type in LANGUAGE_MODELS and any(name.startswith("mm_") for name in hf_config):
        return LLAVA_RESEARCH
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"unsupported model_type {hf_config.get('model_type')!r}; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def family_of_state(keys: Iterable[str]) -> Family[Any]:
    """The family of a research checkpoint, which has no ``config.json``."""
    if any(key.startswith("visual_encoder.") for key in keys):
        return BLIP_RESEARCH
    raise CheckpointError("a checkpoint without config.json must be in BLIP's research layout (visual_encoder.*)")


COUNTERPARTS: dict[type[ModelConfig], Callable[[Any], Counterparts]] = {
    BlipConfig: lambda config: BLIP_COUNTERPARTS[config.task],
    LlavaConfig: llava_counterparts,
    ClipConfig: clip_counterparts,
    ViTModelConfig: vit_counterparts,
}


def counterparts_of_config(config: ModelConfig) -> Counterparts:
    """HF's side of every hook point of a model."""
    return COUNTERPARTS[type(config)](config)

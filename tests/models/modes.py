"""Small models of every kind, and ways to run them, for the tests that walk over all hook names.

Two layers a tower: in a LLaVA, whose features are read before the last vision layer, that layer is beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel, ViTModel

from hooked_vlm import HookedVLM
from hooked_vlm.config import AttentionImplementation
from tests.tiny_blip import Shape, hf_blip, inputs, pixels
from tests.tiny_llava import IMAGE, LANGUAGE_MODELS, clip_inputs, hf_clip, hf_llava, hf_vit, prompts

SHAPE = Shape(text=36, text_heads=3, vision=36, vision_heads=3, text_layers=2, vision_layers=2)
TWO_LAYERS = {"num_hidden_layers": 2}


@dataclass(frozen=True)
class Mode:
    """A way to run a model, and the names that such a run does not pass, with the reason."""

    build: Callable[[], PreTrainedModel]
    inputs: Callable[[PreTrainedModel], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    unpassed: dict[str, str] = field(default_factory=dict)


def _blip(task: str, **entries: Any) -> Mode:
    return Mode(partial(hf_blip, task, SHAPE), lambda hf: inputs(task, batch=2, length=4, answer=3), **entries)


def _llava(kind: str, **entries: Any) -> Mode:
    build = partial(hf_llava, LANGUAGE_MODELS[kind] | TWO_LAYERS, vision=TWO_LAYERS, **entries)
    return Mode(build, lambda hf: prompts(hf, (1, 1), n_words=(6, 6), sizes=[(20, 57)]))


HEADS_READ_THE_FIRST_STATE = "the matching head reads the text encoder's first state alone"

MODES = {
    "vqa": _blip("vqa"),
    "caption": _blip("caption"),
    "itm": _blip(
        "retrieval",
        unpassed={
            "hook_image_embeds": HEADS_READ_THE_FIRST_STATE,
            "hook_text_embeds": HEADS_READ_THE_FIRST_STATE,
        },
    ),
    "itc": _blip(
        "retrieval",
        options={"use_itm_head": False},
        unpassed={
            "cross": "the text is embedded without a look at the image, so cross-attention is passed over",
            "hook_itm_logits": "this is the matching head, which is not asked",
        },
    ),
    "llava": _llava("llama"),
    "llava with phi3": _llava("phi3"),
    "llava with qwen2": _llava("qwen2"),
    "llava-next": _llava("mistral", tiles=True),
    "clip": Mode(partial(hf_clip, eos=95, vision=TWO_LAYERS, **TWO_LAYERS), lambda hf: clip_inputs(eos=95)),
    "vit": Mode(partial(hf_vit, **TWO_LAYERS), lambda hf: {"pixel_values": pixels(2, IMAGE, IMAGE)}),
    "vit with a pooler": Mode(
        partial(hf_vit, ViTModel, pooler_output_size=26, **TWO_LAYERS),
        lambda hf: {"pixel_values": pixels(2, IMAGE, IMAGE)},
    ),
}


@cache
def model_and_inputs(mode: str, attention: AttentionImplementation) -> tuple[HookedVLM, dict[str, Any]]:
    torch.manual_seed(0)
    hf = MODES[mode].build()
    return HookedVLM.from_hf(hf, attention=attention), MODES[mode].inputs(hf)


def passed(mode: str, model: HookedVLM) -> list[str]:
    return [name for name in model.hook_names if not any(part in name for part in MODES[mode].unpassed)]


LEAF = "vision_encoder.hook_pooled"
"""What is made last beyond a LLaVA's features; nothing reads it."""


def beyond_the_features(mode: str, model: HookedVLM) -> list[str]:
    """Where a LLaVA's vision tower goes on after the streams that are read: only for those who look there."""
    if not mode.startswith("llava"):
        return []
    tower = "vision_encoder."
    return [name for name in model.hook_names if name.startswith((f"{tower}blocks.1.", f"{tower}ln_post", LEAF))]

"""Models of every family with inputs of every shape, for the tests of the sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel, ViTConfig, ViTModel

from hooked_vlm import HookedVLM
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.inputs import Span, VLMInputs
from tests import tiny_llava
from tests.models.modes import TWO_LAYERS
from tests.sweep.drawing import Sites
from tests.tiny_blip import hf_blip, padded_inputs, pixels
from tests.tiny_blip import inputs as blip_inputs
from tests.tiny_llava import IMAGE, LANGUAGE_MODELS, VISION, clip_inputs, hf_clip, hf_llava, hf_vit, prompts, randomised
from tests.tiny_runs import batch

Made = tuple[PreTrainedModel, "dict[str, Any] | VLMInputs"]

ATTENTION: list[AttentionImplementation] = ["eager", "sdpa"]


def _blip(task: str, *, padded: bool = False, rows: int = 1) -> Made:
    """Retrieval and captioning with towers of different widths."""
    hf = hf_blip(task, "heads of 12" if task == "vqa" else "narrow on wide")
    return hf, padded_inputs(task) if padded else blip_inputs(task, rows)


def _blip_with_spans() -> Made:
    return hf_blip("vqa"), batch(2)


def _blip_without_prompt(task: str, left_out: str) -> Made:
    hf, made = _blip(task, rows=2)
    assert isinstance(made, dict)
    return hf, {name: made[name] for name in made if name != left_out}


def _llava(
    kind: str = "llama",
    images: Sequence[int] = (1, 1),
    n_words: Sequence[int] = (5, 8),
    sizes: Sequence[tuple[int, int]] = tiny_llava.SIZES,
    **entries: Any,
) -> Made:
    layers = {} if "mixed" in kind else TWO_LAYERS  # mixed windows have a kind for each of three layers
    hf = hf_llava(LANGUAGE_MODELS[kind] | layers, vision={"num_hidden_layers": entries.pop("layers", 2)}, **entries)
    return hf, prompts(hf, images, n_words=n_words, sizes=sizes)


def _llava_with_spans() -> Made:
    hf, made = _llava(n_words=(6, 6))
    is_image = torch.as_tensor(made["input_ids"] == tiny_llava.IMAGE_ID)
    rows, n_positions = is_image.shape
    spans = {
        "image": Span("language_model", tuple(tuple(row.nonzero()[:, 0].tolist()) for row in is_image)),
        "patches": Span("vision_encoder", (tuple(range(1, 17)),) * rows),
        "last": Span("language_model", ((n_positions - 1,),) * rows),
    }
    return hf, replace(VLMInputs(**made), spans=spans)


def _states_alone() -> Made:
    """Neither a classifier nor a pooler."""
    sizes = {name: VISION[name] for name in VISION if name not in ("model_type", "projection_dim")}
    config = ViTConfig(**{**sizes, **TWO_LAYERS})
    hf = randomised(ViTModel(config, add_pooling_layer=False).eval(), seed=0, scale=0.25)
    return hf, {"pixel_values": pixels(2, IMAGE, IMAGE)}


def _vit(**entries: Any) -> Made:
    return hf_vit(**TWO_LAYERS, **entries), {"pixel_values": pixels(2, IMAGE, IMAGE)}


def _clip(eos: int) -> Made:
    """More texts than images."""
    return hf_clip(eos=eos, vision=TWO_LAYERS, **TWO_LAYERS), clip_inputs(2, (9, 4, 7, 2), eos=eos)


FAMILIES: dict[str, Callable[[], Made]] = {
    "blip vqa, one row": partial(_blip, "vqa"),
    "blip vqa, spans": _blip_with_spans,
    "blip vqa, padded": partial(_blip, "vqa", padded=True),
    "blip vqa, [DEC] alone": partial(_blip_without_prompt, "vqa", "decoder_input_ids"),
    "blip caption": partial(_blip, "caption", rows=2),
    "blip caption, padded": partial(_blip, "caption", padded=True),
    "blip caption, [DEC] alone": partial(_blip_without_prompt, "caption", "input_ids"),
    "blip retrieval": partial(_blip, "retrieval", rows=2),
    "blip retrieval, padded": partial(_blip, "retrieval", padded=True),
    "llava, one row": partial(_llava, images=(1,), n_words=(5,)),
    "llava, spans": _llava_with_spans,
    "llava, padded": partial(_llava, images=(1, 1, 1), n_words=(3, 8, 5)),
    "llava, several images": partial(_llava, images=(2, 1)),
    "llava, some rows without an image": partial(_llava, images=(0, 2, 1), n_words=(5, 8, 6)),
    "llava, text alone": partial(_llava, images=(0, 0)),
    "llava, every head its own keys": partial(_llava, "llama, every head its own keys"),
    "llava, sliding windows": partial(_llava, "mistral, sliding", n_words=(6, 6)),
    "llava, sliding windows, padded": partial(_llava, "mistral, sliding"),
    "llava, windows in some layers": partial(_llava, "qwen2, mixed", n_words=(6, 6)),
    "llava, windows in some layers, padded": partial(_llava, "qwen2, mixed"),
    "llava, fused qkv and sliding windows": partial(_llava, "phi3, sliding"),
    "llava, several feature layers": partial(_llava, layers=3, vision_feature_layer=[-2, 1, 0], n_words=(6, 6)),
    "llava, class tokens too": partial(_llava, vision_feature_layer=[2, -3], vision_feature_select_strategy="full"),
    "llava, the embeddings as features": partial(_llava, vision_feature_layer=0),
    "llava, layers beyond the features": partial(_llava, layers=4, vision_feature_layer=-3),
    "llava-next": partial(_llava, "mistral", n_words=(5, 5), sizes=[(IMAGE, 2 * IMAGE), (83, 31)], tiles=True),
    "clip": partial(_clip, 95),
    "clip, read at the highest id": partial(_clip, 2),
    "vit, classifier": _vit,
    "vit, pooler": partial(_vit, cls=ViTModel, pooler_output_size=26),
    "vit, states alone": _states_alone,
}


@cache
def _made(kind: str) -> Made:
    torch.manual_seed(0)
    return FAMILIES[kind]()


@cache
def family(kind: str, attention: AttentionImplementation) -> Sites:
    hf, inputs = _made(kind)
    return Sites.of(HookedVLM.from_hf(hf, attention=attention), inputs)

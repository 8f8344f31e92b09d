"""Tiny LLaVAs, CLIPs and ViTs of HF's classes, with weights in which a mistake shows, and inputs for them.

Sizes differ wherever they may: widths of the towers, heads of queries and of keys, layers. A head has 12 or 20
dimensions, no power of 4, so that its scale is no round number. Every parameter is drawn anew, see
:mod:`tests.tiny_blip`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
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

from hooked_vlm.patches import image_tokens, n_tiles
from tests.tiny_blip import pixels, randomised

VOCAB, PAD, BOS, EOS, IMAGE_ID = 99, 0, 1, 2, 90
IMAGE, PATCH = 28, 7
N_PATCHES = (IMAGE // PATCH) ** 2
WINDOW = 9
"""Of those language models that slide; prompts with an image are longer."""

VISION = {
    "model_type": "clip_vision_model",
    **{"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 4, "num_attention_heads": 3},
    **{"image_size": IMAGE, "patch_size": PATCH, "projection_dim": 20},
}
TEXT = {
    "model_type": "llama",
    **{"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "vocab_size": VOCAB},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 300},
    **{"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
}
PINPOINTS = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE], [3 * IMAGE, IMAGE], [IMAGE, 3 * IMAGE]]


def _rope(kind: str, **entries: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **entries}}


_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, every head its own keys": {"num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 20},
    "mistral, sliding": {"model_type": "mistral", "sliding_window": WINDOW, "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, mixed": {
        **{"model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED}
    },
    "phi3": {"model_type": "phi3", **_rope("default", partial_rotary_factor=0.5)},
    "phi3, sliding": {"model_type": "phi3", "sliding_window": WINDOW},
}
"""What sets each language model apart."""

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"max_position_embeddings": 60, **_rope("linear", factor=2.5)},
    "dynamic": {"max_position_embeddings": 20, **_rope("dynamic", factor=2.0)},
    "llama3": {
        "max_position_embeddings": 160,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=20),
    },
    "yarn": {"max_position_embeddings": 80, **_rope("yarn", factor=4.0, original_max_position_embeddings=20)},
    "qwen2 with yarn": {
        "model_type": "qwen2",
        **{"max_position_embeddings": 80, **_rope("yarn", factor=4.0, original_max_position_embeddings=20)},
    },
    "mistral with a far theta": {"model_type": "mistral", "sliding_window": None, **_rope("default", rope_theta=1e6)},
}
"""Stretched rotary embeddings; the model was trained on 20 positions, and prompts with an image are longer."""

FEATURES: dict[str, dict[str, Any]] = {
    "last": {"vision_feature_layer": -1},
    "last but one, class token too": {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"},
    "counted from the start": {"vision_feature_layer": 2},
    "the embeddings": {"vision_feature_layer": -5},
    "the embeddings, listed": {"vision_feature_layer": [0]},
    "several": {"vision_feature_layer": [-2, 1, 0]},
    "several, class token too": {"vision_feature_layer": [4, -3], "vision_feature_select_strategy": "full"},
}
"""Which hidden states of the vision tower are read; -2, without the class token, where nothing is said."""

NEXT_FEATURES = ("last", "several")
"""Of these, LLaVA-NeXT has no class token among its features."""

HF_CLASSES: dict[str, type[PreTrainedModel]] = {
    cls.__name__: cls
    for cls in (
        *(LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, CLIPModel),
        *(ViTForImageClassification, ViTModel),
    )
}


def hf_llava(
    text: dict[str, Any] | None = None, *, tiles: bool = False, seed: int = 0, scale: float = 0.25, **entries: Any
) -> PreTrainedModel:
    """A LLaVA-1.5, or with ``tiles`` a LLaVA-NeXT; ``text`` changes its language model, ``entries`` the rest."""
    config = {
        "vision_config": {**VISION, **entries.pop("vision", {})},
        "text_config": {**TEXT, **(text or {})},
        "image_token_index": IMAGE_ID,
        **({"image_grid_pinpoints": PINPOINTS} if tiles else {}),
        **entries,
    }
    if tiles:
        return randomised(LlavaNextForConditionalGeneration(LlavaNextConfig(**config)).eval(), seed, scale)
    return randomised(LlavaForConditionalGeneration(LlavaConfig(**config)).eval(), seed, scale)


def hf_clip(
    *, eos: int = EOS, seed: int = 0, scale: float = 0.25, vision: dict[str, Any] | None = None, **text: Any
) -> PreTrainedModel:
    """A CLIP. ``eos`` 2 stands for the highest token id of a row, as in OpenAI's configs."""
    text_config = {
        **{"hidden_size": 60, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 5},
        **{"vocab_size": VOCAB, "max_position_embeddings": 14},
        **{"bos_token_id": BOS, "eos_token_id": eos, "pad_token_id": PAD, **text},
    }
    config = CLIPConfig(text_config=text_config, vision_config={**VISION, **(vision or {})}, projection_dim=20)
    return randomised(CLIPModel(config).eval(), seed, scale)


def hf_vit(
    cls: type[PreTrainedModel] = ViTForImageClassification, *, seed: int = 0, scale: float = 0.25, **entries: Any
) -> PreTrainedModel:
    sizes = {name: VISION[name] for name in VISION if name not in ("model_type", "projection_dim")}
    config = {**sizes, "num_hidden_layers": 3, "num_labels": 5, **entries}
    return randomised(cls(ViTConfig(**config)).eval(), seed, scale)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: partial(hf_llava, text) for name, text in {**LANGUAGE_MODELS, **ROPES}.items()},
    "tied": partial(hf_llava, tie_word_embeddings=True),
    **{name: partial(hf_llava, **entries) for name, entries in FEATURES.items()},
    "next": partial(hf_llava, tiles=True),
    "next, mistral": partial(hf_llava, LANGUAGE_MODELS["mistral"], tiles=True),
    **{f"next, {name}": partial(hf_llava, tiles=True, **FEATURES[name]) for name in NEXT_FEATURES},
    "clip": partial(hf_clip, eos=95),
    "clip, read at the highest id": partial(hf_clip, eos=2),
    "vit": hf_vit,
    "vit, no biases": partial(hf_vit, qkv_bias=False),
    "vit, pooler": partial(hf_vit, ViTModel, pooler_output_size=26),
}
"""Each by its name; all in float32."""


def n_features(hf: PreTrainedModel, size: tuple[int, int] | None = None) -> int:
    """How many image tokens a picture takes; of this size, in LLaVA-NeXT."""
    is_full = hf.config.vision_feature_select_strategy == "full"
    pinpoints = getattr(hf.config, "image_grid_pinpoints", None)
    return len(image_tokens(size or (IMAGE, IMAGE), IMAGE, PATCH, pinpoints, has_class_token=is_full))


SIZES = ((IMAGE, 2 * IMAGE), (83, 31), (20, 57), (45, 45), (9, 100))
"""Of pictures for LLaVA-NeXT: heights and widths, most of them odd and far from square."""


def prompts(
    hf: PreTrainedModel,
    images: Sequence[int],
    *,
    n_words: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> dict[str, Tensor]:
    """Rows with so many images each, and so many words around them; padded on the left."""
    torch.manual_seed(0)
    tiles = hasattr(hf.config, "image_grid_pinpoints")
    n_words = n_words or [6 + 2 * (row % 3) for row in range(len(images))]
    sizes = [sizes[image % len(sizes)] for image in range(sum(images))]
    left = list(sizes)
    rows = []
    for count, words in zip(images, n_words, strict=True):
        row = [BOS, *torch.randint(3, IMAGE_ID, (words - 1,)).tolist()]
        for image in range(count):
            place = 2 * image + 2 + sum(token == IMAGE_ID for token in row)
            row[place:place] = [IMAGE_ID] * n_features(hf, left.pop(0))
        rows.append(row)
    length = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    if not sizes:
        return batch
    if not tiles:
        return {"pixel_values": pixels(len(sizes), IMAGE, IMAGE), **batch}
    counts = [n_tiles(size, IMAGE, hf.config.image_grid_pinpoints) for size in sizes]
    tile_pixels = torch.zeros(len(sizes), max(counts), 3, IMAGE, IMAGE)
    for image, count in enumerate(counts):
        tile_pixels[image, :count] = pixels(count, IMAGE, IMAGE)
    return {"pixel_values": tile_pixels, "image_sizes": torch.tensor(sizes), **batch}


def row_alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row, with its images and without its padding."""
    # Where a row's images begin, by its first image tokens: rows are in the order of images.
    counts = image_counts(batch)
    keep = batch["attention_mask"][row].bool()
    alone = {"input_ids": batch["input_ids"][row : row + 1, keep]}
    images = slice(sum(counts[:row]), sum(counts[: row + 1]))
    if counts[row]:
        alone |= {name: batch[name][images] for name in ("pixel_values", "image_sizes") if name in batch}
    return alone


def image_counts(batch: dict[str, Tensor]) -> list[int]:
    """How many images each row has: runs of image tokens."""
    is_image = batch["input_ids"] == IMAGE_ID
    begins = is_image & ~torch.nn.functional.pad(is_image[:, :-1], (1, 0))
    return begins.sum(1).tolist()


def clip_inputs(n_images: int = 3, lengths: Sequence[int] = (9, 4, 7, 2), *, eos: int = EOS) -> dict[str, Tensor]:
    """Other numbers of images and of texts; texts end in the end-of-text token and are padded on the right."""
    torch.manual_seed(0)
    end = 98 if eos == 2 else eos  # the highest id of all, where 2 says so
    ids = torch.randint(3, IMAGE_ID, (len(lengths), max(lengths)))
    for row, length in enumerate(lengths):
        ids[row, length - 1 :] = end
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"pixel_values": pixels(n_images, IMAGE, IMAGE), "input_ids": ids, "attention_mask": mask}

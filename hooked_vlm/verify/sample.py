"""What both models are fed: a picture and a text, or random numbers where there is no processor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm import toys
from hooked_vlm.config import BlipConfig, ClipConfig, LlavaConfig, ModelConfig, ViTConfig, ViTModelConfig
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.patches import Place, Size, image_tokens, n_tiles

if TYPE_CHECKING:
    from PIL.Image import Image

SEED = 0


def sample_inputs(model: HookedVLM, image: Any, question: str | Sequence[str] | None) -> tuple[VLMInputs, str]:
    """Inputs in which masks are at work, and a word on where they come from.

    Without a question, two texts of different lengths. A VQA decoder reads ``[DEC]`` and then the question's own
    tokens: any tokens will do to compare its causal attention.
    """
    try:
        processor = model.processor
    except ValueError as error:
        if image is not None or question is not None:
            raise
        inputs, numbers = _random_inputs(model.config)
        described = f"{numbers} (seed {SEED}); {error}"
    else:
        image, picture = _picture(model.config) if image is None else (image, "the picture given")
        texts = _texts(processor.tokenizer) if question is None and _reads_text(model.config) else question
        inputs = model.prepare(image, [texts] if isinstance(texts, str) else texts)
        told = [texts] if isinstance(texts, str) else texts or []
        described = ", ".join([picture, *([" / ".join(repr(text) for text in told)] if told else [])])
    if isinstance(model.config, BlipConfig) and model.config.task == "vqa":
        inputs = _with_answer(inputs, model.config)
    return inputs, described


def _reads_text(config: ModelConfig) -> bool:
    return config.d_vocab > 0


def _picture(config: ModelConfig) -> tuple[Image, str]:
    """The demo's, and a word on it; for tiles its upper part, so that there is padding to be cut off."""
    picture = toys.demo_sample().image
    if not isinstance(config, LlavaConfig) or config.pinpoints is None:
        return picture, "an embedded picture"
    part = picture.crop((0, 0, picture.width, picture.height * 2 // 3))
    return part, f"an embedded picture cropped to {part.width}x{part.height}"


def _texts(tokenizer: Any) -> list[str]:
    """The demo's question, or words of the tokenizer's own where it does not know that one; and half of it."""
    text = toys.demo_sample().question
    if tokenizer.unk_token_id in tokenizer(text).input_ids:
        vocabulary = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
        text = " ".join(random.Random(SEED).sample(vocabulary, min(6, len(vocabulary))))
    words = text.split()
    return [text, " ".join(words[: max(1, len(words) // 2)])]


def _with_answer(inputs: VLMInputs, config: BlipConfig) -> VLMInputs:
    assert inputs.input_ids is not None
    answer = inputs.input_ids.clone()
    answer[:, 0] = config.bos_token_id
    return replace(inputs, decoder_input_ids=answer, decoder_attention_mask=inputs.attention_mask)


# Without a processor: random numbers --------------------------------------------------------------------------------


def _random_inputs(config: ModelConfig) -> tuple[VLMInputs, str]:
    """Two rows of different lengths, and a word on them."""
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(config, BlipConfig):
        pixels = _pixels((2,), config.vision, generator)
        rows = [_words(min(length, config.text.n_ctx), config, generator) for length in (7, 4)]
        return VLMInputs(pixel_values=pixels, **_padded(rows, config.pad_token_id)), "random pixels and tokens"
    if isinstance(config, LlavaConfig):
        return _random_prompts(config, generator)
    if isinstance(config, ClipConfig):
        # A text is read at its end, or where its config says 2 at its highest id.
        end = config.d_vocab - 1 if config.text.eos_token_id == 2 else config.text.eos_token_id
        pixels = _pixels((3,), config.vision, generator)
        rows = [[*_words(min(length, config.text.n_ctx) - 1, config, generator, without=end), end] for length in (7, 4)]
        told = "random pixels of 3 images, random tokens of 2 texts"
        return VLMInputs(pixel_values=pixels, **_padded(rows, config.pad_token_id)), told
    assert isinstance(config, ViTModelConfig)
    return VLMInputs(pixel_values=_pixels((2,), config.vision, generator)), "random pixels"


def _random_prompts(config: LlavaConfig, generator: torch.Generator) -> tuple[VLMInputs, str]:
    """LLaVA-1.5: two images in the first row, one in the second; LLaVA-NeXT: one in each, of odd proportions."""
    side, pad, image = config.vision.image_size, config.pad_token_id, config.image_token_id
    is_tiled = config.pinpoints is not None
    by_row = [[(side * 2 // 3, side)], [(side * 3, side)]] if is_tiled else [[(side, side)] * 2, [(side, side)]]
    rows = []
    for sizes, length in zip(by_row, (7, 4), strict=True):
        row = _words(2, config, generator, without=image)
        for size in sizes:
            row += [image] * len(_features(config, size)) + _words(1, config, generator, without=image)
        rows.append(row + _words(length - len(sizes) - 2, config, generator, without=image))
    entries = _padded(rows, pad, side="left")
    flat = [size for sizes in by_row for size in sizes]
    if not is_tiled:
        pixels = _pixels((len(flat),), config.vision, generator)
        return VLMInputs(pixel_values=pixels, **entries), "random pixels (two images in the first row) and tokens"
    counts = [n_tiles(size, side, config.pinpoints) for size in flat]
    pixels = _pixels((len(flat), max(counts)), config.vision, generator)
    for own, count in zip(pixels, counts, strict=True):
        own[count:] = 0
    told = " and ".join(f"{width}x{height}" for height, width in flat)
    entries["image_sizes"] = torch.tensor(flat)
    return VLMInputs(pixel_values=pixels, **entries), f"random pixels (images of {told}) and tokens"


def _features(config: LlavaConfig, size: Size) -> tuple[Place, ...]:
    """The tokens of an image of this size."""
    vision, is_full = config.vision, config.select == "full"
    return image_tokens(size, vision.image_size, vision.patch_size, config.pinpoints, has_class_token=is_full)


def _pixels(
    images: tuple[int, ...], config: ViTConfig, generator: torch.Generator
) -> Float[Tensor, "... 3 height width"]:
    return torch.randn(*images, 3, config.image_size, config.image_size, generator=generator)


def _words(length: int, config: ModelConfig, generator: torch.Generator, *, without: int | None = None) -> list[int]:
    """Random token ids, one of them left out."""
    n_ids = config.d_vocab - (without is not None)
    ids = torch.randint(n_ids, (length,), generator=generator).tolist()
    return [token + (without is not None and token >= without) for token in ids]


def _padded(rows: list[list[int]], pad: int, *, side: Literal["left", "right"] = "right") -> dict[str, Any]:
    """Token ids and their mask."""
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        filled, kept = [pad] * (length - len(row)), [0] * (length - len(row))
        ids.append(filled + row if side == "left" else row + filled)
        mask.append(kept + [1] * len(row) if side == "left" else [1] * len(row) + kept)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

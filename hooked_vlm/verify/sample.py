"""What both models are fed: a picture and a text, or random numbers where there is no processor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hooked_vlm import toys
from hooked_vlm.config import BlipConfig
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM

SEED = 0


def sample_inputs(model: HookedVLM, image: Any, question: str | Sequence[str] | None) -> tuple[VLMInputs, str]:
    """Inputs of more than one decoder position, and a word on where they come from.

    Without a question, two texts of different lengths, so that masks are at work. A VQA decoder reads ``[DEC]`` and
    then the question's own tokens: any tokens will do to compare its causal attention.
    """
    try:
        tokenizer = model.processor.tokenizer
    except ValueError as error:
        if image is not None or question is not None:
            raise
        inputs, described = _random_inputs(model.config), f"random pixels and tokens (seed {SEED}); {error}"
    else:
        texts = _texts(tokenizer) if question is None else [question] if isinstance(question, str) else list(question)
        inputs = model.prepare(toys.demo_sample().image if image is None else image, texts)
        picture = "an embedded picture" if image is None else "the picture given"
        described = f"{picture}, {' / '.join(repr(text) for text in texts)}"
    if model.config.task == "vqa":
        inputs = _with_answer(inputs, model.config)
    return inputs, described


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


def _random_inputs(config: BlipConfig) -> VLMInputs:
    """Two rows, the second one padded."""
    generator = torch.Generator().manual_seed(SEED)
    size, length = config.vision.image_size, min(7, config.text.n_ctx)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(config.text.d_vocab, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    return VLMInputs(
        pixel_values=pixels, input_ids=ids.masked_fill(mask == 0, config.pad_token_id), attention_mask=mask
    )

"""CLIP's inputs: images and texts, each as many as there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hooked_vlm.config import ClipConfig
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.processing.processors import encode_texts, image_inputs, words_of

TEXT_TOWER = "text_encoder"


def clip_inputs(
    processor: Any, config: ClipConfig, images: Any, texts: str | Sequence[str] | None, **options: Any
) -> VLMInputs:
    """What ``HookedClip.prepare`` gives, but for the span that only the model knows."""
    if images is None and texts is None:
        raise ValueError("give CLIP images, texts or both")
    inputs = VLMInputs() if images is None else image_inputs(processor, config.vision, images, **options)
    spans = {name: span for name, span in inputs.spans.items() if name != "last"}
    if texts is None:
        return replace(inputs, spans=spans)
    tokenizer = processor.tokenizer
    text = encode_texts(
        tokenizer,
        [texts] if isinstance(texts, str) else list(texts),
        n_ctx=config.text.n_ctx,
        pad_token_id=config.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    spans["text"] = words_of(text["texts"], TEXT_TOWER)
    return replace(inputs, spans=spans, text_tower=TEXT_TOWER, **text)

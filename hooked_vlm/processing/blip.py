"""BLIP's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hooked_vlm.config import BlipConfig
from hooked_vlm.inputs import Span, VLMInputs
from hooked_vlm.processing.images import load_images
from hooked_vlm.processing.processors import encode_texts, image_inputs, same_in_all, words_of


def blip_inputs(
    processor: Any,
    config: BlipConfig,
    images: Any,
    texts: str | Sequence[str] | None,
    *,
    text_tower: str,
    text_span: str,
    last_tower: str,
    interpolate_pos_encoding: bool = False,
) -> VLMInputs:
    """What BLIP's ``prepare`` methods share. ``text_span`` names the span of the text's own words."""
    pictures = load_images(images)
    texts = [texts] if isinstance(texts, str) else None if texts is None else list(texts)
    if texts is not None and len(texts) != len(pictures) and (len(pictures) > 1 or not texts):
        raise ValueError(f"{len(pictures)} images and {len(texts)} texts: give one text an image, or one image")
    inputs = image_inputs(
        processor,
        config.vision,
        pictures,
        interpolate_pos_encoding=interpolate_pos_encoding,
        # Said, because the processor may be another checkpoint's: a research file has none.
        size={"height": config.vision.image_size, "width": config.vision.image_size},
    )
    inputs = replace(inputs, spans={**inputs.spans, "last": same_in_all(last_tower, [0], len(pictures))})
    if texts is None:
        return inputs
    if len(pictures) == 1:
        inputs = inputs.repeat(len(texts))
    return with_texts(
        processor, config, inputs, texts, text_tower=text_tower, text_span=text_span, last_tower=last_tower
    )


def with_texts(
    processor: Any,
    config: BlipConfig,
    inputs: VLMInputs,
    texts: Sequence[str],
    *,
    text_tower: str,
    text_span: str,
    last_tower: str,
) -> VLMInputs:
    """``inputs`` with other texts, one a row."""
    if len(texts) != len(inputs):
        raise ValueError(f"{len(texts)} texts for {len(inputs)} rows")
    continues = text_tower == "text_decoder"
    text = encode_texts(
        processor.tokenizer,
        texts,
        n_ctx=config.text.n_ctx,
        pad_token_id=config.pad_token_id,
        first=config.bos_token_id if continues else None,
    )
    lengths = text["attention_mask"].sum(1).tolist()
    last = [length - 1 if continues else 0 for length in lengths]
    spans = {
        **inputs.spans,
        text_span: words_of(text["texts"], text_tower),
        "last": Span(last_tower, tuple((position,) for position in last)),
    }
    return replace(inputs, spans=spans, text_tower=text_tower, **text)

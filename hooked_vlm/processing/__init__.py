"""Pictures and texts to :class:`~hooked_vlm.inputs.VLMInputs`, through the checkpoint's own HF processor."""

from hooked_vlm.processing.blip import blip_inputs, with_texts
from hooked_vlm.processing.clip import clip_inputs
from hooked_vlm.processing.images import ImageError, load_image, load_images
from hooked_vlm.processing.llava import label_sequence, llava_inputs, with_prompts
from hooked_vlm.processing.processors import (
    has_processor,
    image_inputs,
    label_patches,
    label_tokens,
    load_processor,
    token_strings,
)

__all__ = [
    "ImageError",
    "blip_inputs",
    "clip_inputs",
    "has_processor",
    "image_inputs",
    "label_patches",
    "label_sequence",
    "label_tokens",
    "llava_inputs",
    "load_image",
    "load_images",
    "load_processor",
    "token_strings",
    "with_prompts",
    "with_texts",
]

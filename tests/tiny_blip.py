"""Tiny BLIPs of HF's three classes, with weights in which a mistake shows, and inputs for them.

HF's default initialisation hides most mistakes: LayerNorms that do nothing, biases of 0, positions that are all alike.
Here every one-dimensional parameter is drawn anew and the matrices are large. Widths, heads and numbers of layers all
differ, and none is a power of two where it need not be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PreTrainedModel,
)

VOCAB, PAD, SEP, CLS, DEC, ENC = 99, 0, 3, 2, 97, 98
IMAGE, PATCH = 24, 8
N_CTX = 24

CLASSES: dict[str, type[PreTrainedModel]] = {
    "vqa": BlipForQuestionAnswering,
    "caption": BlipForConditionalGeneration,
    "retrieval": BlipForImageTextRetrieval,
}


@dataclass(frozen=True)
class Shape:
    """Widths and numbers of heads and layers of the text and the vision towers."""

    text: int
    text_heads: int
    vision: int
    vision_heads: int
    text_layers: int = 2
    vision_layers: int = 3


SHAPES = {
    "heads of 12": Shape(text=36, text_heads=3, vision=36, vision_heads=3),
    "heads of 20": Shape(text=100, text_heads=5, vision=100, vision_heads=5),
    "heads of 12 on 20": Shape(text=60, text_heads=5, vision=60, vision_heads=3),
    "narrow on wide": Shape(text=48, text_heads=3, vision=80, vision_heads=5),  # not for VQA, in HF as in ours
}


def hf_blip(task: str, shape: str | Shape = "heads of 12", *, seed: int = 0, scale: float = 0.25) -> PreTrainedModel:
    """A float32 model in evaluation mode. ``scale``: standard deviation of the matrices' entries."""
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    config = BlipConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": sizes.text,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": sizes.text_heads,
            "intermediate_size": 50,
            "max_position_embeddings": N_CTX,
            "bos_token_id": DEC,
            "sep_token_id": SEP,
            "pad_token_id": PAD,
            "eos_token_id": 1,
        },
        vision_config={
            "hidden_size": sizes.vision,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": sizes.vision_heads,
            "intermediate_size": 70,
            "image_size": IMAGE,
            "patch_size": PATCH,
        },
        image_text_hidden_size=26,
    )
    return randomised(CLASSES[task](config).eval(), seed, scale)


@torch.no_grad()
def randomised(model: PreTrainedModel, seed: int, scale: float) -> PreTrainedModel:
    """The same model with other weights: gains around 1, biases around 0, matrices of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.3 if parameter.dim() == 1 else scale, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            parameter += 1
    return model


def pixels(batch: int = 1, height: int = IMAGE, width: int = IMAGE) -> Tensor:
    return torch.randn(batch, 3, height, width)


def token_ids(batch: int, length: int, first: int = CLS) -> Tensor:
    ids = torch.randint(4, DEC, (batch, length))
    ids[:, 0] = first
    return ids


def padded_ids(lengths: list[int], first: int = CLS) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and their mask."""
    ids = token_ids(len(lengths), max(lengths), first)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def inputs(task: str, batch: int = 1, length: int = 5, answer: int = 3) -> dict[str, Any]:
    """An unpadded batch, under HF's names."""
    made = {"pixel_values": pixels(batch), "input_ids": token_ids(batch, length)}
    if task == "vqa":
        made["decoder_input_ids"] = token_ids(batch, answer, first=DEC)
    return made


def padded_inputs(task: str) -> dict[str, Any]:
    """Three rows of different lengths, the middle one unpadded; a VQA decoder's rows are padded too."""
    ids, mask = padded_ids([4, 7, 2])
    made = {"pixel_values": pixels(3), "input_ids": ids, "attention_mask": mask}
    if task == "vqa":
        made["decoder_input_ids"], made["decoder_attention_mask"] = padded_ids([5, 3, 1], first=DEC)
    return made

"""Pictures for every family of models, and what a corruption makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.corruptions import Corrupted, Corruption
from hooked_vlm.inputs import VLMInputs
from tests import llava_processors

FAMILIES = ("BLIP", "LLaVA-1.5", "LLaVA-NeXT")
family = pytest.mark.parametrize("name", FAMILIES)
QUESTION = "what color is the circle ?"
SIZES = ((120, 200), (150, 130))
"""Heights and widths, all larger than what the models see, so that pictures are made smaller."""


@cache
def model(name: str) -> HookedVLM:
    return HookedVLM.from_pretrained("toy-blip-vqa") if name == "BLIP" else llava_processors.model(tiles="NeXT" in name)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prepared(name: str, pictures: Sequence[Any]) -> VLMInputs:
    question = QUESTION if name == "BLIP" else f"USER: <image>\n{QUESTION} ASSISTANT:"
    return model(name).prepare(list(pictures), [question] * len(pictures))


@cache
def clean(name: str) -> VLMInputs:
    return prepared(name, [picture(*size, seed=seed) for seed, size in enumerate(SIZES)])


def corrupted(name: str, corruption: Corruption, inputs: VLMInputs | None = None) -> Tensor:
    inputs = clean(name) if inputs is None else inputs
    before = pixels(inputs).clone()
    run = corruption(model(name), inputs)
    assert torch.equal(pixels(inputs), before), "the clean inputs are written to"
    assert (run.edits, run.draws) == ((), corruption.draws) == ((), 1)
    assert all(run.inputs.tensors()[name] is value for name, value in inputs.tensors().items() if "pixel" not in name)
    return pixels(run)


def pixels(run: Corrupted | VLMInputs) -> Tensor:
    values = run.pixel_values if isinstance(run, VLMInputs) else run.inputs.pixel_values
    assert values is not None
    return values


def patches(name: str, values: Tensor) -> Tensor:
    """Each image's tiles' patches: [image tile patch numbers]."""
    values = values[:, None] if values.ndim == 4 else values
    side = model(name).config.vision.patch_size  # type: ignore[attr-defined]
    return rearrange(values, "i t c (r p) (q s) -> i t (r q) (c p s)", p=side, s=side)


def differs(one: Tensor, other: Tensor) -> Tensor:
    """Which pixels do: without the axis of colours."""
    return (one != other).any(-3)


BOX = (0, 0, 60, 60)
"""A region of either picture."""

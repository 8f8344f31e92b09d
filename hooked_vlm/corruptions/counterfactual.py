"""Another picture, or another question: what corrupts a run and keeps it likely."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hooked_vlm.corruptions.corrupted import Corrupted, DrawnOnce, pixels_of
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM


@dataclass(frozen=True, eq=False)
class CounterfactualImage(DrawnOnce):
    """Another picture with the same question: a semantic image pair, SIP (Golovanevsky et al. 2025).

    ``images``: what ``prepare`` takes, one a row.
    """

    images: Any

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        if clean.texts is None and clean.input_ids is not None:
            raise ValueError("a counterfactual image needs inputs that model.prepare made")
        options = {"interpolate_pos_encoding": True} if clean.interpolate_pos_encoding else {}
        texts = None if clean.texts is None else [piece.text for piece in clean.texts]
        other = model.prepare(self.images, texts, **options)
        shape, other_shape = (tuple(pixels_of(inputs).shape) for inputs in (clean, other))
        if other_shape != shape or other.image_rows != clean.image_rows:
            raise ValueError(f"the counterfactual pixels are {other_shape}, the clean {shape}")
        if [grid.places for grid in other.patch_grid] != [grid.places for grid in clean.patch_grid]:
            raise ValueError("the counterfactual picture is tiled otherwise than the clean one; give one of its size")
        return Corrupted(replace(clean, pixel_values=other.pixel_values, image_sizes=other.image_sizes))


@dataclass(frozen=True)
class CounterfactualQuestion(DrawnOnce):
    """Another question about the same picture, as many tokens long: symmetric token replacement, STR.

    ``questions``: one a row.
    """

    questions: str | tuple[str, ...]

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        questions = [self.questions] if isinstance(self.questions, str) else list(self.questions)
        if len(questions) != len(clean):
            raise ValueError(f"{len(questions)} counterfactual questions for {len(clean)} rows")
        if clean.texts is None:
            raise ValueError("a counterfactual question needs inputs that model.prepare made, with their texts")
        other = model.reword(clean, questions)
        lengths = zip(_lengths(clean), _lengths(other), strict=True)
        for piece, other_piece, (n_clean, n_other) in zip(clean.texts, other.texts or (), lengths, strict=True):
            if n_other != n_clean:
                raise ValueError(
                    f"{other_piece.text!r} has {n_other} tokens, {piece.text!r} has {n_clean}: positions would not "
                    "align; replace each word by one of as many tokens"
                )
        return Corrupted(other)


def _lengths(inputs: VLMInputs) -> list[int]:
    """How many tokens each row has. Padding is none: it would hide that a row is shorter than it was."""
    assert inputs.input_ids is not None
    mask = torch.ones_like(inputs.input_ids) if inputs.attention_mask is None else inputs.attention_mask
    return mask.sum(1).tolist()

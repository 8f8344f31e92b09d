"""The model that a grid is run on: HF's, ours over the same parameters, and two inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.models import SIZES, BlipSize, LlavaSize, Size
from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.metrics import Probability, at

SMALL_LLAVA = LlavaSize(
    d_model=64,
    n_layers=2,
    n_heads=4,
    d_mlp=160,
    vocabulary=2048,
    d_vision=64,
    vision_layers=2,
    vision_heads=4,
    image=42,
    before=3,
    after=8,
)


def _long(name: str) -> Size:
    """A LLaVA of ``benchmarks.models`` with 30 tokens after the image, and 5 before it."""
    size = SIZES[name]
    assert isinstance(size, LlavaSize)
    return replace(size, after=30)


SUBJECTS: dict[str, dict[str, Size]] = {
    # A question of 9 tokens and 577 image positions; 576 image positions among text.
    "base": {"blip": SIZES["vqa-base"], "llava": _long("llava")},
    # To see that all of it runs.
    "small": {
        "blip": BlipSize(d_model=64, n_layers=2, n_heads=4, image=48, vocabulary=2048, question=9),
        "llava": SMALL_LLAVA,
    },
    # For a GPU.
    "llava-7b": {"llava": _long("llava-7b")},
}
"""By ``--size``, the model of each family."""


@dataclass(frozen=True)
class Subject:
    """A model at random on a device, and inputs on it: the clean ones, and those with another image.

    What is patched or blocked, and where, is a grid's affair.
    """

    size: Size
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @cached_property
    def hf_model(self) -> torch.nn.Module:
        return self.size.hf_model(self.device, self.dtype)

    @cached_property
    def model(self) -> HookedVLM:
        """Ours, over HF's parameters."""
        return HookedVLM.from_hf(self.hf_model)

    @cached_property
    def clean(self) -> dict[str, Tensor]:
        return {name: self._placed(tensor) for name, tensor in self.size.inputs().items()}

    @cached_property
    def other(self) -> dict[str, Tensor]:
        """The same text about another image."""
        pixels = torch.randn(self.clean["pixel_values"].shape, generator=torch.Generator().manual_seed(1))
        return {**self.clean, "pixel_values": self._placed(pixels)}

    @cached_property
    def metric(self) -> Probability:
        """The probability of what the clean run finds likeliest."""
        with torch.no_grad():
            return Probability(at(self.model(VLMInputs.of(self.clean)), -1).argmax(-1))

    @property
    def spans(self) -> dict[str, Sequence[int]]:
        """Positions of LLaVA's prompt: the image's, those after it, the last, and the question's among the latter.

        As in a chat template, a few tokens stand between the question and the last position.
        """
        assert isinstance(self.size, LlavaSize)
        before, image = self.size.before, self.size.image_tokens
        text = range(before + image, before + image + self.size.after)
        return {
            "image": range(before, before + image),
            "text": text,
            "question": text[: 3 * len(text) // 4],
            "last": text[-1:],
        }

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

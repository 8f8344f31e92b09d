"""What a corruption is, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from hooked_vlm.edits import Edit
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM


@dataclass(frozen=True, eq=False)
class Corrupted:
    """A corrupted run: inputs and the edits that corrupt it.

    With several ``draws`` each clean row stands ``draws`` times, copies beside each other.
    """

    inputs: VLMInputs
    edits: tuple[Edit, ...] = ()
    draws: int = 1


@runtime_checkable
class Corruption(Protocol):
    """Makes a corrupted run of clean inputs."""

    @property
    def draws(self) -> int:
        """How many times the random part is drawn; 1 where nothing is random."""
        ...

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted: ...


class DrawnOnce:
    """A corruption that makes one run of each clean row."""

    @property
    def draws(self) -> int:
        return 1


def pixels_of(inputs: VLMInputs) -> Tensor:
    """The pixels.

    Raises:
        ValueError: there are none.
    """
    if inputs.pixel_values is None:
        raise ValueError("these inputs have no pixel_values to corrupt")
    return inputs.pixel_values

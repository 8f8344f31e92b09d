"""What a weight may be beside a plain tensor."""

from __future__ import annotations

from torch import Tensor


def is_int8(weight: Tensor) -> bool:
    """Whether a weight is held as 8-bit integers and their factors (torchao's tensor)."""
    return hasattr(weight, "qdata")


def multiplied_out(weight: Tensor) -> Tensor:
    """A weight as the numbers that it stands for."""
    return weight.dequantize() if is_int8(weight) else weight

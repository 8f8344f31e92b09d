"""Attention held against a region of the picture, in numbers. Keys are the picture's tokens."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def enrichment(
    attention: Float[np.ndarray, "*head key"], mask: Bool[np.ndarray, "... key"]
) -> Float[np.ndarray, "*head"]:
    """The share of attention in a mask over the mask's share of keys; NaN for an empty mask, or no attention."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(share(attention, mask) / np.where(mask.any(-1), mask.mean(-1), np.nan))


def share(attention: Float[np.ndarray, "*head key"], mask: Bool[np.ndarray, "... key"]) -> Float[np.ndarray, "*head"]:
    """The share of attention that falls into a mask; NaN where there is none at all."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((attention * mask).sum(-1) / attention.sum(-1))

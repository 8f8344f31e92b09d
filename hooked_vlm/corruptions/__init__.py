"""Ways to make a corrupted run: the other inputs, or edits that spoil the image embeddings.

A corruption is a frozen value; called with a model and clean inputs it gives a :class:`Corrupted` run. Whatever is
random is drawn once, from a seed, and held: every cell of a grid sees the same corruption.
"""

from hooked_vlm.corruptions.corrupted import Corrupted, Corruption
from hooked_vlm.corruptions.counterfactual import CounterfactualImage, CounterfactualQuestion
from hooked_vlm.corruptions.described import describe
from hooked_vlm.corruptions.noise import (
    IMAGE_EMBEDDINGS,
    AdditiveGaussian,
    MultiplicativeGaussian,
    PixelNoise,
    Scaled,
)
from hooked_vlm.corruptions.pictures import Blur, RegionMask, SwappedPatches
from hooked_vlm.corruptions.tokens import ReplaceTokens

__all__ = [
    "IMAGE_EMBEDDINGS",
    "AdditiveGaussian",
    "Blur",
    "Corrupted",
    "Corruption",
    "CounterfactualImage",
    "CounterfactualQuestion",
    "MultiplicativeGaussian",
    "PixelNoise",
    "RegionMask",
    "ReplaceTokens",
    "Scaled",
    "SwappedPatches",
    "describe",
]

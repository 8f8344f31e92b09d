"""Samples and counterfactual pairs."""

from hooked_vlm.data.scene import COLORS, SHAPES, Scene, ShapeObject, render
from hooked_vlm.data.shapes import (
    KINDS,
    Question,
    SemanticImagePair,
    ShapesSample,
    SymmetricTokenReplacement,
    generate,
    sample,
)

__all__ = [
    "COLORS",
    "KINDS",
    "SHAPES",
    "Question",
    "Scene",
    "SemanticImagePair",
    "ShapeObject",
    "ShapesSample",
    "SymmetricTokenReplacement",
    "generate",
    "render",
    "sample",
]

"""Samples and counterfactual pairs."""

from hooked_vlm.data.samples import Dropped, Sample, SampleError, Samples, span_of
from hooked_vlm.data.scene import COLORS, SHAPES, Scene, ShapeObject, render
from hooked_vlm.data.shapes import (
    KINDS,
    Question,
    SemanticImagePair,
    ShapesSample,
    SymmetricTokenReplacement,
    generate,
    sample,
    shapes,
)

__all__ = [
    "COLORS",
    "KINDS",
    "SHAPES",
    "Dropped",
    "Question",
    "Sample",
    "SampleError",
    "Samples",
    "Scene",
    "SemanticImagePair",
    "ShapeObject",
    "ShapesSample",
    "SymmetricTokenReplacement",
    "generate",
    "render",
    "sample",
    "shapes",
    "span_of",
]

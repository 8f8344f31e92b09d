"""Samples and counterfactual pairs."""

from hooked_vlm.data.correct import keep_correct
from hooked_vlm.data.manifest import read_manifest, write_manifest
from hooked_vlm.data.pairs import (
    DiffusersInpainting,
    FillRegion,
    ImageEditor,
    make_sip,
    make_str,
    options_vocabulary,
    verify_pairs,
)
from hooked_vlm.data.pictures import check_pictures
from hooked_vlm.data.readers import (
    READERS,
    binding_contrast,
    concept_sets,
    read_samples,
    shape_worlds,
    single_atom_accuracy,
)
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
    "READERS",
    "SHAPES",
    "DiffusersInpainting",
    "Dropped",
    "FillRegion",
    "ImageEditor",
    "Question",
    "Sample",
    "SampleError",
    "Samples",
    "Scene",
    "SemanticImagePair",
    "ShapeObject",
    "ShapesSample",
    "SymmetricTokenReplacement",
    "binding_contrast",
    "check_pictures",
    "concept_sets",
    "generate",
    "keep_correct",
    "make_sip",
    "make_str",
    "options_vocabulary",
    "read_manifest",
    "read_samples",
    "render",
    "sample",
    "shape_worlds",
    "shapes",
    "single_atom_accuracy",
    "span_of",
    "verify_pairs",
    "write_manifest",
]

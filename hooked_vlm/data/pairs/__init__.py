"""Counterfactual pairs: the same question about another picture (SIP), or another question about the same (STR)."""

from hooked_vlm.data.pairs.editors import DiffusersInpainting, FillRegion, ImageEditor
from hooked_vlm.data.pairs.pictures import make_sip, verify_pairs
from hooked_vlm.data.pairs.words import make_str, options_vocabulary

__all__ = [
    "DiffusersInpainting",
    "FillRegion",
    "ImageEditor",
    "make_sip",
    "make_str",
    "options_vocabulary",
    "verify_pairs",
]

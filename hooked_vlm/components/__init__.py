"""The parts that every tower is built of, one copy each. What differs between towers is a config value."""

from hooked_vlm.components.attention import Attention, KeyValues, Reader, Rotation
from hooked_vlm.components.block import Block, LayerKnown, build_block
from hooked_vlm.components.embedding import PatchEmbedding, TokenEmbedding
from hooked_vlm.components.mask import Mask, bidirectional_mask, causal_mask
from hooked_vlm.components.mlp import MLP, GatedMLP, activation
from hooked_vlm.components.norm import LayerNorm, Norm, RMSNorm, build_norm
from hooked_vlm.components.rotary import Rotary

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "GatedMLP",
    "KeyValues",
    "LayerKnown",
    "LayerNorm",
    "Mask",
    "Norm",
    "PatchEmbedding",
    "RMSNorm",
    "Reader",
    "Rotary",
    "Rotation",
    "TokenEmbedding",
    "activation",
    "bidirectional_mask",
    "build_block",
    "build_norm",
    "causal_mask",
]

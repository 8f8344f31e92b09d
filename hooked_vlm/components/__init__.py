"""The parts that every tower is built of, one copy each. What differs between towers is a config value."""

from hooked_vlm.components.attention import Attention, KeyValues
from hooked_vlm.components.block import Block, LayerKnown, build_block
from hooked_vlm.components.embedding import PatchEmbedding, TokenEmbedding
from hooked_vlm.components.mask import Mask, bidirectional_mask, causal_mask
from hooked_vlm.components.mlp import MLP, activation
from hooked_vlm.components.norm import LayerNorm

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "KeyValues",
    "LayerKnown",
    "LayerNorm",
    "Mask",
    "PatchEmbedding",
    "TokenEmbedding",
    "activation",
    "bidirectional_mask",
    "build_block",
    "causal_mask",
]

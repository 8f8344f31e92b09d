"""ViT: the HF module that holds the same tensor as each hook point, by transformers 5's names in memory.

Copies of the residual that our sub-layers read (``hook_attn_in`` and its like) are compared with what HF's sub-layer
reads.
"""

from __future__ import annotations

from hooked_vlm.config import ViTModelConfig
from weights_conversion.counterparts import ABSENT, PARAMETER, SEPARATE_QKV, Counterparts, plain_mlp, pre_norm_block
from weights_conversion.vit import CLASSIFIER


def _vision(prefix: str) -> Counterparts:
    block, layer = "vision_encoder.blocks.{l}.", f"{prefix}layers.{{l}}"
    embeddings, norms = f"{prefix}embeddings", ("layernorm_before", "layernorm_after")
    rows = pre_norm_block(block, layer, norms=norms, attention="attention", qkv=SEPARATE_QKV, out="o_proj")
    return (
        rows
        + plain_mlp(block, layer)
        + Counterparts(
            ("vision_encoder.hook_patch_embed", f"{embeddings}.patch_embeddings", "output"),
            ("vision_encoder.hook_cls_embed", f"{embeddings}.cls_token", f"{PARAMETER}, each row"),
            ("vision_encoder.hook_pos_embed", f"{embeddings}.position_embeddings", f"{PARAMETER}, each row"),
            ("vision_encoder.hook_full_embed", embeddings, "output"),
            ("vision_encoder.ln_post.hook_normalized", f"{prefix}layernorm", "output"),
            ("vision_encoder.hook_out", f"{prefix}layernorm", "output"),
        )
    )


def vit_counterparts(config: ViTModelConfig) -> Counterparts:
    """``logits`` is no hook point but what the model's forward returns."""
    heads = Counterparts(("hook_pooled", "pooler", "output"), ("hook_logits", "classifier", "output"))
    if config.n_classes:
        returned = "output.logits"
    else:
        returned = "output.pooler_output" if config.d_pooled else "output[0]"
    tower = _vision("vit." if config.architecture == CLASSIFIER else "")
    return ABSENT + tower + heads + Counterparts(("logits", "", returned))

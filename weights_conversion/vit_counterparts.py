"""ViT: the HF module that holds the same tensor as each hook point, by transformers 5's names in memory.

Copies of the residual that our sub-layers read (``hook_attn_in`` and its like) are compared with what HF's sub-layer
reads.
"""

from __future__ import annotations

from hooked_vlm.config import ViTModelConfig
from weights_conversion.counterparts import ABSENT, PARAMETER, Counterparts
from weights_conversion.vit import CLASSIFIER


def _vision(prefix: str) -> Counterparts:
    block, layer = "vision_encoder.blocks.{l}.", f"{prefix}layers.{{l}}"
    embeddings, attention = f"{prefix}embeddings", f"{layer}.attention"
    return Counterparts(
        ("vision_encoder.hook_patch_embed", f"{embeddings}.patch_embeddings", "output"),
        ("vision_encoder.hook_cls_embed", f"{embeddings}.cls_token", f"{PARAMETER}, each row"),
        ("vision_encoder.hook_pos_embed", f"{embeddings}.position_embeddings", f"{PARAMETER}, each row"),
        ("vision_encoder.hook_full_embed", embeddings, "output"),
        (f"{block}hook_resid_pre", layer, "input"),
        (f"{block}hook_attn_in", f"{layer}.layernorm_before", "input"),
        (f"{block}hook_q_input", f"{layer}.layernorm_before", "input, each head"),
        (f"{block}hook_k_input", f"{layer}.layernorm_before", "input, each head"),
        (f"{block}hook_v_input", f"{layer}.layernorm_before", "input, each head"),
        (f"{block}ln1.hook_normalized", f"{layer}.layernorm_before", "output"),
        (f"{block}attn.hook_q", f"{attention}.q_proj", "output, heads"),
        (f"{block}attn.hook_k", f"{attention}.k_proj", "output, heads"),
        (f"{block}attn.hook_v", f"{attention}.v_proj", "output, heads"),
        (f"{block}attn.hook_pattern", attention, "output[1]"),
        (f"{block}attn.hook_z", f"{attention}.o_proj", "input, heads"),
        (f"{block}hook_attn_out", attention, "output[0]"),
        (f"{block}hook_resid_mid", f"{layer}.layernorm_after", "input"),
        (f"{block}hook_mlp_in", f"{layer}.layernorm_after", "input"),
        (f"{block}ln2.hook_normalized", f"{layer}.layernorm_after", "output"),
        (f"{block}mlp.hook_pre", f"{layer}.mlp.fc1", "output"),
        (f"{block}mlp.hook_post", f"{layer}.mlp.fc2", "input"),
        (f"{block}hook_mlp_out", f"{layer}.mlp", "output"),
        (f"{block}hook_resid_post", layer, "output"),
        ("vision_encoder.ln_post.hook_normalized", f"{prefix}layernorm", "output"),
        ("vision_encoder.hook_out", f"{prefix}layernorm", "output"),
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

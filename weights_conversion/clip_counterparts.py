"""CLIP: the HF module that holds the same tensor as each hook point, on its own and as a LLaVA's vision tower.

Copies of the residual that our sub-layers read (``hook_attn_in`` and its like) are compared with what HF's sub-layer
reads.
"""

from __future__ import annotations

from hooked_vlm.config import ClipConfig
from weights_conversion.counterparts import ABSENT, PARAMETER, SEPARATE_QKV, Counterparts, plain_mlp, pre_norm_block


def blocks(tower: str, prefix: str) -> Counterparts:
    """CLIP's transformer layers; the same modules in both towers."""
    block, layer = f"{tower}.blocks.{{l}}.", f"{prefix}encoder.layers.{{l}}"
    norms = ("layer_norm1", "layer_norm2")
    rows = pre_norm_block(block, layer, norms=norms, attention="self_attn", qkv=SEPARATE_QKV, out="out_proj")
    return rows + plain_mlp(block, layer)


def vision(prefix: str, feature_layers: tuple[int, ...]) -> Counterparts:
    """CLIP's vision tower, whose ``hook_out`` is one of its streams, or several side by side."""
    embeddings = f"{prefix}embeddings"
    return Counterparts(
        ("vision_encoder.hook_patch_embed", f"{embeddings}.patch_embedding", "output, patches"),
        ("vision_encoder.hook_cls_embed", f"{embeddings}.class_embedding", f"{PARAMETER}, each row"),
        ("vision_encoder.hook_pos_embed", f"{embeddings}.position_embedding.weight", f"{PARAMETER}, each row"),
        ("vision_encoder.ln_pre.hook_normalized", f"{prefix}pre_layrnorm", "output"),
        ("vision_encoder.hook_full_embed", f"{prefix}pre_layrnorm", "output"),
        ("vision_encoder.hook_out", *_stream(prefix, feature_layers)),
        ("vision_encoder.ln_post.hook_normalized", f"{prefix}post_layernorm", "output, one position"),
        ("vision_encoder.hook_pooled", f"{prefix}post_layernorm", "output"),
    ) + blocks("vision_encoder", prefix)


def _stream(prefix: str, feature_layers: tuple[int, ...]) -> tuple[str | None, str]:
    if len(feature_layers) > 1:
        return None, "several streams side by side, which no module of HF's gives; each of them is compared"
    (layer,) = feature_layers
    return (f"{prefix}encoder.layers.{layer - 1}" if layer else f"{prefix}pre_layrnorm"), "output"


_TEXT = Counterparts(
    ("text_encoder.hook_embed", "text_model.embeddings.token_embedding", "output"),
    ("text_encoder.hook_pos_embed", "text_model.embeddings.position_embedding", "output, each row"),
    ("text_encoder.hook_full_embed", "text_model.embeddings", "output"),
    ("text_encoder.ln_final.hook_normalized", "text_model.final_layer_norm", "output"),
    ("text_encoder.hook_out", "text_model.final_layer_norm", "output"),
    ("text_encoder.hook_pooled", "text_projection", "input"),
) + blocks("text_encoder", "text_model.")

_HEADS = Counterparts(
    ("hook_image_embeds", "", "output.image_embeds"),
    ("hook_text_embeds", "", "output.text_embeds"),
    ("hook_logits", "", "output.logits_per_image"),
    ("logits", "", "output.logits_per_image"),
)


def clip_counterparts(config: ClipConfig) -> Counterparts:
    """``logits`` is no hook point but what the model's forward returns."""
    assert config.vision.feature_layers is not None
    return ABSENT + vision("vision_model.", config.vision.feature_layers) + _TEXT + _HEADS

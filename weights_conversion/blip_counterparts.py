"""BLIP: the HF module that holds the same tensor as each hook point.

Copies of the residual that our sub-layers read (``hook_attn_in`` and its like) are compared with what HF's sub-layer
reads. HF's last vision LayerNorm runs a second time, on a pooled output; the first time is meant.
"""

from __future__ import annotations

from hooked_vlm.config import BlipTask
from weights_conversion.counterparts import ABSENT, PARAMETER, Counterparts, plain_mlp, pre_norm_block


def _vision() -> Counterparts:
    block, layer = "vision_encoder.blocks.{l}.", "vision_model.encoder.layers.{l}"
    embeddings = "vision_model.embeddings"
    thirds = ("qkv: output, first third, heads", "qkv: output, second third, heads", "qkv: output, last third, heads")
    norms = ("layer_norm1", "layer_norm2")
    rows = pre_norm_block(block, layer, norms=norms, attention="self_attn", qkv=thirds, out="projection")
    return (
        rows
        + plain_mlp(block, layer)
        + Counterparts(
            ("vision_encoder.hook_patch_embed", f"{embeddings}.patch_embedding", "output, patches"),
            ("vision_encoder.hook_cls_embed", f"{embeddings}.class_embedding", f"{PARAMETER}, each row"),
            ("vision_encoder.hook_pos_embed", f"{embeddings}.position_embedding", f"{PARAMETER}, each row"),
            ("vision_encoder.hook_full_embed", embeddings, "output"),
            ("vision_encoder.ln_post.hook_normalized", "vision_model.post_layernorm", "output"),
            ("vision_encoder.hook_out", "vision_model", "output[0]"),
        )
    )


def _text(prefix: str, tower: str) -> Counterparts:
    block, layer = f"{tower}.blocks.{{l}}.", f"{prefix}encoder.layer.{{l}}"
    attention, cross = f"{layer}.attention", f"{layer}.crossattention"
    return Counterparts(
        (f"{tower}.hook_embed", f"{prefix}embeddings.word_embeddings", "output"),
        (f"{tower}.hook_pos_embed", f"{prefix}embeddings.position_embeddings", "output, each row"),
        (f"{tower}.ln_pre.hook_normalized", f"{prefix}embeddings.LayerNorm", "output"),
        (f"{tower}.hook_full_embed", f"{prefix}embeddings", "output"),
        (f"{block}hook_resid_pre", layer, "input"),
        (f"{block}hook_attn_in", attention, "input"),
        (f"{block}hook_q_input", f"{attention}.self.query", "input, each head"),
        (f"{block}hook_k_input", f"{attention}.self.key", "input, each head"),
        (f"{block}hook_v_input", f"{attention}.self.value", "input, each head"),
        (f"{block}attn.hook_q", f"{attention}.self.query", "output, heads"),
        (f"{block}attn.hook_k", f"{attention}.self.key", "output, heads"),
        (f"{block}attn.hook_v", f"{attention}.self.value", "output, heads"),
        (f"{block}attn.hook_pattern", f"{attention}.self", "output[1]"),
        (f"{block}attn.hook_z", f"{attention}.output.dense", "input, heads"),
        (f"{block}hook_attn_out", f"{attention}.output.dense", "output"),
        (f"{block}hook_resid_mid", f"{attention}.output.LayerNorm", "input"),
        (f"{block}ln1.hook_normalized", f"{attention}.output.LayerNorm", "output"),
        (f"{block}hook_normalized_resid_mid", attention, "output[0]"),
        (f"{block}hook_cross_attn_in", cross, "input"),
        (f"{block}cross_attn.hook_q", f"{cross}.self.query", "output, heads"),
        (f"{block}cross_attn.hook_k", f"{cross}.self.key", "output, heads"),
        (f"{block}cross_attn.hook_v", f"{cross}.self.value", "output, heads"),
        (f"{block}cross_attn.hook_pattern", f"{cross}.self", "output[1]"),
        (f"{block}cross_attn.hook_z", f"{cross}.output.dense", "input, heads"),
        (f"{block}hook_cross_attn_out", f"{cross}.output.dense", "output"),
        (f"{block}hook_resid_mid_cross", f"{cross}.output.LayerNorm", "input"),
        (f"{block}ln_cross.hook_normalized", f"{cross}.output.LayerNorm", "output"),
        (f"{block}hook_normalized_resid_mid_cross", cross, "output[0]"),
        (f"{block}hook_mlp_in", f"{layer}.intermediate", "input"),
        (f"{block}mlp.hook_pre", f"{layer}.intermediate.dense", "output"),
        (f"{block}mlp.hook_post", f"{layer}.output.dense", "input"),
        (f"{block}hook_mlp_out", f"{layer}.output.dense", "output"),
        (f"{block}hook_resid_post", f"{layer}.output.LayerNorm", "input"),
        (f"{block}ln2.hook_normalized", f"{layer}.output.LayerNorm", "output"),
        (f"{block}hook_normalized_resid_post", layer, "output"),
        (f"{tower}.hook_out", f"{prefix}encoder", "output[0]"),
    )


def _decoder(tower: str) -> Counterparts:
    head = "text_decoder.cls.predictions"
    return _text("text_decoder.bert.", tower) + Counterparts(
        (f"{tower}.ln_final.hook_normalized", f"{head}.transform.LayerNorm", "output"),
        (f"{tower}.hook_logits", f"{head}.decoder", "output"),
        ("logits", head, "output"),
    )


_HEADS = Counterparts(
    ("hook_itm_logits", "itm_head", "output"),
    ("hook_image_embeds", "vision_proj", "output, unit length"),
    ("hook_text_embeds", "text_proj", "output, unit length"),
    ("logits", "", "output.itm_score"),
)

BLIP_COUNTERPARTS: dict[BlipTask, Counterparts] = {
    "vqa": ABSENT + _vision() + _text("text_encoder.", "question_encoder") + _decoder("answer_decoder"),
    "caption": ABSENT + _vision() + _decoder("text_decoder"),
    "retrieval": ABSENT + _vision() + _text("text_encoder.", "text_encoder") + _HEADS,
}
"""A task's table. ``logits`` is no hook point but what the model's forward returns."""

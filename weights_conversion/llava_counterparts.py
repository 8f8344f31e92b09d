"""LLaVA: the HF module that holds the same tensor as each hook point, by transformers 5's names in memory.

Copies of the residual that our sub-layers read (``hook_attn_in`` and its like) are compared with what HF's sub-layer
reads. In LLaVA-NeXT the vision tower's rows are tiles, in HF as here.
"""

from __future__ import annotations

from hooked_vlm.config import LlamaConfig, LlavaConfig
from weights_conversion.clip_counterparts import vision
from weights_conversion.counterparts import ABSENT, SEPARATE_QKV, Counterparts, pre_norm_block

FUSED_QKV = (
    "qkv_proj: output, first columns, heads",
    "qkv_proj: output, last but one columns, heads",
    "qkv_proj: output, last columns, heads",
)
"""Phi-3."""

_LANGUAGE_ABSENT = Counterparts(
    ("language_model.*.hook_scale", None, "a value inside the forward of HF's RMSNorm, which returns no scale"),
    ("*.hook_rot_q", None, "a value inside the forward of HF's attention; the pattern made of it is compared"),
    ("*.hook_rot_k", None, "a value inside the forward of HF's attention; the pattern made of it is compared"),
)

_PROJECTOR = Counterparts(
    ("projector.hook_in", "model.multi_modal_projector.linear_1", "input"),
    ("projector.hook_pre", "model.multi_modal_projector.linear_1", "output"),
    ("projector.hook_post", "model.multi_modal_projector.linear_2", "input"),
    ("projector.hook_out", "model.multi_modal_projector.linear_2", "output"),
)


def _language(config: LlamaConfig) -> Counterparts:
    tower, prefix = "language_model.", "model.language_model."
    block, layer = f"{tower}blocks.{{l}}.", f"{prefix}layers.{{l}}"
    mlp, norms = f"{layer}.mlp", ("input_layernorm", "post_attention_layernorm")
    qkv = FUSED_QKV if config.fused_qkv else SEPARATE_QKV
    rows = pre_norm_block(block, layer, norms=norms, attention="self_attn", qkv=qkv, out="o_proj")
    return rows + Counterparts(
        (f"{tower}hook_embed", f"{prefix}embed_tokens", "output"),
        (f"{tower}hook_merged_embed", f"{prefix}layers.0", "input"),
        (f"{tower}hook_full_embed", f"{prefix}layers.0", "input"),
        *_gate_and_up(f"{block}mlp.", mlp, fused=config.fused_gate),
        (f"{block}mlp.hook_post", f"{mlp}.down_proj", "input"),
        (f"{tower}ln_final.hook_normalized", f"{prefix}norm", "output"),
        (f"{tower}hook_out", f"{prefix}norm", "output"),
        (f"{tower}hook_logits", "lm_head", "output"),
    )


def _gate_and_up(hooks: str, mlp: str, *, fused: bool) -> tuple[tuple[str, str, str], ...]:
    if fused:
        gate, up = (f"{mlp}.gate_up_proj", "output, first columns"), (f"{mlp}.gate_up_proj", "output, last columns")
    else:
        gate, up = (f"{mlp}.gate_proj", "output"), (f"{mlp}.up_proj", "output")
    return (f"{hooks}hook_pre", *gate), (f"{hooks}hook_pre_linear", *up)


def llava_counterparts(config: LlavaConfig) -> Counterparts:
    """``logits`` is no hook point but what the model's forward returns."""
    assert config.vision.feature_layers is not None
    return (
        _LANGUAGE_ABSENT
        + ABSENT
        + vision("model.vision_tower.", config.vision.feature_layers)
        + _PROJECTOR
        + _language(config.text)
        + Counterparts(("logits", "", "output.logits"))
    )

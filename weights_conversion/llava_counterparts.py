"""LLaVA: the HF module that holds the same tensor as each hook point, by transformers 5's names in memory.

Copies of the residual that our sub-layers read (``hook_attn_in`` and its like) are compared with what HF's sub-layer
reads. In LLaVA-NeXT the vision tower's rows are tiles, in HF as here.
"""

from __future__ import annotations

from hooked_vlm.config import LlamaConfig, LlavaConfig
from weights_conversion.clip_counterparts import vision
from weights_conversion.counterparts import ABSENT, Counterparts

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
    attention, mlp, norm = f"{layer}.self_attn", f"{layer}.mlp", f"{layer}.input_layernorm"
    return Counterparts(
        (f"{tower}hook_embed", f"{prefix}embed_tokens", "output"),
        (f"{tower}hook_merged_embed", f"{prefix}layers.0", "input"),
        (f"{tower}hook_full_embed", f"{prefix}layers.0", "input"),
        (f"{block}hook_resid_pre", layer, "input"),
        (f"{block}hook_attn_in", norm, "input"),
        (f"{block}hook_q_input", norm, "input, each head"),
        (f"{block}hook_k_input", norm, "input, each head"),
        (f"{block}hook_v_input", norm, "input, each head"),
        (f"{block}ln1.hook_normalized", norm, "output"),
        *_queries_keys_values(f"{block}attn.", attention, fused=config.fused_qkv),
        (f"{block}attn.hook_pattern", attention, "output[1]"),
        (f"{block}attn.hook_z", f"{attention}.o_proj", "input, heads"),
        (f"{block}hook_attn_out", attention, "output[0]"),
        (f"{block}hook_resid_mid", f"{layer}.post_attention_layernorm", "input"),
        (f"{block}hook_mlp_in", f"{layer}.post_attention_layernorm", "input"),
        (f"{block}ln2.hook_normalized", f"{layer}.post_attention_layernorm", "output"),
        *_gate_and_up(f"{block}mlp.", mlp, fused=config.fused_gate),
        (f"{block}mlp.hook_post", f"{mlp}.down_proj", "input"),
        (f"{block}hook_mlp_out", mlp, "output"),
        (f"{block}hook_resid_post", layer, "output"),
        (f"{tower}ln_final.hook_normalized", f"{prefix}norm", "output"),
        (f"{tower}hook_out", f"{prefix}norm", "output"),
        (f"{tower}hook_logits", "lm_head", "output"),
    )


def _queries_keys_values(hooks: str, attention: str, *, fused: bool) -> tuple[tuple[str, str, str], ...]:
    if fused:
        columns = {"q": "first columns", "k": "last but one columns", "v": "last columns"}
        return tuple((f"{hooks}hook_{x}", f"{attention}.qkv_proj", f"output, {columns[x]}, heads") for x in "qkv")
    return tuple((f"{hooks}hook_{x}", f"{attention}.{x}_proj", "output, heads") for x in "qkv")


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

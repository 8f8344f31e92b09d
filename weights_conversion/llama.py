"""LLaMA and its kin inside a LLaVA: Vicuna, Mistral, Qwen2, Phi-3. One table of names; configs differ by kind."""

from __future__ import annotations

from typing import Any, get_args

from hooked_vlm.config import LlamaConfig, RotaryConfig, RotaryKind
from weights_conversion.checkpoint import CheckpointError
from weights_conversion.hf_config import check_tower
from weights_conversion.rules import Rules

KINDS = ("llama", "mistral", "qwen2", "phi3")
"""HF's ``model_type`` of the language models that we read."""


def language_rules(prefix: str, head: str) -> Rules:
    """The language model and its head, under the prefixes that a layout gives them."""
    layer, block = f"{prefix}layers.{{l}}.", "language_model.blocks.{l}."
    return Rules(
        (f"{prefix}embed_tokens.weight", "language_model.embed.token.weight"),
        (f"{layer}input_layernorm.weight", f"{block}ln1.weight"),
        (f"{layer}self_attn.q_proj.*", f"{block}attn.q.*"),
        (f"{layer}self_attn.k_proj.*", f"{block}attn.k.*"),
        (f"{layer}self_attn.v_proj.*", f"{block}attn.v.*"),
        (f"{layer}self_attn.qkv_proj.*", f"{block}attn.qkv.*"),
        (f"{layer}self_attn.o_proj.*", f"{block}attn.o.*"),
        (f"{layer}post_attention_layernorm.weight", f"{block}ln2.weight"),
        (f"{layer}mlp.gate_proj.*", f"{block}mlp.gate.*"),
        (f"{layer}mlp.up_proj.*", f"{block}mlp.up.*"),
        (f"{layer}mlp.gate_up_proj.*", f"{block}mlp.gate_up.*"),
        (f"{layer}mlp.down_proj.*", f"{block}mlp.down.*"),
        (f"{prefix}norm.weight", "language_model.ln_final.weight"),
        (f"{head}weight", "language_model.unembed.weight"),
        # Saved by transformers 4.30 and before; computed anew.
        ignored=(f"{prefix}rotary_emb.inv_freq", f"{layer}self_attn.rotary_emb.inv_freq"),
    )


def text_config(text: Any, *, ties_embeddings: bool) -> LlamaConfig:
    """Our config of HF's config object of a language model."""
    kind = text.model_type
    if kind not in KINDS:
        raise CheckpointError(
            f"text_config.model_type is {kind!r}, which is not supported; supported: {', '.join(KINDS)}"
        )
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    d_head = check_tower(text, "text_config", _own_head_size(text))
    if kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(
            f"text_config does not fit together: num_attention_heads {heads}, num_key_value_heads {kv_heads}"
        )
    return LlamaConfig(
        d_model=text.hidden_size,
        n_layers=text.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_head=d_head,
        d_mlp=text.intermediate_size,
        act=text.hidden_act,
        eps=text.rms_norm_eps,
        norm="rms",
        norm_order="pre",
        fused_qkv=kind == "phi3",
        is_causal=True,
        qkv_bias=kind == "qwen2" or (kind == "llama" and text.attention_bias),
        out_bias=kind == "llama" and text.attention_bias,
        mlp_bias=kind == "llama" and text.mlp_bias,
        softmax_in_float32=True,
        gated_mlp=True,
        fused_gate=kind == "phi3",
        rotary=rotary_config(text, d_head),
        windows=_windows(text),
        d_vocab=text.vocab_size,
        n_ctx=text.max_position_embeddings,
        ties_embeddings=ties_embeddings,
    )


def rotary_config(text: Any, d_head: int) -> RotaryConfig:
    """HF's ``rope_parameters``, which transformers 5 makes of the older ``rope_theta`` and ``rope_scaling`` too."""
    said = text.rope_parameters
    kind = said.get("rope_type")
    if kind not in get_args(RotaryKind):
        raise CheckpointError(
            f"text_config has rotary embeddings of rope_type {kind!r}, which is not supported; supported: "
            f"{', '.join(get_args(RotaryKind))}"
        )
    # HF's default kind turns part of a head in Phi-3 alone. Its scaled kinds would in every family; HF then fails.
    share = said.get("partial_rotary_factor", 1.0) if kind != "default" or text.model_type == "phi3" else 1.0
    d_rotary = int(d_head * share)
    smallest = 4 if kind == "dynamic" else 2
    if d_rotary < smallest or d_rotary % 2 or (d_rotary < d_head and text.model_type != "phi3"):
        raise CheckpointError(f"text_config turns {d_rotary} of a head's {d_head} dimensions, which is not supported")
    n_ctx = text.max_position_embeddings
    # Beside rope_scaling or within: HF's module takes the outer one where both are said.
    outer = None if kind == "default" else getattr(text, "original_max_position_embeddings", None)
    original = outer or said.get("original_max_position_embeddings")
    factor = said.get("factor")
    if factor is None:
        if kind not in ("default", "yarn"):
            raise CheckpointError(f"text_config has rotary embeddings of rope_type {kind!r} without a factor")
        factor = n_ctx / original if kind == "yarn" else 1.0
    return RotaryConfig(
        d_rotary=d_rotary,
        theta=float(said["rope_theta"]),
        kind=kind,
        factor=float(factor),
        n_ctx=n_ctx,
        original_n_ctx=original,
        low_freq_factor=float(said.get("low_freq_factor") or 1.0),
        high_freq_factor=float(said.get("high_freq_factor") or 4.0),
        beta_fast=float(said.get("beta_fast") or 32.0),
        beta_slow=float(said.get("beta_slow") or 1.0),
        # HF's other kinds ignore it.
        attention_factor=said.get("attention_factor") if kind == "yarn" else None,
        mscale=said.get("mscale"),
        mscale_all_dim=said.get("mscale_all_dim"),
        truncate=bool(said.get("truncate", True)),
    )


def _own_head_size(text: Any) -> int | None:
    """The config's ``head_dim``, where it is more than HF's quotient."""
    said = getattr(text, "head_dim", None)
    return None if said == text.hidden_size // max(text.num_attention_heads, 1) else said


def _windows(text: Any) -> tuple[int | None, ...]:
    """HF: Qwen2 says layer by layer which ones slide; in Mistral and Phi-3 all do, if any."""
    window = getattr(text, "sliding_window", None)
    if window is None or text.model_type == "llama":
        return ()
    if text.model_type != "qwen2":
        return (window,) * text.num_hidden_layers
    windows = {"sliding_attention": window, "full_attention": None}
    unknown = sorted({*text.layer_types} - {*windows})
    if unknown:
        raise CheckpointError(f"text_config has layers of {', '.join(unknown)}; supported: {', '.join(windows)}")
    slides = tuple(windows[layer] for layer in text.layer_types)
    return slides if any(slides) else ()

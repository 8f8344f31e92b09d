"""What HF's LLaVA, CLIP and ViT compute inside, by our hook names.

Forward hooks on HF's modules give most; queries and keys after rotary, scores and pattern are seen where they go
through HF's attention function, whose output stays HF's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.parity.hf_record import Read, everything, into, out, watching

Entries = Iterator[tuple[str, str, Read]]
"""Our name, HF's module, and what to read there."""


def split_heads(read: Read, d_head: int) -> Read:
    return lambda given, made: rearrange(read(given, made), "b p (h d) -> b p h d", d=d_head)


def columns(read: Read, start: int, stop: int) -> Read:
    return lambda given, made: read(given, made)[..., start:stop]


def patches(_given: Any, made: Tensor) -> Tensor:
    return rearrange(made, "b d row column -> b (row column) d")


def this(tensor: Tensor) -> Read:
    return lambda _given, _made: tensor


def d_head_of(attention: nn.Module) -> int:
    return attention.head_dim


def sub_layers(block: str, layer: str, attention: str, norms: tuple[str, str]) -> Entries:
    """What all pre-LN layers of HF have."""
    first, second = (f"{layer}.{norm}" for norm in norms)
    yield f"{block}hook_resid_pre", layer, into
    yield f"{block}hook_attn_in", first, into
    yield f"{block}ln1.hook_normalized", first, out
    yield f"{block}hook_attn_out", attention, out
    yield f"{block}hook_resid_mid", second, into
    yield f"{block}hook_mlp_in", second, into
    yield f"{block}ln2.hook_normalized", second, out
    yield f"{block}hook_mlp_out", f"{layer}.mlp", out
    yield f"{block}hook_resid_post", layer, out


def separate_projections(hf: nn.Module, block: str, attention: str, output: str) -> Entries:
    d_head = d_head_of(hf.get_submodule(attention))
    for name in "qkv":
        yield f"{block}attn.hook_{name}", f"{attention}.{name}_proj", split_heads(out, d_head)
    yield f"{block}attn.hook_z", f"{attention}.{output}", split_heads(into, d_head)


def plain_mlp(block: str, layer: str) -> Entries:
    yield f"{block}mlp.hook_pre", f"{layer}.mlp.fc1", out
    yield f"{block}mlp.hook_post", f"{layer}.mlp.fc2", into


def clip_blocks(hf: nn.Module, tower: str, prefix: str) -> Entries:
    for index in range(len(hf.get_submodule(f"{prefix}encoder.layers"))):
        block, layer = f"{tower}.blocks.{index}.", f"{prefix}encoder.layers.{index}"
        yield from sub_layers(block, layer, f"{layer}.self_attn", ("layer_norm1", "layer_norm2"))
        yield from separate_projections(hf, block, f"{layer}.self_attn", "out_proj")
        yield from plain_mlp(block, layer)


def clip_vision(hf: nn.Module, prefix: str) -> Entries:
    embeddings = hf.get_submodule(f"{prefix}embeddings")
    yield "vision_encoder.hook_patch_embed", f"{prefix}embeddings.patch_embedding", patches
    yield "vision_encoder.hook_cls_embed", f"{prefix}embeddings", this(embeddings.class_embedding[None, None])
    yield "vision_encoder.hook_pos_embed", f"{prefix}embeddings.position_embedding", out
    yield "vision_encoder.ln_pre.hook_normalized", f"{prefix}pre_layrnorm", out
    yield "vision_encoder.hook_full_embed", f"{prefix}pre_layrnorm", out
    yield from clip_blocks(hf, "vision_encoder", prefix)
    yield (
        *("vision_encoder.ln_post.hook_normalized", f"{prefix}post_layernorm"),
        lambda _, made: made[:, None],
    )
    yield "vision_encoder.hook_pooled", f"{prefix}post_layernorm", out


def clip(hf: nn.Module) -> Entries:
    yield from clip_vision(hf, "vision_model.")
    yield "vision_encoder.hook_out", f"vision_model.encoder.layers.{len(hf.vision_model.encoder.layers) - 1}", out
    yield "text_encoder.hook_embed", "text_model.embeddings.token_embedding", out
    yield "text_encoder.hook_pos_embed", "text_model.embeddings.position_embedding", out
    yield "text_encoder.hook_full_embed", "text_model.embeddings", out
    yield from clip_blocks(hf, "text_encoder", "text_model.")
    yield "text_encoder.ln_final.hook_normalized", "text_model.final_layer_norm", out
    yield "text_encoder.hook_out", "text_model.final_layer_norm", out
    yield "text_encoder.hook_pooled", "text_projection", into
    yield "hook_image_embeds", "", lambda _, made: made.image_embeds
    yield "hook_text_embeds", "", lambda _, made: made.text_embeds
    yield "hook_logits", "", lambda _, made: made.logits_per_image


def vit(hf: nn.Module) -> Entries:
    prefix = "vit." if hasattr(hf, "vit") else ""
    embeddings, pooler = hf.get_submodule(f"{prefix}embeddings"), getattr(hf, "pooler", None)
    yield "vision_encoder.hook_patch_embed", f"{prefix}embeddings.patch_embeddings.projection", patches
    yield "vision_encoder.hook_cls_embed", f"{prefix}embeddings", this(embeddings.cls_token)
    yield "vision_encoder.hook_full_embed", f"{prefix}embeddings", out
    for index in range(len(hf.get_submodule(f"{prefix}layers"))):
        block, layer = f"vision_encoder.blocks.{index}.", f"{prefix}layers.{index}"
        yield from sub_layers(block, layer, f"{layer}.attention", ("layernorm_before", "layernorm_after"))
        yield from separate_projections(hf, block, f"{layer}.attention", "o_proj")
        yield from plain_mlp(block, layer)
    yield "vision_encoder.ln_post.hook_normalized", f"{prefix}layernorm", out
    yield "vision_encoder.hook_out", f"{prefix}layernorm", out
    if pooler is not None:
        yield "hook_pooled", "pooler", out
    if hasattr(hf, "classifier"):
        yield "hook_logits", "classifier", out


def llava(hf: nn.Module) -> Entries:
    yield from clip_vision(hf, "model.vision_tower.")
    yield "projector.hook_in", "model.multi_modal_projector.linear_1", into
    yield "projector.hook_pre", "model.multi_modal_projector.linear_1", out
    yield "projector.hook_post", "model.multi_modal_projector.linear_2", into
    yield "projector.hook_out", "model.multi_modal_projector", out
    prefix = "model.language_model."
    yield "language_model.hook_embed", f"{prefix}embed_tokens", out
    yield "language_model.hook_merged_embed", f"{prefix}layers.0", into
    yield "language_model.hook_full_embed", f"{prefix}layers.0", into
    for index in range(len(hf.model.language_model.layers)):
        block, layer = f"language_model.blocks.{index}.", f"{prefix}layers.{index}"
        attention = f"{layer}.self_attn"
        yield from sub_layers(block, layer, attention, ("input_layernorm", "post_attention_layernorm"))
        if hasattr(hf.get_submodule(attention), "qkv_proj"):
            yield from fused_projections(hf, block, layer)
        else:
            yield from separate_projections(hf, block, attention, "o_proj")
            yield f"{block}mlp.hook_pre", f"{layer}.mlp.gate_proj", out
            yield f"{block}mlp.hook_pre_linear", f"{layer}.mlp.up_proj", out
        yield f"{block}mlp.hook_post", f"{layer}.mlp.down_proj", into
    yield "language_model.ln_final.hook_normalized", f"{prefix}norm", out
    yield "language_model.hook_out", f"{prefix}norm", out
    yield "language_model.hook_logits", "lm_head", out


def fused_projections(hf: nn.Module, block: str, layer: str) -> Entries:
    """Phi-3's."""
    config, d_head = hf.config.text_config, d_head_of(hf.get_submodule(f"{layer}.self_attn"))
    d_q, d_kv = config.num_attention_heads * d_head, config.num_key_value_heads * d_head
    for name, start, width in (("q", 0, d_q), ("k", d_q, d_kv), ("v", d_q + d_kv, d_kv)):
        read = split_heads(columns(out, start, start + width), d_head)
        yield f"{block}attn.hook_{name}", f"{layer}.self_attn.qkv_proj", read
    yield f"{block}attn.hook_z", f"{layer}.self_attn.o_proj", split_heads(into, d_head)
    d_mlp = config.intermediate_size
    yield f"{block}mlp.hook_pre", f"{layer}.mlp.gate_up_proj", columns(out, 0, d_mlp)
    yield f"{block}mlp.hook_pre_linear", f"{layer}.mlp.gate_up_proj", columns(out, d_mlp, 2 * d_mlp)


def kind(hf: nn.Module) -> Callable[[nn.Module], Entries]:
    return llava if hasattr(hf, "lm_head") else clip if hasattr(hf, "text_model") else vit


Attend = Callable[..., tuple[Tensor, Tensor | None]]


def hf_eager(module: nn.Module) -> Attend:
    """Each of HF's files has its own."""
    return sys.modules[type(module).__module__].eager_attention_forward


def hf_sdpa(_module: nn.Module) -> Attend:
    return sdpa_attention_forward


@contextmanager
def attention_noted(
    blocks: dict[nn.Module, str], record: dict[str, Tensor], wanted: Callable[[str], bool]
) -> Iterator[None]:
    """While this lasts, HF's attention functions note what they are given, and do what they did.

    Scores are not to be had of HF: they are computed from its queries, keys and mask as its eager function computes
    them, and beside a fused kernel so is the pattern, which is HF's own otherwise.
    """

    def noting(function: Callable[[nn.Module], Attend]) -> Attend:
        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
            output, weights = function(module)(module, q, k, v, mask, **kwargs)
            block = blocks.get(module)
            if block is not None and wanted(f"{block}attn.hook_pattern"):
                is_causal = kwargs.get("is_causal", module.is_causal)
                scores = scores_of(module, q, k, mask, kwargs["scaling"], is_causal)
                pattern = scores.softmax(-1, dtype=torch.float32).to(q.dtype) if weights is None else weights
                noted = {"attn_scores": scores, "pattern": pattern}
                if block.startswith("language_model."):
                    noted |= {"rot_q": q.transpose(1, 2), "rot_k": k.transpose(1, 2)}
                record.update({f"{block}attn.hook_{name}": noted[name].detach().clone() for name in noted})
            return output, weights

        return attend

    try:
        for name, function in (("eager", hf_eager), ("sdpa", hf_sdpa)):
            ALL_ATTENTION_FUNCTIONS[name] = noting(function)
        yield
    finally:
        for name in ("eager", "sdpa"):
            del ALL_ATTENTION_FUNCTIONS[name]


def scores_of(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, is_causal: bool) -> Tensor:
    # HF's own way to repeat them: a copy in another layout is multiplied in another order.
    scores = q @ repeat_kv(k, getattr(module, "num_key_value_groups", 1)).transpose(-1, -2) * scaling
    if mask is None and is_causal and scores.shape[-2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        mask = torch.where(mask, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
    return scores + mask


@contextmanager
def recording(hf: nn.Module, wanted: Callable[[str], bool] = everything) -> Iterator[dict[str, Tensor]]:
    """While this lasts, a forward of ``hf`` fills the dictionary: our hook name to HF's tensor."""
    entries = [entry for entry in kind(hf)(hf) if wanted(entry[0])]
    blocks = {
        hf.get_submodule(f"{module}.{attention}"): name.removesuffix("hook_resid_pre")
        for name, module, _ in kind(hf)(hf)
        for attention in ("self_attn", "attention")
        if name.endswith("hook_resid_pre") and hasattr(hf.get_submodule(module), attention)
    }
    with watching(hf, entries) as record, attention_noted(blocks, record, wanted):
        yield record


@torch.no_grad()
def hf_activations(hf: nn.Module, batch: dict[str, Any], **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """HF's output, and everything inside by our names."""
    with recording(hf) as record:
        output = hf(**batch, **options)
    if kind(hf) is llava:
        record["vision_encoder.hook_out"] = features(hf, record) if "pixel_values" in batch else torch.empty(0)
    return output, {name: tensor for name, tensor in record.items() if tensor.numel()}


def features(hf: nn.Module, record: dict[str, Tensor]) -> Tensor:
    """The streams that LLaVA reads, side by side, class tokens too."""
    said, blocks = hf.config.vision_feature_layer, "vision_encoder.blocks."
    n_layers = hf.config.vision_config.num_hidden_layers
    streams = [record[f"{blocks}{layer}.hook_resid_pre"] for layer in range(n_layers)]
    streams.append(record[f"{blocks}{n_layers - 1}.hook_resid_post"])
    return torch.cat([streams[layer] for layer in (said if isinstance(said, list) else [said])], dim=-1)

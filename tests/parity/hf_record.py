"""What HF computes inside, by our hook names: forward hooks on its modules, nothing recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Read = Callable[[Any, Any], Tensor]
"""From a module's first input and its output to the tensor that is wanted."""


def into(given: Any, _made: Any) -> Tensor:
    return given


def out(_given: Any, made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made


def weights(_given: Any, made: Any) -> Tensor:
    return made[1]


def heads(read: Read, n_heads: int) -> Read:
    return lambda given, made: rearrange(read(given, made), "b p (h d) -> b p h d", h=n_heads)


def fused(index: int, n_heads: int) -> Read:
    return lambda _, made: rearrange(made, "b p (three h d) -> three b p h d", three=3, h=n_heads)[index]


def vision_table(hf: nn.Module) -> Iterator[tuple[str, str, Read]]:
    """Our name, HF's module, and what to read there."""
    config = hf.config.vision_config
    yield "vision_encoder.hook_full_embed", "vision_model.embeddings", out
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"vision_encoder.blocks.{layer}.", f"vision_model.encoder.layers.{layer}"
        yield ours + "hook_resid_pre", theirs, into
        yield ours + "hook_attn_in", theirs + ".layer_norm1", into
        yield ours + "ln1.hook_normalized", theirs + ".layer_norm1", out
        for index, name in enumerate("qkv"):
            yield ours + f"attn.hook_{name}", theirs + ".self_attn.qkv", fused(index, config.num_attention_heads)
        yield ours + "attn.hook_pattern", theirs + ".self_attn", weights
        yield ours + "attn.hook_z", theirs + ".self_attn.projection", heads(into, config.num_attention_heads)
        yield ours + "hook_attn_out", theirs + ".self_attn", out
        yield ours + "hook_resid_mid", theirs + ".layer_norm2", into
        yield ours + "hook_mlp_in", theirs + ".layer_norm2", into
        yield ours + "ln2.hook_normalized", theirs + ".layer_norm2", out
        yield ours + "mlp.hook_pre", theirs + ".mlp.fc1", out
        yield ours + "mlp.hook_post", theirs + ".mlp.fc2", into
        yield ours + "hook_mlp_out", theirs + ".mlp", out
        yield ours + "hook_resid_post", theirs, out
    yield "vision_encoder.ln_post.hook_normalized", "vision_model.post_layernorm", out
    yield "vision_encoder.hook_out", "vision_model.post_layernorm", out


def text_table(hf: nn.Module, ours: str, theirs: str) -> Iterator[tuple[str, str, Read]]:
    config = hf.config.text_config
    yield f"{ours}.hook_pos_embed", f"{theirs}.embeddings.position_embeddings", out
    yield f"{ours}.ln_pre.hook_normalized", f"{theirs}.embeddings.LayerNorm", out
    yield f"{ours}.hook_full_embed", f"{theirs}.embeddings", out
    for layer in range(config.num_hidden_layers):
        block, module = f"{ours}.blocks.{layer}.", f"{theirs}.encoder.layer.{layer}"
        yield block + "hook_resid_pre", module, into
        yield block + "hook_attn_in", module + ".attention.self.query", into
        yield from attention_table(block, "attn", module + ".attention", config.num_attention_heads)
        yield block + "hook_resid_mid", module + ".attention.output.LayerNorm", into
        yield block + "ln1.hook_normalized", module + ".attention.output.LayerNorm", out
        yield block + "hook_normalized_resid_mid", module + ".attention", out
        yield block + "hook_cross_attn_in", module + ".crossattention.self.query", into
        yield from attention_table(block, "cross_attn", module + ".crossattention", config.num_attention_heads)
        yield block + "hook_resid_mid_cross", module + ".crossattention.output.LayerNorm", into
        yield block + "ln_cross.hook_normalized", module + ".crossattention.output.LayerNorm", out
        yield block + "hook_normalized_resid_mid_cross", module + ".crossattention", out
        yield block + "hook_mlp_in", module + ".intermediate.dense", into
        yield block + "mlp.hook_pre", module + ".intermediate.dense", out
        yield block + "mlp.hook_post", module + ".output.dense", into
        yield block + "hook_mlp_out", module + ".output.dense", out
        yield block + "hook_resid_post", module + ".output.LayerNorm", into
        yield block + "ln2.hook_normalized", module + ".output.LayerNorm", out
        yield block + "hook_normalized_resid_post", module, out
    yield f"{ours}.hook_out", theirs, lambda _, made: made.last_hidden_state


def attention_table(block: str, ours: str, theirs: str, n_heads: int) -> Iterator[tuple[str, str, Read]]:
    for name, linear in (("q", "query"), ("k", "key"), ("v", "value")):
        yield f"{block}{ours}.hook_{name}", f"{theirs}.self.{linear}", heads(out, n_heads)
    yield f"{block}{ours}.hook_pattern", f"{theirs}.self", weights
    yield f"{block}{ours}.hook_z", f"{theirs}.output.dense", heads(into, n_heads)
    yield f"{block}hook_{ours}_out", f"{theirs}.output.dense", out


def decoder_table(hf: nn.Module, ours: str) -> Iterator[tuple[str, str, Read]]:
    yield from text_table(hf, ours, "text_decoder.bert")
    yield f"{ours}.ln_final.hook_normalized", "text_decoder.cls.predictions.transform.LayerNorm", out
    yield f"{ours}.hook_logits", "text_decoder.cls.predictions.decoder", out


def heads_table() -> Iterator[tuple[str, str, Read]]:
    yield "hook_itm_logits", "itm_head", out
    yield "hook_image_embeds", "vision_proj", lambda _, made: F.normalize(made, dim=-1)
    yield "hook_text_embeds", "text_proj", lambda _, made: F.normalize(made, dim=-1)


def table(hf: nn.Module, task: str) -> list[tuple[str, str, Read]]:
    entries = list(vision_table(hf))
    if task == "vqa":
        entries += [*text_table(hf, "question_encoder", "text_encoder"), *decoder_table(hf, "answer_decoder")]
    elif task == "caption":
        entries += decoder_table(hf, "text_decoder")
    else:
        entries += [*text_table(hf, "text_encoder", "text_encoder"), *heads_table()]
    return entries


WITHOUT_COUNTERPART = (
    # No module of HF's has these alone: sums and products inside a forward, or copies that only we make.
    *("hook_patch_embed", "hook_cls_embed", "vision_encoder.hook_pos_embed", ".hook_embed"),
    *("hook_attn_scores", "hook_result", "hook_scale", "hook_q_input", "hook_k_input", "hook_v_input"),
)
"""Ends of the names that no module of HF's computes as its input or output."""


def disagreements(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """By hook name, what keeps our tensors from being HF's to the bit; in our forward order."""
    wrong = {name: "HF has it, we have not" for name in expected if name not in found}
    for name, ours in found.items():
        if name not in expected:
            if not name.endswith(WITHOUT_COUNTERPART):
                wrong[name] = "we have it, HF has not"
            continue
        # HF adds one row of positions to every row of tokens; where we are looked at, each row has its own.
        theirs = expected[name].expand_as(ours)
        # In float16 a masked score may round to minus infinity.
        masked = (theirs == -torch.inf) & name.endswith("hook_attn_scores")
        if not bool((torch.isfinite(theirs) | masked).all()):
            wrong[name] = "HF's is not finite, which proves nothing"
        elif ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            wrong[name] = f"differs by {float((ours.double() - theirs.double()).abs().max()):.1e}"
    return wrong


def everything(_name: str) -> bool:
    return True


@contextmanager
def watching(hf: nn.Module, entries: Iterable[tuple[str, str, Read]]) -> Iterator[dict[str, Tensor]]:
    """While this lasts, a forward of ``hf`` fills the dictionary: our hook name to what an entry reads."""
    record: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, read: Read) -> Any:
        def hook(_module: nn.Module, args: tuple, kwargs: dict, made: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if (
                name not in record
            ):  # BLIP applies its last vision LayerNorm again, to a pooled output that no task reads
                record[name] = read(given, made).detach().clone()

        return module.register_forward_hook(hook, with_kwargs=True)

    handles = [watch(name, hf.get_submodule(module), read) for name, module, read in entries]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording(hf: nn.Module, task: str, wanted: Callable[[str], bool] = everything) -> Iterator[dict[str, Tensor]]:
    """While this lasts, a forward of ``hf`` fills the dictionary: our hook name to HF's tensor."""
    with watching(hf, [entry for entry in table(hf, task) if wanted(entry[0])]) as record:
        yield record


@torch.no_grad()
def hf_activations(hf: nn.Module, task: str, batch: dict[str, Any], **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """HF's output, and everything inside by our names."""
    with recording(hf, task) as record:
        output = hf(**batch, **options)
    return output, record

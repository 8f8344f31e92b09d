"""HF's BLIP as it would be without its known faults, for the cases in which ours follows the paper and not HF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention


@contextmanager
def cross_attention_masked(hf: nn.Module) -> Iterator[None]:
    """While this lasts, cross-attention keeps off padded positions.

    Since transformers 4.54 a text layer hands cross-attention its mask as ``attention_mask``, and cross-attention looks
    for it in ``encoder_attention_mask``; it is put there.
    """

    def rename(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if kwargs.get("encoder_hidden_states") is None:
            return None
        return args, kwargs | {"encoder_attention_mask": kwargs["attention_mask"]}

    attentions = [module for module in hf.modules() if isinstance(module, BlipTextSelfAttention)]
    handles = [module.register_forward_pre_hook(rename, with_kwargs=True) for module in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def vision_eps(hf: nn.Module, eps: float) -> Iterator[None]:
    """While this lasts, the vision tower's LayerNorms have this eps."""
    norms = [module for module in hf.vision_model.modules() if isinstance(module, nn.LayerNorm)]
    before = [norm.eps for norm in norms]
    try:
        for norm in norms:
            norm.eps = eps
        yield
    finally:
        for norm, old in zip(norms, before, strict=True):
            norm.eps = old


def with_first_token(batch: dict[str, Any], token: int) -> dict[str, Any]:
    ids: Tensor = batch["input_ids"].clone()
    ids[:, 0] = token
    return batch | {"input_ids": ids}

"""Which query may read which key. Axes: b batch, q query, k key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """``keep[b, 0, q, k]`` says whether query q may read key k."""

    keep: Bool[Tensor, "b 1 q k"]
    dtype: torch.dtype
    is_plain_causal: bool = False
    """Whether every query reads all keys up to its own, and no more: what a fused kernel knows by itself."""
    first_key: int = 0
    """No query reads a key before this one: all are out of the window."""

    @cached_property
    def bias(self) -> Float[Tensor, "b 1 q k"]:
        """What is added to the scores: 0, or the dtype's most negative number (HF's choice, not minus infinity)."""
        zero = torch.zeros((), dtype=self.dtype, device=self.keep.device)
        return torch.where(self.keep, zero, torch.finfo(self.dtype).min)

    @cached_property
    def in_any_row(self) -> Bool[Tensor, "q k"]:
        """Which query reads which key in some row; on the CPU."""
        return self.keep.any(0)[0].cpu()


def bidirectional_mask(
    attention_mask: Int[Tensor, "b k"] | Bool[Tensor, "b k"] | None, n_queries: int, dtype: torch.dtype
) -> Mask | None:
    """Every query reads every key that is not padding; None when nothing is masked."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    keep = attention_mask.bool()[:, None, None, :].expand(-1, 1, n_queries, -1)
    return Mask(keep, dtype)


def causal_mask(
    attention_mask: Int[Tensor, "b k"] | Bool[Tensor, "b k"] | None,
    n_queries: int,
    n_known: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> Mask | None:
    """Query i, at position ``n_known + i``, reads the keys up to its own, at most ``window`` of them; None when nothing
    is masked."""
    n_keys = n_known + n_queries
    padded = attention_mask is not None and not bool(attention_mask.all())
    # HF's rule, which decides between kernels: from a full window on, the mask is spelled out.
    slides = window is not None and n_keys >= window
    if n_queries == 1 and not padded and not slides:
        return None
    keys = torch.arange(n_keys, device=device)
    queries = keys[n_known:, None]
    keep = keys[None, :] <= queries
    if slides:
        assert window is not None
        keep = keep & (keys[None, :] > queries - window)
    keep = keep[None, None]
    if padded:
        assert attention_mask is not None
        keep = keep & attention_mask.bool()[:, None, None, :]
    first_key = 0 if window is None else max(0, n_known + 1 - window)
    return Mask(keep, dtype, is_plain_causal=not padded and not slides and n_known == 0, first_key=first_key)

"""The attention fix of AtP*: a patched query or key, through the softmax itself and not through its tangent.

Kramár et al. 2024, section 3.1.1. Where attention is saturated the softmax's gradient is near zero, however much a
patch would move it; what comes after the pattern is still linearised. Axes: b row, h head, q query, k key.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.components import Attention


def scores_of(
    attention: Attention, q: Float[Tensor, "b q h d_head"], k: Float[Tensor, "b k kv d_head"]
) -> Float[Tensor, "b h q k"]:
    """Attention scores before the mask; rotated where the model rotates."""
    keys = repeat(k, "b k kv d -> b k (kv group) d", group=attention.n_heads // attention.n_kv_heads)
    return einsum(q.float(), keys.float(), "b q h d, b k h d -> b h q k") / math.sqrt(attention.d_head)


def query_effect(
    gradient: Float[Tensor, "b h q k"], scores: Float[Tensor, "b h q k"], change: Float[Tensor, "b h q k"]
) -> Float[Tensor, "b q h"]:
    """Of each query patched: ``gradient . (softmax(scores + change) - softmax(scores))``."""
    patched = (scores + change).softmax(-1)
    return einsum(gradient, patched - scores.softmax(-1), "b h q k, b h q k -> b q h")


def key_effect(
    gradient: Float[Tensor, "b h q k"], scores: Float[Tensor, "b h q k"], change: Float[Tensor, "b h q k"]
) -> Float[Tensor, "b k h"]:
    """Of each key patched alone: one score of every query changes, and its softmax is made anew.

    A key's share p becomes ``sigmoid(logit(p) + change)``, and what it gains the others lose in proportion, so that the
    effect is ``(p' - p) (g - mean of the others' g)``: no softmax for each key.
    """
    pattern = scores.softmax(-1)
    best = scores.argmax(-1, keepdim=True)
    others = scores.scatter(-1, best, -torch.inf)
    # Of the largest share, 1 - p has no digits left where attention is saturated.
    rest = torch.where(
        torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True),
        others.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True),
        torch.log1p(-pattern.scatter(-1, best, 0.0)),
    )
    patched = torch.sigmoid(scores.log_softmax(-1) - rest + change)
    others_mean = (gradient * pattern).sum(-1, keepdim=True) - gradient * pattern
    others_mean = others_mean / rest.exp()
    of_best = (gradient * others.softmax(-1)).nan_to_num().sum(-1, keepdim=True)
    others_mean = others_mean.scatter(-1, best, of_best)
    return reduce((patched - pattern) * (gradient - others_mean), "b h q k -> b k h", "sum")


def for_each_key_head(attention: Attention, effect: Float[Tensor, "b k h"]) -> Float[Tensor, "b k kv"]:
    """Query heads that share a key are patched with it, all together."""
    return reduce(effect, "b k (kv group) -> b k kv", "sum", kv=attention.n_kv_heads)

"""Multi-head attention, self or cross, every tensor of it observable and editable.

Axes: b batch, p position, h head, kv head of keys and values (several h share one in grouped-query attention), q query,
k key. Projections keep HF's ``nn.Linear`` layout, fused or separate as in the checkpoint, so that the matrix products
are HF's; ``W_Q`` and the others are views in TransformerLens's layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.components.mask import Mask
from hooked_vlm.components.rotary import rotate
from hooked_vlm.components.weights import multiplied_out
from hooked_vlm.config import AttentionImplementation, TowerConfig
from hooked_vlm.hook_point import HookPoint, follow

ProjectionName = Literal["q", "k", "v"]
QKV: tuple[ProjectionName, ...] = ("q", "k", "v")


class Split(NamedTuple):
    """One of q, k, v's own per-head input, as it was shown, and where a hook has edited it."""

    shown: Float[Tensor, "b p h d_model"]
    edited: Bool[Tensor, "b p h"] | None
    normalize: Callable[[Tensor], Tensor] | None
    """The LayerNorm between what was shown and what is projected, in pre-LN blocks."""


Rotation = tuple[Float[Tensor, "#b p d_rotary"], Float[Tensor, "#b p d_rotary"]]
"""Cosines and sines of the positions."""

Reader = Callable[["Attention", Tensor, Tensor | None, Tensor | None], Tensor]
"""What reads keys and values in another way than query by query of one sequence: ``(attention, q, k, v) -> z``, each
``[b p h d_head]`` as the hook points show it; ``k`` and ``v`` are None where cross-attention has none of its own."""


@dataclass
class KeyValues:
    """The keys and values of one attention layer that are known already: earlier positions, or another tower's."""

    keys: Float[Tensor, "b kv k d_head"] | None = None
    values: Float[Tensor, "b kv k d_head"] | None = None

    def extend(
        self, keys: Float[Tensor, "b kv k d_head"], values: Float[Tensor, "b kv k d_head"]
    ) -> tuple[Float[Tensor, "b kv k_all d_head"], Float[Tensor, "b kv k_all d_head"]]:
        """Put new positions after the known ones, and return all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys.contiguous(), values.contiguous()
        return self.keys, self.values

    def reorder(self, rows: Int[Tensor, " b"]) -> None:
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys[rows], self.values[rows]

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


class Attention(nn.Module):
    """Attention (Vaswani et al. 2017) of ``x`` over itself or over ``other``.

    Under ``"eager"`` the output is made from ``hook_pattern``. Under ``"sdpa"`` it is the fused kernel's; scores and
    pattern are computed beside it when someone looks, and take its place when someone has changed them.
    """

    def __init__(
        self, config: TowerConfig, implementation: AttentionImplementation = "eager", *, is_cross: bool = False
    ) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_head
        self.n_kv_heads = config.n_heads if config.n_kv_heads is None else config.n_kv_heads
        self.scale_by, self.softmax_in_float32 = config.scale_by, config.softmax_in_float32
        self.packs_keys = config.packs_keys
        self.implementation: AttentionImplementation = implementation
        self.is_cross = is_cross
        self.fused_qkv = config.fused_qkv and not is_cross
        d_source = config.d_cross if is_cross else config.d_model
        assert d_source is not None
        d_q, d_kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        if self.fused_qkv:
            self.qkv = nn.Linear(config.d_model, d_q + 2 * d_kv, bias=config.qkv_bias)
        else:
            self.q = nn.Linear(config.d_model, d_q, bias=config.qkv_bias)
            self.k = nn.Linear(d_source, d_kv, bias=config.qkv_bias)
            self.v = nn.Linear(d_source, d_kv, bias=config.qkv_bias)
        self.o = nn.Linear(d_q, config.d_model, bias=config.out_bias)
        self.hook_q = HookPoint("b p h d_head")
        self.hook_k = HookPoint("b p h d_head")
        self.hook_v = HookPoint("b p h d_head")
        if config.rotary is not None:
            self.hook_rot_q = HookPoint("b p h d_head")
            self.hook_rot_k = HookPoint("b p h d_head")
        self.hook_attn_scores = HookPoint("b h q k")
        self.hook_pattern = HookPoint("b h q k", aliased=True)
        self.hook_z = HookPoint("b p h d_head", aliased=True)
        self.hook_result = HookPoint("b p h d_model")

    def forward(
        self,
        x: Float[Tensor, "b p d_model"],
        *,
        other: Float[Tensor, "b k d_other"] | None = None,
        mask: Mask | None = None,
        known: KeyValues | None = None,
        rotation: Rotation | None = None,
        split: tuple[Split | None, ...] = (),
        queries: Int[Tensor, " n"] | None = None,
        reader: Reader | None = None,
    ) -> Float[Tensor, "b n d_model"]:
        """``known`` holds this layer's earlier keys and values and is extended; for cross-attention it is filled once.

        ``split``: per-head inputs of q, k and v that were shown beside ``x``. ``queries``: which positions of ``x``
        have an output, by default all.
        """
        if self.is_cross:
            q, k, v = self.hook_q(self._heads(self.q(x))), *self._other_keys(other, known)
        else:
            q, k, v = self._project(x)
            if any(split):
                q, k, v = self._project_split((q, k, v), split)
            q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
            if rotation is not None:
                q, k = self.hook_rot_q(_rotated(q, rotation)), self.hook_rot_k(_rotated(k, rotation))
        if queries is not None:
            q = q[:, queries]
        if reader is None:
            z = self._attend(q.transpose(1, 2), *self._remember(k, v, known), mask).transpose(1, 2)
        else:
            z = reader(self, q, k, v)
        return self._output(self.hook_z(z))

    def _heads(self, projected: Float[Tensor, "b p hd"]) -> Float[Tensor, "b p h d_head"]:
        return projected.view(*projected.shape[:2], -1, self.d_head)

    def _project(
        self, x: Float[Tensor, "b p d_model"]
    ) -> tuple[Float[Tensor, "b p h d_head"], Float[Tensor, "b p kv d_head"], Float[Tensor, "b p kv d_head"]]:
        if self.fused_qkv:
            qkv = self.qkv(x)
            # Not split(), whose outputs autograd forbids to write to.
            q, k, v = (self._heads(qkv[..., self._rows(name)]) for name in QKV)
            return q, k, v
        return self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))

    def _project_split(self, projected: tuple[Tensor, ...], split: tuple[Split | None, ...]) -> tuple[Tensor, ...]:
        return tuple(
            main if own is None else self._with_heads(name, main, own)
            for name, main, own in zip(QKV, projected, split, strict=True)
        )

    def _with_heads(
        self, name: ProjectionName, main: Float[Tensor, "b p h d_head"], own: Split
    ) -> Float[Tensor, "b p h d_head"]:
        """The heads and positions that were edited are projected from their own inputs."""
        path = partial(self._project_heads, name, own)
        if own.edited is None:
            return follow(main, False, path, own.shown)
        heads = path()
        return torch.where(own.edited[..., None], heads, follow(main, False, lambda: heads, own.shown))

    def _project_heads(self, name: ProjectionName, own: Split) -> Float[Tensor, "b p h d_head"]:
        heads = own.shown if own.normalize is None else own.normalize(own.shown)
        projected = einsum(heads, self._weight(name), "b p h m, h m d_head -> b p h d_head")
        bias = self._bias(name)
        return projected if bias is None else projected + bias

    def _other_keys(
        self, other: Float[Tensor, "b k d_other"] | None, known: KeyValues | None
    ) -> tuple[Float[Tensor, "b k kv d_head"] | None, Float[Tensor, "b k kv d_head"] | None]:
        """None where they are known."""
        if other is None or (known is not None and known.keys is not None):
            return None, None
        return self.hook_k(self._heads(self.k(other))), self.hook_v(self._heads(self.v(other)))

    def _remember(
        self,
        k: Float[Tensor, "b p kv d_head"] | None,
        v: Float[Tensor, "b p kv d_head"] | None,
        known: KeyValues | None,
    ) -> tuple[Float[Tensor, "b kv k d_head"], Float[Tensor, "b kv k d_head"]]:
        """All keys and values there are now, head by head."""
        if k is None or v is None:
            assert known is not None
            assert known.keys is not None
            assert known.values is not None
            return known.keys, known.values
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.packs_keys:
            k, v = k.contiguous(), v.contiguous()
        return (k, v) if known is None else known.extend(k, v)

    def _attend(
        self,
        q: Float[Tensor, "b h q d_head"],
        k: Float[Tensor, "b kv k d_head"],
        v: Float[Tensor, "b kv k d_head"],
        mask: Mask | None,
    ) -> Float[Tensor, "b h q d_head"]:
        if self.implementation == "eager":
            scores = self.hook_attn_scores(self._scores(q, k, mask))
            return self.hook_pattern(self._softmax(scores)) @ self._for_each_query_head(v)
        z = self._fused(q, k, v, mask)
        if self.hook_attn_scores.is_hooked or self.hook_pattern.is_hooked:
            scores, scores_edited = self.hook_attn_scores.show(self._scores(q, k, mask))
            pattern, pattern_edited = self.hook_pattern.show(self._softmax(scores))
            z = follow(z, scores_edited or pattern_edited, lambda: pattern @ self._for_each_query_head(v), pattern)
        return z

    def _fused(
        self,
        q: Float[Tensor, "b h q d_head"],
        k: Float[Tensor, "b kv k d_head"],
        v: Float[Tensor, "b kv k d_head"],
        mask: Mask | None,
    ) -> Float[Tensor, "b h q d_head"]:
        """The kernel, called as HF calls it: which of its ways to share heads and to mask decides the last bit."""
        is_causal = mask is not None and mask.is_plain_causal
        keep = None if mask is None or is_causal else mask.keep
        if mask is not None and keep is not None and mask.first_key:
            # HF's cache forgets keys that are out of the window; as zeros in the sums they would change the last bit.
            k, v, keep = k[:, :, mask.first_key :], v[:, :, mask.first_key :], keep[..., mask.first_key :]
        groups, n_queries = self.n_heads // self.n_kv_heads, q.shape[2]
        if groups > 1 and keep is not None and n_queries == 1:
            # One query: the heads that share keys stand as the queries of one head.
            q = rearrange(q, "b (kv group) 1 d_head -> b kv group d_head", group=groups)
        elif groups > 1 and keep is not None:
            k, v = self._for_each_query_head(k), self._for_each_query_head(v)
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=keep, is_causal=is_causal, scale=self.d_head**-0.5, enable_gqa=k.shape[1] < q.shape[1]
        )
        return z.reshape(len(z), self.n_heads, n_queries, self.d_head)

    def _for_each_query_head(self, states: Float[Tensor, "b kv k d_head"]) -> Float[Tensor, "b h k d_head"]:
        groups = self.n_heads // self.n_kv_heads
        return states if groups == 1 else repeat(states, "b kv k d_head -> b (kv group) k d_head", group=groups)

    def _scores(
        self, q: Float[Tensor, "b h q d_head"], k: Float[Tensor, "b kv k d_head"], mask: Mask | None
    ) -> Float[Tensor, "b h q k"]:
        scores = q @ self._for_each_query_head(k).transpose(-1, -2)
        scores = scores * self.d_head**-0.5 if self.scale_by == "multiply" else scores / math.sqrt(self.d_head)
        return scores if mask is None else scores + mask.bias

    def _softmax(self, scores: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h q k"]:
        if self.softmax_in_float32:
            return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
        return scores.softmax(-1)

    def _output(self, z: Float[Tensor, "b p h d_head"]) -> Float[Tensor, "b p d_model"]:
        out = self.o(z.flatten(2))
        if self.hook_result.is_hooked:
            result, edited = self.hook_result.show(einsum(z, self.W_O, "b p h d_head, h d_head m -> b p h m"))
            out = follow(out, edited, lambda: self._sum_of(result), result)
        return out

    def _sum_of(self, result: Float[Tensor, "b p h d_model"]) -> Float[Tensor, "b p d_model"]:
        return result.sum(2) if self.b_O is None else result.sum(2) + self.b_O

    def _rows(self, name: ProjectionName) -> slice:
        """Which rows of the fused matrix make q, k or v."""
        d_q, d_kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        start = {"q": 0, "k": d_q, "v": d_q + d_kv}[name]
        return slice(start, start + (d_q if name == "q" else d_kv))

    def _weight(self, name: ProjectionName) -> Float[Tensor, "h d_in d_head"]:
        weight = multiplied_out((self.qkv if self.fused_qkv else getattr(self, name)).weight)
        weight = weight[self._rows(name)] if self.fused_qkv else weight
        return rearrange(weight, "(h d_head) d_in -> h d_in d_head", d_head=self.d_head)

    def _bias(self, name: ProjectionName) -> Float[Tensor, "h d_head"] | None:
        bias = self.qkv.bias if self.fused_qkv else getattr(self, name).bias
        if bias is None:
            return None
        return rearrange(
            bias[self._rows(name)] if self.fused_qkv else bias, "(h d_head) -> h d_head", d_head=self.d_head
        )

    @property
    def W_Q(self) -> Float[Tensor, "h d_model d_head"]:
        return self._weight("q")

    @property
    def W_K(self) -> Float[Tensor, "kv d_in d_head"]:
        return self._weight("k")

    @property
    def W_V(self) -> Float[Tensor, "kv d_in d_head"]:
        return self._weight("v")

    @property
    def W_O(self) -> Float[Tensor, "h d_head d_model"]:
        return rearrange(multiplied_out(self.o.weight), "d_model (h d_head) -> h d_head d_model", h=self.n_heads)

    @property
    def b_Q(self) -> Float[Tensor, "h d_head"] | None:
        """None where there is none, as in LLaMA; so the other biases."""
        return self._bias("q")

    @property
    def b_K(self) -> Float[Tensor, "kv d_head"] | None:
        return self._bias("k")

    @property
    def b_V(self) -> Float[Tensor, "kv d_head"] | None:
        return self._bias("v")

    @property
    def b_O(self) -> Float[Tensor, " d_model"] | None:
        return self.o.bias


def _rotated(states: Float[Tensor, "b p h d_head"], rotation: Rotation) -> Float[Tensor, "b p h d_head"]:
    return rotate(states.transpose(1, 2), *rotation).transpose(1, 2)

"""Multi-head attention, self or cross, every tensor of it observable and editable.

Axes: b batch, p position, h head, q query, k key. Projections keep HF's ``nn.Linear`` layout, fused or separate as in
the checkpoint, so that the matrix products are HF's; ``W_Q`` and the others are views in TransformerLens's layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.components.mask import Mask
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.hook_point import HookPoint, follow


class Split(NamedTuple):
    """One of q, k, v's own per-head input, as it was shown, and whether a hook has edited it."""

    shown: Float[Tensor, "b p h d_model"]
    edited: bool
    normalize: Callable[[Tensor], Tensor] | None
    """The LayerNorm between what was shown and what is projected, in pre-LN blocks."""


@dataclass
class KeyValues:
    """The keys and values of one attention layer that are known already: earlier positions, or another tower's."""

    keys: Float[Tensor, "b h k d_head"] | None = None
    values: Float[Tensor, "b h k d_head"] | None = None

    def extend(
        self, keys: Float[Tensor, "b h k d_head"], values: Float[Tensor, "b h k d_head"]
    ) -> tuple[Float[Tensor, "b h k_all d_head"], Float[Tensor, "b h k_all d_head"]]:
        """Put new positions after the known ones, and return all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys.contiguous(), values.contiguous()
        return self.keys, self.values

    def reorder(self, rows: Int[Tensor, " b"]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


class Attention(nn.Module):
    """Attention (Vaswani et al. 2017) of ``x`` over itself or over ``other``.

    Under ``"eager"`` the output is made from ``hook_pattern``. Under ``"sdpa"`` it is the fused kernel's; scores and
    pattern are computed beside it when someone looks, and take its place when someone has changed them.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        *,
        d_other: int | None = None,
        fused_qkv: bool = False,
        scale_by: Literal["multiply", "divide"] = "multiply",
        packs_keys: bool = False,
        implementation: AttentionImplementation = "eager",
    ) -> None:
        """``d_other``: width of the other tower's states, for cross-attention. ``scale_by``: whether scores are
        multiplied by ``d_head ** -0.5`` or divided by ``d_head ** 0.5``, which differ in the last bit.
        ``packs_keys``: whether keys and values are laid out head by head before they are used, as HF's decoders do,
        which put them through a cache; products over another layout differ in the last bit."""
        super().__init__()
        self.n_heads, self.d_head, self.scale_by, self.packs_keys = n_heads, d_head, scale_by, packs_keys
        self.implementation: AttentionImplementation = implementation
        self.is_cross = d_other is not None
        self.fused_qkv = fused_qkv
        d_source = d_model if d_other is None else d_other
        if fused_qkv:
            self.qkv = nn.Linear(d_model, 3 * n_heads * d_head)
        else:
            self.q = nn.Linear(d_model, n_heads * d_head)
            self.k = nn.Linear(d_source, n_heads * d_head)
            self.v = nn.Linear(d_source, n_heads * d_head)
        self.o = nn.Linear(n_heads * d_head, d_model)
        self.hook_q = HookPoint("b p h d_head")
        self.hook_k = HookPoint("b p h d_head")
        self.hook_v = HookPoint("b p h d_head")
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
        split: tuple[Split | None, ...] = (),
    ) -> Float[Tensor, "b p d_model"]:
        """``known`` holds this layer's earlier keys and values and is extended; for cross-attention it is filled once.

        ``split``: per-head inputs of q, k and v that were shown beside ``x``.
        """
        if self.is_cross:
            assert other is not None
            q, (k, v) = self.hook_q(self._heads(self.q(x))), self._other_keys(other, known)
        else:
            q, k, v = self._project(x)
            if any(split):
                q, k, v = self._project_split((q, k, v), split)
            q, (k, v) = self.hook_q(q), self._remember(self.hook_k(k), self.hook_v(v), known)
        z = self._attend(q.transpose(1, 2), k, v, mask)
        return self._output(self.hook_z(z.transpose(1, 2)))

    def _heads(self, projected: Float[Tensor, "b p hd"]) -> Float[Tensor, "b p h d_head"]:
        return projected.view(*projected.shape[:2], self.n_heads, self.d_head)

    def _project(
        self, x: Float[Tensor, "b p d_model"]
    ) -> tuple[Float[Tensor, "b p h d_head"], Float[Tensor, "b p h d_head"], Float[Tensor, "b p h d_head"]]:
        if self.fused_qkv:
            qkv = self.qkv(x).view(*x.shape[:2], 3, self.n_heads, self.d_head)
            # Not unbind(2), whose outputs autograd forbids to write to.
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        return self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))

    def _project_split(self, projected: tuple[Tensor, ...], split: tuple[Split | None, ...]) -> tuple[Tensor, ...]:
        names: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
        return tuple(
            main if own is None else follow(main, own.edited, partial(self._project_heads, name, own), own.shown)
            for name, main, own in zip(names, projected, split, strict=True)
        )

    def _project_heads(self, name: Literal["q", "k", "v"], own: Split) -> Float[Tensor, "b p h d_head"]:
        heads = own.shown if own.normalize is None else own.normalize(own.shown)
        return einsum(heads, self._weight(name), "b p h m, h m d_head -> b p h d_head") + self._bias(name)

    def _other_keys(
        self, other: Float[Tensor, "b k d_other"], known: KeyValues | None
    ) -> tuple[Float[Tensor, "b h k d_head"], Float[Tensor, "b h k d_head"]]:
        if known is not None and known.keys is not None and known.values is not None:
            return known.keys, known.values
        k, v = self.hook_k(self._heads(self.k(other))), self.hook_v(self._heads(self.v(other)))
        return self._remember(k, v, known)

    def _remember(
        self, k: Float[Tensor, "b p h d_head"], v: Float[Tensor, "b p h d_head"], known: KeyValues | None
    ) -> tuple[Float[Tensor, "b h k d_head"], Float[Tensor, "b h k d_head"]]:
        """All keys and values there are now, head by head."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if known is not None:
            return known.extend(k, v)
        return (k.contiguous(), v.contiguous()) if self.packs_keys else (k, v)

    def _attend(
        self,
        q: Float[Tensor, "b h q d_head"],
        k: Float[Tensor, "b h k d_head"],
        v: Float[Tensor, "b h k d_head"],
        mask: Mask | None,
    ) -> Float[Tensor, "b h q d_head"]:
        if self.implementation == "eager":
            return self.hook_pattern(self.hook_attn_scores(self._scores(q, k, mask)).softmax(-1)) @ v
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.keep)
        if self.hook_attn_scores.is_hooked or self.hook_pattern.is_hooked:
            scores, scores_edited = self.hook_attn_scores.show(self._scores(q, k, mask))
            pattern, pattern_edited = self.hook_pattern.show(scores.softmax(-1))
            z = follow(z, scores_edited or pattern_edited, lambda: pattern @ v, pattern)
        return z

    def _scores(
        self, q: Float[Tensor, "b h q d_head"], k: Float[Tensor, "b h k d_head"], mask: Mask | None
    ) -> Float[Tensor, "b h q k"]:
        scores = q @ k.transpose(-1, -2)
        scores = scores * self.d_head**-0.5 if self.scale_by == "multiply" else scores / math.sqrt(self.d_head)
        return scores if mask is None else scores + mask.bias

    def _output(self, z: Float[Tensor, "b p h d_head"]) -> Float[Tensor, "b p d_model"]:
        out = self.o(z.flatten(2))
        if self.hook_result.is_hooked:
            result, edited = self.hook_result.show(einsum(z, self.W_O, "b p h d_head, h d_head m -> b p h m"))
            out = follow(out, edited, lambda: result.sum(2) + self.b_O, result)
        return out

    def _rows(self, name: Literal["q", "k", "v"]) -> nn.Linear | tuple[Tensor, Tensor]:
        if not self.fused_qkv:
            return getattr(self, name)
        index = "qkv".index(name)
        return self.qkv.weight.chunk(3)[index], self.qkv.bias.chunk(3)[index]

    def _weight(self, name: Literal["q", "k", "v"]) -> Float[Tensor, "h d_in d_head"]:
        rows = self._rows(name)
        weight = rows.weight if isinstance(rows, nn.Linear) else rows[0]
        return rearrange(weight, "(h d_head) d_in -> h d_in d_head", h=self.n_heads)

    def _bias(self, name: Literal["q", "k", "v"]) -> Float[Tensor, "h d_head"]:
        rows = self._rows(name)
        bias = rows.bias if isinstance(rows, nn.Linear) else rows[1]
        return rearrange(bias, "(h d_head) -> h d_head", h=self.n_heads)

    @property
    def W_Q(self) -> Float[Tensor, "h d_model d_head"]:
        return self._weight("q")

    @property
    def W_K(self) -> Float[Tensor, "h d_in d_head"]:
        return self._weight("k")

    @property
    def W_V(self) -> Float[Tensor, "h d_in d_head"]:
        return self._weight("v")

    @property
    def W_O(self) -> Float[Tensor, "h d_head d_model"]:
        return rearrange(self.o.weight, "d_model (h d_head) -> h d_head d_model", h=self.n_heads)

    @property
    def b_Q(self) -> Float[Tensor, "h d_head"]:
        return self._bias("q")

    @property
    def b_K(self) -> Float[Tensor, "h d_head"]:
        return self._bias("k")

    @property
    def b_V(self) -> Float[Tensor, "h d_head"]:
        return self._bias("v")

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return self.o.bias

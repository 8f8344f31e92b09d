"""Attention of many runs over keys that most of them share.

A run's own keys stand at the positions that it holds; all others are the base run's, which are read in place and never
copied. Where a run owns every key, or none, the fused kernel does the work; else one softmax goes over both parts.

Axes: set, row, n queries of a set and row, k keys, own keys; h head, kv head of keys and values, group the query heads
that share one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from hooked_vlm.components import Attention, KeyValues, Mask
from hooked_vlm.sweep.tokens import Layout, Padded

PatternEdits = Callable[[Tensor, str, int], Tensor]
"""``(scores or pattern [row h n k], the hook point's name, set) -> the same, edited``."""


@dataclass(frozen=True, eq=False)
class SharedKeys:
    """How the queries of one attention layer read: what is shared, what is each set's own, what is masked or edited."""

    queries: Layout
    own: Layout | None
    """Positions of the keys that a set has anew; None where no set has any."""
    clean: KeyValues
    mask: Mask | None
    shut: Mapping[int, Bool[Tensor, "row _ n k"]] = field(default_factory=dict)
    """For some sets, which keys are knocked out for their queries."""
    edited: Sequence[int] = ()
    """Sets whose scores or pattern are edited, and are therefore spelled out."""
    edit: PatternEdits | None = None
    done: Callable[[], None] = lambda: None
    """Called when the keys have been read, and only the queries go on."""

    def __call__(
        self,
        attention: Attention,
        q: Float[Tensor, "1 token h d_head"],
        k: Float[Tensor, "1 own kv d_head"] | None,
        v: Float[Tensor, "1 own kv d_head"] | None,
    ) -> Float[Tensor, "1 token h d_head"]:
        z = torch.empty_like(q[0])
        for kind, members in self._groups():
            queries = self.queries.padded(members)
            if kind == "shared":
                queries.put(self._over_shared(attention, queries.of(q), queries, members), z)
                continue
            if kind == "spelled out":
                for one in members:
                    alone = self.queries.padded([one])
                    alone.put(self._spelled_out(attention, alone.of(q), alone, k, v, one), z)
                continue
            assert self.own is not None
            assert k is not None
            assert v is not None
            own = self.own.padded(members)
            read = self._over_own if kind == "own" else self._over_both
            queries.put(read(attention, queries.of(q), own.of(k), own.of(v), queries, own, members), z)
        self.done()
        return z[None]

    def _groups(self) -> list[tuple[str, list[int]]]:
        """Sets that read alike, those of like lengths together."""
        n_keys = self._clean_keys.shape[2]
        groups: dict[tuple[str, int, int], list[int]] = {}
        anew = np.zeros_like(self.queries.counts) if self.own is None else self.own.counts
        for one in np.flatnonzero(self.queries.counts).tolist():
            n_queries, n_own = int(self.queries.counts[one]), int(anew[one])
            kind = "shared" if n_own == 0 else "own" if n_own == n_keys else "both"
            if one in self.edited:
                kind = "spelled out"
            if one in self.shut:  # their masks are stacked, so no query may be padding
                key = (kind, n_queries, self.shut[one].shape[1])
            else:
                key = (kind, -_length_class(n_queries if kind == "own" else max(n_queries, n_own)), 0)
            groups.setdefault(key, []).append(one)
        return [(kind, members) for (kind, _, _), members in groups.items()]

    @property
    def _clean_keys(self) -> Float[Tensor, "row kv k d_head"]:
        assert self.clean.keys is not None
        return self.clean.keys

    @property
    def _clean_values(self) -> Float[Tensor, "row kv k d_head"]:
        assert self.clean.values is not None
        return self.clean.values

    def _kept(self, queries: Padded, members: Sequence[int]) -> Bool[Tensor, "set #row #h n k"] | None:
        """Which keys may be read; None for all."""
        kept = None
        if self.mask is not None:
            kept = rearrange(self.mask.keep[:, 0][:, queries.positions], "row set n k -> set row 1 n k")
        shut = [self.shut.get(one) for one in members]
        if any(own is not None for own in shut):
            is_open = ~torch.stack(shut)  # type: ignore[arg-type]
            kept = is_open if kept is None else kept & is_open
        return kept

    def _over_shared(
        self, attention: Attention, q: Float[Tensor, "set row n h d_head"], queries: Padded, members: Sequence[int]
    ) -> Float[Tensor, "set row n h d_head"]:
        """All sets' queries as those of one sequence."""
        kept = self._kept(queries, members)
        if kept is not None:
            kept = kept.expand(len(members), len(kept[0]), kept.shape[2], q.shape[2], self._clean_keys.shape[2])
            kept = rearrange(kept, "set row h n k -> row h (set n) k")
        q, kept = self._evenly(attention, rearrange(q, "set row n h d -> row h (set n) d"), kept, members)
        z = _fused(q, self._clean_keys, self._clean_values, kept)
        return rearrange(z, "row h (set n) d -> set row n h d", set=len(members))

    def _over_own(
        self,
        attention: Attention,
        q: Float[Tensor, "set row n h d_head"],
        k: Float[Tensor, "set row own kv d_head"],
        v: Float[Tensor, "set row own kv d_head"],
        queries: Padded,
        own: Padded,
        members: Sequence[int],
    ) -> Float[Tensor, "set row n h d_head"]:
        kept = self._kept(queries, members)
        if kept is not None:
            kept = kept.expand(-1, q.shape[1], -1, q.shape[2], k.shape[2]).flatten(0, 1)
        q, k, v = (rearrange(states, "set row n h d -> (set row) h n d") for states in (q, k, v))
        q, kept = self._evenly(attention, q, kept, members)
        return rearrange(_fused(q, k, v, kept), "(set row) h n d -> set row n h d", set=len(members))

    def _over_both(
        self,
        attention: Attention,
        q: Float[Tensor, "set row n h d_head"],
        k: Float[Tensor, "set row own kv d_head"],
        v: Float[Tensor, "set row own kv d_head"],
        queries: Padded,
        own: Padded,
        members: Sequence[int],
    ) -> Float[Tensor, "set row n h d_head"]:
        """One softmax over two lots of keys, which are never put into one tensor."""
        assert self.own is not None
        is_own = torch.from_numpy(self.own.mask[members]).to(q.device)
        n_shared = self._n_shared(attention, members)
        keys, values = self._clean_keys[:, :, :n_shared], self._clean_values[:, :, :n_shared]
        kept, groups = self._kept(queries, members), attention.n_heads // attention.n_kv_heads
        # As in the kernel: scores and their softmax in float32 at least, and rounded before values are summed.
        dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        scale = attention.d_head**-0.5
        lowest = torch.finfo(wide).min if self._reads_evenly(attention, members) else -torch.inf

        q = q * scale if dtype == wide else q
        q = rearrange(q, "set row n (kv group) d -> row kv (set group n) d", group=groups)
        shared = rearrange(
            q @ keys.transpose(-1, -2),
            "row kv (set group n) k -> set row (kv group) n k",
            set=len(members),
            group=groups,
        ).to(wide)
        per_set = rearrange(q, "row kv (set group n) d -> set row kv (group n) d", set=len(members), group=groups)
        anew = rearrange(
            per_set @ rearrange(k, "set row own kv d -> set row kv d own"),
            "set row kv (group n) own -> set row (kv group) n own",
            group=groups,
        ).to(wide)
        if dtype != wide:
            shared, anew = shared.mul_(scale), anew.mul_(scale)
        if kept is not None:
            shared.masked_fill_(~kept[..., :n_shared], lowest)
            index = own.positions[:, None, None, None].expand(*kept.shape[:-1], -1)
            anew.masked_fill_(~kept.gather(-1, index), lowest)
        shared.masked_fill_(is_own[:, None, None, None, :n_shared], -torch.inf)
        if not own.is_full:
            anew.masked_fill_(~own.held[:, None, None, None], -torch.inf)

        top = torch.maximum(shared.amax(-1, keepdim=True), anew.amax(-1, keepdim=True))
        top = top.clamp_(min=torch.finfo(top.dtype).min)
        shared, anew = shared.sub_(top).exp_(), anew.sub_(top).exp_()
        total = shared.sum(-1, keepdim=True) + anew.sum(-1, keepdim=True)
        shared, anew = shared.to(dtype), anew.to(dtype)
        z = rearrange(
            rearrange(shared, "set row (kv group) n k -> row kv (set group n) k", group=groups) @ values,
            "row kv (set group n) d -> set row (kv group) n d",
            set=len(members),
            group=groups,
        )
        z = z.to(wide) + rearrange(
            rearrange(anew, "set row (kv group) n own -> set row kv (group n) own", group=groups)
            @ rearrange(v, "set row own kv d -> set row kv own d"),
            "set row kv (group n) d -> set row (kv group) n d",
            group=groups,
        )
        z = z / total.clamp(min=torch.finfo(wide).tiny)
        return rearrange(z.to(dtype), "set row h n d -> set row n h d")

    def _reads_evenly(self, attention: Attention, members: Sequence[int]) -> bool:
        """Whether a query that the mask leaves nothing to read (padding) reads all keys alike, as in the plain run."""
        is_spelled_out = self.mask is not None and not self.mask.is_plain_causal
        return attention.implementation == "eager" and is_spelled_out and not any(one in self.shut for one in members)

    def _evenly(
        self,
        attention: Attention,
        q: Float[Tensor, "b h n d_head"],
        kept: Bool[Tensor, "b _ n k"] | None,
        members: Sequence[int],
    ) -> tuple[Float[Tensor, "b h n d_head"], Bool[Tensor, "b _ n k"] | None]:
        if kept is None or not self._reads_evenly(attention, members):
            return q, kept
        nothing = ~kept.any(-1, keepdim=True)
        return q.masked_fill(nothing, 0), kept | nothing

    def _n_shared(self, attention: Attention, members: Sequence[int]) -> int:
        """How many keys, from the first on, any of the sets shares; none that no query may read."""
        assert self.own is not None
        shared = ~self.own.mask[members]
        if self.mask is not None and not self._reads_evenly(attention, members):
            shared = shared & self.mask.in_any_row.numpy()[self.queries.mask[members].any(0)].any(0)
        return int(np.flatnonzero(shared.any(0)).max(initial=0)) + 1

    def _spelled_out(
        self,
        attention: Attention,
        q: Float[Tensor, "1 row n h d_head"],
        queries: Padded,
        k: Float[Tensor, "1 own kv d_head"] | None,
        v: Float[Tensor, "1 own kv d_head"] | None,
        one: int,
    ) -> Float[Tensor, "1 row n h d_head"]:
        """One set's scores and pattern, whole, as the plain forward has them."""
        assert self.edit is not None
        keys, values = self._clean_keys, self._clean_values
        if self.own is not None and self.own.counts[one]:
            assert k is not None
            assert v is not None
            own = self.own.padded([one])
            keys, values = keys.clone(), values.clone()
            keys[:, :, own.positions[0]] = rearrange(own.of(k), "1 row own kv d -> row kv own d")
            values[:, :, own.positions[0]] = rearrange(own.of(v), "1 row own kv d -> row kv own d")
        mask = self.mask and Mask(self.mask.keep[:, :, queries.positions[0]], self.mask.dtype)
        scores = attention._scores(rearrange(q, "1 row n h d -> row h n d"), keys, mask)
        scores = self.edit(scores, "hook_attn_scores", one)
        pattern = self.edit(attention._softmax(scores), "hook_pattern", one)
        return rearrange(pattern @ attention._for_each_query_head(values), "row h n d -> 1 row n h d")


def _fused(
    q: Float[Tensor, "b h n d_head"],
    k: Float[Tensor, "b kv k d_head"],
    v: Float[Tensor, "b kv k d_head"],
    kept: Bool[Tensor, "b _ n k"] | None,
) -> Float[Tensor, "b h n d_head"]:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=k.shape[1] < q.shape[1])


@cache
def _length_class(count: int) -> int:
    """Lengths that are run together: none is padded by more than a half."""
    return int(np.ceil(np.log(max(count, 1)) / np.log(1.5)))

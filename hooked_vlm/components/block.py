"""One transformer block: self-attention, cross-attention where the tower has it, MLP; pre-LN or post-LN.

Axes: b batch, p position, h head, kv head of keys and values, k the other tower's positions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.components.attention import Attention, KeyValues, Reader, Rotation, Split
from hooked_vlm.components.mask import Mask
from hooked_vlm.components.mlp import build_mlp
from hooked_vlm.components.norm import Norm, build_norm
from hooked_vlm.config import AttentionImplementation, TowerConfig
from hooked_vlm.hook_point import HookPoint


@dataclass
class LayerKnown:
    """What one layer's attentions know already."""

    attn: KeyValues = field(default_factory=KeyValues)
    cross_attn: KeyValues = field(default_factory=KeyValues)

    def reorder(self, rows: Int[Tensor, " b"]) -> None:
        self.attn.reorder(rows)
        self.cross_attn.reorder(rows)


class Block(nn.Module):
    """What both orders share. Build one with :func:`build_block`."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.has_cross_attention = config.d_cross is not None

    def forward(
        self,
        resid_pre: Float[Tensor, "b p d_model"],
        *,
        mask: Mask | None = None,
        known: LayerKnown | None = None,
        other: Float[Tensor, "b k d_other"] | None = None,
        other_mask: Mask | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Tensor, "b p d_model"]:
        stream = self.attend(resid_pre, mask=mask, known=None if known is None else known.attn, rotation=rotation)
        if self.has_cross_attention and other is not None:
            stream = self.cross_attend(
                stream, other, mask=other_mask, known=None if known is None else known.cross_attn
            )
        return self.feed_forward(stream)

    @abstractmethod
    def attend(
        self,
        stream: Float[Tensor, "b p d_model"],
        *,
        mask: Mask | None = None,
        known: KeyValues | None = None,
        rotation: Rotation | None = None,
        queries: Int[Tensor, " n"] | None = None,
        reader: Reader | None = None,
    ) -> Float[Tensor, "b n d_model"]:
        """The stream after self-attention, at the positions ``queries`` (by default all)."""

    @abstractmethod
    def cross_attend(
        self,
        stream: Float[Tensor, "b p d_model"],
        other: Float[Tensor, "_ k d_other"] | None,
        *,
        mask: Mask | None = None,
        known: KeyValues | None = None,
        reader: Reader | None = None,
    ) -> Float[Tensor, "b p d_model"]:
        """The stream after cross-attention over ``other``."""

    @abstractmethod
    def feed_forward(self, stream: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        """The stream after the MLP."""

    def _build_attention_inputs(self) -> None:
        self.hook_attn_in = _residual()
        self.hook_q_input = HookPoint("b p h d_model")
        self.hook_k_input = HookPoint("b p h d_model")
        self.hook_v_input = HookPoint("b p h d_model")

    def _split(self, attn_in: Float[Tensor, "b p d_model"], norm: Norm | None) -> tuple[Split | None, ...]:
        """Each of q, k and v's own per-head copy of what attention reads, where someone looks at it."""
        points = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        if not (points[0].is_hooked or points[1].is_hooked or points[2].is_hooked):
            return ()
        n_heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        return tuple(
            self._own_copies(point, n, attn_in, norm) if point.is_hooked else None
            for point, n in zip(points, n_heads, strict=True)
        )

    def _own_copies(
        self, point: HookPoint, n_heads: int, attn_in: Float[Tensor, "b p d_model"], norm: Norm | None
    ) -> Split:
        copies = attn_in.unsqueeze(2).expand(-1, -1, n_heads, -1)
        shown, edited = point.show(copies.clone() if point.is_edited else copies)
        where = (shown != copies).any(-1) if edited else None
        return Split(shown, where, None if norm is None else norm.normalize)


class PreNormBlock(Block):
    """A sub-layer reads the residual through a normalisation and adds to it."""

    def __init__(self, config: TowerConfig, implementation: AttentionImplementation) -> None:
        super().__init__(config)
        self.hook_resid_pre = _residual()
        self._build_attention_inputs()
        self.ln1 = build_norm(config)
        self.attn = Attention(config, implementation)
        self.hook_attn_out = HookPoint("b p d_model")
        self.hook_resid_mid = _residual()
        if self.has_cross_attention:
            self.hook_cross_attn_in = _residual()
            self.ln_cross = build_norm(config)
            self.cross_attn = Attention(config, implementation, is_cross=True)
            self.hook_cross_attn_out = HookPoint("b p d_model")
            self.hook_resid_mid_cross = _residual()
        self.hook_mlp_in = _residual()
        self.ln2 = build_norm(config)
        self.mlp = build_mlp(config)
        self.hook_mlp_out = HookPoint("b p d_model")
        self.hook_resid_post = _residual()

    def attend(
        self,
        stream: Float[Tensor, "b p d_model"],
        *,
        mask: Mask | None = None,
        known: KeyValues | None = None,
        rotation: Rotation | None = None,
        queries: Int[Tensor, " n"] | None = None,
        reader: Reader | None = None,
    ) -> Float[Tensor, "b n d_model"]:
        stream = self.hook_resid_pre(stream)
        attn_in = self.hook_attn_in(stream)
        split = self._split(attn_in, self.ln1)
        attn_out = self.attn(
            self.ln1(attn_in),
            mask=mask,
            known=known,
            rotation=rotation,
            split=split,
            queries=queries,
            reader=reader,
        )
        return self.hook_resid_mid(_at(stream, queries) + self.hook_attn_out(attn_out))

    def cross_attend(
        self,
        stream: Float[Tensor, "b p d_model"],
        other: Float[Tensor, "_ k d_other"] | None,
        *,
        mask: Mask | None = None,
        known: KeyValues | None = None,
        reader: Reader | None = None,
    ) -> Float[Tensor, "b p d_model"]:
        cross_in = self.ln_cross(self.hook_cross_attn_in(stream))
        cross_out = self.cross_attn(cross_in, other=other, mask=mask, known=known, reader=reader)
        return self.hook_resid_mid_cross(stream + self.hook_cross_attn_out(cross_out))

    def feed_forward(self, stream: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(stream))))
        return self.hook_resid_post(stream + mlp_out)


class PostNormBlock(Block):
    """A sub-layer reads the stream, adds to it, and a LayerNorm makes the sum the new stream."""

    def __init__(self, config: TowerConfig, implementation: AttentionImplementation) -> None:
        super().__init__(config)
        self.hook_resid_pre = _residual()
        self._build_attention_inputs()
        self.attn = Attention(config, implementation)
        self.hook_attn_out = HookPoint("b p d_model")
        self.hook_resid_mid = _residual()
        self.ln1 = build_norm(config)
        self.hook_normalized_resid_mid = _residual()
        if self.has_cross_attention:
            self.hook_cross_attn_in = _residual()
            self.cross_attn = Attention(config, implementation, is_cross=True)
            self.hook_cross_attn_out = HookPoint("b p d_model")
            self.hook_resid_mid_cross = _residual()
            self.ln_cross = build_norm(config)
            self.hook_normalized_resid_mid_cross = _residual()
        self.hook_mlp_in = _residual()
        self.mlp = build_mlp(config)
        self.hook_mlp_out = HookPoint("b p d_model")
        self.hook_resid_post = _residual()
        self.ln2 = build_norm(config)
        self.hook_normalized_resid_post = _residual()

    def attend(
        self,
        stream: Float[Tensor, "b p d_model"],
        *,
        mask: Mask | None = None,
        known: KeyValues | None = None,
        rotation: Rotation | None = None,
        queries: Int[Tensor, " n"] | None = None,
        reader: Reader | None = None,
    ) -> Float[Tensor, "b n d_model"]:
        stream = self.hook_resid_pre(stream)
        attn_in = self.hook_attn_in(stream)
        attn_out = self.attn(
            attn_in,
            mask=mask,
            known=known,
            rotation=rotation,
            split=self._split(attn_in, None),
            queries=queries,
            reader=reader,
        )
        stream = self.hook_resid_mid(_at(stream, queries) + self.hook_attn_out(attn_out))
        return self.hook_normalized_resid_mid(self.ln1(stream))

    def cross_attend(
        self,
        stream: Float[Tensor, "b p d_model"],
        other: Float[Tensor, "_ k d_other"] | None,
        *,
        mask: Mask | None = None,
        known: KeyValues | None = None,
        reader: Reader | None = None,
    ) -> Float[Tensor, "b p d_model"]:
        cross_in = self.hook_cross_attn_in(stream)
        cross_out = self.cross_attn(cross_in, other=other, mask=mask, known=known, reader=reader)
        stream = self.hook_resid_mid_cross(stream + self.hook_cross_attn_out(cross_out))
        return self.hook_normalized_resid_mid_cross(self.ln_cross(stream))

    def feed_forward(self, stream: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        mlp_out = self.hook_mlp_out(self.mlp(self.hook_mlp_in(stream)))
        return self.hook_normalized_resid_post(self.ln2(self.hook_resid_post(stream + mlp_out)))


def build_block(config: TowerConfig, implementation: AttentionImplementation) -> Block:
    """A block of the order that the config says."""
    return PreNormBlock(config, implementation) if config.norm_order == "pre" else PostNormBlock(config, implementation)


def _residual() -> HookPoint:
    # Whoever hooks one reader of the residual must not write into the others' tensor.
    return HookPoint("b p d_model", aliased=True)


def _at(stream: Float[Tensor, "b p d_model"], queries: Int[Tensor, " n"] | None) -> Float[Tensor, "b n d_model"]:
    return stream if queries is None else stream[:, queries]

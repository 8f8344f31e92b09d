"""Vision transformers: BLIP's and Google's (Dosovitskiy et al. 2021), CLIP's (Radford et al. 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.components import PatchEmbedding, build_norm
from hooked_vlm.config import AttentionImplementation, ViTConfig
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.models.tower import Tower, shown


class ViT(Tower):
    """Pixels to one state a patch, the class token first.

    ``hook_out`` is what other towers read: the last stream through ``ln_post``; or, with ``feature_layers``, those
    streams side by side, and then only the layers up to the last of them run, unless someone looks beyond.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig, attention: AttentionImplementation) -> None:
        super().__init__(config)
        self.embed = PatchEmbedding(config)
        self.hook_patch_embed = HookPoint("b p d_model")
        self.hook_cls_embed = HookPoint("b p d_model")
        self.hook_pos_embed = HookPoint("b p d_model")
        if config.has_pre_norm:
            self.ln_pre = build_norm(config)
        self.hook_full_embed = HookPoint("b p d_model", aliased=True)
        self._build_blocks(attention)
        if config.feature_layers is None:
            self.ln_post = build_norm(config)
            self.hook_out = HookPoint("b p d_model", aliased=True)
        else:
            self.hook_out = HookPoint("b p d_features", aliased=True)
            self.ln_post = build_norm(config)
            self.hook_pooled = HookPoint("b d_model")
            # What runs only where someone looks: LLaVA reads no further than its feature layers.
            beyond = (
                () if config.pools else (*self.blocks[max(config.feature_layers) :], self.ln_post, self.hook_pooled)
            )
            self.unread = [point for module in beyond for point in module.modules() if isinstance(point, HookPoint)]

    def forward(
        self, pixel_values: Float[Tensor, "b 3 height width"], *, interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b p d_features"]:
        resid = self.embed_patches(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if self.config.feature_layers is None:
            return self.read_out(self.run_blocks(resid))
        streams, done = {0: resid}, 0
        for layer in sorted({*self.config.feature_layers, *([len(self.blocks)] if self._is_looked_beyond else [])}):
            streams[layer] = resid = self.run_blocks(resid, start=done, stop=layer)
            done = layer
        features = self.read_out(*(streams[layer] for layer in self.config.feature_layers))
        if self._is_looked_beyond:
            self.pooled(resid)
        return features

    def read_out(self, *streams: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_features"]:
        """What other towers read, of the last stream, or of those of ``feature_layers``."""
        if self.config.feature_layers is None:
            return self.hook_out(self.ln_post(*streams))
        return self.hook_out(streams[0] if len(streams) == 1 else torch.cat(streams, dim=-1))

    def embed_patches(
        self, pixel_values: Float[Tensor, "b 3 height width"], *, interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b p d_model"]:
        """What block 0 reads."""
        batch, _, height, width = pixel_values.shape
        positions = self.embed.positions(height, width, interpolate=interpolate_pos_encoding)
        patches = self.hook_patch_embed(self.embed.patches(pixel_values))
        cls = self.hook_cls_embed(self.embed.cls.expand(batch, 1, -1).clone())
        pos = shown(self.hook_pos_embed, positions, batch)
        embedded = torch.cat([cls, patches], dim=1) + pos
        return self.hook_full_embed(self.ln_pre(embedded) if self.config.has_pre_norm else embedded)

    def pooled(self, last: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b d_model"]:
        """CLIP's image state: the last stream's class token, through ``ln_post``."""
        return self.hook_pooled(self.ln_post(last[:, :1])[:, 0])

    @property
    def _is_looked_beyond(self) -> bool:
        return any(point.is_hooked for point in self.unread)

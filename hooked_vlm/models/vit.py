"""BLIP's vision transformer (Dosovitskiy et al. 2021; Li et al. 2022)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.components import LayerNorm, PatchEmbedding
from hooked_vlm.config import AttentionImplementation, ViTConfig
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.models.tower import Tower, shown


class ViT(Tower):
    """Pixels to one state a patch, the class token first."""

    config: ViTConfig

    def __init__(self, config: ViTConfig, attention: AttentionImplementation) -> None:
        super().__init__(config)
        self.embed = PatchEmbedding(config.d_model, config.image_size, config.patch_size)
        self.hook_patch_embed = HookPoint("b p d_model")
        self.hook_cls_embed = HookPoint("b p d_model")
        self.hook_pos_embed = HookPoint("b p d_model")
        self.hook_full_embed = HookPoint("b p d_model", aliased=True)
        self._build_blocks(attention)
        self.ln_post = LayerNorm(config.d_model, config.eps)
        self.hook_out = HookPoint("b p d_model", aliased=True)

    def forward(
        self, pixel_values: Float[Tensor, "b 3 height width"], *, interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b p d_model"]:
        batch, _, height, width = pixel_values.shape
        positions = self.embed.positions(height, width, interpolate=interpolate_pos_encoding)
        patches = self.hook_patch_embed(self.embed.patches(pixel_values))
        cls = self.hook_cls_embed(self.embed.cls.expand(batch, 1, -1).clone())
        pos = shown(self.hook_pos_embed, positions, batch)
        resid = self.hook_full_embed(torch.cat([cls, patches], dim=1) + pos)
        return self.hook_out(self.ln_post(self.run_blocks(resid)))

"""What a tower's residual stream starts from: patches of an image, or tokens of a text."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.config import ViTConfig


class PatchEmbedding(nn.Module):
    """A convolution over patches, a class token, and learned positions."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.grid = self.image_size // self.patch_size
        self.cls = nn.Parameter(torch.zeros(1, 1, config.d_model))
        self.patch = nn.Conv2d(
            3, config.d_model, kernel_size=self.patch_size, stride=self.patch_size, bias=config.patch_bias
        )
        self.pos = nn.Parameter(torch.zeros(1, self.grid**2 + 1, config.d_model))

    def patches(self, pixel_values: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b p d_model"]:
        """One position a patch, row by row."""
        return self.patch(pixel_values.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)

    def positions(self, height: int, width: int, *, interpolate: bool) -> Float[Tensor, "1 p d_model"]:
        """Position embeddings for an image of this size in pixels, class token first.

        With ``interpolate``, another size than the checkpoint's gets the learned grid, bicubically resized.

        Raises:
            ValueError: another size, without ``interpolate``.
        """
        if (height, width) == (self.image_size, self.image_size):
            return self.pos
        if not interpolate:
            raise ValueError(
                f"image is {height}x{width} pixels, the model's position embeddings are for "
                f"{self.image_size}x{self.image_size}; pass interpolate_pos_encoding=True to resize them"
            )
        if min(height, width) < self.patch_size:
            raise ValueError(f"image is {height}x{width} pixels, smaller than one patch of {self.patch_size}")
        grid = rearrange(self.pos[:, 1:], "1 (row column) d -> 1 d row column", row=self.grid)
        size = (height // self.patch_size, width // self.patch_size)
        grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
        return torch.cat([self.pos[:, :1], rearrange(grid, "1 d row column -> 1 (row column) d")], dim=1)


class TokenEmbedding(nn.Module):
    """Token embeddings, and learned position embeddings for towers of ``n_ctx`` positions that have them."""

    def __init__(self, d_vocab: int, d_model: int, n_ctx: int | None = None) -> None:
        super().__init__()
        self.token = nn.Embedding(d_vocab, d_model)
        self.n_ctx = n_ctx
        if n_ctx is not None:
            self.pos = nn.Embedding(n_ctx, d_model)

    def positions(
        self, n_known: int, n_new: int, position_ids: Int[Tensor, "b p"] | None = None
    ) -> Float[Tensor, "_ p d_model"]:
        """Embeddings of the positions that follow the first ``n_known``, or of ``position_ids``."""
        assert self.n_ctx is not None
        if n_known + n_new > self.n_ctx:
            raise ValueError(f"{n_known + n_new} tokens are too many: the tower has {self.n_ctx} positions")
        if position_ids is None:
            position_ids = torch.arange(n_known, n_known + n_new, device=self.pos.weight.device)[None]
        return self.pos(position_ids)

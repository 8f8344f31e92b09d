"""Layer normalisation, observable: its scale and its output."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.hook_point import HookPoint, follow


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016) over the last axis.

    ``hook_scale`` is the standard deviation that is divided by; ``hook_normalized`` is the output, weight and bias
    applied, as in TransformerLens. The fused kernel computes the output unless someone has edited the scale.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.eps = eps
        self.hook_scale = HookPoint("b p 1", aliased=True)
        self.hook_normalized = HookPoint("b p d_model", aliased=True)

    def forward(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        normalized = self.normalize(x)
        if self.hook_scale.is_hooked:
            # In float32 at least, as the kernel does: in float16 a square soon overflows.
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            centered = wide - wide.mean(-1, keepdim=True)
            variance = centered.pow(2).mean(-1, keepdim=True)
            scale, edited = self.hook_scale.show((variance + self.eps).sqrt().to(x.dtype))
            normalized = follow(
                normalized, edited, lambda: (centered / scale).to(x.dtype) * self.weight + self.bias, scale
            )
        return self.hook_normalized(normalized)

    def normalize(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The arithmetic alone, past no hook."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

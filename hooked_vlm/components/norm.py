"""Normalisation, observable: its scale and its output."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.config import TowerConfig
from hooked_vlm.hook_point import HookPoint, follow


class Norm(nn.Module):
    """A normalisation over the last axis.

    ``hook_scale`` is what is divided by; ``hook_normalized`` is the output, weight and bias applied, as in
    TransformerLens. HF's own arithmetic makes the output unless someone has edited the scale.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps
        self.hook_scale = HookPoint("b p 1", aliased=True)
        self.hook_normalized = HookPoint("b p d_model", aliased=True)

    def forward(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        normalized = self.normalize(x)
        if self.hook_scale.is_hooked:
            # In float32 at least, as HF does: in float16 a square soon overflows.
            centered = self._centered(x.to(torch.promote_types(x.dtype, torch.float32)))
            mean_square = centered.pow(2).mean(-1, keepdim=True)
            scale, edited = self.hook_scale.show((mean_square + self.eps).sqrt().to(x.dtype))
            normalized = follow(normalized, edited, lambda: self._affine((centered / scale).to(x.dtype)), scale)
        return self.hook_normalized(normalized)

    @abstractmethod
    def normalize(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The arithmetic alone, past no hook."""

    @abstractmethod
    def _centered(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        """What is divided by the scale: the root of its mean square."""

    @abstractmethod
    def _affine(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]: ...


class LayerNorm(Norm):
    """LayerNorm (Ba et al. 2016): the scale is the standard deviation."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__(d_model, eps)
        self.bias = nn.Parameter(torch.zeros(d_model))

    def normalize(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def _centered(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        return x - x.mean(-1, keepdim=True)

    def _affine(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        return x * self.weight + self.bias


class RMSNorm(Norm):
    """RMSNorm (Zhang & Sennrich 2019): the scale is the root mean square; nothing is subtracted or added."""

    def normalize(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        # Not F.rms_norm: HF multiplies by the reciprocal root, and rounds to the dtype before the weight.
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def _centered(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        return x

    def _affine(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        return self.weight * x


def build_norm(config: TowerConfig) -> Norm:
    """A normalisation of the kind that the config says."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.d_model, config.eps)

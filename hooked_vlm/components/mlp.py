"""The feed-forward sub-layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.hook_point import HookPoint


def quick_gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that HF's ``hidden_act`` names."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unsupported activation {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """``W_out act(W_in x + b_in) + b_out``."""

    def __init__(self, d_model: int, d_mlp: int, act: str) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_mlp)
        self.down = nn.Linear(d_mlp, d_model)
        self.act = activation(act)
        self.hook_pre = HookPoint("b p d_mlp")
        self.hook_post = HookPoint("b p d_mlp")

    def forward(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        return self.down(self.hook_post(self.act(self.hook_pre(self.up(x)))))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.up.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        return self.up.bias

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.down.weight.T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return self.down.bias

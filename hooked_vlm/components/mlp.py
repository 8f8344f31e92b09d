"""The feed-forward sub-layer, plain or gated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.components.weights import multiplied_out
from hooked_vlm.config import TowerConfig
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
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that HF's ``hidden_act`` names."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unsupported activation {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """``W_out act(W_in x + b_in) + b_out``."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_mlp, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=config.mlp_bias)
        self.act = activation(config.act)
        self.hook_pre = HookPoint("b p d_mlp")
        self.hook_post = HookPoint("b p d_mlp")

    def forward(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        return self.down(self.hook_post(self.act(self.hook_pre(self.up(x)))))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return multiplied_out(self.up.weight).T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        return self.up.bias

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return multiplied_out(self.down.weight).T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return self.down.bias


class GatedMLP(nn.Module):
    """``W_out (act(W_gate x) * W_in x)`` (Shazeer 2020), gate and up separate or one matrix as in the checkpoint."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.d_mlp, self.fused_gate = config.d_mlp, config.fused_gate
        if config.fused_gate:
            self.gate_up = nn.Linear(config.d_model, 2 * config.d_mlp, bias=config.mlp_bias)
        else:
            self.gate = nn.Linear(config.d_model, config.d_mlp, bias=config.mlp_bias)
            self.up = nn.Linear(config.d_model, config.d_mlp, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=config.mlp_bias)
        self.act = activation(config.act)
        self.hook_pre = HookPoint("b p d_mlp")
        self.hook_pre_linear = HookPoint("b p d_mlp")
        self.hook_post = HookPoint("b p d_mlp")

    def forward(self, x: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        if self.fused_gate:
            both = self.gate_up(x)
            gate, up = both[..., : self.d_mlp], both[..., self.d_mlp :]
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(self.hook_post(self.act(self.hook_pre(gate)) * self.hook_pre_linear(up)))

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return (
            multiplied_out(self.gate_up.weight)[: self.d_mlp] if self.fused_gate else multiplied_out(self.gate.weight)
        ).T

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return (
            multiplied_out(self.gate_up.weight)[self.d_mlp :] if self.fused_gate else multiplied_out(self.up.weight)
        ).T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return multiplied_out(self.down.weight).T

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"] | None:
        """None where there are no biases, as in every published LLaVA."""
        if self.fused_gate:
            return None if self.gate_up.bias is None else self.gate_up.bias[: self.d_mlp]
        return self.gate.bias

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"] | None:
        if self.fused_gate:
            return None if self.gate_up.bias is None else self.gate_up.bias[self.d_mlp :]
        return self.up.bias

    @property
    def b_out(self) -> Float[Tensor, " d_model"] | None:
        return self.down.bias


def build_mlp(config: TowerConfig) -> MLP | GatedMLP:
    """A feed-forward of the kind that the config says."""
    return GatedMLP(config) if config.gated_mlp else MLP(config)

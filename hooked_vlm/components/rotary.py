"""Rotary position embeddings (Su et al. 2021): a head's dimensions turn, in pairs, by angles that grow with position.

Axes: b batch, p position, h head, d_rotary the dimensions that turn, pair two of them (i and i + d_rotary / 2). The
arithmetic is HF's, in HF's order, so that the numbers are HF's to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.config import RotaryConfig


class Rotary(nn.Module):
    """Cosines and sines of the angles at given positions.

    The inverse frequencies, which are the angles at position 1, are in float32 whatever the model's dtype, and neither
    buffer nor parameter: they are computed from the config on the CPU when first needed, and again for another device.

    ``"dynamic"`` frequencies depend on the longest position of the call, and on no earlier call. HF's module remembers
    the longest sequence since one shorter than ``n_ctx``, and goes on turning by its frequencies; the two differ only
    where a sequence of ``n_ctx`` positions or more follows a longer one, which a fresh HF module would turn as here.
    """

    def __init__(self, config: RotaryConfig) -> None:
        """Raises ``ValueError`` for an unknown ``config.kind``."""
        super().__init__()
        if config.kind not in KINDS:
            raise ValueError(f"unsupported rotary embeddings {config.kind!r}; supported: {', '.join(KINDS)}")
        self.config = config
        self.attention_factor = _attention_factor(config)
        self._inverse: Float[Tensor, " pair"] | None = None

    def forward(
        self, position_ids: Int[Tensor, "#b p"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "#b p d_rotary"], Float[Tensor, "#b p d_rotary"]]:
        angles = position_ids[..., None].float() * self._inverse_frequencies(position_ids)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return cos.to(dtype), sin.to(dtype)

    def _inverse_frequencies(self, position_ids: Int[Tensor, "#b p"]) -> Float[Tensor, " pair"]:
        if self.config.kind == "dynamic":
            n_positions = position_ids.max() + 1
            if n_positions > self.config.n_ctx:
                return dynamic(self.config, n_positions.float())
        if self._inverse is None or self._inverse.device != position_ids.device:
            self._inverse = KINDS[self.config.kind](self.config).to(position_ids.device)
        return self._inverse


def rotate(
    x: Float[Tensor, "b h p d_head"], cos: Float[Tensor, "#b p d_rotary"], sin: Float[Tensor, "#b p d_rotary"]
) -> Float[Tensor, "b h p d_head"]:
    """Queries or keys, their first d_rotary dimensions turned; the rest passes by."""
    d_rotary = cos.shape[-1]
    if d_rotary < x.shape[-1]:
        return torch.cat((rotate(x[..., :d_rotary], cos, sin), x[..., d_rotary:]), dim=-1)
    first, second = x[..., : d_rotary // 2], x[..., d_rotary // 2 :]
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def default(config: RotaryConfig) -> Float[Tensor, " pair"]:
    """Su et al. 2021."""
    return 1.0 / _frequencies(config, config.theta)


def linear(config: RotaryConfig) -> Float[Tensor, " pair"]:
    """Position interpolation (Chen et al. 2023): all angles divided by ``factor``."""
    return default(config) / config.factor


def dynamic(config: RotaryConfig, n_positions: float | Float[Tensor, ""] | None = None) -> Float[Tensor, " pair"]:
    """NTK-aware scaling, as in HF: theta grows with ``n_positions``, from ``n_ctx`` on.

    With ``n_positions`` a tensor all is computed in float32 on its device, as HF does for a sequence beyond ``n_ctx``.
    """
    n, d = config.n_ctx if n_positions is None else n_positions, config.d_rotary
    theta = config.theta * ((config.factor * n / config.n_ctx) - (config.factor - 1)) ** (d / (d - 2))
    return 1.0 / _frequencies(config, theta)


def llama3(config: RotaryConfig) -> Float[Tensor, " pair"]:
    """LLaMA 3.1 (Dubey et al. 2024): long wavelengths divided by ``factor``, short ones kept, a ramp between."""
    inverse, low, high = default(config), config.low_freq_factor, config.high_freq_factor
    n_ctx = _original_n_ctx(config)
    wavelengths = 2 * math.pi / inverse
    is_long, is_short = wavelengths > n_ctx / low, wavelengths < n_ctx / high
    share = (n_ctx / wavelengths - low) / (high - low)
    ramp = (1 - share) * inverse / config.factor + share * inverse
    return torch.where(is_long, inverse / config.factor, torch.where(is_short, inverse, ramp))


def yarn(config: RotaryConfig) -> Float[Tensor, " pair"]:
    """YaRN (Peng et al. 2023): pairs that turn often are kept, seldom ones divided by ``factor``, a ramp between."""
    frequencies, d = _frequencies(config, config.theta), config.d_rotary

    def pair(turns: float) -> float:
        """Which pair turns so many times over the original context."""
        return (d * math.log(_original_n_ctx(config) / (turns * 2 * math.pi))) / (2 * math.log(config.theta))

    low, high = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(d // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (config.factor * frequencies) * (1 - kept) + 1.0 / frequencies * kept


KINDS: dict[str, Callable[[RotaryConfig], Tensor]] = {
    "default": default,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
}
"""Inverse frequencies of each kind, in float32 on the CPU."""


def _frequencies(config: RotaryConfig, theta: float | Float[Tensor, ""]) -> Float[Tensor, " pair"]:
    device = theta.device if isinstance(theta, Tensor) else "cpu"
    return theta ** (torch.arange(0, config.d_rotary, 2, dtype=torch.float32, device=device) / config.d_rotary)


def _original_n_ctx(config: RotaryConfig) -> int:
    return config.n_ctx if config.original_n_ctx is None else config.original_n_ctx


def _attention_factor(config: RotaryConfig) -> float:
    """What cosines and sines are multiplied by, so that attention stays as sharp over a longer context (YaRN)."""
    if config.attention_factor is not None:
        return config.attention_factor
    if config.kind != "yarn" or config.factor <= 1:
        return 1.0
    log = math.log(config.factor)
    if config.mscale and config.mscale_all_dim:
        return (0.1 * config.mscale * log + 1.0) / (0.1 * config.mscale_all_dim * log + 1.0)
    return 0.1 * log + 1.0

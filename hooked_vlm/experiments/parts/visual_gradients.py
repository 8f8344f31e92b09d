"""Integrated gradients of an answer over the visual tokens (Sundararajan et al. 2017; Neo et al. 2025, section 4.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.analysis.runs import without_parameters
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import Span, VLMInputs
from hooked_vlm.metrics import at
from hooked_vlm.models import HookedVLM


class Attribution(NamedTuple):
    """What each visual token gives to a logit, on the way from a baseline."""

    values: Float[Tensor, "n d_model"]
    """One row a token, one number a feature; they sum to the logit's change, but for the steps' error."""
    change: float
    """The logit, less that of the baseline."""

    @property
    def error(self) -> float:
        """How far the sum is from the change, in parts of it."""
        return abs(float(self.values.sum()) - self.change) / max(abs(self.change), 1e-12)


def visual_site(model: HookedVLM) -> str:
    """Where visual tokens enter what reads them: LLaVA's language model, BLIP's text tower.

    Raises:
        ValueError: a model in which nothing reads a picture's tokens.
    """
    if "language_model.hook_merged_embed" in model.hook_dict:
        return "language_model.hook_merged_embed"
    if any(".cross_attn." in name for name in model.hook_names):
        return "vision_encoder.hook_out"
    raise ValueError(f"in {type(model).__name__} nothing reads a picture's tokens")


def integrated_gradients(
    model: HookedVLM,
    inputs: VLMInputs,
    tokens: Span,
    answer: Int[Tensor, "1"],
    *,
    baseline: Float[Tensor, " d_model"] | None = None,
    steps: int = 50,
    batch_size: int = 10,
) -> Attribution:
    """The gradient of the answer's logit with respect to visual tokens, integrated along the way from a baseline.

    The way is cut into equal steps, and the gradient taken in the middle of each: less error than at their ends.

    Args:
        inputs: of one row.
        tokens: positions that move together from the baseline to what they are.
        baseline: by default zeros.
        batch_size: how many steps run together.

    Raises:
        ValueError: several rows; inside ``torch.inference_mode``, where nothing has gradients.
    """
    if len(inputs) != 1:
        raise ValueError(f"integrated gradients are of one row, and these inputs have {len(inputs)}")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size are at least 1, not {steps} and {batch_size}")
    if torch.is_inference_mode_enabled():
        raise ValueError("integrated gradients need gradients, and torch.inference_mode() forbids them")
    site, places = visual_site(model), list(tokens[0])
    with torch.no_grad():
        own = model.run_with_hooks(inputs, stop_at=site)[0, places]
    start = torch.zeros_like(own) if baseline is None else baseline.to(own).expand_as(own)
    middles = (torch.arange(steps, device=own.device, dtype=torch.float32) + 0.5) / steps
    total = torch.zeros(own.shape, dtype=torch.float32, device=own.device)
    with without_parameters(model), torch.enable_grad():
        for part in middles.to(own.dtype).split(batch_size):
            states = (start + part[:, None, None] * (own - start)).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_logit(model, inputs, site, places, states, answer).sum(), states)
            total += gradient.float().sum(0)
    with torch.no_grad():
        ends = _logit(model, inputs, site, places, torch.stack([start, own]), answer)
    return Attribution((own - start).float() * total / steps, float(ends[1] - ends[0]))


def _logit(
    model: HookedVLM,
    inputs: VLMInputs,
    site: str,
    places: list[int],
    states: Float[Tensor, "rows n d_model"],
    answer: Int[Tensor, "1"],
) -> Float[Tensor, " rows"]:
    """The answer's logit, with other visual tokens in each row."""

    def put(activation: Tensor, hook: HookPoint) -> Tensor:
        replaced = activation.detach().clone()
        replaced[:, places] = states.to(activation)
        return replaced

    logits = model.run_with_hooks(inputs.repeat(len(states)), fwd_hooks=[(site, put)])
    return at(logits, -1)[:, int(answer)]

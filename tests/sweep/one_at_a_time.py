"""A sweep beside the same runs one at a time.

The tolerance is ``1e-5 * max(1, largest logit)``: rounding in fp32 grows with the numbers that are rounded. Positions
of padding are not compared. Their queries may have nothing to read, and what attention puts out there, which kernels
differ in, is nobody's: no other position reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.edits import Edit, edit_hooks
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.sweep import sweep

TOLERANCE = 1e-5

Inputs = VLMInputs | Mapping[str, Any]


@torch.no_grad()
def assert_as_alone(
    model: HookedVLM,
    inputs: Inputs,
    sets: Sequence[Sequence[Edit]],
    *,
    base: Sequence[Edit] = (),
    batch_size: Any = "auto",
    may_overflow: bool = False,
) -> list[float]:
    """Each set's logits are those of ``patch``, and of a run with the edits as plain hooks.

    Args:
        may_overflow: pass over sets whose lone run has numbers that are not finite.

    Returns:
        how much each set changes.
    """
    metric = without_padding(model, inputs)
    swept = sweep(model, inputs, sets, metric, base=base, batch_size=batch_size, progress=False)
    assert not swept.alone
    clean, effects, wrong = metric(model.patch(inputs, base)), [], []
    for edits, found in zip(sets, swept, strict=True):
        alone = metric(model.patch(inputs, [*base, *edits]))
        effects.append(distance(clean, alone))
        if may_overflow and not bool(alone.isfinite().all()):
            continue
        strayed = distance(found, alone)
        if not strayed <= TOLERANCE:
            wrong.append(f"{strayed:.1e}, the effect being {effects[-1]:.1e}: {told(edits)}")
    assert not wrong, "\n".join([f"after {told(base)}", *wrong])
    assert float(swept.noise_floor.max()) <= TOLERANCE * max(1.0, float(clean.abs().max()))
    return effects


@torch.no_grad()
def assert_patch_is_the_hook_path(model: HookedVLM, inputs: VLMInputs, edits: Sequence[Edit]) -> None:
    with model.hooks(edit_hooks(model, inputs, edits)):
        by_hooks = model(inputs)
    assert torch.equal(model.patch(inputs, edits), by_hooks), told(edits)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, by the largest number, or 1."""
    return float((one - other).abs().max()) / max(1.0, float(other.abs().max()))


def without_padding(model: HookedVLM, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """A metric that is all logits, but for those of padding, which are 0."""
    mask = padding_mask(model, inputs)

    def metric(logits: Tensor) -> Tensor:
        return logits if mask is None else logits.masked_fill(mask[..., None] == 0, 0)

    return metric


def padding_mask(model: HookedVLM, inputs: Inputs) -> Tensor | None:
    """Which positions of the logits are no padding; None where all are, or where logits have no positions."""
    inputs, tower = VLMInputs.of(inputs), model.towers[-1]
    if f"{tower}.hook_logits" not in model.hook_dict:
        return None
    return inputs.decoder_attention_mask if tower == "answer_decoder" else inputs.attention_mask


def told(edits: Sequence[Edit]) -> str:
    """Edits in a line, without their tensors."""
    return "[" + ", ".join(map(_told, edits)) + "]"


def _told(edit: Edit) -> str:
    fields = {name: _short(value) for name, value in vars(edit).items() if name != "site" and value is not None}
    return f"{type(edit).__name__}({', '.join([repr(edit.site), *(f'{name}={fields[name]}' for name in fields)])})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return repr(value.tolist()) if value.dtype == torch.bool else f"tensor{list(value.shape)}"
    return type(value).__name__ if callable(value) or isinstance(value, Mapping) else repr(value)

"""Which part of an activation is meant: positions, heads, neurons; and which of its positions are at hand.

Axes: b rows, p or q positions, n positions of one axis, held or all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import Span, VLMInputs

Indices = int | Sequence[int] | Tensor
"""Indices (negative ones from the end), or a boolean mask."""

Positions = Indices | str | Span | None
"""Indices, a mask ``[p]`` or one for each row ``[b p]``, a span or its name or its text, or all."""

APART = ("hook_patch_embed", "hook_cls_embed")
"""Hook points whose positions are not those of their tower's stream, which spans count."""


class EditError(ValueError):
    """An edit that does not fit its site, its source, or the inputs it is applied to."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some positions of an activation, where the others are not at hand: ``held`` of ``size`` (keys are all there)."""

    held: Int[Tensor, " n"]
    size: int
    grows: bool = False
    """Whether this is a generation, whose sequence is longer than the prompt that masks and spans were made for."""

    @classmethod
    def after(cls, n_known: int, n_new: int) -> Part:
        """What a generation reads after ``n_known`` positions."""
        return cls(torch.arange(n_known, n_known + n_new), n_known + n_new, grows=True)

    def of(self, tensor: Tensor, axis: int) -> Tensor:
        """The held part of a tensor that has all positions along ``axis``."""
        return tensor.index_select(axis, self.held.to(tensor.device))


def position_axis(hook: HookPoint) -> int | None:
    """Which axis of an activation counts positions (for scores and patterns, queries)."""
    return next((hook.axes.index(name) for name in ("p", "q") if name in hook.axes), None)


def whole_shape(shape: Sequence[int], hook: HookPoint, part: Part | None) -> tuple[int, ...]:
    """The shape of an activation if all its positions were at hand."""
    axis = position_axis(hook)
    if part is None or axis is None:
        return tuple(shape)
    return (*shape[:axis], part.size, *shape[axis + 1 :])


def position_mask(
    positions: Positions, shape: Sequence[int], hook: HookPoint, axis: str, inputs: VLMInputs, part: Part | None = None
) -> Bool[Tensor, "#b n"]:
    """Which positions of an axis are meant, of those at hand, for all rows or for each.

    Args:
        shape: the activation's.

    Raises:
        EditError: positions out of range, or for other rows than the activation's.
    """
    if axis not in hook.axes:
        raise EditError(f"{hook.name} has no positions: its axes are {' '.join(hook.axes)}")
    grows = part is not None and part.grows
    if axis == "k":
        part = None
    size = shape[hook.axes.index(axis)] if part is None else part.size
    if isinstance(positions, str):
        positions = inputs.positions(positions)
    if isinstance(positions, Span):
        mask = torch.stack([index_mask(row, size, "positions", hook.name) for row in positions.rows])
    elif isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.ndim == 2:
        mask = torch.stack([index_mask(_longer(row, size, grows), size, "positions", hook.name) for row in positions])
    else:
        assert positions is not None
        mask = index_mask(_longer(positions, size, grows), size, "positions", hook.name)[None]
    if grows and shape[0] % len(mask) == 0:
        mask = mask.repeat_interleave(shape[0] // len(mask), dim=0)  # each row's beams stand together
    if len(mask) not in (1, shape[0]):
        raise EditError(f"positions of {len(mask)} rows at {hook.name}, whose batch has {shape[0]}")
    return mask if part is None else part.of(mask, 1)


def positions_of(hook: HookPoint, axis: str, towers: Sequence[str]) -> str | None:
    """The tower whose stream an axis counts the positions of; cross-attention reads the tower before its own."""
    if hook.name.endswith(APART) or hook.tower not in towers:
        return None
    reads_other = ".cross_attn." in hook.name and (axis == "k" or hook.name.endswith(("hook_k", "hook_v")))
    return towers[towers.index(hook.tower) - reads_other]


def index_mask(indices: Indices, size: int, what: str, name: str) -> Bool[Tensor, " n"]:
    """Indices, or a mask, as a mask.

    Raises:
        EditError: what is neither, or out of range; says ``what`` was meant, at the hook point ``name``.
    """
    try:
        chosen = torch.as_tensor(indices).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise EditError(f"{what} at {name} are whole numbers or a mask, not {indices!r}") from None
    if chosen.dtype == torch.bool and chosen.ndim:
        if chosen.shape != (size,):
            raise EditError(f"a mask of {what} of shape {tuple(chosen.shape)} at {name}, which has {size}")
        return chosen
    if chosen.ndim > 1 or (chosen.is_floating_point() and chosen.numel()):
        given = f"{chosen.dtype} of shape {tuple(chosen.shape)}"
        raise EditError(f"{what} at {name} are one list of whole numbers or a mask, not {given}")
    chosen = chosen.flatten().long()
    wrong = chosen[(chosen < -size) | (chosen >= size)].tolist()
    if wrong:
        raise EditError(f"{what} {wrong} are out of range at {name}, which has {size}")
    mask = torch.zeros(size, dtype=torch.bool)
    mask[chosen] = True
    return mask


def spread(rows: Bool[Tensor, "#b n"], axes: tuple[str, ...], axis: str) -> Bool[Tensor, "..."]:
    """A mask of rows and one axis, to go with a whole activation."""
    shape = [1] * len(axes)
    shape[0], shape[axes.index(axis)] = rows.shape
    return rows.view(shape)


def _longer(positions: Any, size: int, grows: bool) -> Any:
    """A mask of a prompt's positions, for the longer sequence that a generation has made of it."""
    if grows and isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.ndim == 1:
        return torch.nn.functional.pad(positions, (0, max(0, size - len(positions))))
    return positions

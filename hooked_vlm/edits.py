"""What is done to a run, as data: where (a site), to which part of it (positions, heads, neurons), and what.

An edit is a frozen value. Edits in a list apply together in one run, in their order: ``model.patch(inputs, edits)``.
Because an edit says what it touches, the library can tell what it cannot change.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.cache import ActivationCache
from hooked_vlm.hooks import HookedModule, HookFunction, HookPoint, match_names
from hooked_vlm.inputs import Span, VLMInputs

Positions = int | Sequence[int] | str | Span | Tensor | None
"""Indices (negative ones from the end), a span or its name or its text, a boolean mask ``[p]`` or ``[b p]``, or all."""

SCORES = "hook_attn_scores"


class EditError(ValueError):
    """An edit that does not fit its site, its source, or the inputs it is applied to."""


@dataclass(frozen=True, eq=False)
class Edit:
    """Something that is done to the activation at ``site``, a hook name or a pattern of hook names.

    Attributes:
        positions: along the position axis (for scores and patterns, the query axis); None for all.
        heads: head indices; None for all.
        neurons: indices along the last axis; None for all.
    """

    site: str
    positions: Positions = field(default=None, kw_only=True)
    heads: int | Sequence[int] | None = field(default=None, kw_only=True)
    neurons: int | Sequence[int] | None = field(default=None, kw_only=True)

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        """What takes the place of the selected part; broadcasts against the activation."""
        raise NotImplementedError

    def apply(self, activation: Tensor, hook: HookPoint, inputs: VLMInputs) -> Tensor:
        """The activation with the selected part edited. The given tensor is not written to."""
        value = self.value(activation, hook).to(device=activation.device, dtype=activation.dtype)
        try:
            torch.broadcast_shapes(value.shape, activation.shape)
            value = value.expand_as(activation)
        except RuntimeError:
            raise EditError(
                f"{type(self).__name__} at {hook.name}: a value of shape {tuple(value.shape)} does not fit the "
                f"activation's {tuple(activation.shape)}"
            ) from None
        return torch.where(self._selected(activation, hook, inputs), value, activation)

    def hooks(self, model: HookedModule, inputs: VLMInputs, fired: set[str]) -> list[tuple[str, HookFunction]]:
        """The hooks that carry the edit out; each notes in ``fired`` that it did."""

        def run(activation: Tensor, hook: HookPoint) -> Tensor:
            fired.add(hook.name)
            return self.apply(activation, hook, inputs)

        return [(name, run) for name in match_names(self.site, model.hook_names)]

    def _selected(self, activation: Tensor, hook: HookPoint, inputs: VLMInputs) -> Bool[Tensor, "..."]:
        selected = torch.ones((1,) * activation.ndim, dtype=torch.bool, device=activation.device)
        position_axis = "q" if "q" in hook.axes else "p"
        for indices, axis, what in (
            (self.heads, "h", "heads"),
            (self.neurons, hook.axes[-1], "neurons"),
        ):
            if indices is not None:
                selected = selected & self._along(indices, axis, what, activation, hook)
        if self.positions is not None:
            rows = position_mask(self.positions, activation, hook, position_axis, inputs)
            selected = selected & _spread(rows, hook.axes, position_axis)
        return selected

    def _along(
        self, indices: int | Sequence[int], axis: str, what: str, activation: Tensor, hook: HookPoint
    ) -> Bool[Tensor, "..."]:
        if axis not in hook.axes:
            raise EditError(f"{hook.name} has no {what}: its axes are {' '.join(hook.axes)}")
        dim = hook.axes.index(axis)
        mask = _index_mask(indices, activation.shape[dim], what, hook.name).to(activation.device)
        return mask.view([-1 if place == dim else 1 for place in range(activation.ndim)])


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Put in what another run had there: a cache's activation of the same name, or a tensor.

    A source of one row serves every row of the batch.
    """

    source: ActivationCache | Mapping[str, Tensor] | Tensor

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        if isinstance(self.source, Tensor):
            return self.source
        if hook.name not in self.source:
            held = ", ".join(list(self.source)[:4])
            raise EditError(f"the source of Replace at {hook.name} has no such activation; it has {held}, ...")
        source = self.source[hook.name]
        if source.shape[1:] != activation.shape[1:] or len(source) not in (1, len(activation)):
            raise EditError(
                f"the source of Replace at {hook.name} has shape {tuple(source.shape)}, "
                f"the activation {tuple(activation.shape)}"
            )
        return source


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """Add a tensor or a number, as for steering."""

    amount: Tensor | float

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        return activation + _as_tensor(self.amount, activation)


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply by a tensor or a number."""

    factor: Tensor | float

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        return activation * _as_tensor(self.factor, activation)


@dataclass(frozen=True, eq=False)
class Zero(Edit):
    """Zero ablation."""

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        return torch.zeros((), dtype=activation.dtype, device=activation.device)


@dataclass(frozen=True, eq=False)
class Mean(Edit):
    """Mean ablation: a given mean (over a dataset, say), or the activation's own over the axes of ``over``."""

    mean: Tensor | None = None
    over: str = "b p"
    """Names of axes, as the hook point has them: ``"b"``, ``"p"``, ``"b p"``, ..."""

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        if self.mean is not None:
            return self.mean
        unknown = set(self.over.split()) - set(hook.axes)
        if unknown:
            raise EditError(f"Mean at {hook.name}: no axes {sorted(unknown)}; its axes are {' '.join(hook.axes)}")
        dims = [hook.axes.index(axis) for axis in self.over.split()]
        return activation.mean(dims, keepdim=True)


@dataclass(frozen=True, eq=False)
class Noise(Edit):
    """Gaussian noise, the same at every run for a seed, and for a row whatever the batch.

    ``"additive"`` adds N(0, std), in units of the row's own standard deviation at the site; ``"multiplicative"``
    multiplies by N(1, std).
    """

    std: float
    kind: Literal["additive", "multiplicative"] = "additive"
    seed: int = 0

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        # Each site has draws of its own.
        first_seed = self.seed + zlib.crc32(hook.name.encode())
        noise = torch.stack([gaussian(first_seed + row, activation.shape[1:]) for row in range(len(activation))])
        noise = noise.to(device=activation.device, dtype=activation.dtype)
        if self.kind == "multiplicative":
            return activation * (1 + self.std * noise)
        own = activation.flatten(1).std(dim=1).view(-1, *[1] * (activation.ndim - 1))
        return activation + self.std * own * noise


@dataclass(frozen=True, eq=False)
class BlockAttention(Edit):
    """Attention knockout: the chosen queries cannot read the chosen keys (Geva et al. 2023).

    ``site`` names attention layers: ``"question_encoder.blocks.*.cross_attn"``. ``positions`` are the queries. A
    query that may read nothing any more gets nothing: its attention output is that of an all-zero pattern.
    """

    keys: Positions = None

    def apply(self, activation: Tensor, hook: HookPoint, inputs: VLMInputs) -> Tensor:
        edges = self._selected(activation, hook, inputs)
        if self.keys is not None:
            keys = position_mask(self.keys, activation, hook, "k", inputs)
            edges = edges & _spread(keys, hook.axes, "k")
        return activation.masked_fill(edges, torch.finfo(activation.dtype).min)

    def hooks(self, model: HookedModule, inputs: VLMInputs, fired: set[str]) -> list[tuple[str, HookFunction]]:
        site = self.site if self.site.endswith(SCORES) else f"{self.site}.{SCORES}"
        blocked = super(BlockAttention, replace(self, site=site)).hooks(model, inputs, fired)
        return [hook for name, run in blocked for hook in self._with_dead_rows(name, run)]

    def _with_dead_rows(self, scores_name: str, block: HookFunction) -> list[tuple[str, HookFunction]]:
        dead: list[Tensor] = []

        def scores(activation: Tensor, hook: HookPoint) -> Tensor:
            shut = block(activation, hook=hook)
            assert shut is not None
            dead[:] = [shut.amax(-1, keepdim=True) <= torch.finfo(shut.dtype).min]
            return shut

        def pattern(activation: Tensor, hook: HookPoint) -> Tensor:
            # Softmax makes a row of equal scores uniform, however low they are.
            return activation.masked_fill(dead.pop(), 0)

        return [(scores_name, scores), (scores_name.replace(SCORES, "hook_pattern"), pattern)]


@dataclass(frozen=True, eq=False)
class Function(Edit):
    """Any function of the activation: ``fn(activation, hook=hook_point)``, as for a hook.

    What it changes cannot be known, so a planner must take everything from its site on to be changed.
    """

    fn: Callable[..., Tensor | None]

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        copy = activation.clone()
        result = self.fn(copy, hook=hook)
        return copy if result is None else result


def edit_hooks(
    model: HookedModule, inputs: VLMInputs, edits: Sequence[Edit], fired: set[str] | None = None
) -> list[tuple[str, HookFunction]]:
    """The hooks that carry ``edits`` out together, in their order."""
    fired = set() if fired is None else fired
    return [hook for edit in edits for hook in edit.hooks(model, inputs, fired)]


def gaussian(seed: int, shape: Sequence[int]) -> Float[Tensor, "..."]:
    """Standard normal numbers that depend on the seed alone, not on the device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def position_mask(
    positions: Positions, activation: Tensor, hook: HookPoint, axis: str, inputs: VLMInputs
) -> Bool[Tensor, "1_or_b n"]:
    """Which positions of an axis are meant, for all rows or for each.

    Raises:
        EditError: positions out of range, or a span of another tower than the axis's.
    """
    if axis not in hook.axes:
        raise EditError(f"{hook.name} has no positions: its axes are {' '.join(hook.axes)}")
    size = activation.shape[hook.axes.index(axis)]
    if isinstance(positions, str):
        positions = inputs.positions(positions)
    if isinstance(positions, Span):
        _check_tower(positions, hook, axis)
        if len(positions) not in (1, len(activation)):
            raise EditError(f"a span of {len(positions)} rows at {hook.name}, whose batch has {len(activation)}")
        rows = [_index_mask(row, size, "positions", hook.name) for row in positions.rows]
        return torch.stack(rows).to(activation.device)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        mask = positions if positions.ndim == 2 else positions[None]
        if mask.shape[-1] != size or len(mask) not in (1, len(activation)):
            raise EditError(
                f"a mask of shape {tuple(positions.shape)} at {hook.name}: {len(activation)} rows, {size} positions"
            )
        return mask.to(activation.device)
    indices = positions.tolist() if isinstance(positions, Tensor) else positions
    assert indices is not None
    return _index_mask(indices, size, "positions", hook.name)[None].to(activation.device)


def _check_tower(span: Span, hook: HookPoint, axis: str) -> None:
    crosses = axis == "k" and ".cross_attn." in hook.name
    if (span.tower == hook.tower) == crosses:
        whose = "the other tower's" if crosses else f"{hook.tower}'s"
        raise EditError(f"a span of {span.tower} cannot say positions at {hook.name}: they are {whose}")


def _index_mask(indices: int | Sequence[int], size: int, what: str, name: str) -> Bool[Tensor, " n"]:
    mask = torch.zeros(size, dtype=torch.bool)
    listed = [indices] if isinstance(indices, int) else [int(index) for index in indices]
    wrong = [index for index in listed if not -size <= index < size]
    if wrong:
        raise EditError(f"{what} {wrong} are out of range at {name}, which has {size}")
    mask[listed] = True
    return mask


def _spread(rows: Bool[Tensor, "1_or_b n"], axes: tuple[str, ...], axis: str) -> Bool[Tensor, "..."]:
    shape = [1] * len(axes)
    shape[0], shape[axes.index(axis)] = rows.shape
    return rows.view(shape)


def _as_tensor(number: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(number, dtype=like.dtype, device=like.device)

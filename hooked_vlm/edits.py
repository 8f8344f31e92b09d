"""What is done to a run, as data: where (a site), to which part of it (positions, heads, neurons), and what.

An edit is a frozen value. Edits in a list apply together in one run, in their order: ``model.patch(inputs, edits)``.
Because an edit says what it touches, the library can tell what it cannot change.
"""

from __future__ import annotations

import difflib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.cache import ActivationCache
from hooked_vlm.hook_point import HookFunction, HookPoint
from hooked_vlm.hooks import match_names
from hooked_vlm.inputs import Span, VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.selection import (
    EditError,
    Indices,
    Part,
    Positions,
    index_mask,
    position_axis,
    position_mask,
    positions_of,
    spread,
    whole_shape,
)

SCORES = "hook_attn_scores"


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """Something that is done to the activation at ``site``, a hook name or a pattern of hook names.

    Attributes:
        positions: along the position axis (for scores and patterns, the query axis); None for all. In a generation
            they count from the prompt's first, so that a step that reads none of them is not edited.
        heads: along the head axis; None for all.
        neurons: along the last axis (of scores and patterns: keys); None for all.
    """

    site: str
    positions: Positions = field(default=None, kw_only=True)
    heads: Indices | None = field(default=None, kw_only=True)
    neurons: Indices | None = field(default=None, kw_only=True)

    @property
    def is_local(self) -> bool:
        """Whether what it puts at a position depends on that position alone, so that others need not be at hand.

        A sweep is cheap only for edits that are. Override it in an edit of your own if it holds.
        """
        return False

    @abstractmethod
    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        """What takes the place of the selected part; broadcasts against the activation.

        ``part``: which positions the activation holds, where not all. Edits that are not local never get one, but in a
        generation.
        """

    def apply(self, activation: Tensor, hook: HookPoint, inputs: VLMInputs, part: Part | None = None) -> Tensor:
        """The activation with the selected part edited. The given tensor is not written to."""
        selected = self.selected(activation.shape, hook, inputs, part).to(activation.device)
        if part is not None and not bool(selected.any()):
            return activation
        value = self.value(activation, hook, part) if self.is_local else self.value(activation, hook)
        return torch.where(selected, self._fitted(value, activation, hook), activation)

    def hooks(self, model: HookedVLM, inputs: VLMInputs, fired: set[str]) -> list[tuple[str, HookFunction]]:
        """The hooks that carry the edit out; each notes in ``fired`` that it did."""

        def run(activation: Tensor, hook: HookPoint) -> Tensor:
            fired.add(hook.name)
            return self.apply(activation, hook, inputs, _at_hand(model, activation, hook))

        return [(name, run) for name in self.names(model, inputs)]

    def names(self, model: HookedVLM, inputs: VLMInputs) -> list[str]:
        """The hook points that are edited.

        Raises:
            HookError: the site is none, or matches none.
            EditError: a span of another tower.
        """
        names = [self.site] if self.site in model.hook_dict else match_names(self.site, model.hook_names)
        for name in names:
            self._check_spans(model, model.hook_dict[name], inputs)
        return names

    def places(self, hook: HookPoint) -> list[tuple[Positions, str]]:
        """Positions, each with the axis that they are along."""
        return [(self.positions, "q" if "q" in hook.axes else "p")]

    def _check_spans(self, model: HookedVLM, hook: HookPoint, inputs: VLMInputs) -> None:
        for positions, axis in self.places(hook):
            span = inputs.positions(positions) if isinstance(positions, str) else positions
            whose = positions_of(hook, axis, model.towers)
            if isinstance(span, Span) and axis in hook.axes and span.tower != whose:
                other = f"{whose}'s" if whose else "not those of its tower's stream"
                raise EditError(f"a span of {span.tower} cannot say positions at {hook.name}: they are {other}")

    def _fitted(self, value: Any, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        """``value``, given for all positions, as a tensor like the activation."""
        value = torch.as_tensor(value, dtype=activation.dtype, device=activation.device)
        shape, axis = whole_shape(activation.shape, hook, part), position_axis(hook)
        try:
            value = value.expand(shape)
        except RuntimeError:
            raise EditError(
                f"{type(self).__name__} at {hook.name}: a value of shape {tuple(value.shape)} does not fit the "
                f"activation's {shape}"
            ) from None
        return value if part is None or axis is None else part.of(value, axis)

    def selected(
        self, shape: Sequence[int], hook: HookPoint, inputs: VLMInputs, part: Part | None = None
    ) -> Bool[Tensor, "..."]:
        """Which numbers of an activation of some shape are edited; broadcasts against it.

        Raises:
            EditError: positions, heads or neurons that the activation does not have.
        """
        selected = torch.ones((1,) * len(shape), dtype=torch.bool)
        for indices, axis, what in ((self.heads, "h", "heads"), (self.neurons, hook.axes[-1], "neurons")):
            if indices is not None:
                selected = selected & self._along(indices, axis, what, shape, hook)
        for positions, axis in self.places(hook):
            if positions is not None:
                rows = position_mask(positions, shape, hook, axis, inputs, part)
                selected = selected & spread(rows, hook.axes, axis)
        return selected

    def _along(
        self, indices: Indices, axis: str, what: str, shape: Sequence[int], hook: HookPoint
    ) -> Bool[Tensor, "..."]:
        if axis not in hook.axes:
            raise EditError(f"{hook.name} has no {what}: its axes are {' '.join(hook.axes)}")
        dim = hook.axes.index(axis)
        mask = index_mask(indices, shape[dim], what, hook.name)
        return mask.view([-1 if place == dim else 1 for place in range(len(shape))])


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Put in what another run had there: a cache's activation of the same name, or a tensor.

    A source of one row serves every row of the batch.
    """

    source: ActivationCache | Mapping[str, Tensor] | Tensor

    @property
    def is_local(self) -> bool:
        return True

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        if isinstance(self.source, Tensor):
            return self._fitted(self.source, activation, hook, part)
        if hook.name not in self.source:
            nearest = difflib.get_close_matches(hook.name, list(self.source), n=4, cutoff=0)
            raise EditError(
                f"the source of Replace at {hook.name} has no such activation; nearest: {', '.join(nearest) or 'none'}"
            )
        source, shape = self.source[hook.name], whole_shape(activation.shape, hook, part)
        if source.shape[1:] != shape[1:] or len(source) not in (1, len(activation)):
            raise EditError(
                f"the source of Replace at {hook.name} has shape {tuple(source.shape)}, the activation {shape}"
            )
        return self._fitted(source, activation, hook, part)


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """Add a tensor or a number, as for steering."""

    amount: Tensor | float

    @property
    def is_local(self) -> bool:
        return True

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        return activation + self._fitted(self.amount, activation, hook, part)


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply by a tensor or a number."""

    factor: Tensor | float

    @property
    def is_local(self) -> bool:
        return True

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        return activation * self._fitted(self.factor, activation, hook, part)


@dataclass(frozen=True, eq=False)
class Zero(Edit):
    """Zero ablation."""

    @property
    def is_local(self) -> bool:
        return True

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        return torch.zeros((), dtype=activation.dtype, device=activation.device)


@dataclass(frozen=True, eq=False)
class Mean(Edit):
    """Mean ablation: a given mean (over a dataset, say), or the activation's own over the axes of ``over``."""

    mean: Tensor | None = None
    over: str = "b p"
    """Names of axes, as the hook point has them: ``"b"``, ``"p"``, ``"b p"``, ..."""

    @property
    def is_local(self) -> bool:
        return self.mean is not None

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        if self.mean is not None:
            return self._fitted(self.mean, activation, hook, part)
        unknown = set(self.over.split()) - set(hook.axes)
        if unknown or not self.over.split():
            raise EditError(f"Mean at {hook.name} over {self.over!r}: its axes are {' '.join(hook.axes)}")
        dims = [hook.axes.index(axis) for axis in self.over.split()]
        return activation.mean(dims, keepdim=True)


@dataclass(frozen=True, eq=False)
class Noise(Edit):
    """Gaussian noise: the same in every run for a seed, other at each site and row, whatever the batch's size.

    ``"additive"`` adds N(0, std), in units of the row's own standard deviation at the site; ``"multiplicative"``
    multiplies by N(1, std).
    """

    std: float
    kind: Literal["additive", "multiplicative"] = "additive"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("additive", "multiplicative"):
            raise EditError(f"Noise is 'additive' or 'multiplicative', not {self.kind!r}")

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        noise = torch.stack(
            [gaussian(activation.shape[1:], self.seed, hook.name, row) for row in range(len(activation))]
        ).to(activation.device)
        if self.kind == "multiplicative":
            return activation * (1 + self.std * noise)
        own = activation.flatten(1).float().std(dim=1).view(-1, *[1] * (activation.ndim - 1))
        return activation + self.std * own * noise


@dataclass(frozen=True, eq=False)
class BlockAttention(Edit):
    """Attention knockout: the chosen queries cannot read the chosen keys (Geva et al. 2023).

    ``site`` names attention layers: ``"question_encoder.blocks.*.cross_attn"``. ``positions`` are the queries. A
    query that may read nothing any more gets nothing: its attention output is that of an all-zero pattern.
    """

    keys: Positions = None

    @property
    def is_local(self) -> bool:
        return True

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        return torch.full((), torch.finfo(activation.dtype).min, dtype=activation.dtype, device=activation.device)

    def names(self, model: HookedVLM, inputs: VLMInputs) -> list[str]:
        site = self.site if self.site.endswith(SCORES) else f"{self.site}.{SCORES}"
        return super(BlockAttention, replace(self, site=site)).names(model, inputs)

    def places(self, hook: HookPoint) -> list[tuple[Positions, str]]:
        return [*super().places(hook), (self.keys, "k")]

    def hooks(self, model: HookedVLM, inputs: VLMInputs, fired: set[str]) -> list[tuple[str, HookFunction]]:
        return [
            hook
            for scores_name, run in super().hooks(model, inputs, fired)
            for hook in _with_dead_rows(scores_name, run)
        ]


def dead_rows(before: Float[Tensor, "b h q k"], shut: Float[Tensor, "b h q k"]) -> Bool[Tensor, "b h q 1"]:
    """The queries that a knockout has left nothing to read."""
    # A masked score is the dtype's lowest number, give or take the score that it was added to.
    nothing_left = shut.amax(-1, keepdim=True) < torch.finfo(shut.dtype).min / 2
    return nothing_left & (shut != before).any(-1, keepdim=True)


def _with_dead_rows(scores_name: str, block: HookFunction) -> list[tuple[str, HookFunction]]:
    dead: list[Tensor] = []

    def scores(activation: Tensor, hook: HookPoint) -> Tensor:
        shut = block(activation, hook=hook)
        assert shut is not None
        dead[:] = [dead_rows(activation, shut)]
        return shut

    def pattern(activation: Tensor, hook: HookPoint) -> Tensor:
        # Softmax makes a row of equal scores uniform, however low they are.
        return activation.masked_fill(dead.pop(), 0)

    return [(scores_name, scores), (scores_name.replace(SCORES, "hook_pattern"), pattern)]


@dataclass(frozen=True, eq=False)
class Function(Edit):
    """Any function of the activation: ``fn(activation, hook=hook_point)``, as for a hook.

    What it changes cannot be known, so a sweep computes all positions from its site on anew.
    """

    fn: Callable[..., Tensor | None]

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        copy = activation.clone()
        result = self.fn(copy, hook=hook)
        if result is None:
            return copy
        if not isinstance(result, Tensor) or result.shape != activation.shape:
            returned = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise EditError(f"Function at {hook.name} returned {returned}; the activation is {tuple(activation.shape)}")
        return result


def edit_hooks(
    model: HookedVLM, inputs: VLMInputs, edits: Sequence[Edit], fired: set[str] | None = None
) -> list[tuple[str, HookFunction]]:
    """The hooks that carry ``edits`` out together, in their order."""
    fired = set() if fired is None else fired
    return [hook for edit in edits for hook in edit.hooks(model, inputs, fired)]


def gaussian(shape: Sequence[int], *key: int | str) -> Float[Tensor, "..."]:
    """Standard normal numbers that depend on the key alone, not on the device."""
    seed = zlib.crc32(repr(key).encode())
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _at_hand(model: HookedVLM, activation: Tensor, hook: HookPoint) -> Part | None:
    """Which positions an activation holds: in a generation, those that are being read."""
    tower = model.get_submodule(hook.tower) if hook.tower in model.towers else None
    n_known, axis = getattr(tower, "n_known", 0), position_axis(hook)
    return None if not n_known or axis is None else Part.after(n_known, activation.shape[axis])

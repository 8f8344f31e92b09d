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

Indices = int | Sequence[int] | Tensor
"""Indices (negative ones from the end), or a boolean mask."""

Positions = Indices | str | Span | None
"""Indices, a mask ``[p]`` or one for each row ``[b p]``, a span or its name or its text, or all."""

SCORES = "hook_attn_scores"
APART = ("hook_patch_embed", "hook_cls_embed")
"""Hook points whose positions are not those of their tower's stream, which spans count."""


class EditError(ValueError):
    """An edit that does not fit its site, its source, or the inputs it is applied to."""


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """Something that is done to the activation at ``site``, a hook name or a pattern of hook names.

    Attributes:
        positions: along the position axis (for scores and patterns, the query axis); None for all. In a generation
            they count from the prompt's first, so that a step that reads none of them is not edited.
        heads: along the head axis; None for all.
        neurons: along the last axis; None for all.
    """

    site: str
    positions: Positions = field(default=None, kw_only=True)
    heads: Indices | None = field(default=None, kw_only=True)
    neurons: Indices | None = field(default=None, kw_only=True)

    @abstractmethod
    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        """What takes the place of the selected part; broadcasts against the activation."""

    def apply(self, activation: Tensor, hook: HookPoint, inputs: VLMInputs, n_known: int = 0) -> Tensor:
        """The activation with the selected part edited. The given tensor is not written to.

        ``n_known``: how many positions came before the activation's first, in a generation.
        """
        selected = self._selected(activation, hook, inputs, n_known)
        if n_known > 0 and not bool(selected.any()):
            return activation
        value = self._fitted(self.value(activation, hook), activation, hook)
        return torch.where(selected, value, activation)

    def hooks(self, model: HookedVLM, inputs: VLMInputs, fired: set[str]) -> list[tuple[str, HookFunction]]:
        """The hooks that carry the edit out; each notes in ``fired`` that it did."""

        def run(activation: Tensor, hook: HookPoint) -> Tensor:
            fired.add(hook.name)
            tower = model.get_submodule(hook.tower) if hook.tower in model.towers else None
            return self.apply(activation, hook, inputs, getattr(tower, "n_known", 0))

        names = match_names(self.site, model.hook_names)
        for name in names:
            self._check_spans(model, model.hook_dict[name], inputs)
        return [(name, run) for name in names]

    def _places(self, hook: HookPoint) -> list[tuple[Positions, str]]:
        """Positions, each with the axis that they are along."""
        return [(self.positions, "q" if "q" in hook.axes else "p")]

    def _check_spans(self, model: HookedVLM, hook: HookPoint, inputs: VLMInputs) -> None:
        for positions, axis in self._places(hook):
            span = inputs.positions(positions) if isinstance(positions, str) else positions
            whose = _positions_of(hook, axis, model.towers)
            if isinstance(span, Span) and axis in hook.axes and span.tower != whose:
                other = f"{whose}'s" if whose else "not those of its tower's stream"
                raise EditError(f"a span of {span.tower} cannot say positions at {hook.name}: they are {other}")

    def _fitted(self, value: Any, activation: Tensor, hook: HookPoint) -> Tensor:
        """``value`` as a tensor like the activation."""
        value = torch.as_tensor(value, dtype=activation.dtype, device=activation.device)
        try:
            return value.expand_as(activation)
        except RuntimeError:
            raise EditError(
                f"{type(self).__name__} at {hook.name}: a value of shape {tuple(value.shape)} does not fit the "
                f"activation's {tuple(activation.shape)}"
            ) from None

    def _selected(
        self, activation: Tensor, hook: HookPoint, inputs: VLMInputs, n_known: int = 0
    ) -> Bool[Tensor, "..."]:
        selected = torch.ones((1,) * activation.ndim, dtype=torch.bool, device=activation.device)
        for indices, axis, what in ((self.heads, "h", "heads"), (self.neurons, hook.axes[-1], "neurons")):
            if indices is not None:
                selected = selected & self._along(indices, axis, what, activation, hook)
        for positions, axis in self._places(hook):
            if positions is not None:
                rows = position_mask(positions, activation, hook, axis, inputs, n_known)
                selected = selected & _spread(rows, hook.axes, axis)
        return selected

    def _along(
        self, indices: Indices, axis: str, what: str, activation: Tensor, hook: HookPoint
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
            nearest = difflib.get_close_matches(hook.name, list(self.source), n=4, cutoff=0)
            raise EditError(
                f"the source of Replace at {hook.name} has no such activation; nearest: {', '.join(nearest) or 'none'}"
            )
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
        return activation + self._fitted(self.amount, activation, hook)


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply by a tensor or a number."""

    factor: Tensor | float

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        return activation * self._fitted(self.factor, activation, hook)


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

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
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

    def value(self, activation: Tensor, hook: HookPoint) -> Tensor:
        return torch.full((), torch.finfo(activation.dtype).min, dtype=activation.dtype, device=activation.device)

    def hooks(self, model: HookedVLM, inputs: VLMInputs, fired: set[str]) -> list[tuple[str, HookFunction]]:
        site = self.site if self.site.endswith(SCORES) else f"{self.site}.{SCORES}"
        blocked = super(BlockAttention, replace(self, site=site)).hooks(model, inputs, fired)
        return [hook for name, run in blocked for hook in self._with_dead_rows(name, run)]

    def _places(self, hook: HookPoint) -> list[tuple[Positions, str]]:
        return [*super()._places(hook), (self.keys, "k")]

    def _with_dead_rows(self, scores_name: str, block: HookFunction) -> list[tuple[str, HookFunction]]:
        dead: list[Tensor] = []

        def scores(activation: Tensor, hook: HookPoint) -> Tensor:
            shut = block(activation, hook=hook)
            assert shut is not None
            # A masked score is the dtype's lowest number, give or take the score that it was added to.
            nothing_left = shut.amax(-1, keepdim=True) < torch.finfo(shut.dtype).min / 2
            dead[:] = [nothing_left & (shut != activation).any(-1, keepdim=True)]
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


def position_mask(
    positions: Positions, activation: Tensor, hook: HookPoint, axis: str, inputs: VLMInputs, n_known: int = 0
) -> Bool[Tensor, "#b n"]:
    """Which positions of an axis are meant, for all rows or for each.

    ``n_known`` positions came before the activation's first, in a generation; keys are all there, earlier ones too.

    Raises:
        EditError: positions out of range, or for other rows than the activation's.
    """
    if axis not in hook.axes:
        raise EditError(f"{hook.name} has no positions: its axes are {' '.join(hook.axes)}")
    before = 0 if axis == "k" else n_known
    size = before + activation.shape[hook.axes.index(axis)]
    if isinstance(positions, str):
        positions = inputs.positions(positions)
    if isinstance(positions, Span):
        mask = torch.stack([_index_mask(row, size, "positions", hook.name) for row in positions.rows])
    elif isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.ndim == 2:
        mask = torch.stack(
            [_index_mask(_longer(row, size, n_known), size, "positions", hook.name) for row in positions]
        )
    else:
        assert positions is not None
        mask = _index_mask(_longer(positions, size, n_known), size, "positions", hook.name)[None]
    if n_known > 0 and len(activation) % len(mask) == 0:
        mask = mask.repeat_interleave(len(activation) // len(mask), dim=0)  # each row's beams stand together
    if len(mask) not in (1, len(activation)):
        raise EditError(f"positions of {len(mask)} rows at {hook.name}, whose batch has {len(activation)}")
    return mask[:, before:].to(activation.device)


def _positions_of(hook: HookPoint, axis: str, towers: Sequence[str]) -> str | None:
    """The tower whose stream an axis counts the positions of; cross-attention reads the tower before its own."""
    if hook.name.endswith(APART) or hook.tower not in towers:
        return None
    reads_other = ".cross_attn." in hook.name and (axis == "k" or hook.name.endswith(("hook_k", "hook_v")))
    return towers[towers.index(hook.tower) - reads_other]


def _longer(positions: Any, size: int, n_known: int) -> Any:
    """A mask of a prompt's positions, for the longer sequence that a generation has made of it."""
    if n_known > 0 and isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.ndim == 1:
        return torch.nn.functional.pad(positions, (0, max(0, size - len(positions))))
    return positions


def _index_mask(indices: Indices, size: int, what: str, name: str) -> Bool[Tensor, " n"]:
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


def _spread(rows: Bool[Tensor, "#b n"], axes: tuple[str, ...], axis: str) -> Bool[Tensor, "..."]:
    shape = [1] * len(axes)
    shape[0], shape[axes.index(axis)] = rows.shape
    return rows.view(shape)

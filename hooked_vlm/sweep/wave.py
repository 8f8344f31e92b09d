"""Many edited runs at once, each only where it differs from the base run.

All sets of a chunk go through the model together. A set joins where its first edit is, with the positions that the edit
changes, and from there on holds the positions that its edits have reached. A stage that no set has reached is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from hooked_vlm.components import Rotation
from hooked_vlm.edits import BlockAttention, Edit, dead_rows
from hooked_vlm.hook_point import HookFunction, HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.selection import Part
from hooked_vlm.sweep.places import PATTERNS, Stage
from hooked_vlm.sweep.plan import Chunk, Compiler, Step, said_of
from hooked_vlm.sweep.reader import SharedKeys
from hooked_vlm.sweep.tokens import Layout, Packed, nothing
from hooked_vlm.sweep.trail import TowerTrail, Trail


class Wave:
    """One chunk on its way through a model."""

    def __init__(self, compiler: Compiler, inputs: VLMInputs, trail: Trail, chunk: Chunk) -> None:
        self.compiler, self.inputs, self.trail, self.chunk = compiler, inputs, trail, chunk
        self.model = compiler.model
        self.reached: dict[str, Packed] = {}
        """What each tower put out, of the sets that reach its end."""
        self._here: Layout | None = None
        self._other: Layout | None = None
        self._sites: dict[str, dict[int, list[Edit]]] = {}
        for row, one in enumerate(chunk.sets):
            for name, edits in one.edits.items():
                self._sites.setdefault(name, {})[row] = edits

    def run(self, read: Bool[ndarray, " p"]) -> None:
        """Pass all towers; ``read`` says which positions of the last one's output are read."""
        names = [name for name in self._sites if self._stage(name) not in ("enter", "head", None)]
        hooks = [(name, self._edit) for name in names if not name.endswith(PATTERNS)]
        with self.model.hooks(hooks):
            for tower in self.trail.towers:
                is_last, size = tower == self.model.towers[-1], self.trail.towers[tower].n_positions
                wanted = self.chunk.read_by_head(tower, read) if is_last else self.compiler.read_positions(tower, size)
                self._pass(tower, wanted)

    def logits(self, read: Bool[ndarray, " p"]) -> Packed:
        """The last tower's logits, at those of the positions read that differ from the base run's."""
        tower = self.model.towers[-1]
        clean = self.trail.towers[tower].out
        assert clean is not None
        states = self.reached.get(tower, nothing(len(self.chunk), clean))
        states = states.carry(self.chunk.head(tower, states.layout.mask, read).tokens, clean)
        self._here = states.layout
        if len(states.layout) == 0:
            return Packed(clean.new_zeros(1, 0, self.trail.logits.shape[-1]), states.layout)
        with self.model.hooks([(name, self._edit) for name in self._sites if self._stage(name) == "head"]):
            logits = Packed(self.model.leave({tower: states.values}, self.inputs), states.layout)
        return logits.carry(states.layout.mask & read, self.trail.logits)

    def outputs_of(self, one: int) -> Tensor:
        """The model's output for one set, where that is not logits position by position."""
        states: dict[str, Tensor] = {}
        for tower, trail in self.trail.towers.items():
            assert trail.out is not None
            packed = self.reached.get(tower)
            states[tower] = trail.out if packed is None else packed.of_set(one, trail.out)
        with self._said_of(one), self.model.hooks(self._alone(one, "head")):
            return self.model.leave(states, self.inputs)

    # Towers -----------------------------------------------------------------------------------------------------

    def _pass(self, tower: str, read: Bool[ndarray, " p"]) -> None:
        trail, before = self.trail.towers[tower], self.compiler.before(tower, self.trail)
        fed = self.reached.get(before) if before else None
        if fed is None and not self.chunk.edits_in(tower):
            return
        other = fed.layout.mask if fed is not None and trail.n_other else None
        self._through(tower, self._enter(tower, fed), other, read)

    def _enter(self, tower: str, fed: Packed | None) -> Packed:
        """The sets that are changed before the first block: each run through the embedding by itself."""
        trail = self.trail.towers[tower]
        dirty = self.chunk.entered(self.compiler, tower, None if fed is None else fed.layout.mask)
        if not dirty.any():
            return nothing(len(self.chunk), self._shape_of(trail))
        layout = Layout(dirty, trail.n_rows, self._shape_of(trail).device)
        values = []
        for one in np.flatnonzero(dirty.any(1)).tolist():
            states = {
                name: own.out if (packed := self.reached.get(name)) is None else packed.of_set(one, own.out)
                for name, own in self.trail.towers.items()
                if own.out is not None and name != tower
            }
            with self._said_of(one), self.model.hooks(self._alone(one, "enter", tower)):
                resid = self.model.enter(tower, self.inputs, states)
            values.append(resid[:, layout.index(layout.positions_of(one))].flatten(0, 1))
        return Packed(torch.cat(values)[None], layout)

    def _through(
        self, tower: str, packed: Packed, other: Bool[ndarray, "set k"] | None, read: Bool[ndarray, " p"]
    ) -> None:
        trail, module = self.trail.towers[tower], self._module(tower)
        features, stop = getattr(module.config, "feature_layers", None) or (), self.compiler.stop(tower)
        streams: dict[int, Packed] = {}
        for step in self.chunk.steps(tower, stop, packed.layout.mask, other, read):
            streams |= {layer: packed for layer in features if layer <= step.layer and layer not in streams}
            if step.stage == "leave":
                ends = [
                    streams.get(layer, packed).carry(step.tokens, trail.streams[layer, "attend"])
                    for layer in features or (stop,)
                ]
                self._here = ends[0].layout
                self.reached[tower] = Packed(module.read_out(*(end.values for end in ends)), self._here)
                return
            packed = packed.carry(step.tokens, trail.streams[step.layer, step.stage])
            self._here = packed.layout
            stage = {"attend": self._attend, "cross_attend": self._cross_attend, "feed_forward": self._feed_forward}
            packed = stage[step.stage](tower, packed, step)

    # Stages -----------------------------------------------------------------------------------------------------

    def _attend(self, tower: str, packed: Packed, step: Step) -> Packed:
        trail, layout = self.trail.towers[tower], packed.layout
        goes_on, queries = layout, None
        if not layout.holds(step.queries):
            goes_on = Layout(step.queries, layout.n_rows, layout.device)
            queries = layout.index(np.searchsorted(layout.places, goes_on.places))
        values = (
            self._module(tower)
            .blocks[step.layer]
            .attend(
                packed.values,
                rotation=_at(trail.rotation, layout),
                queries=queries,
                reader=SharedKeys(
                    goes_on,
                    layout,
                    trail.known[step.layer].attn,
                    trail.masks[step.layer],
                    *self._patterns(f"{tower}.blocks.{step.layer}.attn", goes_on, trail.n_positions),
                    done=partial(self._go_on_with, goes_on),
                ),
            )
        )
        return Packed(values, goes_on)

    def _cross_attend(self, tower: str, packed: Packed, step: Step) -> Packed:
        trail, before = self.trail.towers[tower], self.compiler.before(tower, self.trail)
        assert before is not None
        assert step.other is not None
        clean = self.trail.towers[before].out
        assert clean is not None
        other = None
        if step.other.any():
            other = self.reached.get(before, nothing(len(self.chunk), clean)).carry(step.other, clean)
        self._other = None if other is None else other.layout
        values = (
            self._module(tower)
            .blocks[step.layer]
            .cross_attend(
                packed.values,
                None if other is None else other.values,
                reader=SharedKeys(
                    packed.layout,
                    self._other,
                    trail.known[step.layer].cross_attn,
                    trail.other_mask,
                    *self._patterns(f"{tower}.blocks.{step.layer}.cross_attn", packed.layout, trail.n_other),
                ),
            )
        )
        return Packed(values, packed.layout)

    def _feed_forward(self, tower: str, packed: Packed, step: Step) -> Packed:
        return Packed(self._module(tower).blocks[step.layer].feed_forward(packed.values), packed.layout)

    def _go_on_with(self, layout: Layout) -> None:
        self._here = layout

    def _module(self, tower: str) -> Any:
        return self.model.get_submodule(tower)

    def _shape_of(self, trail: TowerTrail) -> Float[Tensor, "row p d"]:
        return next(iter(trail.streams.values()))

    # Edits ------------------------------------------------------------------------------------------------------

    def _stage(self, name: str) -> Stage | None:
        place = self.compiler.place(name)
        return None if place is None else place.stage

    def _edit(self, activation: Float[Tensor, "1 token ..."], hook: HookPoint) -> Tensor:
        """Every set's edits at a hook point, each on its own tokens."""
        is_others = hook.name.endswith(("cross_attn.hook_k", "cross_attn.hook_v"))
        layout = self._other if is_others else self._here
        assert layout is not None
        for one, edits in self._sites[hook.name].items():
            if not layout.counts[one]:
                continue
            tokens, part = layout.tokens_of(one), _part(layout, one)
            own = edited = activation[0, tokens].unflatten(0, (layout.n_rows, int(layout.counts[one])))
            with self._said_of(one):
                for edit in edits:
                    edited = edit.apply(edited, hook, self.inputs, part)
            if edited is not own:
                activation[0, tokens] = edited.flatten(0, 1)
        return activation

    def _said_of(self, one: int) -> AbstractContextManager[None]:
        index = self.chunk.sets[one].index
        return said_of(None if index < 0 else index)

    def _alone(self, one: int, stage: Stage, tower: str | None = None) -> list[tuple[str, HookFunction]]:
        """One set's edits before a tower, or behind all, as plain hooks."""
        return [
            (name, partial(_apply, edit, self.inputs))
            for name, edits in self.chunk.sets[one].edits.items()
            for edit in edits
            if (place := self.compiler.place(name)) is not None
            and place.stage == stage
            and tower in (None, place.tower)
        ]

    def _patterns(
        self, attention: str, queries: Layout, n_keys: int
    ) -> tuple[dict[int, Bool[Tensor, "row _ n k"]], Sequence[int], Callable[[Tensor, str, int], Tensor]]:
        """Edits of scores and patterns: those that only knock out, as masks; and how the others are done."""
        scores, pattern = (self._sites.get(f"{attention}.{point}", {}) for point in PATTERNS)
        sets = [one for one in {**scores, **pattern} if queries.counts[one]]
        every = {one: [*scores.get(one, []), *pattern.get(one, [])] for one in sets}
        plain = [one for one in sets if all(isinstance(edit, BlockAttention) for edit in every[one])]
        hook = self.model.hook_dict[f"{attention}.{PATTERNS[0]}"]
        n_heads = self._module(attention).n_heads
        shut = {}
        for one in plain:
            shape = (queries.n_rows, n_heads, int(queries.counts[one]), n_keys)
            with self._said_of(one):
                masks = [edit.selected(shape, hook, self.inputs, _part(queries, one)) for edit in scores[one]]
            mask = reduce(torch.logical_or, masks)  # of one head, where it is the same for all
            shut[one] = mask.expand(shape[0], -1, *shape[2:]).to(queries.device)
        dead: list[Tensor] = []

        def edit_pattern(activation: Tensor, point: str, one: int) -> Tensor:
            hook = self.model.hook_dict[f"{attention}.{point}"]
            for edit in self._sites.get(hook.name, {}).get(one, []):
                is_block, before = isinstance(edit, BlockAttention), activation
                if is_block and point == "hook_pattern":
                    activation = activation.masked_fill(dead.pop(0), 0)
                    continue
                with self._said_of(one):
                    activation = edit.apply(activation, hook, self.inputs, _part(queries, one))
                if is_block:
                    dead.append(dead_rows(before, activation))
            return activation

        return shut, [one for one in sets if one not in plain], edit_pattern


def passes(compiler: Compiler, chunk: Chunk, read: Bool[ndarray, " p"]) -> Iterator[tuple[str, Step]]:
    """The steps of a chunk's way through all towers, and the head; nothing is run."""
    reached: dict[str, Bool[ndarray, "set p"]] = {}
    for tower, trail in chunk.trail.towers.items():
        before, is_last = compiler.before(tower, chunk.trail), tower == compiler.model.towers[-1]
        fed = reached.get(before) if before else None
        wanted = chunk.read_by_head(tower, read) if is_last else compiler.read_positions(tower, trail.n_positions)
        if fed is not None or chunk.edits_in(tower):
            entered, other = chunk.entered(compiler, tower, fed), fed if trail.n_other else None
            for step in chunk.steps(tower, compiler.stop(tower), entered, other, wanted):
                if step.stage == "leave":
                    reached[tower] = step.tokens
                yield tower, step
        if is_last and compiler.has_token_head:
            yield tower, chunk.head(tower, reached.get(tower, np.zeros((len(chunk), len(read)), dtype=bool)), read)


def _apply(edit: Edit, inputs: VLMInputs, activation: Tensor, hook: HookPoint) -> Tensor:
    return edit.apply(activation, hook, inputs)


def _part(layout: Layout, one: int) -> Part | None:
    """Which positions a set holds; None for all."""
    size = layout.mask.shape[1]
    if layout.counts[one] == size:
        return None
    return Part(torch.from_numpy(layout.positions_of(one)), size)


def _at(rotation: Rotation | None, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """The positions' angles, token by token."""
    if rotation is None:
        return None
    cos, sin = (
        states[0, layout.positions] if len(states) == 1 else states[layout.rows, layout.positions]
        for states in rotation
    )
    return cos[None], sin[None]

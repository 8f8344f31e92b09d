"""What n edit sets make dirty: per tower, layer and stage, the positions that differ from the base run.

Axes of masks: set, position; with a metric's positions, position. All here is bookkeeping in NumPy: nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from hooked_vlm.components import Mask
from hooked_vlm.edits import BlockAttention, Edit, EditError
from hooked_vlm.hook_point import HookError, HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.selection import APART, position_axis, position_mask
from hooked_vlm.sweep.places import BESIDE, BLOCK_STAGES, PATTERNS, Place, Stage, place_of
from hooked_vlm.sweep.trail import Trail, record


@dataclass
class Step:
    """One stage of one block, or what comes after the blocks, for many sets at once."""

    layer: int
    stage: Stage
    tokens: Bool[ndarray, "set p"]
    """Positions that are carried in."""
    queries: Bool[ndarray, "set p"]
    """Positions that come out: all of ``tokens``, but where later ones are not read."""
    entered: Bool[ndarray, "set p"]
    """Positions whose stream differs already where the stage begins."""
    keys: Bool[ndarray, "set p"] | None = None
    """Positions whose keys and values differ."""
    other: Bool[ndarray, "set k"] | None = None
    """Positions of the other tower whose keys and values are made anew."""


@dataclass
class EditSet:
    """One set, with the base: what is done at which hook point, and what that makes dirty by itself."""

    index: int
    base: dict[str, list[Edit]] = field(default_factory=dict)
    """The base's edits, at each hook point."""
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    """All, the base's first."""
    dirt: dict[Place, Bool[ndarray, " p"]] = field(default_factory=dict)
    """Positions at the places of the set's own edits."""
    whole: set[Place] = field(default_factory=set)
    """Stages in which an edit needs every position at hand, and may change every one."""

    @property
    def start(self) -> Place | None:
        """Where it first differs from the base run."""
        return next(iter(self.dirt), None)

    def add(self, name: str, edit: Edit) -> None:
        _add(self.edits, name, edit)

    @property
    def needs_all(self) -> bool:
        """Whether an edit needs all positions at hand."""
        return bool(self.whole)

    def without_edits(self) -> EditSet:
        """A set that goes the same way and changes nothing: the base's edits, and what this one makes dirty."""
        return EditSet(-1, self.base, self.base, self.dirt, self.whole)

    @cached_property
    def looks_beside(self) -> bool:
        """Whether it edits what is made only where someone looks, which is large."""
        return any(name.endswith(BESIDE) or _is_spelled_out(name, edits) for name, edits in self.edits.items())


def _is_spelled_out(name: str, edits: Sequence[Edit]) -> bool:
    """Whether edits are of scores or a pattern that have to be there for them; a knockout is a mask."""
    return name.endswith(PATTERNS) and not all(isinstance(edit, BlockAttention) for edit in edits)


def _add(edits: dict[str, list[Edit]], name: str, edit: Edit) -> None:
    edits.setdefault(name, []).append(edit)
    if isinstance(edit, BlockAttention):  # it also empties the patterns of queries that are left nothing to read
        edits.setdefault(name.replace(*PATTERNS), []).append(edit)


class Compiler:
    """Edit sets of one sweep, placed and measured against its base run."""

    def __init__(self, model: HookedVLM, inputs: VLMInputs, base: Sequence[Edit]) -> None:
        self.model, self.inputs, self.base = model, inputs, base
        self._places: dict[str, Place | None] = {}

    def place(self, name: str) -> Place | None:
        if name not in self._places:
            self._places[name] = place_of(name, self.model)
        return self._places[name]

    def sites(self, edits: Sequence[Edit]) -> list[tuple[str, Edit]]:
        return [(name, edit) for edit in edits for name in edit.names(self.model, self.inputs)]

    def record(self, edit_sets: Sequence[Sequence[Edit]]) -> Trail:
        """The base run, with what the sets need of it.

        Raises:
            EditError, HookError: an edit that does not fit; says of which set it is.
        """
        names: set[str] = set()
        for index, edits in enumerate(edit_sets):
            with said_of(index):
                names.update(name for name, _ in self.sites(edits))
        with said_of(None):
            based = [name for name, _ in self.sites(self.base)]
        heads = [name for name in {*names, *based} if (place := self.place(name)) and place.stage == "head"]
        return record(self.model, self.inputs, self.base, self._first_layers(names), heads)

    def _first_layers(self, names: Iterable[str]) -> dict[str, int]:
        """For each tower that has to be resumed, the first layer where it may be."""
        first: dict[str, int] = {}
        towers = self.model.towers
        for place in map(self.place, names):
            if place is None:
                continue
            layer = 0 if place.stage == "enter" else place.layer
            if place.stage != "head":
                first[place.tower] = min(first.get(place.tower, layer), layer)
            for later in towers[towers.index(place.tower) + 1 :]:
                first[later] = 0
        return first

    def compile_all(self, edit_sets: Sequence[Sequence[Edit]], trail: Trail) -> list[EditSet]:
        """Raises as :meth:`compile`, and says of which set it is."""
        with said_of(None):
            self.compile(-1, self.base, trail)
        compiled = []
        for index, edits in enumerate(edit_sets):
            with said_of(index):
                compiled.append(self.compile(index, edits, trail))
        return compiled

    def compile(self, index: int, edits: Sequence[Edit], trail: Trail) -> EditSet:
        """Raises ``EditError`` for an edit that does not fit, or whose site is not passed."""
        every, whole = self._base
        compiled = EditSet(index, every, {name: list(own) for name, own in every.items()}, whole=set(whole))
        dirt: dict[Place, ndarray] = {}
        for edit in edits:
            passed = False
            for name in edit.names(self.model, self.inputs):
                place, hook = self.place(name), self.model.hook_dict[name]
                if not self._is_passed(place, hook, trail):
                    continue
                passed = True
                if place is None:
                    continue
                compiled.add(name, edit)
                mask = self._dirt(edit, hook, place, trail)
                dirt[place] = dirt[place] | mask if place in dirt else mask
                if not edit.is_local:
                    compiled.whole.add(place)
            if not passed:
                raise EditError(f"{edit.site} is not passed in this run, so {type(edit).__name__} changed nothing")
        compiled.dirt = dict(sorted(dirt.items(), key=lambda item: self.moment(item[0])))
        return compiled

    @cached_property
    def _base(self) -> tuple[dict[str, list[Edit]], set[Place]]:
        """The base's edits at each hook point, and the places that need all positions for them."""
        every: dict[str, list[Edit]] = {}
        whole = set()
        for name, edit in self.sites(self.base):
            if (place := self.place(name)) is not None:
                _add(every, name, edit)
                if not edit.is_local:
                    whole.add(place)
        return every, whole

    def read_positions(self, tower: str, n_positions: int) -> Bool[ndarray, " p"]:
        """Which positions of a tower's output the rest of the model reads."""
        positions = self.model.positions_read(tower, self.inputs)
        read = np.zeros(n_positions, dtype=bool)
        read[slice(None) if positions is None else positions] = True
        return read

    def moment(self, place: Place) -> tuple[int, int, int]:
        """Where in the forward a place comes."""
        stages: tuple[Stage, ...] = ("enter", *BLOCK_STAGES, "leave", "head")
        after = place.stage in ("leave", "head")
        return self.model.towers.index(place.tower), place.layer if not after else 10**6, stages.index(place.stage)

    def _dirt(self, edit: Edit, hook: HookPoint, place: Place, trail: Trail) -> Bool[ndarray, " p"]:
        tower = trail.towers.get(place.tower)
        if tower is None:  # a similarity of towers that were not run
            return np.ones(1, dtype=bool)
        size = tower.n_other if place.reaches == "other" else tower.n_positions
        axis = position_axis(hook)
        is_apart = hook.name.endswith(APART) or (place.stage == "head" and not self.has_token_head)
        if place.stage == "enter" and hook.tower != place.tower:
            return self.fed_positions(size)
        if edit.positions is None or axis is None or is_apart or not edit.is_local:
            return np.ones(size, dtype=bool)
        shape = [1] * len(hook.axes)
        shape[0], shape[axis] = tower.n_rows, size
        return position_mask(edit.positions, shape, hook, hook.axes[axis], self.inputs).any(0).numpy()

    def before(self, tower: str, trail: Trail) -> str | None:
        """The tower that a tower reads from, if any."""
        names, config = list(trail.towers), self._config(tower)
        reads = config.d_cross is not None or "projector" in self.model.towers
        return names[names.index(tower) - 1] if names.index(tower) and reads else None

    def stop(self, tower: str) -> int:
        """How many of a tower's blocks anything reads."""
        config = self._config(tower)
        return max(getattr(config, "feature_layers", None) or (config.n_layers,))

    def _config(self, tower: str) -> Any:
        return self.model.get_submodule(tower).config

    def fed_positions(self, n_positions: int) -> Bool[ndarray, " p"]:
        """The positions of a tower's first stream that the tower before it writes."""
        fed = np.zeros(n_positions, dtype=bool)
        fed[self.model.positions_fed(self.inputs)] = True
        return fed

    @property
    def has_token_head(self) -> bool:
        """Whether the model's output is the last tower's logits, position by position."""
        return f"{self.model.towers[-1]}.hook_logits" in self.model.hook_dict

    def _is_passed(self, place: Place | None, hook: HookPoint, trail: Trail) -> bool:
        if place is None:  # run where someone looks
            return hook.tower in trail.towers
        if place.stage == "head":
            return hook.name in trail.passed
        tower = trail.towers.get(place.tower)
        if place.stage == "enter" and hook.tower not in trail.towers:  # LLaVA's projector, or a tower that did not run
            return self.model.towers[self.model.towers.index(hook.tower) - 1] in trail.towers and tower is not None
        return tower is not None and (place.stage != "cross_attend" or tower.n_other > 0)


@contextmanager
def said_of(index: int | None) -> Iterator[None]:
    """Errors of an edit say of which set it is; None for the base's."""
    try:
        yield
    except (EditError, HookError) as error:
        whose = "base edits" if index is None else f"edit set {index}"
        raise type(error)(f"{whose}: {error}") from None


class Chunk:
    """Edit sets that run together."""

    def __init__(self, sets: Sequence[EditSet], trail: Trail) -> None:
        self.sets, self.trail = sets, trail
        self._marks: dict[Place, dict[int, ndarray]] = {}
        for row, one in enumerate(sets):
            for place, mask in one.dirt.items():
                self._marks.setdefault(place, {})[row] = mask
        self.whole = {(place.tower, place.layer, place.stage) for one in sets for place in one.whole}
        # Whoever writes scores or patterns can let a query read what its mask forbids.
        self._unmasked = {
            name.rsplit(".", 1)[0] for one in sets for name, edits in one.edits.items() if _is_spelled_out(name, edits)
        }

    def __len__(self) -> int:
        return len(self.sets)

    def _mask(self, tower: str, layer: int) -> Mask | None:
        """Who may read whom in a tower's self-attention; None: everybody."""
        is_unmasked = f"{tower}.blocks.{layer}.attn" in self._unmasked
        return None if is_unmasked else self.trail.towers[tower].masks.get(layer)

    def marks(self, place: Place, size: int) -> Bool[ndarray, "set p"]:
        """What each set's own edits at a place make dirty."""
        marks = np.zeros((len(self), size), dtype=bool)
        for row, mask in self._marks.get(place, {}).items():
            marks[row] = mask
        return marks

    def edits_in(self, tower: str) -> bool:
        """Whether any set edits the tower, up to what it puts out."""
        return any(place.tower == tower and place.stage != "head" for place in self._marks)

    def entered(self, compiler: Compiler, tower: str, fed: Bool[ndarray, "set k"] | None) -> Bool[ndarray, "set p"]:
        """What is dirty of what a tower's first block reads; ``fed``: what is of the output of the tower before."""
        trail = self.trail.towers[tower]
        dirty = np.zeros((len(self), trail.n_positions), dtype=bool)
        if fed is not None and not trail.n_other:
            dirty |= fed.any(1, keepdims=True) & compiler.fed_positions(trail.n_positions)
        return dirty | self.marked(Place(tower, 0, "enter"), dirty)

    def read_by_head(self, tower: str, read: Bool[ndarray, " p"]) -> Bool[ndarray, " p"]:
        """What is read of the last tower's output: where its logits are, or all that an edit of them needs."""
        return np.ones_like(read) if self._is_whole(Place(tower, 0, "head")) else read

    def head(self, tower: str, reached: Bool[ndarray, "set p"], read: Bool[ndarray, " p"]) -> Step:
        """The last tower's logits, where its output is dirty and they are read."""
        read = self.read_by_head(tower, read)
        dirty = (reached | self.marked(Place(tower, 0, "head"), reached)) & read
        return Step(0, "head", dirty, dirty, reached & read)

    def steps(
        self,
        tower: str,
        stop: int,
        dirty: Bool[ndarray, "set p"],
        other: Bool[ndarray, "set k"] | None,
        read: Bool[ndarray, " p"],
    ) -> Iterator[Step]:
        """The stages that a tower has to pass again, and for which positions.

        Args:
            stop: how many of its blocks are read.
            dirty: what was changed before its first block.
            other: what was changed of what its cross-attention reads.
            read: which positions of its output are read.
        """
        trail = self.trail.towers[tower]
        needed = self._needed(tower, stop, read)
        for layer in range(stop):
            place = Place(tower, layer, "attend")
            keys = dirty | self.marks(place._replace(reaches="keys"), trail.n_positions)
            own, mask = self.marked(place, keys), self._mask(tower, layer)
            keys = (keys | (own if self._is_whole(place) else False)) & _readable(needed[place], mask)
            queries = (dirty | own | _reached(keys, mask)) & needed[place]
            entered, dirty = dirty, queries
            if (queries | keys).any():
                yield Step(layer, "attend", queries | keys, queries, entered, keys)
            place = Place(tower, layer, "cross_attend")
            if trail.n_other:
                made = self.marks(place._replace(reaches="other"), trail.n_other)
                made = made if other is None else made | other
                made = made | (made.any(1, keepdims=True) & self._is_whole(place))
                reached = dirty | made.any(1, keepdims=True)
                entered, dirty = dirty, (reached | self.marked(place, reached)) & needed[place]
                if dirty.any():
                    made = made & dirty.any(1, keepdims=True)
                    yield Step(layer, "cross_attend", dirty, dirty, entered, other=made)
            place = Place(tower, layer, "feed_forward")
            entered, dirty = dirty, (dirty | self.marked(place, dirty)) & needed[place]
            if dirty.any():
                yield Step(layer, "feed_forward", dirty, dirty, entered)
        place = Place(tower, 0, "leave")
        entered, dirty = dirty, (dirty | self.marked(place, dirty)) & needed[place]
        if dirty.any():
            yield Step(stop, "leave", dirty, dirty, entered)

    def marked(self, place: Place, dirty: Bool[ndarray, "set p"]) -> Bool[ndarray, "set p"]:
        """What is edited there; where an edit needs all positions, all of those sets that have any."""
        marks = self.marks(place, dirty.shape[1])
        return marks | (dirty | marks).any(1, keepdims=True) if self._is_whole(place) else marks

    def _is_whole(self, place: Place) -> bool:
        return place[:3] in self.whole

    def _needed(self, tower: str, stop: int, read: Bool[ndarray, " p"]) -> dict[Place, Bool[ndarray, " p"]]:
        """For each stage of a tower, the positions of what it puts out that anything reads."""
        needed = {}

        def need(place: Place, read: Bool[ndarray, " p"]) -> Bool[ndarray, " p"]:
            needed[place] = np.ones_like(read) if self._is_whole(place) else read
            return needed[place]

        read = need(Place(tower, 0, "leave"), read)
        for layer in reversed(range(stop)):
            read = need(Place(tower, layer, "feed_forward"), read)
            read = need(Place(tower, layer, "cross_attend"), read)
            read = need(Place(tower, layer, "attend"), read)
            read = read | _readable(read, self._mask(tower, layer))
        return needed


def _reached(keys: Bool[ndarray, "set p"], mask: Mask | None) -> Bool[ndarray, "set p"]:
    """The positions that attend to some keys."""
    if mask is None:
        return np.broadcast_to(keys.any(1, keepdims=True), keys.shape)
    if mask.is_plain_causal:
        return np.logical_or.accumulate(keys, axis=1)
    return keys.astype(np.float32) @ mask.in_any_row.numpy().T.astype(np.float32) > 0


def _readable(queries: Bool[ndarray, " p"], mask: Mask | None) -> Bool[ndarray, " p"]:
    """The positions whose keys some queries read."""
    return np.ones_like(queries) if mask is None else mask.in_any_row.numpy()[queries].any(0)

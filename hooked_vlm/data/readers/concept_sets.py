"""Sets of pictures of which a concept is true (B_s) and not true (B_d), balanced over what it is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hooked_vlm.data.readers.concepts import (
    Atom,
    Concept,
    ConceptError,
    atoms_of,
    cell_name,
    holds,
    parse_concept,
    true_atoms,
)
from hooked_vlm.data.readers.worlds import Thing, World, Worlds, attributes_of
from hooked_vlm.data.rows import nearest
from hooked_vlm.data.samples import Dropped, Sample, Samples
from hooked_vlm.data.scene import COLORS, SHAPES, Scene
from hooked_vlm.data.shapes import sample as draw

SETS = ("B_d", "B_s")
"""The set of pictures of which a concept is not true (the difference set), and of which it is (the support set)."""

_VALUES: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "shape": SHAPES}

Truth = frozenset[Atom]


def concept_sets(
    worlds: Iterable[World],
    concept: str | Concept,
    *,
    per_cell: int,
    level: str = "object",
    seed: int = 0,
    question: str | None = None,
) -> Samples:
    """B_s and B_d: as many pictures of which a concept is true as of which it is not, both balanced.

    A *cell* is a combination of what is true of the concept's atoms; ``red and cone`` has four. Within either set all
    cells are equally large, and the sets are as large as each other, so that a single atom predicts no more of the
    answer than the concept implies (:func:`single_atom_accuracy`): 5/6 for AND and for OR of two.

    Args:
        worlds: from :func:`clevr_worlds`, :func:`shapeworld_worlds` or :func:`shape_worlds`.
        concept: in words, see :func:`parse_concept`.
        per_cell: pictures in each cell of the set that has more cells; those of the other are larger. (Where the
            numbers of cells are not multiples of each other, a multiple of this, the smallest that gives equal sets.)
        level: "object" if the atoms are to be true of the same object, and "image" if each of any. On the level
            "object", worlds where several objects have some of the atoms are in no cell, and dropped.
        seed: of the choice among the worlds of a cell, and of the counterfactuals.
        question: what to ask; by default ``is there an object that is CONCEPT ?``.

    Returns:
        Samples with the answer "yes" (B_s) or "no" (B_d) and the other as its foil, the cell as its group, and in
        ``meta`` ``set``, ``cell``, ``atoms`` (which are true), ``concept``, ``level``. The region ``object`` is the
        object that decides, where there is one and its place is known. A generated scene (:func:`shape_worlds`) has as
        ``image_cf`` a picture of the other set that differs in one attribute of one object, where there is such a
        picture, and the cell of that in ``meta`` as ``cell_cf``.

    Raises:
        ConceptError: a concept that is always or never true; atoms that occur in no world; a cell with too few worlds.
    """
    concept = parse_concept(concept) if isinstance(concept, str) else concept
    atoms = atoms_of(concept)
    worlds = list(worlds) if not isinstance(worlds, Worlds) else worlds
    _check_known(atoms, worlds)
    cells, left = _cells(atoms, worlds, level)
    random = np.random.default_rng(seed)
    asked = question or f"is there an object that is {concept} ?"
    samples = []
    for truth, n in _sizes(concept, _possible(atoms, worlds, level), per_cell).items():
        found = cells.get(truth, [])
        if len(found) < n:
            raise ConceptError(
                f"{n} pictures of {cell_name(atoms, truth)!r} are needed, and there are {len(found)} among "
                f"{len(worlds)}; give more, or a smaller per_cell than {per_cell}",
                "too few pictures of a cell",
            )
        chosen = [found[index] for index in random.permutation(len(found))[:n]]
        samples += [_sample(world, concept, atoms, truth, level, asked, random) for world in chosen]
    return Samples(samples, (*getattr(worlds, "dropped", ()), *left))


def single_atom_accuracy(samples: Sequence[Sample]) -> dict[str, float]:
    """How well each atom alone, or its negation, predicts the answer: what a probe of a concept has to beat.

    Of samples from :func:`concept_sets`; the best atom is first.
    """
    if not samples:
        raise ConceptError("there are no samples to predict the answers of")
    names = list(samples[0].meta["atoms"])
    agreeing = {name: np.mean([one.meta["atoms"][name] == (one.answer == "yes") for one in samples]) for name in names}
    accuracy = {name: float(max(share, 1 - share)) for name, share in agreeing.items()}
    return dict(sorted(accuracy.items(), key=lambda item: -item[1]))


def binding_contrast(
    n: int, seed: int, first: tuple[str, str] = ("red", "circle"), second: tuple[str, str] = ("blue", "square")
) -> Samples:
    """Pictures with the same colours and shapes, bound to each other in one way or in the other.

    Of ``n`` pairs, one picture has the ``first`` and the ``second`` object, each (colour, shape), and the other, its
    ``image_cf``, the two with their colours exchanged. The question is whether there is a ``first``; no colour and no
    shape alone, nor both without their binding, say anything about the answer. The region ``object`` is the object of
    the asked colour. There are 2 ``n`` samples: each picture of a pair is one, with the other as its counterfactual.
    """
    for color, shape in (first, second):
        if color not in COLORS or shape not in SHAPES:
            raise ValueError(f"{(color, shape)} is not (color, shape), of {', '.join(COLORS)} and {', '.join(SHAPES)}")
    if first[0] == second[0] or first[1] == second[1]:
        raise ValueError(f"{first} and {second} have something in common, so that exchanging it changes nothing")
    samples = []
    for index in range(n):
        scene = draw(seed, index, object_counts=(2,)).scene
        bound = _with(scene, (first, second))
        swapped = _with(scene, ((second[0], first[1]), (first[0], second[1])))
        for group, own, other in (("bound", bound, swapped), ("swapped", swapped, bound)):
            samples.append(_bound(f"binding-{seed}-{index}-{group}", own, other, first, group))
    return Samples(samples)


def _bound(id: str, own: Scene, other: Scene, asked: tuple[str, str], group: str) -> Sample:
    answer = "yes" if group == "bound" else "no"
    color, shape = asked
    target = next(one for one in own.objects if one.color == color)
    question = f"is there a {color} {shape} ?"
    return Sample(
        id,
        lambda: own.image,
        question,
        answer,
        "no" if answer == "yes" else "yes",
        image_cf=lambda: other.image,
        spans={"subject": (question.index(color), question.index(shape) + len(shape))},
        regions={"object": target.box},
        group=group,
        meta={"atoms": {color: True, shape: True}},
    )


def _with(scene: Scene, pairs: Sequence[tuple[str, str]]) -> Scene:
    objects = (replace(one, color=color, shape=shape) for one, (color, shape) in zip(scene.objects, pairs, strict=True))
    return replace(scene, objects=tuple(objects))


def _check_known(atoms: Sequence[Atom], worlds: Sequence[World]) -> None:
    known = {value for world in worlds for thing in world.things for value in thing.attributes.values()}
    for atom in atoms:
        if not any(atom.of(thing) for world in worlds for thing in world.things):
            raise ConceptError(
                f"nothing in {len(worlds)} pictures is {str(atom)!r}; there are {', '.join(sorted(known))}"
                f"{nearest(atom.value, known)}",
                "an attribute that does not occur",
            )


def _cells(
    atoms: Sequence[Atom], worlds: Iterable[World], level: str
) -> tuple[dict[Truth, list[World]], list[Dropped]]:
    """The worlds of each cell, and those that are in none."""
    cells: dict[Truth, list[World]] = {}
    left = []
    for world in worlds:
        truth = true_atoms(atoms, world.things, level)
        if truth is None:
            left.append(Dropped(world.id, "several of its objects have some of the atoms", "atoms on several objects"))
        else:
            cells.setdefault(truth, []).append(world)
    return cells, left


def _possible(atoms: Sequence[Atom], worlds: Sequence[World], level: str) -> list[Truth]:
    """All combinations of atoms but those of two values of one attribute on the same object."""
    things = [thing for world in worlds for thing in world.things]
    attribute = {
        atom: {name for thing in things for name in thing.attributes if thing.has(atom.value, name) and atom.of(thing)}
        for atom in atoms
    }
    combinations = [
        frozenset(atom for bit, atom in enumerate(atoms) if code >> bit & 1) for code in range(2 ** len(atoms))
    ]
    if level == "image":
        return combinations
    exclusive = [
        {one, other}
        for one, other in itertools.combinations(atoms, 2)
        if len(attribute[one]) == 1 and attribute[one] == attribute[other]
    ]
    return [truth for truth in combinations if not any(pair <= truth for pair in exclusive)]


def _sizes(concept: Concept, cells: Sequence[Truth], per_cell: int) -> dict[Truth, int]:
    """How many pictures each cell has to have; first those of B_s."""
    if per_cell < 1:
        raise ValueError(f"per_cell is at least 1, not {per_cell}")
    inside = [truth for truth in cells if holds(concept, truth)]
    outside = [truth for truth in cells if not holds(concept, truth)]
    if not inside or not outside:
        raise ConceptError(f"{str(concept)!r} is {'always' if inside else 'never'} true", "a concept without a set")
    whole = per_cell * math.lcm(len(inside), len(outside))
    return {truth: whole // len(several) for several in (inside, outside) for truth in several}


def _sample(
    world: World,
    concept: Concept,
    atoms: Sequence[Atom],
    truth: Truth,
    level: str,
    question: str,
    random: np.random.Generator,
) -> Sample:
    is_true = holds(concept, truth)
    deciding = [thing for thing in world.things if any(atom.of(thing) for atom in atoms)]
    partner = _partner(world, concept, atoms, truth, level, random)
    meta: dict[str, Any] = {
        "set": SETS[is_true],
        "cell": cell_name(atoms, truth),
        "atoms": {str(atom): atom in truth for atom in atoms},
        "concept": str(concept),
        "level": level,
    }
    return Sample(
        world.id,
        world.image,
        question,
        "yes" if is_true else "no",
        "no" if is_true else "yes",
        image_cf=None if partner is None else lambda: partner[0].image,
        regions={"object": deciding[0].region} if len(deciding) == 1 and deciding[0].region is not None else {},
        group=meta["cell"],
        meta=meta if partner is None else {**meta, "cell_cf": cell_name(atoms, partner[1])},
    )


def _partner(
    world: World, concept: Concept, atoms: Sequence[Atom], truth: Truth, level: str, random: np.random.Generator
) -> tuple[Scene, Truth] | None:
    """A scene of the other set that differs in one attribute of one object, evenly among the cells there are."""
    if world.scene is None:
        return None
    found: dict[Truth, list[Scene]] = {}
    for scene in _neighbours(world.scene):
        after = true_atoms(atoms, [Thing(attributes_of(one)) for one in scene.objects], level)
        if after is not None and holds(concept, after) != holds(concept, truth):
            found.setdefault(after, []).append(scene)
    if not found:
        return None
    cell = sorted(found, key=lambda after: cell_name(atoms, after))[random.integers(len(found))]
    return found[cell][random.integers(len(found[cell]))], cell


def _neighbours(scene: Scene) -> Iterable[Scene]:
    for index, one in enumerate(scene.objects):
        for attribute, values in _VALUES.items():
            for value in values:
                if value != getattr(one, attribute):
                    change: Mapping[str, Any] = {attribute: value}
                    yield replace(
                        scene, objects=(*scene.objects[:index], replace(one, **change), *scene.objects[index + 1 :])
                    )

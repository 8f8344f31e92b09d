"""Questions about pictures of coloured shapes, each with its answer and its two counterfactuals.

Every sample carries the two ways of corrupting a run that stay inside the data's distribution (NOTICE, Golovanevsky et
al. 2025): a **semantic image pair** (SIP), the same picture with one attribute of one object changed, and a **symmetric
token replacement** (STR), the same question with one word replaced. Either changes the answer and nothing else.

A sample depends on ``(seed, index)`` alone. Answers are drawn evenly within each kind before the picture is drawn, so
that the question by itself does not give the answer.

    >>> from hooked_vlm.data import sample
    >>> one = sample(seed=0, index=0, kinds=("color",))
    >>> one.question, one.answer, one.sip.answer, one.str_.question
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from hooked_vlm.data.samples import Sample, Samples
from hooked_vlm.data.scene import COLORS, GRID, SHAPES, Scene, ShapeObject

KINDS: tuple[str, ...] = ("color", "shape", "count", "exists")

COUNTS: tuple[str, ...] = ("0", "1", "2", "3")
"""Answers to "how many". A fourth object of a kind never occurs, neither in a picture nor in its counterfactual."""

OBJECT_COUNTS: tuple[int, ...] = (2, 3, 4)

_COLOR_WORDS = tuple(COLORS)
# Of the questions "is there ..." with the answer no, the share where both words are true of something, but not of the
# same thing. Only these cannot be answered by looking for the words one by one.
_UNBOUND_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, as data: the kind, and the colour and the shape that it names (None where it names none)."""

    kind: str
    color: str | None = None
    shape: str | None = None

    @property
    def text(self) -> str:
        """The question in words. Words are separated by single spaces, and each is one token of the toy."""
        if self.kind == "color":
            return f"what color is the {self.shape} ?"
        if self.kind == "shape":
            return f"what shape is the {self.color} object ?"
        if self.kind == "count":
            things = f"{self.color} objects" if self.color else f"{self.shape}s"
            return f"how many {things} are there ?"
        things = " ".join(word for word in (self.color, self.shape or "object") if word)
        return f"is there a {things} ?"

    def about(self, objects: Sequence[ShapeObject]) -> tuple[int, ...]:
        """Indices of the objects that have what the question names; none where the answer is "no" or "0"."""
        return tuple(index for index, item in enumerate(objects) if self._names(item))

    def answer(self, objects: Sequence[ShapeObject]) -> str | None:
        """The answer in one word, or None where the question has no single answer for these objects."""
        named = [item for item in objects if self._names(item)]
        if self.kind == "exists":
            return "yes" if named else "no"
        if self.kind == "count":
            return str(len(named)) if len(named) < len(COUNTS) else None
        if len(named) != 1:
            return None
        return named[0].color if self.kind == "color" else named[0].shape

    def _names(self, item: ShapeObject) -> bool:
        return self.color in (None, item.color) and self.shape in (None, item.shape)


@dataclass(frozen=True, slots=True)
class SemanticImagePair:
    """SIP: the picture with one attribute of one object changed, and the answer that the same question then has.

    Attributes:
        scene: the counterfactual picture.
        answer: the answer to the sample's own question about it.
        changed: index of the object that differs.
        attribute: "color" or "shape", what differs about it.
    """

    scene: Scene
    answer: str
    changed: int
    attribute: str

    @property
    def image(self) -> Image.Image:
        """The counterfactual picture, as the processor takes it."""
        return self.scene.image


@dataclass(frozen=True, slots=True)
class SymmetricTokenReplacement:
    """STR: the question with one word replaced, and the answer that it then has about the same picture.

    Attributes:
        asked: the counterfactual question, as data.
        answer: its answer about the sample's own picture.
        position: index of the replaced word among the question's words. Its token is at ``position + 1``, after [CLS].
        old, new: the word that was there, and the word that is.
    """

    asked: Question
    answer: str
    position: int
    old: str
    new: str

    @property
    def question(self) -> str:
        """The counterfactual question, in words."""
        return self.asked.text


@dataclass(frozen=True, slots=True)
class ShapesSample:
    """A picture, a question about it, the answer, and the two counterfactuals.

    Attributes:
        seed, index: what the sample was drawn from.
        asked: the question, as data.
        sip: the picture changed, the question kept.
        str_: the question changed, the picture kept.
    """

    seed: int
    index: int
    asked: Question
    answer: str
    scene: Scene
    sip: SemanticImagePair
    str_: SymmetricTokenReplacement

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        return self.asked.kind

    @property
    def question(self) -> str:
        """The question, in words."""
        return self.asked.text

    @property
    def about(self) -> tuple[int, ...]:
        """Indices of the objects that have what the question names.

        Exactly one for "color" and "shape"; for "exists" and "count" those that match, so none for "no" and "0".
        """
        return self.asked.about(self.objects)

    @property
    def objects(self) -> tuple[ShapeObject, ...]:
        """What is in the picture."""
        return self.scene.objects

    @property
    def image(self) -> Image.Image:
        """The picture, as the processor takes it."""
        return self.scene.image

    @property
    def pixels(self) -> UInt8[np.ndarray, "height width 3"]:
        """The picture as an array."""
        return self.scene.pixels

    @property
    def masks(self) -> Bool[np.ndarray, "object height width"]:
        """One mask an object, in the order of ``objects``."""
        return self.scene.masks

    def as_sample(self) -> Sample:
        """The record that every method takes.

        Its foil is the answer on the counterfactual picture. The span ``subject`` is the words for what is asked about,
        the region ``object`` the pixels of all that they are true of, ``changed`` those of the object that the
        counterfactual picture changes.
        """
        asked = self.asked
        things = [word for word in (asked.color, asked.shape) if word]
        first, last = things[0], things[-1]
        start = self.question.index(first)
        end = self.question.index(last) + len(last)
        end += self.question[end : end + 1] == "s"
        masks = self.masks
        regions = {"changed": masks[self.sip.changed]}
        if self.about:
            regions["object"] = masks[list(self.about)].any(0)
        return Sample(
            f"shapes-{self.seed}-{self.index}",
            partial(getattr, self.scene, "image"),
            self.question,
            self.answer,
            self.sip.answer,
            image_cf=partial(getattr, self.sip.scene, "image"),
            question_cf=self.str_.question,
            spans={"subject": (start, end)},
            regions=regions,
            group=self.kind,
            meta={"answer_str": self.str_.answer},
        )


def sample(
    seed: int,
    index: int,
    kinds: Sequence[str] = KINDS,
    object_counts: Sequence[int] = OBJECT_COUNTS,
) -> ShapesSample:
    """The sample at ``index`` of the endless sequence that ``seed`` names.

    Args:
        seed, index: not negative. The same pair (with the same kinds and object counts) always gives the same sample.
        kinds: the kinds of question to draw from, evenly.
        object_counts: how many objects a picture may have, each from 2 to 4.

    Raises:
        ValueError: an unknown kind, an object count outside 2 to 4, or none at all; a negative seed or index.
    """
    _check(kinds, object_counts)
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    random = np.random.default_rng((seed, index))
    while True:
        question, attributes = _DRAW[_pick(random, kinds)](random, object_counts)
        scene = _place(random, attributes)
        answer = question.answer(scene.objects)
        sip = _semantic_image_pair(random, question, scene, answer)
        str_ = _symmetric_token_replacement(random, question, scene, answer)
        # Rarely a draw has no counterfactual (two of the same shape asked for nothing else): draw again.
        if answer is not None and sip is not None and str_ is not None:
            return ShapesSample(seed, index, question, answer, scene, sip, str_)


def generate(
    n: int,
    seed: int,
    kinds: Sequence[str] = KINDS,
    object_counts: Sequence[int] = OBJECT_COUNTS,
) -> Iterator[ShapesSample]:
    """The first ``n`` samples of the sequence that ``seed`` names; see :func:`sample`."""
    _check(kinds, object_counts)
    return (sample(seed, index, kinds, object_counts) for index in range(n))


def shapes(
    n: int,
    seed: int,
    kinds: Sequence[str] = KINDS,
    object_counts: Sequence[int] = OBJECT_COUNTS,
) -> Samples:
    """The same as the records that methods take; see :meth:`ShapesSample.as_sample`."""
    # Other kinds are another sequence, and ids are to be told apart.
    drawn_from = ((kinds, KINDS), (object_counts, OBJECT_COUNTS))
    ending = "".join(f"-{'+'.join(map(str, own))}" for own, every in drawn_from if tuple(own) != every)
    samples = (one.as_sample() for one in generate(n, seed, kinds, object_counts))
    return Samples(replace(one, id=one.id + ending) for one in samples)


def _check(kinds: Sequence[str], object_counts: Sequence[int]) -> None:
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be some of {KINDS}, got {tuple(kinds)}")
    if not object_counts or not set(object_counts) <= set(OBJECT_COUNTS):
        raise ValueError(f"object_counts must be some of {OBJECT_COUNTS}, got {tuple(object_counts)}")


Option = TypeVar("Option")

Attributes = tuple[str, str]
"""(color, shape) of one object."""


def _draw_color(random: np.random.Generator, object_counts: Sequence[int]) -> tuple[Question, list[Attributes]]:
    color, shape = _pick(random, _COLOR_WORDS), _pick(random, SHAPES)
    others = _pick(random, object_counts) - 1
    rest = [(_pick(random, _COLOR_WORDS), _other(random, SHAPES, shape)) for _ in range(others)]
    return Question("color", shape=shape), [(color, shape), *rest]


def _draw_shape(random: np.random.Generator, object_counts: Sequence[int]) -> tuple[Question, list[Attributes]]:
    color, shape = _pick(random, _COLOR_WORDS), _pick(random, SHAPES)
    others = _pick(random, object_counts) - 1
    rest = [(_other(random, _COLOR_WORDS, color), _pick(random, SHAPES)) for _ in range(others)]
    return Question("shape", color=color), [(color, shape), *rest]


def _draw_count(random: np.random.Generator, object_counts: Sequence[int]) -> tuple[Question, list[Attributes]]:
    wanted = int(random.integers(min(len(COUNTS), max(object_counts) + 1)))
    total = _pick(random, [count for count in object_counts if count >= wanted])
    color, shape = _pick(random, _COLOR_WORDS), _pick(random, SHAPES)
    if random.random() < 0.5:
        named = [(color, _pick(random, SHAPES)) for _ in range(wanted)]
        rest = [(_other(random, _COLOR_WORDS, color), _pick(random, SHAPES)) for _ in range(total - wanted)]
        return Question("count", color=color), named + rest
    named = [(_pick(random, _COLOR_WORDS), shape) for _ in range(wanted)]
    rest = [(_pick(random, _COLOR_WORDS), _other(random, SHAPES, shape)) for _ in range(total - wanted)]
    return Question("count", shape=shape), named + rest


def _draw_exists(random: np.random.Generator, object_counts: Sequence[int]) -> tuple[Question, list[Attributes]]:
    color, shape = _pick(random, _COLOR_WORDS), _pick(random, SHAPES)
    same_color = (color, _other(random, SHAPES, shape))
    same_shape = (_other(random, _COLOR_WORDS, color), shape)
    neither = (_other(random, _COLOR_WORDS, color), _other(random, SHAPES, shape))
    total = _pick(random, object_counts)
    if random.random() < 0.5:
        attributes = [(color, shape)]
    elif random.random() < _UNBOUND_SHARE:
        attributes = [same_color, same_shape]
    else:
        attributes = [_pick(random, (same_color, same_shape))]
    while len(attributes) < total:
        attributes.append(_pick(random, (same_color, same_shape, neither)))
    return Question("exists", color=color, shape=shape), attributes


_DRAW = {"color": _draw_color, "shape": _draw_shape, "count": _draw_count, "exists": _draw_exists}


def _place(random: np.random.Generator, attributes: Sequence[Attributes]) -> Scene:
    """Give every object a cell of its own, and let position, size and background vary a little."""
    cells = random.permutation(GRID * GRID)[: len(attributes)].tolist()
    shuffled = list(attributes)
    random.shuffle(shuffled)
    offsets = random.integers(-1, 2, size=(len(attributes), 2)).tolist()
    sizes = random.integers(3, size=len(attributes)).tolist()
    objects = tuple(
        ShapeObject(shape, color, divmod(cell, GRID), (down, right), 5.5 + 0.5 * size)
        for (color, shape), cell, (down, right), size in zip(shuffled, cells, offsets, sizes, strict=True)
    )
    shade, tint = int(random.integers(236, 250)), random.integers(-4, 5, size=3).tolist()
    return Scene(objects, (shade + tint[0], shade + tint[1], shade + tint[2]))


def _semantic_image_pair(
    random: np.random.Generator, question: Question, scene: Scene, answer: str | None
) -> SemanticImagePair | None:
    found = []
    for index, item in enumerate(scene.objects):
        for attribute, words in (("color", _COLOR_WORDS), ("shape", SHAPES)):
            for word in words:
                if word == getattr(item, attribute):
                    continue
                change: dict[str, Any] = {attribute: word}
                changed = replace(item, **change)
                objects = (*scene.objects[:index], changed, *scene.objects[index + 1 :])
                new_answer = question.answer(objects)
                if new_answer not in (None, answer):
                    found.append((new_answer, objects, index, attribute))
    if not found:
        return None
    new_answer, objects, index, attribute = _pick_answer_first(random, found)
    return SemanticImagePair(replace(scene, objects=objects), new_answer, index, attribute)


def _symmetric_token_replacement(
    random: np.random.Generator, question: Question, scene: Scene, answer: str | None
) -> SymmetricTokenReplacement | None:
    found = []
    for attribute, words in (("color", _COLOR_WORDS), ("shape", SHAPES)):
        if getattr(question, attribute) is None:
            continue
        for word in words:
            change: dict[str, Any] = {attribute: word}
            other = replace(question, **change)
            new_answer = other.answer(scene.objects)
            if new_answer not in (None, answer):
                found.append((new_answer, other))
    if not found:
        return None
    new_answer, other = _pick_answer_first(random, found)
    old_words, new_words = question.text.split(), other.text.split()
    position = next(at for at, (old, new) in enumerate(zip(old_words, new_words, strict=True)) if old != new)
    return SymmetricTokenReplacement(other, new_answer, position, old_words[position], new_words[position])


def _pick(random: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(random.integers(len(options)))]


def _pick_answer_first(random: np.random.Generator, found: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Pick evenly among the answers (the first fields), then among what gives that answer."""
    answer = _pick(random, sorted({candidate[0] for candidate in found}))
    return _pick(random, [candidate for candidate in found if candidate[0] == answer])


def _other(random: np.random.Generator, options: Sequence[str], avoid: str) -> str:
    return _pick(random, [option for option in options if option != avoid])

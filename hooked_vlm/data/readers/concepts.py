"""A small language of concepts: AND, OR and NOT over the attributes of things, such as ``red and cone``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hooked_vlm.data.readers.worlds import Thing
from hooked_vlm.data.samples import SampleError

LEVELS = ("object", "image")
"""Where the atoms of a concept are looked for: all on the same, one object, or each anywhere in the picture."""


class ConceptError(SampleError):
    """A concept that cannot be read, or of which no sets can be made."""


@dataclass(frozen=True)
class Atom:
    """A value, such as ``red``, of a given attribute or of any."""

    value: str
    attribute: str | None = None

    def __str__(self) -> str:
        return self.value if self.attribute is None else f"{self.attribute}={self.value}"

    def of(self, thing: Thing) -> bool:
        return thing.has(self.value, self.attribute)


@dataclass(frozen=True)
class Not:
    """What is true where its term is not."""

    term: Concept

    def __str__(self) -> str:
        return f"not {_bracketed(self.term, And, Or)}"


@dataclass(frozen=True)
class And:
    """What is true where all its terms are."""

    terms: tuple[Concept, ...]

    def __str__(self) -> str:
        return " and ".join(_bracketed(term, And, Or) for term in self.terms)


@dataclass(frozen=True)
class Or:
    """What is true where any of its terms is."""

    terms: tuple[Concept, ...]

    def __str__(self) -> str:
        return " or ".join(_bracketed(term, Or) for term in self.terms)


Concept: TypeAlias = Atom | Not | And | Or


def parse_concept(text: str) -> Concept:
    """A concept from words: ``red and cone``, ``metallic or cube``, ``color=red and not (shape=cube or large)``.

    "not" binds before "and", "and" before "or".

    Raises:
        ConceptError: what is not in this form; says where.
    """
    parser = _Parser(text)
    concept = parser.disjunction()
    if parser.next is not None:
        raise parser.error("'and', 'or' or the end")
    return concept


def atoms_of(concept: Concept) -> tuple[Atom, ...]:
    """What a concept is made of, in its order."""
    if isinstance(concept, Atom):
        return (concept,)
    terms = (concept.term,) if isinstance(concept, Not) else concept.terms
    return tuple(dict.fromkeys(atom for term in terms for atom in atoms_of(term)))


def holds(concept: Concept, true: Collection[Atom]) -> bool:
    """Whether a concept is true where these of its atoms are, and the others are not."""
    if isinstance(concept, Atom):
        return concept in true
    if isinstance(concept, Not):
        return not holds(concept.term, true)
    return (all if isinstance(concept, And) else any)(holds(term, true) for term in concept.terms)


def true_atoms(atoms: Collection[Atom], things: Sequence[Thing], level: str = "object") -> frozenset[Atom] | None:
    """Which atoms are true of the things in a picture.

    On the level "image" those that are true of any thing. On the level "object" those that are true of the one thing
    that has any of them: None if several things have some, since then there is no such one.
    """
    if level not in LEVELS:
        raise ValueError(f"level is one of {', '.join(LEVELS)}, not {level!r}")
    found = [frozenset(atom for atom in atoms if atom.of(thing)) for thing in things]
    some = [true for true in found if true]
    if level == "object" and len(some) > 1:
        return None
    return frozenset().union(*some)


def cell_name(atoms: Collection[Atom], true: Collection[Atom]) -> str:
    """A combination of atoms in words: ``red, not cone``."""
    return ", ".join(str(atom) if atom in true else f"not {atom}" for atom in atoms)


def _bracketed(term: Concept, *kinds: type) -> str:
    return f"({term})" if isinstance(term, kinds) else str(term)


_TOKEN = re.compile(r"\s*([()]|[^\s()]+)")
_RESERVED = ("and", "or", "not", "(", ")")


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _TOKEN.findall(text)
        self.at = 0

    @property
    def next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, *wanted: str) -> bool:
        taken = self.next in wanted
        self.at += taken
        return taken

    def error(self, wanted: str) -> ConceptError:
        found = "it ends" if self.next is None else f"there is {self.next!r}"
        return ConceptError(
            f"{self.text!r} is no concept: after {' '.join(self.tokens[: self.at]) or 'its beginning'!r} {found}, and "
            f"{wanted} was expected; concepts are such as 'red and cone', 'color=red or not (cube and large)'",
            "a concept that cannot be read",
        )

    def disjunction(self) -> Concept:
        terms = [self.conjunction()]
        while self.take("or"):
            terms.append(self.conjunction())
        return terms[0] if len(terms) == 1 else Or(tuple(terms))

    def conjunction(self) -> Concept:
        terms = [self.term()]
        while self.take("and"):
            terms.append(self.term())
        return terms[0] if len(terms) == 1 else And(tuple(terms))

    def term(self) -> Concept:
        if self.take("not"):
            return Not(self.term())
        if self.take("("):
            inner = self.disjunction()
            if not self.take(")"):
                raise self.error("')'")
            return inner
        if self.next is None or self.next in _RESERVED:
            raise self.error("an attribute")
        attribute, equals, value = self.tokens[self.at].rpartition("=")
        if equals and not (attribute and value):
            raise self.error("ATTRIBUTE=VALUE")
        self.at += 1
        return Atom(value, attribute or None)

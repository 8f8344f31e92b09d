"""Words that are not to stand for one another: "wet" and "moist" are no pair of opposites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Avoid = Mapping[str, Iterable[str]]
"""For each word those that are too much like it."""


class Likeness:
    """Which words are like which, whatever their case. ``symmetric``: what is like a word, the word is like."""

    def __init__(self, avoid: Avoid | None, *, symmetric: bool = True) -> None:
        self._like: dict[str, set[str]] = {}
        for word, others in (avoid or {}).items():
            if isinstance(others, str):
                raise TypeError(f"avoid says for each word a list of words, and for {word!r} it says {others!r}")
            for other in others:
                self._like.setdefault(word.casefold(), set()).add(other.casefold())
                if symmetric:
                    self._like.setdefault(other.casefold(), set()).add(word.casefold())

    def forbids(self, word: str, other: str) -> bool:
        """Whether ``other`` is not to stand where ``word`` does."""
        return other.casefold() == word.casefold() or other.casefold() in self._like.get(word.casefold(), ())

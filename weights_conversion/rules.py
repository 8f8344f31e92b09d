"""A checkpoint's table of names: key pattern -> parameter, read both ways.

``{l}`` stands for a layer's number and ``*`` for the rest of a name (``weight`` or ``bias``). Where the checkpoint's
tensor has another shape than our parameter, a row's third element says how the one becomes the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class View(Protocol):
    """How a checkpoint's tensor becomes a parameter, and back; never a copy."""

    def to_parameter(self, tensor: Tensor) -> Tensor: ...

    def to_key(self, tensor: Tensor) -> Tensor: ...


class Same:
    """The parameter is the tensor."""

    def to_parameter(self, tensor: Tensor) -> Tensor:
        return tensor

    def to_key(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Leading:
    """The parameter has ``n`` axes of size 1 before those of the checkpoint's tensor."""

    n: int

    def to_parameter(self, tensor: Tensor) -> Tensor:
        return tensor[(None,) * self.n]

    def to_key(self, tensor: Tensor) -> Tensor:
        return tensor[(0,) * self.n]


SAME = Same()

Row = tuple[str, str] | tuple[str, str, View]


class Rules:
    """Rows of (checkpoint key pattern, parameter name pattern), and the patterns of keys that carry no parameter."""

    def __init__(self, *rows: Row, ignored: Iterable[str] = ()) -> None:
        self.rows = rows
        self.ignored = tuple(ignored)
        views = [row[2] if len(row) == 3 else SAME for row in rows]
        self._to_parameter = [
            (_compile(row[0]), _template(row[1]), view) for row, view in zip(rows, views, strict=True)
        ]
        self._to_key = [(_compile(row[1]), _template(row[0]), view) for row, view in zip(rows, views, strict=True)]
        self._ignored = [_compile(pattern) for pattern in self.ignored]

    def __add__(self, other: Rules) -> Rules:
        return Rules(*self.rows, *other.rows, ignored=self.ignored + other.ignored)

    def parameter(self, key: str) -> str | None:
        """The parameter that a checkpoint key holds; None for a key that no rule knows."""
        return _apply(self._to_parameter, key)[0]

    def key(self, parameter: str) -> str | None:
        """The checkpoint key that holds a parameter: that of the earliest row that fits."""
        return _apply(self._to_key, parameter)[0]

    def to_parameter(self, key: str, tensor: Tensor) -> Tensor:
        """What a checkpoint holds under a key, in the shape of its parameter."""
        return _apply(self._to_parameter, key)[1].to_parameter(tensor)

    def to_key(self, parameter: str, tensor: Tensor) -> Tensor:
        """A parameter, in the shape that a checkpoint holds it in."""
        return _apply(self._to_key, parameter)[1].to_key(tensor)

    def rank(self, key: str) -> int:
        """The place of a key's rule in the table."""
        matching = (place for place, (pattern, _, _) in enumerate(self._to_parameter) if pattern.fullmatch(key))
        return next(matching, len(self.rows))

    def ignores(self, key: str) -> bool:
        return any(pattern.fullmatch(key) for pattern in self._ignored)


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(re.escape("{l}"), r"(?P<l>\d+)").replace(re.escape("*"), r"(?P<rest>.+)")
    return re.compile(escaped)


def _template(pattern: str) -> str:
    return pattern.replace("*", "{rest}")


def _apply(rules: list[tuple[re.Pattern[str], str, View]], name: str) -> tuple[str | None, View]:
    for pattern, template, view in rules:
        match = pattern.fullmatch(name)
        if match:
            return template.format(**match.groupdict()), view
    return None, SAME

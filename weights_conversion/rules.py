"""A checkpoint's table of names: key pattern -> parameter, read both ways.

``{l}`` stands for a layer's number and ``*`` for the rest of a name (``weight`` or ``bias``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class Rules:
    """Pairs of (checkpoint key pattern, parameter name pattern), and the patterns of keys that carry no parameter."""

    def __init__(self, *pairs: tuple[str, str], ignored: Iterable[str] = ()) -> None:
        self.pairs = pairs
        self.ignored = tuple(ignored)
        self._to_parameter = [(_compile(key), _template(name)) for key, name in pairs]
        self._to_key = [(_compile(name), _template(key)) for key, name in pairs]
        self._ignored = [_compile(pattern) for pattern in self.ignored]

    def __add__(self, other: Rules) -> Rules:
        return Rules(*self.pairs, *other.pairs, ignored=self.ignored + other.ignored)

    def parameter(self, key: str) -> str | None:
        """The parameter that a checkpoint key holds; None for a key that no rule knows."""
        return _apply(self._to_parameter, key)

    def key(self, parameter: str) -> str | None:
        """The checkpoint key that holds a parameter."""
        return _apply(self._to_key, parameter)

    def rank(self, key: str) -> int:
        """The place of a key's rule in the table."""
        matching = (place for place, (pattern, _) in enumerate(self._to_parameter) if pattern.fullmatch(key))
        return next(matching, len(self.pairs))

    def ignores(self, key: str) -> bool:
        return any(pattern.fullmatch(key) for pattern in self._ignored)


def _compile(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(re.escape("{l}"), r"(?P<l>\d+)").replace(re.escape("*"), r"(?P<rest>.+)")
    return re.compile(escaped)


def _template(pattern: str) -> str:
    return pattern.replace("*", "{rest}")


def _apply(rules: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    for pattern, template in rules:
        match = pattern.fullmatch(name)
        if match:
            return template.format(**match.groupdict())
    return None

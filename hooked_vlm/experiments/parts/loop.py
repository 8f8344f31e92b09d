"""How a method goes through its samples.

Here, one after another, and whatever fails is raised. A run over a dataset (:mod:`hooked_vlm.runs`) goes through them
in its own way, keeps what it has found, and shares them out; the methods do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from hooked_vlm.data.samples import Dropped, Sample, SampleError
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.progress import track


@dataclass(frozen=True)
class Failed(Dropped):
    """A sample whose turn ended in an error that is no fault of its own, as far as the method knows."""

    traceback: str = ""


Outcome: TypeAlias = Found | Dropped
"""What comes of a sample: something found, or why not."""

One: TypeAlias = Callable[[Sample], Found]
"""What a method does with one sample."""

Shared = TypeVar("Shared")
"""What a method makes of all samples before it goes through them: a mean, say."""


class Loop:
    """One sample after another."""

    def outcomes(self, method: str, samples: Sequence[Sample], one: One, *, progress: bool = False) -> list[Outcome]:
        """What comes of each sample, in their order."""
        return [outcome(sample, one) for sample in track(samples, method, shown=progress)]

    def once(
        self,
        name: str,
        make: Callable[[], Shared],
        save: Callable[[Shared, Path], None],
        load: Callable[[Path], Shared],
    ) -> Shared:
        """What is made once for all samples; ``save`` and ``load``: how a file keeps it."""
        return make()


_LOOP: ContextVar[Loop] = ContextVar("loop")
_PLAIN = Loop()


def current_loop() -> Loop:
    """How samples are gone through at this place."""
    return _LOOP.get(_PLAIN)


@contextmanager
def going_through(loop: Loop) -> Iterator[None]:
    """Methods called in this block go through their samples by ``loop``."""
    token = _LOOP.set(loop)
    try:
        yield
    finally:
        _LOOP.reset(token)


def outcome(sample: Sample, one: One) -> Outcome:
    """What comes of a sample."""
    try:
        return found(sample, one)
    except SampleError as error:
        return Dropped.of(sample.id, error)


def found(sample: Sample, one: One) -> Found:
    """What is found of a sample; of methods that ``one`` itself calls, samples are gone through plainly."""
    with going_through(_PLAIN):
        return one(sample).labelled(sample)

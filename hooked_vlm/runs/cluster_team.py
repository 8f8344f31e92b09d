"""The actors of a run as the driver sees them: who has which samples, and who takes the place of one that died."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hooked_vlm.data.pictures import is_address
from hooked_vlm.data.samples import Sample
from hooked_vlm.experiments.parts.loop import Failed
from hooked_vlm.runs.cluster_actor import ClusterError, Task
from hooked_vlm.runs.records import Kept, encoded

IN_FLIGHT = 2
"""Samples that an actor has at a time: the one that it works at, and one more, so that it need not wait for it."""

ATTEMPTS = 3
"""How many actors may die at one sample before it is given up; and how many, one after another, before they begin."""

LOOK = 0.5
"""Seconds that the driver waits for samples before it looks what other processes have done."""


class Death(NamedTuple):
    """Of an actor."""

    reason: str

    @classmethod
    def of(cls, error: Exception) -> Death:
        return cls(" ".join(str(error).split())[:1000])


class Turn(NamedTuple):
    """A sample that an actor has."""

    number: int
    sample: Sample
    record: Any
    """A reference to it."""


class Team:
    """The actors that do a run's samples, by their places.

    Args:
        hire: makes an actor.
        versions: of what the driver computes with.
        told: is called with what should be said to the user.
    """

    def __init__(
        self,
        ray: Any,
        hire: Callable[[], Any],
        workers: int,
        versions: Mapping[str, str],
        told: Callable[[str], None],
    ) -> None:
        self.ray, self.told, self._hire, self._versions = ray, told, hire, versions
        self.actors = {place: hire() for place in range(workers)}
        self._differing: set[str] = set()

    def replace(self, place: int) -> None:
        """Another actor in the place of one that is of no more use."""
        self._end(place)
        self.actors[place] = self._hire()

    def dismiss(self) -> None:
        """End all actors."""
        for place in self.actors:
            self._end(place)

    def met(self, host: str, versions: Mapping[str, str]) -> None:
        """Say so, once, where a machine computes with other versions."""
        here = self._versions
        differ = [f"{name} {own} (here {here[name]})" for name, own in versions.items() if own != here[name]]
        if differ and host not in self._differing:
            self._differing.add(host)
            self.told(f"{host} has {', '.join(differ)}: numbers may differ in their last digits")

    def _end(self, place: int) -> None:
        with suppress(self.ray.exceptions.RayError):
            self.ray.kill(self.actors[place])


class Shift:
    """A team at one task."""

    def __init__(self, team: Team, task: Task) -> None:
        self._team, self._ray = team, team.ray
        self._task = self._ray.put(task)
        self._deaths = Counter[int]()
        self._false_starts = 0
        self._beginning: dict[int, Any] = {}
        """Of actors that load their model, or go over to this task."""
        self._turns: dict[int, deque[Turn]] = {}
        """Of actors that have begun, in their order."""
        for place in team.actors:
            self._begin(place)

    @property
    def has_room(self) -> bool:
        """Whether an actor can take a sample."""
        return any(len(turns) < IN_FLIGHT for turns in self._turns.values())

    def give(self, number: int, sample: Sample) -> None:
        """Hand a sample to the actor that has the fewest."""
        place = min(self._turns, key=lambda place: len(self._turns[place]))
        record = self._team.actors[place].turn.remote(sample.id, _paths(sample))
        self._turns[place].append(Turn(number, sample, record))

    def returned(self) -> Iterator[tuple[int, bytes | None]]:
        """Records of samples that were given; None of those that must be done again. Nothing, after a while."""
        first = {turns[0].record: place for place, turns in self._turns.items() if turns}
        beginning = {begun: place for place, begun in self._beginning.items()}
        if not first and not beginning:
            time.sleep(LOOK)
            return
        ready, _ = self._ray.wait([*beginning, *first], timeout=LOOK)
        for reference in ready:
            if reference in first:
                yield from self._ended(first[reference])
            else:
                self._begun(beginning[reference])

    def _begin(self, place: int) -> None:
        self._beginning[place] = self._team.actors[place].begin.remote(self._task)

    def _begun(self, place: int) -> None:
        begun = self._got(self._beginning.pop(place))
        if not isinstance(begun, Death):
            self._false_starts = 0
            self._turns[place] = deque()
            self._team.met(*begun)
            return
        self._false_starts += 1
        if self._false_starts >= ATTEMPTS:
            raise ClusterError(f"{ATTEMPTS} workers died before they could begin; the last: {begun.reason}")
        self._replace(place, begun)

    def _ended(self, place: int) -> Iterator[tuple[int, bytes | None]]:
        """What came of an actor's first sample; of all that it had, where it died."""
        turn, *others = self._turns[place]
        record = self._got(turn.record)
        if not isinstance(record, Death):
            self._turns[place].popleft()
            yield turn.number, record
            return
        del self._turns[place]
        self._replace(place, record)
        self._deaths[turn.number] += 1
        is_given_up = self._deaths[turn.number] >= ATTEMPTS
        yield turn.number, _given_up(turn.sample, record) if is_given_up else None
        # It had not come to these.
        yield from ((other.number, None) for other in others)

    def _replace(self, place: int, death: Death) -> None:
        self._team.told(f"a worker died, and is replaced; what it was at is done again: {death.reason}")
        self._team.replace(place)
        self._begin(place)

    def _got(self, reference: Any) -> Any:
        """What an actor gives, or its death; another error is raised as it was there."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # A process whose GPU has failed once does nothing more with it.
            cause = error.cause or error
            # A process whose GPU has failed once does nothing more with it. Its traceback tells of causes, too.
            if "CUDA error" not in str(error):
                raise cause from error
            return Death.of(cause)
        except self._ray.exceptions.RayError as error:
            return Death.of(error)


def _given_up(sample: Sample, death: Death) -> bytes:
    reason = f"{ATTEMPTS} workers died at it, one after another; the last: {death.reason}"
    return encoded(Kept(Failed(sample.id, reason, "workers died at it"), 0.0))


def _paths(sample: Sample) -> list[str]:
    """The files here that a sample's pictures are read from."""
    given = (one for one in (sample.image, sample.image_cf) if isinstance(one, (str, Path)) and not is_address(one))
    return [str(path) for path in given if os.path.exists(path)]

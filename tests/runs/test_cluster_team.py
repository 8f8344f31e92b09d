"""A team whose actors do as they are told: who gets which samples, and what becomes of those of one that died."""

from __future__ import annotations

import errno
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from hooked_vlm.data import Sample
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Failed
from hooked_vlm.runs import cluster_team
from hooked_vlm.runs.cluster import ClusterLoop
from hooked_vlm.runs.cluster_actor import ClusterError, Task
from hooked_vlm.runs.cluster_team import Team
from hooked_vlm.runs.records import Kept, Records, encoded
from tests.runs.disturbed import wait_until


class RayError(Exception):
    """Of an actor that died."""


class RayTaskError(RayError):
    """Of one that lives, and raised something."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Reference(NamedTuple):
    actor: int
    what: str
    """A sample's name, or what it begins with."""


class ScriptedRay:
    """Actors that do what ``does`` does; which of them is ready first is drawn."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, does: Callable[[str], Any]) -> None:
        self.does, self.drawn = does, random.Random(0)
        self.hired, self.killed, self.dead = 0, set[int](), set[int]()
        self.at_hand, self.done, self.tasks = Counter[int](), list[tuple[int, str]](), list[Task]()

    def hire(self) -> SimpleNamespace:
        actor, self.hired = self.hired, self.hired + 1

        def begin(task: Task) -> Reference:
            self.tasks.append(task)
            return Reference(actor, task.step)

        def turn(name: str, paths: Sequence[str]) -> Reference:
            self.at_hand[actor] += 1
            assert self.at_hand[actor] <= cluster_team.IN_FLIGHT
            return Reference(actor, name)

        return SimpleNamespace(number=actor, begin=SimpleNamespace(remote=begin), turn=SimpleNamespace(remote=turn))

    def put(self, task: Task) -> Task:
        return task

    def wait(self, references: Sequence[Reference], timeout: float) -> tuple[list[Reference], list[Reference]]:
        return [self.drawn.choice(references)], []

    def get(self, reference: Reference) -> Any:
        actor, what = reference
        self.at_hand[actor] -= what != STEP
        if actor in self.dead:
            raise RayError("it is dead already")
        self.done.append(reference)
        try:
            return self.does(what)
        except RayError as error:
            if not isinstance(error, RayTaskError):
                self.dead.add(actor)
            raise

    def kill(self, actor: SimpleNamespace) -> None:
        self.killed.add(actor.number)
        self.dead.add(actor.number)


STEP = "STEP"
SAMPLES = {name: Sample(id=name, image=None, question="what ?") for name in "abcdefgh"}


def does(what: str) -> Any:
    """What an actor gives that is well."""
    if what == STEP:
        return "far", {"torch": "2.0"}
    found = Found({"value": (("sample",), np.array([ord(what)]))}, frozenset())
    return encoded(Kept(found.labelled(SAMPLES[what]), 0.5))


class Play:
    """A step that a scripted team of two goes through."""

    def __init__(self, folder: Path, does: Callable[[str], Any], version: str = "2.0", **options: Any) -> None:
        self.ray, self.records, self.told = ScriptedRay(does), Records(folder), list[str]()
        self.team = Team(self.ray, self.ray.hire, 2, {"torch": version}, self.told.append)
        self.loop = ClusterLoop(folder, self.team, STEP, told=self.told.append, **options)

    def outcomes(self) -> list[Any]:
        return self.loop.outcomes("method", list(SAMPLES.values()), lambda sample: pytest.fail("actors do the samples"))

    @property
    def turns(self) -> Counter[str]:
        """How often an actor was at a sample."""
        return Counter(what for _, what in self.ray.done if what != STEP)


def raising(error: Exception, at: str, times: int = 100) -> Callable[[str], Any]:
    """What actors do to whom something happens at some samples, or at their beginning, so many times."""
    left = [error] * times

    def what_it_does(what: str) -> Any:
        if what in at and left:
            raise left.pop()
        return does(what)

    return what_it_does


def values(outcomes: Sequence[Any]) -> list[Any]:
    return [one.variables["value"][1].item() if isinstance(one, Found) else type(one) for one in outcomes]


def test_two_actors_share_the_samples(tmp_path: Path) -> None:
    numbers = {name: 30 - place for place, name in enumerate(SAMPLES)}
    play = Play(tmp_path, does, numbers=numbers)
    assert values(play.outcomes()) == [ord(name) for name in SAMPLES]
    assert play.records.finished() == set(numbers.values())
    assert play.turns == dict.fromkeys(SAMPLES, 1)
    assert len({actor for actor, what in play.ray.done if what in SAMPLES}) == 2
    assert play.loop.seconds == len(SAMPLES) * 0.5
    again = Play(tmp_path, does, numbers=numbers)
    assert values(again.outcomes()) == [ord(name) for name in SAMPLES]
    assert not again.ray.done
    play.team.dismiss()
    assert play.ray.killed == {0, 1}
    assert play.told == []


@pytest.mark.parametrize("at", ["a", "d", "h", "cd", "abcdefgh"])
def test_a_death_is_that_of_the_sample_at_its_turn(at: str, tmp_path: Path) -> None:
    play = Play(tmp_path, raising(RayError("all is\n  over"), at))
    found = play.outcomes()
    assert values(found) == [Failed if name in at else ord(name) for name in SAMPLES]
    assert play.turns == {name: 3 if name in at else 1 for name in SAMPLES}
    assert play.ray.hired == 2 + 3 * len(at)
    assert len(play.ray.killed) == 3 * len(at)
    assert play.told == ["a worker died, and is replaced; what it was at is done again: all is over"] * 3 * len(at)
    lost = next(one for one in found if isinstance(one, Failed))
    reason = "3 workers died at it, one after another; the last: all is over"
    assert (lost.id, lost.reason, lost.kind) == (at[0], reason, "workers died at it")
    assert values(Play(tmp_path, does).outcomes()) == values(found)


def test_who_lost_its_gpu_is_replaced(tmp_path: Path) -> None:
    lost = RayTaskError(RuntimeError("CUDA error: an illegal memory access was encountered"))
    play = Play(tmp_path, raising(lost, "c", times=2))
    assert values(play.outcomes()) == [ord(name) for name in SAMPLES]
    assert play.turns == {**dict.fromkeys(SAMPLES, 1), "c": 3}
    assert play.ray.hired == 2 + 2


def test_what_ends_a_run_ends_it_and_frees_its_samples(tmp_path: Path) -> None:
    play = Play(tmp_path, raising(RayTaskError(OSError(errno.ENOSPC, "the disk is full")), "c"))
    with pytest.raises(OSError, match="the disk is full"):
        play.outcomes()
    assert not list(tmp_path.rglob("*.lock"))
    assert values(Play(tmp_path, does).outcomes()) == [ord(name) for name in SAMPLES]


def test_actors_that_never_begin_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="3 workers died before they could begin; the last: no memory"):
        Play(tmp_path, raising(RayError("no memory"), STEP)).outcomes()
    with pytest.raises(ValueError, match="no such model"):
        Play(tmp_path, raising(RayTaskError(ValueError("no such model")), STEP)).outcomes()


def test_actors_that_begin_in_the_end_do_the_samples(tmp_path: Path) -> None:
    is_well = iter([False, False, True, False, False])

    def begins(what: str) -> Any:
        if what == STEP and not next(is_well, True):
            raise RayError("no memory")
        return does(what)

    play = Play(tmp_path, begins)
    assert values(play.outcomes()) == [ord(name) for name in SAMPLES]
    assert play.ray.hired == 2 + 4


def test_other_versions_are_told_once(tmp_path: Path) -> None:
    play = Play(tmp_path, does, version="2.1")
    play.outcomes()
    assert play.told == ["far has torch 2.0 (here 2.1): numbers may differ in their last digits"]


def test_what_another_process_does_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_team, "LOOK", 0.01)
    play = Play(tmp_path, does)

    def another(begun: threading.Event) -> None:
        with play.records.claim(3):
            begun.set()
            wait_until(lambda: len(play.turns) == len(SAMPLES) - 1)
            play.records.write(3, does("d"))

    begun = threading.Event()
    other = threading.Thread(target=another, args=(begun,))
    other.start()
    begun.wait()
    assert values(play.outcomes()) == [ord(name) for name in SAMPLES]
    other.join()
    assert play.turns == dict.fromkeys(set(SAMPLES) - {"d"}, 1)


def test_actors_are_told_what_was_made_and_found_before(tmp_path: Path) -> None:
    play = Play(tmp_path, does)
    made = play.loop.once("mean", lambda: b"12", lambda value, path: path.write_bytes(value), Path.read_bytes)
    first = play.outcomes()
    task = Task(STEP, list(SAMPLES.values()), (), {"mean": b"12"})
    assert made == b"12"
    assert play.ray.tasks == [task] * 2
    play.loop.outcomes("method", list(SAMPLES.values())[:3], lambda sample: pytest.fail("actors do the samples"))
    assert play.ray.tasks[2:] == [task._replace(earlier=(first,))] * 2

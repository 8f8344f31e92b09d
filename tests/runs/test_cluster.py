"""Runs over a Ray cluster of this machine's: the values of one process, whoever is killed on the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from hooked_vlm.data import Sample
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Dropped, Failed, Loop
from hooked_vlm.runs import Experiment, cluster_team
from hooked_vlm.runs.cluster import ClusterLoop, check, over_cluster
from hooked_vlm.runs.cluster_actor import Actor, AskedLoop, ClusterError, Task
from hooked_vlm.runs.cluster_team import Team
from hooked_vlm.runs.folder import Folder, Identity
from hooked_vlm.runs.records import Kept, Records, decoded, encoded
from tests.runs.deadly import impatient
from tests.runs.disturbed import (
    Turn,
    a_model,
    carry_out,
    leftovers,
    numbers_of,
    started,
    turns,
    values_of,
    wait_until,
)

SETTINGS = {"RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Of Ray: it leaves nothing in the home folder, tells nobody, and does not give way to the tests that run beside it."""

N_SAMPLES = 12
ONCE, ALWAYS, DROPPED, FAILED = (f"shapes-7-{number}-color" for number in (8, 11, 1, 2))
"""Samples at which one worker dies; or every one (the last, so that no other waits for a new one); odd ones."""


# A cluster, and runs on it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="ray is an extra")
    with pytest.MonkeyPatch.context() as patched:
        for name, value in SETTINGS.items():
            patched.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80_000_000,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield ray
        ray.shutdown()


def tables(log: Path, once: int = 0, always: int = 0) -> dict[str, Any]:
    """Four steps: two that cost nothing, at which so many workers die; and two real ones, one with means of samples."""
    odd = {DROPPED: "dropped", FAILED: "failed"}
    deadly = {"use": "tests.runs.deadly:DEADLY"}
    edges = [["question", "last"], ["image", "last"]]
    tokens = {"evaluate": {"vqa": {"kind": "NextToken"}}, "conditions": {"object": {"kind": "ObjectTokens"}}}
    return {
        "model": "toy-llava",
        "samples": {"shapes": N_SAMPLES, "seed": 7, "kinds": ["color"]},
        "keep_correct": True,
        "methods": {
            "numbers": {**deadly, "log": f"{log}.numbers", "deaths": {ONCE: once}, "odd": odd, "seconds": 0.05},
            "flow": {"use": "information_flow", "width": 1, "edges": edges},
            "visual_tokens": {"replace_by": "mean", **tokens},
            "hopeless": {**deadly, "log": f"{log}.hopeless", "deaths": {ALWAYS: always}},
        },
        "statistics": {"resamples": 20, "permutations": 20},
    }


def end_of(process: ForkServerProcess) -> int | None:
    process.join(300)
    return process.exitcode


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@dataclass
class Story:
    """A run over the cluster whose driver is killed, and which goes on with two workers, some of whom die."""

    out: Path
    alone: Path
    """The same run, undisturbed, in one process."""
    kept: set[int]
    """Samples of the first step that had a record when the driver was killed."""
    numbers: list[Turn]
    hopeless: list[Turn]
    said: str

    def summary(self, step: str) -> dict[str, Any]:
        return json.loads((self.out / "summary.json").read_text())["steps"][step]


@pytest.fixture(scope="module")
def story(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("cluster")
    out, log, said = folder / "run", folder / "log", folder / "said"
    alone = started(carry_out, tables(folder / "alone"), folder / "alone")
    given = tables(log, once=1, always=99)
    on_cluster = {
        "before": partial(impatient, SETTINGS, attempts=2),
        "ray": cluster.get_runtime_context().gcs_address,
        "said": said,
    }
    driver = started(carry_out, given, out, workers=1, **on_cluster)
    records = Records(out / "records" / "numbers")
    wait_until(lambda: len(records.finished()) >= 3 or not driver.is_alive())
    driver.kill()
    assert end_of(driver) == -signal.SIGKILL, said.read_text()
    kept = records.finished()
    assert 3 <= len(kept) < 8
    (worker,) = {turn.process for turn in turns(f"{log}.numbers")}
    wait_until(lambda: not is_alive(worker))  # its worker ends, too
    driver = started(carry_out, given, out, resume=True, workers=2, **on_cluster)
    assert end_of(driver) == 0, said.read_text()
    assert end_of(alone) == 0
    logs = [turns(f"{log}.{step}") for step in ("numbers", "hopeless")]
    return Story(out, folder / "alone", kept, *logs, said.read_text())


def test_the_values_are_those_of_one_process(story: Story) -> None:
    values, alone = values_of(story.out), values_of(story.alone)
    disturbed = {name for name in values if name.startswith(("hopeless", "samples"))}
    assert {name: value for name, value in values.items() if name not in disturbed} == {
        name: value for name, value in alone.items() if name not in disturbed
    }
    assert {name.partition(",")[0] for name in values} - disturbed >= {"numbers", "flow", "visual_tokens", "flow.csv"}
    assert leftovers(story.out) == []


def test_what_was_done_before_the_driver_was_killed_is_not_done_again(story: Story) -> None:
    begun = Counter(turn.sample for turn in story.numbers if turn.what == "begins")
    assert [begun[f"shapes-7-{number}-color"] for number in story.kept] == [1] * len(story.kept)


def test_samples_of_a_worker_that_was_killed_are_done_again(story: Story) -> None:
    at_it = [(turn.what, turn.process) for turn in story.numbers if turn.sample == ONCE]
    assert [what for what, _ in at_it] == ["begins", "begins", "ends"]
    assert at_it[0][1] != at_it[1][1]
    assert story.summary("numbers")["used"] == N_SAMPLES - 2
    assert "a worker died, and is replaced; what it was at is done again" in story.said


def test_samples_that_cannot_be_used_are_no_deaths(story: Story) -> None:
    kinds = {own["kind"]: own["outcome"] for own in story.summary("numbers")["reasons"]}
    assert kinds == {f"{DROPPED} is odd": "dropped", "RuntimeError": "failed"}


def test_a_sample_at_which_every_worker_dies_is_given_up(story: Story) -> None:
    at_it = [turn.what for turn in story.hopeless if turn.sample == ALWAYS]
    assert at_it == ["begins", "begins"]
    (reason,) = story.summary("hopeless")["reasons"]
    assert (reason["outcome"], reason["kind"], reason["count"]) == ("failed", "workers died at it", 1)
    ((name, why),) = reason["examples"]
    assert name == ALWAYS
    assert why.startswith("2 workers died at it, one after another; the last: ")
    assert story.summary("hopeless")["used"] == N_SAMPLES - 1


def test_who_is_connected_says_auto(cluster: Any, tmp_path: Path) -> None:
    experiment, folder = Experiment.of(tables(tmp_path / "log")), Folder(tmp_path / "run")
    with pytest.raises(ValueError, match="no run has begun in "):
        over_cluster(folder, experiment, address="auto", workers=1).__enter__()
    folder.begin(Identity(experiment.tables(), [], {}, 1, 1 << 20), experiment, resume=False)
    with pytest.raises(ValueError, match="connected to a Ray cluster already, which is 'auto', not 'local'"):
        over_cluster(folder, experiment, address="local", workers=1).__enter__()


# Addresses -----------------------------------------------------------------------------------------------------------


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"needs Ray .*: pip install 'hooked-vlm\[ray\]'"):
        check("local")


@pytest.mark.parametrize("address", ["", "nonsense", "127.0.0.1", "http://127.0.0.1:80", "ray://host", "host:port"])
def test_what_is_no_address_is_said(address: str) -> None:
    pytest.importorskip("ray", reason="ray is an extra")
    with pytest.raises(ValueError, match="is no address of a Ray cluster: give 'local'"):
        check(address)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_nothing_answers_is_said_at_once(scheme: str) -> None:
    pytest.importorskip("ray", reason="ray is an extra")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        check(address)
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}: "):
        check(address)
    with pytest.raises(ConnectionError, match="no Ray cluster answers at 127.0.0.1:99999: "):
        check("127.0.0.1:99999")


# A team of actors that do as they are told ---------------------------------------------------------------------------


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
        self.at_hand[actor] -= 1
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


STEP = "step"
SAMPLES = {name: Sample(id=name, image=None, question="what ?") for name in "abcdefgh"}


def does(what: str) -> Any:
    """What an actor gives that is well."""
    if what == STEP:
        return "far", {"torch": "2.0"}
    found = Found({"value": (("sample",), np.array([ord(what)]))}, frozenset())
    return encoded(Kept(found.labelled(SAMPLES[what]), 0.5))


class Play:
    """A step that a scripted team of two goes through."""

    def __init__(self, folder: Path, does: Callable[[str], Any], version: str = "2.0") -> None:
        self.ray, self.records, self.told = ScriptedRay(does), Records(folder), list[str]()
        self.team = Team(self.ray, self.ray.hire, 2, {"torch": version}, self.told.append)
        self.loop = ClusterLoop(folder, self.team, STEP, told=self.told.append)

    def outcomes(self) -> list[Any]:
        return self.loop.outcomes("method", list(SAMPLES.values()), lambda sample: pytest.fail("actors do the samples"))

    @property
    def turns(self) -> Counter[str]:
        """How often an actor was at a sample."""
        return Counter(what for _, what in self.ray.done if what != STEP)


def raising(error: Exception, at: str, times: int = 100) -> Callable[[str], Any]:
    """What actors do to whom something happens at one sample, or at their beginning, so many times."""
    left = [error] * times

    def what_it_does(what: str) -> Any:
        if what == at and left:
            raise left.pop()
        return does(what)

    return what_it_does


def values(outcomes: Sequence[Any]) -> list[Any]:
    return [one.variables["value"][1].item() if isinstance(one, Found) else type(one) for one in outcomes]


def test_two_actors_share_the_samples(tmp_path: Path) -> None:
    play = Play(tmp_path, does)
    assert values(play.outcomes()) == [ord(name) for name in SAMPLES]
    assert play.turns == dict.fromkeys(SAMPLES, 1)
    assert len({actor for actor, what in play.ray.done if what in SAMPLES}) == 2
    assert play.loop.seconds == len(SAMPLES) * 0.5
    again = Play(tmp_path, does)
    assert values(again.outcomes()) == [ord(name) for name in SAMPLES]
    assert not again.ray.done
    play.team.dismiss()
    assert play.ray.killed == {0, 1}
    assert play.told == []


@pytest.mark.parametrize("at", SAMPLES)
def test_a_death_is_that_of_the_sample_at_its_turn(at: str, tmp_path: Path) -> None:
    play = Play(tmp_path, raising(RayError("all is\n  over"), at))
    found = dict(zip(SAMPLES, play.outcomes(), strict=True))
    reason = "3 workers died at it, one after another; the last: all is over"
    lost = found.pop(at)
    assert (type(lost), lost.id, lost.reason, lost.kind) == (Failed, at, reason, "workers died at it")
    assert values(list(found.values())) == [ord(name) for name in found]
    assert play.turns == {**dict.fromkeys(SAMPLES, 1), at: 3}
    assert play.ray.hired == 2 + 3
    assert len(play.ray.killed) == 3
    assert play.told == ["a worker died, and is replaced; what it was at is done again: all is over"] * 3
    assert Play(tmp_path, does).outcomes()[list(SAMPLES).index(at)].reason == reason


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
    play = Play(tmp_path, raising(RayError("no memory"), STEP, times=2))
    assert values(play.outcomes()) == [ord(name) for name in SAMPLES]
    with pytest.raises(ClusterError, match="3 workers died before they could begin; the last: no memory"):
        Play(tmp_path / "other", raising(RayError("no memory"), STEP)).outcomes()
    with pytest.raises(ValueError, match="no such model"):
        Play(tmp_path / "other", raising(RayTaskError(ValueError("no such model")), STEP)).outcomes()


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
    play.outcomes()
    assert play.ray.tasks[2:] == [task._replace(earlier=(first,))] * 2


# What an actor does --------------------------------------------------------------------------------------------------


def an_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Actor, Task]:
    monkeypatch.setattr(Experiment, "load_model", lambda self, device=None: a_model("toy-blip-vqa"))
    monkeypatch.chdir(tmp_path)
    given = {**tables(tmp_path / "log"), "model": "toy-blip-vqa"}
    experiment = Experiment.of(given, base=tmp_path)
    identity = Identity.of(experiment, a_model("toy-blip-vqa"), [], 1 << 30)
    samples = experiment.read_samples(4).samples
    actor = Actor(experiment.tables(), tmp_path, replace(identity, **changes), tmp_path, False)
    return actor, Task("numbers", samples, (), {})


def test_an_actor_gives_records_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    actor, task = an_actor(tmp_path, monkeypatch)
    _, versions = actor.begin(task)
    assert versions["torch"] == torch.__version__
    names = [sample.id for sample in task.samples]
    kept = [decoded(actor.turn(name, [str(tmp_path)])).outcome for name in reversed(names)][::-1]
    assert [type(one) for one in kept] == [Found, Dropped, Failed, Found]
    found = kept[0]
    assert isinstance(found, Found)
    np.testing.assert_array_equal(found.variables["value"][1], numbers_of(names[0]).value)
    actor.begin(task)
    assert isinstance(decoded(actor.turn(names[0], [])).outcome, Found)


def test_a_machine_without_a_picture_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, _ = an_actor(tmp_path, monkeypatch)
    with pytest.raises(
        FileNotFoundError, match="has no /gone.png, which x needs: pictures lie at the same path on all"
    ):
        actor.turn("x", [str(tmp_path), "/gone.png"])


def test_a_machine_with_another_model_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, task = an_actor(tmp_path, monkeypatch, model={"revision": None, "files": {"model.safetensors": "0"}})
    with pytest.raises(ClusterError, match="has another toy-blip-vqa than this run began with"):
        actor.begin(task)


def test_a_loop_that_is_asked_knows_what_came_before() -> None:
    samples = [Sample(id=name, image=None, question="what ?") for name in "ab"]
    earlier = [Dropped("a", "odd", "odd"), Dropped("b", "odd", "odd")]
    loop = AskedLoop(Task("step", samples, (earlier,), {"mean": b"12"}))

    def method(own: Loop) -> None:
        made = own.once("mean", lambda: pytest.fail("made anew"), lambda *_: None, Path.read_bytes)
        first = own.outcomes("method", samples, lambda sample: pytest.fail("done anew"))
        found = Found({"value": (("sample",), np.array([int(made)]))}, frozenset())
        own.outcomes("method", samples, lambda sample: found if first == earlier else pytest.fail("forgotten"))
        pytest.fail("a method is over when it is asked for no more")

    threads = threading.active_count()
    loop.enter(method)
    assert values([decoded(loop.ask(name)).outcome for name in "ba"]) == [12, 12]
    with pytest.raises(ClusterError, match="method cannot be shared out: here, c is not among its samples"):
        loop.ask("c")
    other = AskedLoop(Task("step", samples, (earlier,), {"mean": b"12"}))
    other.enter(method)
    other.end()
    wait_until(lambda: threading.active_count() == threads)


def test_a_method_that_fails_before_its_samples_says_so() -> None:
    task = Task("step", [], (), {})

    def fails(loop: Loop) -> None:
        raise ValueError("no heads to look at")

    with pytest.raises(ValueError, match="no heads to look at"):
        AskedLoop(task).enter(fails)
    with pytest.raises(ClusterError, match="did not go through its samples"):
        AskedLoop(task).enter(lambda loop: None)

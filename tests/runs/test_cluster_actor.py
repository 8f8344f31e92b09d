"""What an actor does on its machine, here in this process: records of samples, as it is asked for them."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooked_vlm.data import Sample
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Dropped, Failed, Loop
from hooked_vlm.runs import Experiment
from hooked_vlm.runs.cluster_actor import Actor, AskedLoop, ClusterError, Task
from hooked_vlm.runs.folder import Identity
from hooked_vlm.runs.records import decoded
from tests.runs.deadly import tables
from tests.runs.disturbed import a_model, numbers_of, wait_until


def an_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Actor, Task]:
    monkeypatch.setattr(Experiment, "load_model", lambda self, device=None: a_model("toy-blip-vqa"))
    monkeypatch.chdir(tmp_path)
    given = {**tables(tmp_path / "log"), "model": "toy-blip-vqa"}
    given["methods"]["numbers"]["threads"] = 2
    experiment = Experiment.of(given, base=tmp_path)
    identity = replace(Identity.of(experiment, a_model("toy-blip-vqa"), [], 1 << 30), threads=2)
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
    threads = threading.active_count()
    actor.begin(task)
    assert isinstance(decoded(actor.turn(names[0], [])).outcome, Found)
    wait_until(lambda: threading.active_count() == threads)


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
    for name in "ba":
        done = decoded(loop.ask(name)).outcome
        assert isinstance(done, Found)
        assert done.variables["value"][1].item() == 12
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

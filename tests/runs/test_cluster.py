"""Runs over a Ray cluster of this machine's: the values of one process, whoever is killed on the way."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hooked_vlm.runs import Experiment
from hooked_vlm.runs.cluster import ClusterLoop, check, over_cluster
from hooked_vlm.runs.folder import Folder, Identity
from hooked_vlm.runs.records import Records
from tests.runs.deadly import ALWAYS, DROPPED, N_SAMPLES, ONCE, impatient, tables
from tests.runs.disturbed import Turn, carry_out, leftovers, started, turns, values_of, wait_until

SETTINGS = {"RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Of Ray: it leaves nothing in the home folder, tells nobody, and does not give way to the tests that run beside it."""


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
    # Twice, and once more for each worker that died at it before the record of the sample before had arrived.
    assert at_it in (["begins"] * n for n in (2, 3, 4))
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


@pytest.mark.parametrize(("address", "gpus"), [("auto", 1.0), ("local", 0.5)])
def test_each_worker_has_a_cpu_and_a_gpu(
    address: str, gpus: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole GPUs of a cluster; where that is this machine, a share of those that there are."""
    calls: dict[str, Any] = {}

    def options(**needs: float) -> SimpleNamespace:
        calls["needs"] = needs
        return SimpleNamespace(remote=lambda *facts: calls.update(on_gpu=facts[-1]))

    ray = SimpleNamespace(
        is_initialized=lambda: address == "auto",
        init=lambda **options: calls.update(options),
        shutdown=lambda: None,
        kill=lambda actor: None,
        cluster_resources=lambda: {"CPU": 2.0, "GPU": 1.0},
        available_resources=lambda: {"CPU": 2.0, "GPU": 0.5},
        remote=lambda actor: SimpleNamespace(options=options),
        exceptions=SimpleNamespace(RayError=Exception),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    experiment = Experiment.of({**tables(tmp_path / "log"), "model": {"name": "toy-llava", "device": "cuda:1"}})
    folder, told = Folder(tmp_path / "run"), list[str]()
    folder.begin(Identity(experiment.tables(), [], {}, 1, 1 << 20), experiment, resume=False)
    folder.write("environment.json", [{"versions": {}}])
    with over_cluster(folder, experiment, address=address, workers=2, told=told.append) as loop_of:
        assert isinstance(loop_of("flow"), ClusterLoop)
    assert calls["needs"] == {"num_cpus": 1.0, "num_gpus": gpus}
    assert calls["on_gpu"]
    assert calls.get("address") == (None if address == "auto" else "local")
    assert told == [
        f"GPUs that are free in the cluster: 0.5; 2 workers take {2 * gpus:g}, and some of them begin only when there "
        "are so many"
    ]

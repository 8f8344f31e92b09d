"""A run whose samples are shared out over the machines of a Ray cluster.

This process, the driver, reads the samples and keeps what comes of them; actors on the cluster's machines, each with
its own copy of the model (and its own GPU, where the model is on one), do the samples. Only the driver writes, so that
machines need no disk in common. It has a model, too: what a method does before and after its samples is done here. A
driver that dies takes its actors along, and ``--resume`` goes on from the folder.

Each machine needs this library and Ray in the driver's versions, and whatever the experiment names by a path (a local
model, pictures, methods of your own) at the same path; what it names by an address each fetches for itself.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hooked_vlm.data.samples import Sample
from hooked_vlm.experiments.parts.loop import One, Outcome, Shared
from hooked_vlm.runs.cluster_actor import Actor, Task
from hooked_vlm.runs.cluster_team import Shift, Team
from hooked_vlm.runs.experiment import Experiment
from hooked_vlm.runs.folder import Folder
from hooked_vlm.runs.kept import KeptLoop
from hooked_vlm.runs.records import Kept, Records, decoded

REACH = 5.0
"""Seconds in which an address has to answer."""


def check(address: str) -> None:
    """That Ray is installed, and the address is one; of a machine's, that it answers.

    Raises:
        ImportError: Ray is not installed.
        ValueError: no address of a cluster.
        ConnectionError: nothing answers there.
    """
    _ray()
    if address in ("auto", "local"):
        return
    named = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d{1,5})", address)
    if named is None:
        raise ValueError(
            f"{address!r} is no address of a Ray cluster: give 'local' (one is started on this machine), 'auto' (the "
            "one that this machine is part of), 'HOST:PORT', or 'ray://HOST:PORT'"
        )
    # Ray itself would try for minutes.
    try:
        socket.create_connection((named[1], int(named[2])), timeout=REACH).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from error


@contextmanager
def over_cluster(
    folder: Folder,
    experiment: Experiment,
    *,
    address: str,
    workers: int,
    told: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> Iterator[Callable[[str], KeptLoop]]:
    """The loops of a run's steps, by their names, which share samples out over actors as long as the block lasts.

    Args:
        folder: in which the run has begun, and this session of it is noted.
        address: ``"local"`` starts a cluster on this machine, for this run; ``"auto"`` is the one that this process is
            connected to, or this machine is part of; or ``HOST:PORT``, or ``ray://HOST:PORT``.
        workers: actors. Each takes a CPU of the cluster's, and a GPU if the model's device is one; those that it has no
            room for begin when it has.
        told, options: as of :class:`~hooked_vlm.runs.kept.KeptLoop`.

    Raises:
        ImportError, ValueError, ConnectionError: as :func:`check`.
    """
    check(address)
    identity = folder.identity()
    if identity is None:
        raise ValueError(f"no run has begun in {folder.path}")
    with _connected(address, workers) as ray:
        on_gpu = str(experiment.model.get("device")).startswith("cuda")
        needs = {"num_cpus": 1.0, **({"num_gpus": _gpus_each(ray, address, workers)} if on_gpu else {})}
        _tell_of_room(ray, needs, workers, told)
        # The samples, whose digests may be many, go to the actors themselves.
        facts = (experiment.tables(), experiment.base.resolve(), replace(identity, samples=()), Path.cwd(), on_gpu)
        versions = folder.read("environment.json")[-1]["versions"]
        actor = ray.remote(Actor).options(**needs)
        team = Team(ray, lambda: actor.remote(*facts), workers, versions, told)
        try:
            yield lambda step: ClusterLoop(folder.records(step), team, step, told=told, **options)
        finally:
            team.dismiss()


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(f"a run over a cluster needs Ray ({error}): pip install 'hooked-vlm[ray]'") from error


@contextmanager
def _connected(address: str, workers: int) -> Iterator[Any]:
    ray = _ray()
    if ray.is_initialized():
        if address != "auto":
            raise ValueError(f"this process is connected to a Ray cluster already, which is 'auto', not {address!r}")
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
        # Nobody is told of a cluster that is for this run alone, unless the user wants that.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"no connection to a Ray cluster, {address!r}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _gpus_each(ray: Any, address: str, workers: int) -> float:
    """Whole ones; where the cluster is this machine, workers share those that there are."""
    count = ray.cluster_resources().get("GPU", 0.0)
    return min(1.0, count / workers) if address == "local" and count else 1.0


def _tell_of_room(ray: Any, needs: Mapping[str, float], workers: int, told: Callable[[str], None]) -> None:
    free = ray.available_resources()
    for name, each in needs.items():
        kind = name.removeprefix("num_").removesuffix("s").upper()
        if free.get(kind, 0.0) < each * workers:
            told(
                f"{kind}s that are free in the cluster: {free.get(kind, 0.0):g}; {workers} workers take "
                f"{each * workers:g}, and some of them begin only when there are so many"
            )


class ClusterLoop(KeptLoop):
    """A loop over the samples of one step, which a cluster's actors do, and this process keeps."""

    def __init__(self, folder: Path, team: Team, step: str, **options: Any) -> None:
        super().__init__(folder, **options)
        self._team, self._task = team, Task(step, (), (), {})

    def outcomes(self, method: str, samples: Sequence[Sample], one: One, *, progress: bool = False) -> list[Outcome]:
        """What comes of each sample, in their order; read where it is known."""
        if not self._task.earlier:
            self._task = self._task._replace(samples=samples)
        found = super().outcomes(method, samples, one, progress=progress)
        self._task = self._task._replace(earlier=(*self._task.earlier, found))
        return found

    def once(
        self,
        name: str,
        make: Callable[[], Shared],
        save: Callable[[Shared, Path], None],
        load: Callable[[Path], Shared],
    ) -> Shared:
        """What is made once for all samples, here, and kept; actors get the file."""

        def load_and_share(path: Path) -> Shared:
            self._task = self._task._replace(shared={**self._task.shared, name: path.read_bytes()})
            return load(path)

        return super().once(name, make, save, load_and_share)

    def carried_out(self, records: Records, missing: Mapping[int, Sample], one: One) -> Iterator[tuple[int, Kept]]:
        """Samples that have no sound record, each with what came of it, when it is kept."""
        left, claims = deque(missing), dict[int, ExitStack]()
        shift = Shift(self._team, self._task)
        try:
            while left or claims:
                free = _claimed(records, left, claims)
                while shift.has_room and (number := next(free, None)) is not None:
                    # Another process may have done it since we looked.
                    kept = self._one(records, number, missing[number])
                    if kept is None:
                        shift.give(number, missing[number])
                    else:
                        claims.pop(number).close()
                        yield number, kept
                for number, record in shift.returned():
                    if record is None:
                        left.appendleft(number)
                    else:
                        records.write(number, record)
                    claims.pop(number).close()
                    if record is not None:
                        yield number, decoded(record)
        finally:
            for claim in claims.values():
                claim.close()


def _claimed(records: Records, left: deque[int], claims: dict[int, ExitStack]) -> Iterator[int]:
    """Samples that no other process is at, which are then ours; each is looked at once."""
    for _ in range(len(left)):
        number = left.popleft()
        claim = ExitStack()
        if claim.enter_context(records.claim(number)):
            claims[number] = claim
            yield number
        else:
            left.append(number)

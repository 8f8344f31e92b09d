"""A run: an experiment carried out over its samples, in a folder from which it can be gone on with at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from hooked_vlm.data.correct import keep_correct
from hooked_vlm.data.samples import Dropped, Sample, SampleError, Samples
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Outcome, going_through
from hooked_vlm.experiments.parts.over_samples import NoneUsedError
from hooked_vlm.runs.experiment import SELECTION, Experiment, Step
from hooked_vlm.runs.folder import Folder, Identity, ResumeError
from hooked_vlm.runs.kept import KeptLoop, NothingLeft, may_be_mended
from hooked_vlm.runs.made import Made, make_of, write_samples
from hooked_vlm.runs.records import Records
from hooked_vlm.runs.report import write_report
from hooked_vlm.sweep.batches import chunk_memory, memory_budget

if TYPE_CHECKING:
    import xarray as xr

    from hooked_vlm.models import HookedVLM


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    folder: Path
    results: dict[str, xr.Dataset]
    summary: dict[str, Any]

    @property
    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Of each step: how many samples were used, were dropped, and failed."""
        return {name: (own["used"], own["dropped"], own["failed"]) for name, own in self.summary["steps"].items()}


LoopOf: TypeAlias = Callable[[str], KeptLoop]
"""The loop of a step, by its name."""


def run(
    experiment: Experiment | str | Path,
    out: str | Path,
    *,
    limit: int | None = None,
    resume: bool = False,
    workers: int = 1,
    ray: str | None = None,
    retry_failed: bool = False,
    progress: bool = False,
    told: Callable[[str], None] = lambda message: None,
) -> Run:
    """Carry an experiment out, or go on with it.

    Each sample's result is in ``out`` before the next sample begins. A run that ended at any moment, however it did, is
    gone on with by ``resume``, and gives what it would have given undisturbed. Several processes may do so at a time.

    Args:
        limit: use the first so many samples. A run may be gone on with under a higher one.
        workers: processes on this machine, each with a model of its own, on a GPU of its own where there are several.
        ray: the address of a Ray cluster (``"auto"``, ``"local"``, ``ray://...``) whose machines share the samples, in
            ``workers`` actors.
        retry_failed: do samples again that failed, or whose pictures could not be read; what else was dropped stays so.
        progress: show a bar, with the time left.
        told: is called with what should be said to the user.

    Raises:
        ExperimentError: a file that says something that cannot be done.
        ResumeError: a folder that holds a run, without ``resume``; or another run, with it; samples to be tried again
            on which others depend.
    """
    from hooked_vlm.runs.cluster import check as check_cluster
    from hooked_vlm.runs.workers import helpers

    started = time.perf_counter()
    experiment = experiment if isinstance(experiment, Experiment) else Experiment.load(experiment)
    if limit is not None and limit < 1:
        raise ValueError(f"a run takes at least one sample, not {limit}")
    if workers < 1:
        raise ValueError(f"a run takes at least one worker, not {workers}")
    folder = Folder(Path(out))
    # Before a model is loaded, which takes long: what can be known to fail.
    folder.check(resume=resume)
    if ray is not None:
        check_cluster(ray)
    if retry_failed:
        _check_retry(folder, experiment)
    samples = experiment.read_samples(limit)
    model = experiment.load_model()
    # Processes share a machine's memory, and have a GPU each.
    sharing = workers if model.device.type == "cpu" and ray in (None, "local") else 1
    identity = Identity.of(experiment, model, samples, chunk_memory(model.device) // sharing)
    identity = folder.begin(identity, experiment, resume=resume)
    with as_begun(identity), helpers(folder, experiment, workers if ray is None else 1, told):
        folder.add_session(model, workers, told)
        options = {"numbers": numbers_of(samples), "retry_failed": retry_failed, "progress": progress, "told": told}
        with _loops(folder, experiment, ray, workers, options) as loop_of:
            made, chosen = _steps(folder, experiment, model, samples, loop_of, told)
    with _making(folder, samples):
        folder.tidy()
        write_samples(folder, samples, chosen, [step.name for step in experiment.steps], made)
        summary = _summary(folder, experiment, samples, made, time.perf_counter() - started)
        folder.write("summary.json", summary)
        write_report(folder.path)
    return Run(folder.path, {name: result for own in made for name, result in own.results.items()}, summary)


def _check_retry(folder: Folder, experiment: Experiment) -> None:
    """That samples may be tried again without those that are done already being others for it.

    Raises:
        ResumeError: they may not, in some step.
    """
    for step in experiment.steps:
        gate, own = (Records(folder.records(name)) for name in (SELECTION, step.name))
        if own.finished() and step.method.looks_around(step.arguments) and (may_be_mended(gate) or may_be_mended(own)):
            raise ResumeError(
                f"what {step.name} finds of a sample depends on all the others, so that none can be tried again by "
                f"itself: remove {own.folder}, and all are"
            )


@contextmanager
def _loops(
    folder: Folder, experiment: Experiment, ray: str | None, workers: int, options: Mapping[str, Any]
) -> Iterator[LoopOf]:
    """How each step's samples are gone through: by this process, or by a cluster's."""
    if ray is None:
        yield lambda step: KeptLoop(folder.records(step), **options)
        return
    from hooked_vlm.runs.cluster import over_cluster

    with over_cluster(folder, experiment, address=ray, workers=workers, **options) as loop_of:
        yield loop_of


def numbers_of(samples: Samples) -> dict[str, int]:
    """What samples are kept under, by their names."""
    return {sample.id: number for number, sample in enumerate(samples)}


def _steps(
    folder: Folder,
    experiment: Experiment,
    model: HookedVLM,
    samples: Samples,
    loop_of: LoopOf,
    told: Callable[[str], None],
) -> tuple[list[Made], Samples]:
    chosen = selected(experiment, model, samples, loop_of(SELECTION))
    made = []
    for step in experiment.steps:
        loop = loop_of(step.name)
        try:
            result = carried_out(step, model, chosen, loop)
            with _making(folder, samples):
                made.append(make_of(folder.path, step, result, experiment.statistics, loop.seconds, samples.dropped))
        except NoneUsedError as error:
            told(str(error))
            left_out = (*chosen.dropped[len(samples.dropped) :], *error.outcomes)
            made.append(Made(step, {}, left_out, loop.seconds))
        except ValueError as error:
            if len(chosen):
                raise
            told(str(error))
            made.append(Made(step, {}, chosen.dropped[len(samples.dropped) :], loop.seconds))
    return made, chosen


@contextmanager
def _making(folder: Folder, samples: Samples) -> Iterator[None]:
    """No other process makes files of the run, and they are still to be of these samples.

    Raises:
        ResumeError: another process has gone on with more.
    """
    with folder.alone():
        known = folder.identity()
        if known is None or len(known.samples) > len(samples):
            raise ResumeError(
                f"another process has gone on with {folder.path}, with more samples; its results are there"
            )
        yield


def carried_out(step: Step, model: HookedVLM, samples: Samples, loop: KeptLoop) -> xr.Dataset:
    """A step's result."""
    with going_through(loop):
        return step.method.call(model, samples, **step.arguments)


def selected(experiment: Experiment, model: HookedVLM, samples: Samples, loop: KeptLoop) -> Samples:
    """The samples that are used: all, or those that the model answers rightly."""
    options = experiment.keep_correct
    if options is None:
        return samples
    outcomes = loop.outcomes(SELECTION, samples.samples, answered(model, options))
    kept = [_as_answered(sample, own) for sample, own in zip(samples, outcomes, strict=True) if isinstance(own, Found)]
    return Samples(kept, (*samples.dropped, *(own for own in outcomes if isinstance(own, Dropped))))


def answered(model: HookedVLM, options: Mapping[str, Any]) -> Callable[[Sample], Found]:
    """What the model says about a sample, if it is right."""
    import numpy as np

    def one(sample: Sample) -> Found:
        found = keep_correct(model, [sample], **options)
        if not found:
            raise SampleError(found.dropped[0].reason, found.dropped[0].kind)
        texts = {"answered": found[0].answer, "generated": found[0].meta["generated"]}
        return Found({name: (("sample",), np.array([text], dtype=str)) for name, text in texts.items()}, frozenset())

    return one


def _as_answered(sample: Sample, own: Outcome) -> Sample:
    assert isinstance(own, Found)
    answer, generated = (str(own.variables[name][1][0]) for name in ("answered", "generated"))
    return replace(sample, answer=answer, meta={**sample.meta, "generated": generated})


@contextmanager
def as_begun(identity: Identity) -> Iterator[None]:
    """Computing as the run did when it was begun, so that numbers are the same to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(identity.threads)
    try:
        with memory_budget(identity.memory):
            yield
    finally:
        torch.set_num_threads(threads)


def join(
    folder: Folder, base: Path, device: str | None = None, told: Callable[[str], None] = lambda message: None
) -> None:
    """Help a run along, until no sample is left that nobody is at."""
    identity = folder.identity()
    assert identity is not None
    experiment = Experiment.of(identity.experiment, base=base)
    samples = experiment.read_samples(len(identity.samples))
    model = experiment.load_model(device)
    options: dict[str, Any] = {"numbers": numbers_of(samples), "told": told}
    with as_begun(identity):
        chosen = selected(experiment, model, samples, KeptLoop(folder.records(SELECTION), **options))
        for step in experiment.steps:
            try:
                carried_out(step, model, chosen, KeptLoop(folder.records(step.name), is_helper=True, **options))
            except (NothingLeft, ValueError):  # of which the run that is helped along says more
                continue


def _summary(
    folder: Folder, experiment: Experiment, samples: Samples, made: Sequence[Made], seconds: float
) -> dict[str, Any]:
    from hooked_vlm.runs.made import reasons

    worked = sum(own.seconds for own in made)
    return {
        "title": experiment.title,
        "question": experiment.question,
        "model": experiment.model["name"],
        "steps": {own.step.name: own.summary() for own in made},
        "read": len(samples),
        "not_read": reasons(samples.dropped, "dropped"),
        "seconds": round(seconds, 3),
        "samples_per_hour": round(3600 * len(samples) / worked, 1) if worked else 0.0,
        "bytes_on_disk": folder.bytes_on_disk,
    }

"""What runs on a cluster's machines: an actor with a copy of the model, which does samples as it is asked to."""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from hooked_vlm.data.samples import Sample, Samples
from hooked_vlm.experiments.parts.loop import Loop, One, Outcome, Shared, going_through
from hooked_vlm.runs.experiment import SELECTION, Experiment
from hooked_vlm.runs.folder import Identity, session
from hooked_vlm.runs.kept import turn
from hooked_vlm.runs.records import encoded
from hooked_vlm.runs.run import answered, as_begun

if TYPE_CHECKING:
    from hooked_vlm.models import HookedVLM


class ClusterError(RuntimeError):
    """A cluster, or a machine of it, that cannot do a run's samples."""


class Task(NamedTuple):
    """What an actor has to know to do samples of a step."""

    step: str
    samples: Sequence[Sample]
    """All that the step's method is given."""
    earlier: Sequence[Sequence[Outcome]]
    """What came of them when the method went through them before."""
    shared: Mapping[str, bytes]
    """What was made once for all of them: files, by their names."""


class Actor:
    """One copy of a run's model, and the method of the step at hand.

    Args:
        tables: of the experiment; ``base``: what its paths are relative to.
        identity: of the run.
        folder: where the driver was started, for paths that are relative to that.
        on_gpu: the model is to be on the GPU that this actor has been given.
    """

    def __init__(self, tables: Mapping[str, Any], base: Path, identity: Identity, folder: Path, on_gpu: bool) -> None:
        # Nothing that can fail: of an actor that could not be made, Ray tells no more than that.
        self.tables, self.base, self.identity, self.folder, self.on_gpu = tables, base, identity, folder, on_gpu
        self.loaded: tuple[Experiment, HookedVLM] | None = None
        self.loop: AskedLoop | None = None

    def begin(self, task: Task) -> tuple[str, Mapping[str, str]]:
        """Make ready for samples of a step; this machine's name, and its versions."""
        if self.loaded is None:
            self.loaded = self._load()
        if self.loop is not None:
            self.loop.end()
        self.loop = AskedLoop(task)
        experiment, model = self.loaded
        self.loop.enter(lambda loop: self._go_through(experiment, model, task, loop))
        return platform.node(), session(model, 1)["versions"]

    def turn(self, name: str, paths: Sequence[str]) -> bytes:
        """The record of a sample, by its name; ``paths``: files that the driver has for it."""
        absent = [path for path in paths if not os.path.exists(path)]
        if absent:
            raise FileNotFoundError(
                f"{platform.node()} has no {absent[0]}, which {name} needs: pictures lie at the same path on all "
                "machines of the cluster, or have addresses"
            )
        assert self.loop is not None
        return self.loop.ask(name)

    def _load(self) -> tuple[Experiment, HookedVLM]:
        if self.folder.is_dir():
            os.chdir(self.folder)
        experiment = Experiment.of(self.tables, base=self.base)
        model = experiment.load_model("cuda" if self.on_gpu else None)
        if Identity.of(experiment, model, (), 0).model != self.identity.model:
            raise ClusterError(f"{platform.node()} has another {experiment.model['name']} than this run began with")
        return experiment, model

    def _go_through(self, experiment: Experiment, model: HookedVLM, task: Task, loop: Loop) -> None:
        with as_begun(self.identity):
            if task.step == SELECTION:
                assert experiment.keep_correct is not None
                loop.outcomes(SELECTION, task.samples, answered(model, experiment.keep_correct))
            else:
                step = next(step for step in experiment.steps if step.name == task.step)
                with going_through(loop):
                    step.method.call(model, Samples(task.samples), **step.arguments)


class AskedLoop(Loop):
    """A loop that does samples as another thread asks for them.

    The method stays where it goes through its samples, so that whatever it has set up around that holds for each.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._earlier = task, deque(task.earlier)
        self._asked: SimpleQueue[str | None] = SimpleQueue()
        self._given: SimpleQueue[bytes | BaseException] = SimpleQueue()

    def enter(self, go: Callable[[Loop], None]) -> None:
        """Start a method with this loop; returns when it is at its samples. Raises what the method does."""
        Thread(target=self._work, args=(go,), daemon=True).start()
        self._take()

    def ask(self, name: str) -> bytes:
        """A sample's record."""
        self._asked.put(name)
        return self._take()

    def end(self) -> None:
        """Ask for no more."""
        self._asked.put(None)

    def outcomes(self, method: str, samples: Sequence[Sample], one: One, *, progress: bool = False) -> list[Outcome]:
        """What came of the samples if that is known; else this goes through what is asked for, and does not return."""
        if self._earlier:
            return list(self._earlier.popleft())
        named = {sample.id: sample for sample in samples}
        self._given.put(b"")
        while (name := self._asked.get()) is not None:
            if name not in named:
                raise ClusterError(f"{method} cannot be shared out: here, {name} is not among its samples")
            self._given.put(encoded(turn(named[name], one)))
        raise _NoMore

    def once(
        self,
        name: str,
        make: Callable[[], Shared],
        save: Callable[[Shared, Path], None],
        load: Callable[[Path], Shared],
    ) -> Shared:
        """What the driver made for all samples."""
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / f"{name}.safetensors"
            path.write_bytes(self._task.shared[name])
            return load(path)

    def _work(self, go: Callable[[Loop], None]) -> None:
        try:
            go(self)
            raise ClusterError("a method did not go through its samples as it had done before")
        except _NoMore:
            return
        except BaseException as error:  # whatever it is, it is waited for
            self._given.put(error)

    def _take(self) -> bytes:
        given = self._given.get()
        if isinstance(given, BaseException):
            raise given
        return given


class _NoMore(BaseException):
    """The end of a loop that no method is to catch."""

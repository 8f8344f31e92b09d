"""How a run goes through its samples: what is done is read, the rest is done and kept, each before the next begins.

Any number of processes may go through one folder side by side: a sample belongs to whoever claims it first, and the
claim of a process that dies ends with it.
"""

from __future__ import annotations

import errno
import hashlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hooked_vlm.data.samples import UNREADABLE, Dropped, Sample, SampleError
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Failed, Loop, One, Outcome, Shared, found
from hooked_vlm.files import remove, tidy
from hooked_vlm.progress import counted
from hooked_vlm.runs.records import DamagedRecordError, Kept, Records, encoded

WAIT = 0.05
"""Seconds between two looks at what other processes have done."""

LONGEST = 4000
"""Characters that are kept of an error's message, and of its traceback."""


class NothingLeft(Exception):  # noqa: N818  (no error: a helper has no more to do)
    """All samples of a step are done, or another process is at them."""


class KeptLoop(Loop):
    """A loop over the samples of one step, whose outcomes a folder keeps.

    Args:
        numbers: of all samples of the run, by their names: what they are kept under, whichever of them a step has.
            Without, a sample's place among those that are gone through.
        retry_failed: samples that failed are done again, and those whose pictures could not be read, or fetched.
        is_helper: leaves a step when no sample is left that nobody is at, in place of waiting for the others.
        told: is called with what should be said to the user.
    """

    def __init__(
        self,
        folder: Path,
        *,
        numbers: Mapping[str, int] | None = None,
        retry_failed: bool = False,
        progress: bool = False,
        is_helper: bool = False,
        told: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.folder, self.progress, self.is_helper, self.told = folder, progress, is_helper, told
        self.numbers, self.retry_failed = numbers or {}, retry_failed
        self.seconds = 0.0
        """What the samples took, all together."""
        self._calls = 0

    def outcomes(self, method: str, samples: Sequence[Sample], one: One, *, progress: bool = False) -> list[Outcome]:
        """What comes of each sample, in their order; read where it is known."""
        records = self._next_records()
        numbered = {self._number(place, sample): sample for place, sample in enumerate(samples)}
        kept = self._read(records, numbered)
        missing = {number: sample for number, sample in numbered.items() if number not in kept}
        if missing:
            with counted(self.folder.name, len(samples), done=len(kept), shown=self.progress) as count:
                for number, own in self.carried_out(records, missing, one):
                    kept[number] = own
                    count(len(kept))
        self.seconds += sum(own.seconds for own in kept.values())
        return [kept[number].outcome for number in numbered]

    def carried_out(self, records: Records, missing: Mapping[int, Sample], one: One) -> Iterator[tuple[int, Kept]]:
        """Samples that have no sound record, each with what came of it, when it is kept."""
        left = dict(missing)
        while left:
            for number, sample in list(left.items()):
                with records.claim(number) as is_ours:
                    if not is_ours:
                        continue
                    # Another process may have done it since we looked.
                    kept = self._one(records, number, sample)
                    if kept is None:
                        kept = turn(sample, one)
                        records.write(number, encoded(kept))
                del left[number]
                yield number, kept
            if left and self.is_helper:
                raise NothingLeft
            if left:
                time.sleep(WAIT)

    def once(
        self,
        name: str,
        make: Callable[[], Shared],
        save: Callable[[Shared, Path], None],
        load: Callable[[Path], Shared],
    ) -> Shared:
        """What is made once for all samples, and kept, too."""
        from filelock import FileLock
        from safetensors import SafetensorError

        path = self.folder / "shared" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.with_suffix(".sha256")
        with FileLock(path.with_suffix(".lock")):
            if not _is_sound(path, digest):
                if path.exists():
                    self.told(f"{path} is not what was written; it is made again")
                    remove(path)
                tidy(path.parent)
                made = make()
                try:
                    save(made, path)
                except SafetensorError as error:  # which is what a full disk is to it
                    raise OSError(f"{path} cannot be written: {error}") from error
                digest.write_text(_digest(path))
            # As it will be read, so that it is the same however often the run is begun.
            return load(path)

    def _number(self, place: int, sample: Sample) -> int:
        # A method may go through samples of its own making, which come after all others.
        return self.numbers.get(sample.id, len(self.numbers) + place)

    def _next_records(self) -> Records:
        # A method that goes through samples more than once does so in the same order each time.
        self._calls += 1
        records = Records(self.folder if self._calls == 1 else self.folder / f"pass-{self._calls}")
        records.tidy()
        return records

    def _read(self, records: Records, samples: Mapping[int, Sample]) -> dict[int, Kept]:
        """What is known. What is damaged is left for whoever claims it."""
        kept = {}
        for number in sorted(records.finished().intersection(samples)):
            with suppress(DamagedRecordError, FileNotFoundError):
                own = _read(records, number, samples[number])
                if self.retry_failed and _may_be_mended(own.outcome):
                    records.forget({number})
                else:
                    kept[number] = own
        return kept

    def _one(self, records: Records, number: int, sample: Sample) -> Kept | None:
        """A sample's record; None, and no record any more, where there is none that is sound."""
        try:
            return _read(records, number, sample)
        except DamagedRecordError as error:
            self.told(f"{error}; {sample.id} is done again")
            records.forget({number})
        except FileNotFoundError:
            pass
        return None


def _read(records: Records, number: int, sample: Sample) -> Kept:
    kept = records.read(number)
    if _id(kept.outcome) != sample.id:
        raise DamagedRecordError(f"{records.path(number)} is of {_id(kept.outcome)!r}, not of {sample.id!r}")
    return kept


def turn(sample: Sample, one: One) -> Kept:
    """A sample's turn, whatever comes of it; an error that is no fault of the sample's is raised."""
    started = time.perf_counter()
    result: Outcome
    try:
        result = found(sample, one)
    except Exception as error:
        if _ends_the_run(error):
            raise
        if isinstance(error, SampleError):
            result = Dropped(sample.id, _shortened(str(error)), _shortened(error.kind))
        else:
            told = _shortened("".join(traceback.format_exception_only(error)))
            result = Failed(sample.id, told, type(error).__name__, _shortened(traceback.format_exc()))
            _free_memory()
    return Kept(result, time.perf_counter() - started)


def may_be_mended(records: Records) -> bool:
    """Whether there are samples that another turn may help."""
    for number in records.finished():
        with suppress(DamagedRecordError, FileNotFoundError):
            if _may_be_mended(records.read(number).outcome):
                return True
    return False


def _may_be_mended(outcome: Outcome) -> bool:
    """Whether another turn may come to something else."""
    return isinstance(outcome, Failed) or (isinstance(outcome, Dropped) and outcome.kind == UNREADABLE)


def _ends_the_run(error: BaseException | None) -> bool:
    """Whether every sample after this one would fail, too: the disk is full, or the device has stopped answering."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        return True
    return _ends_the_run(error.__cause__ or error.__context__)


def _shortened(text: str) -> str:
    """As long as anybody reads; what cannot be written as UTF-8 as its code."""
    text = text.strip().encode(errors="backslashreplace").decode()
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}\n...\n{text[-LONGEST // 2 :]}"


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _id(outcome: Outcome) -> str:
    return str(outcome.variables["sample"][1][0]) if isinstance(outcome, Found) else outcome.id


def _is_sound(path: Path, digest: Path) -> bool:
    try:
        return digest.read_text() == _digest(path)
    except (OSError, UnicodeDecodeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

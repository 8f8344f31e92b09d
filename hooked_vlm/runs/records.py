"""What a run keeps of each sample: one small file, whole or not at all, that says whether it is sound."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hooked_vlm.data.samples import Dropped
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Failed, Outcome
from hooked_vlm.files import whole_file

_SUFFIX = ".record"
_PER_FOLDER = 1000


class DamagedRecordError(ValueError):
    """A record that is not what was written."""


class Kept(NamedTuple):
    """What came of a sample, and how many seconds it took."""

    outcome: Outcome
    seconds: float


@dataclass(frozen=True)
class Records:
    """The records of one step of a run, by the samples' numbers."""

    folder: Path

    def path(self, number: int) -> Path:
        """Where a sample's record is, or will be."""
        # A folder of a hundred thousand files is slow on many file systems.
        return self.folder / f"{number // _PER_FOLDER:03d}" / f"{number:06d}{_SUFFIX}"

    def finished(self) -> set[int]:
        """The numbers of the samples that have a record."""
        return {int(path.stem) for path in self._files() if path.suffix == _SUFFIX and not path.name.startswith(".")}

    def read(self, number: int) -> Kept:
        """A sample's record.

        Raises:
            FileNotFoundError: it has none.
            DamagedRecordError: it is not what was written.
        """
        return decoded(self.path(number).read_bytes(), str(self.path(number)))

    def write(self, number: int, kept: bytes) -> None:
        """Keep what came of a sample, as :func:`encoded`."""
        with whole_file(self.path(number)) as temporary:
            temporary.write_bytes(kept)

    @contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Whether this process may work at a sample now: no other one does. The claim of a process that dies ends."""
        from filelock import FileLock, Timeout

        path = self.path(number).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            # While it is still ours: whoever opens it later finds the record, and leaves the sample alone.
            with suppress(OSError):
                path.unlink()
            lock.release()

    def tidy(self) -> None:
        """Remove what processes that were killed left of files that they were writing."""
        for path in list(self._files()):
            if path.name.startswith("."):
                number = int(path.name[1:].partition("-")[0])
                with self.claim(number) as is_ours:
                    if is_ours:
                        path.unlink(missing_ok=True)

    def forget(self, numbers: set[int]) -> None:
        """Remove records, so that their samples are done again."""
        for number in numbers:
            self.path(number).unlink(missing_ok=True)

    def _files(self) -> Iterator[Path]:
        if not self.folder.is_dir():
            return
        for part in sorted(self.folder.iterdir()):
            if part.name.isdigit():
                with os.scandir(part) as entries:
                    yield from (Path(entry.path) for entry in entries)


def encoded(kept: Kept) -> bytes:
    """A record as bytes: a digest of the rest, a line of facts, and the numbers, in safetensors' format."""
    from safetensors.numpy import save

    outcome = kept.outcome
    facts: dict[str, Any] = {"seconds": kept.seconds}
    body = b""
    if isinstance(outcome, Found):
        numbers = {name: _stored(values) for name, (_, values) in outcome.variables.items() if values.dtype.kind != "U"}
        texts = {name: values.tolist() for name, (_, values) in outcome.variables.items() if values.dtype.kind == "U"}
        shapes = {name: [dims, list(values.shape)] for name, (dims, values) in outcome.variables.items()}
        facts |= {"found": shapes, "texts": texts, "coords": sorted(outcome.coords)}
        body = save(numbers)
    else:
        facts |= {"id": outcome.id, "kind": outcome.kind, "reason": outcome.reason}
        facts |= {"traceback": outcome.traceback} if isinstance(outcome, Failed) else {}
    rest = json.dumps(facts).encode() + b"\n" + body
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def decoded(data: bytes, what: str = "the record") -> Kept:
    """What was :func:`encoded`.

    Raises:
        DamagedRecordError: it is not what was written.
    """
    from safetensors.numpy import load

    digest, _, rest = data.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        raise DamagedRecordError(f"{what} is damaged: it is not what was written")
    line, _, body = rest.partition(b"\n")
    facts: dict[str, Any] = json.loads(line)
    if "found" in facts:
        numbers = load(body)
        variables = {
            name: (tuple(dims), _read(numbers[name] if name in numbers else facts["texts"][name], shape))
            for name, (dims, shape) in facts["found"].items()
        }
        return Kept(Found(variables, frozenset(facts["coords"])), facts["seconds"])
    if "traceback" in facts:
        failed = Failed(facts["id"], facts["reason"], facts["kind"], facts["traceback"])
        return Kept(failed, facts["seconds"])
    return Kept(Dropped(facts["id"], facts["reason"], facts["kind"]), facts["seconds"])


def _stored(values: np.ndarray) -> np.ndarray:
    # The format knows no numbers without an axis.
    return np.ascontiguousarray(values).reshape(values.shape or (1,))


def _read(values: np.ndarray | list | str, shape: list[int]) -> np.ndarray:
    whole = values if isinstance(values, np.ndarray) else np.array(values, dtype=str)
    return whole.reshape(shape)

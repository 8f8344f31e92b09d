"""What a run keeps of each sample: one small file, whole or not at all, that says whether it is sound."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hooked_vlm.data.samples import Dropped
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Failed, Outcome
from hooked_vlm.files import remove, whole_file

_SUFFIX = ".record"
_PER_FOLDER = 1000
_OURS = re.compile(r"\.?(\d+)(?:-.*)?\.(?:record|lock)")
"""A record, one that is being written, or a claim."""


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
        return {number for path, number in self._files() if path.suffix == _SUFFIX and not path.name.startswith(".")}

    def read(self, number: int) -> Kept:
        """A sample's record.

        Raises:
            FileNotFoundError: it has none.
            DamagedRecordError: it is not what was written.
        """
        path = self.path(number)
        try:
            data = path.read_bytes()
        except IsADirectoryError as error:
            raise DamagedRecordError(f"{path} is a folder") from error
        return decoded(data, str(path))

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
            # While it is still ours. Who gets hold of the file that is gone finds the record when it has the claim.
            with suppress(OSError):
                path.unlink()
            lock.release()

    def tidy(self) -> None:
        """Remove what processes that were killed left of files that they were writing, and of claims."""
        for path, number in list(self._files()):
            if path.suffix != _SUFFIX or path.name.startswith("."):
                # A claim that is no process's ends with ours.
                with self.claim(number) as is_ours:
                    if is_ours and path.name.startswith("."):
                        path.unlink(missing_ok=True)

    def forget(self, numbers: Iterable[int]) -> None:
        """Remove records, so that their samples are done again."""
        for number in numbers:
            remove(self.path(number))

    def _files(self) -> Iterator[tuple[Path, int]]:
        """Ours, and the numbers of their samples."""
        if not self.folder.is_dir():
            return
        for part in sorted(self.folder.iterdir()):
            if part.name.isdigit() and part.is_dir():
                for name in os.listdir(part):
                    if match := _OURS.fullmatch(name):
                        yield part / name, int(match[1])


def encoded(kept: Kept) -> bytes:
    """A record as bytes: a digest of the rest, a line of facts, and the numbers, in safetensors' format."""
    from safetensors.numpy import save

    outcome = kept.outcome
    facts: dict[str, Any] = {"seconds": kept.seconds}
    body = b""
    if isinstance(outcome, Found):
        texts = {name: values for name, (_, values) in outcome.variables.items() if values.dtype.kind == "U"}
        numbers = {name: values for name, (_, values) in outcome.variables.items() if name not in texts}
        facts["found"] = {name: [dims, values.shape] for name, (dims, values) in outcome.variables.items()}
        facts["texts"] = {name: [values.dtype.str, values.tolist()] for name, values in texts.items()}
        facts["coords"] = sorted(outcome.coords)
        # The format knows no numbers without an axis.
        body = save({name: np.ascontiguousarray(values).reshape(-1) for name, values in numbers.items()})
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
        values = load(body) | {name: np.array(texts, dtype) for name, (dtype, texts) in facts["texts"].items()}
        variables = {name: (tuple(dims), values[name].reshape(shape)) for name, (dims, shape) in facts["found"].items()}
        return Kept(Found(variables, frozenset(facts["coords"])), facts["seconds"])
    if "traceback" in facts:
        failed = Failed(facts["id"], facts["reason"], facts["kind"], facts["traceback"])
        return Kept(failed, facts["seconds"])
    return Kept(Dropped(facts["id"], facts["reason"], facts["kind"]), facts["seconds"])

"""The folder of a run: what it is of, so that a resumed run is the same run; and where everything is."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_vlm.data.samples import Sample
from hooked_vlm.files import whole_file
from hooked_vlm.runs.experiment import Experiment

if TYPE_CHECKING:
    from hooked_vlm.models import HookedVLM

FORMAT = 1
_MAY_CHANGE = ("title", "question", "statistics", "model.device")
"""What moves no number that is kept."""


class ResumeError(ValueError):
    """A folder that holds no run, or another one than is to be resumed."""


@dataclass(frozen=True)
class Identity:
    """What a run is of. Runs with equal ones give equal numbers, on one kind of device."""

    experiment: Mapping[str, Any]
    samples: Sequence[str]
    """A digest of each sample."""
    model: Mapping[str, Any]
    threads: int
    """Of torch. More or fewer of them round otherwise."""
    memory: int
    """Bytes that a sweep takes at once: other chunks round otherwise."""
    created: str = ""

    @classmethod
    def of(cls, experiment: Experiment, model: HookedVLM, samples: Sequence[Sample], memory: int) -> Identity:
        import torch

        digests = [digest_of(sample) for sample in samples]
        facts = {"revision": model.config.revision, "files": _files_of(experiment)}
        return cls(_plain(experiment.tables()), digests, facts, torch.get_num_threads(), memory, now())


@dataclass(frozen=True)
class Folder:
    """Where a run keeps what it does."""

    path: Path

    def check(self, *, resume: bool) -> None:
        """That the folder may be begun in, or gone on with.

        Raises:
            ResumeError: it holds a run, and is not to be resumed; or other things.
        """
        if self.identity() is not None:
            if not resume:
                raise ResumeError(
                    f"{self.path} holds a run already: go on with it (--resume), or choose another folder"
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ResumeError(f"{self.path} is not empty, and holds no run")

    def begin(self, identity: Identity, experiment: Experiment, *, resume: bool) -> Identity:
        """Make the folder a run's, or find that it is this one's; what the run is of, as it was begun.

        Raises:
            ResumeError: as :meth:`check`; or it holds another run: which settings differ.
        """
        self.check(resume=resume)
        known = self.identity()
        if known is None:
            self._create(identity, experiment)
            return identity
        changed = differences(known, identity, experiment)
        if changed:
            raise ResumeError(f"{self.path} holds another run, which cannot be resumed: {'; '.join(changed)}")
        if len(identity.samples) > len(known.samples):
            known = replace(known, samples=identity.samples)
            self.write("run.json", {"format": FORMAT, **asdict(known)})
        return known

    def identity(self) -> Identity | None:
        """What the run is of; None where there is none.

        Raises:
            ResumeError: a run of another version of this library.
        """
        path = self.path / "run.json"
        if not path.is_file():
            return None
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.pop("format") != FORMAT:
                raise ResumeError(f"{path} was written by another version of hooked-vlm, and cannot be resumed")
            return Identity(**facts)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ResumeError(f"{path} is damaged: {error}") from error

    def _create(self, identity: Identity, experiment: Experiment) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path / "experiment.toml") as temporary:
            temporary.write_text(experiment.text or json.dumps(experiment.tables(), indent=2), encoding="utf-8")
        self.write("run.json", {"format": FORMAT, **asdict(identity)})

    def records(self, step: str) -> Path:
        """Where a step's records are."""
        return self.path / "records" / step

    def add_session(self, model: HookedVLM, workers: int) -> None:
        """Note that the run is begun, or gone on with, here and now."""
        path = self.path / "environment.json"
        sessions = self.read("environment.json") if path.is_file() else []
        self.write("environment.json", [*sessions, session(model, workers)])

    def read(self, name: str) -> Any:
        """One of its JSON files."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def write(self, name: str, content: Any) -> None:
        """Write one of its JSON files."""
        with whole_file(self.path / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1, default=str, ensure_ascii=False), encoding="utf-8")

    @property
    def bytes_on_disk(self) -> int:
        """Of everything in it."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())


def differences(known: Identity, new: Identity, experiment: Experiment) -> list[str]:
    """What keeps a run from being resumed as another one, in words; nothing if it may be."""
    one, other = (dict(_flat(own.experiment)) for own in (known, new))
    names = [name for name in dict.fromkeys([*one, *other]) if not name.startswith(_MAY_CHANGE)]
    nothing = object()
    told = [
        f"{name} was {one.get(name, 'not given')!r}, and is {other.get(name, 'not given')!r}"
        for name in names
        if one.get(name, nothing) != other.get(name, nothing)
    ]
    if known.model != new.model:
        told += [f"the model's {name} changed" for name in known.model if known.model[name] != new.model.get(name)]
    if told:
        return told
    n_known, n_new = len(known.samples), len(new.samples)
    if n_new < n_known:
        return [f"it has {n_known} samples, and now {n_new} are given (a larger --limit, or none, goes on with it)"]
    changed = [place for place in range(n_known) if known.samples[place] != new.samples[place]]
    if changed:
        return [f"{len(changed)} of its samples changed, the first of them number {changed[0]}"]
    around = [step.name for step in experiment.steps if step.method.looks_around(step.arguments)]
    if n_new > n_known and around:
        return [
            f"it has {n_known} samples, and now {n_new} are given: what {', '.join(around)} finds of a sample depends "
            "on all the others"
        ]
    return []


def digest_of(sample: Sample) -> str:
    """A sample's facts, in a few letters; of pictures, where they lie."""
    facts = [sample.id, sample.question, sample.answer, sample.foil, sample.question_cf, sample.group]
    pictures = [str(one) if isinstance(one, (str, Path)) else "" for one in (sample.image, sample.image_cf)]
    spans = {name: list(span) for name, span in sample.spans.items()}
    regions = {name: list(one) if isinstance(one, tuple) else "mask" for name, one in sample.regions.items()}
    text = json.dumps([facts, pictures, spans, regions], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def session(model: HookedVLM, workers: int) -> dict[str, Any]:
    """What is so of this start of a run."""
    import numpy
    import torch
    import transformers

    from hooked_vlm.version import __version__

    device = model.device
    return {
        "started": now(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "hooked_vlm": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "workers": workers,
    }


def now() -> str:
    """The time, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _files_of(experiment: Experiment) -> dict[str, str]:
    """Digests of a local model's files: whole ones of small files, of large ones their size and beginning."""
    from hooked_vlm import toys
    from hooked_vlm.runs.experiment import is_embedded

    name = experiment.model["name"]
    folder = toys.folder(name) if is_embedded(name) else experiment.base / name
    paths = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.is_file() else []
    whole = 1 << 26
    return {
        path.name: f"{path.stat().st_size}-{hashlib.sha256(_beginning(path, whole)).hexdigest()[:16]}"
        for path in paths
        if path.is_file() and path.suffix in (".json", ".safetensors", ".bin", ".pth", ".txt", ".model")
    }


def _beginning(path: Path, n_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(n_bytes)


def _flat(tables: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tables, Mapping) and tables:
        for name, value in tables.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, tables


def _plain(tables: Any) -> Any:
    """As JSON gives it back, so that what is compared is of one kind."""
    return json.loads(json.dumps(tables, default=str))

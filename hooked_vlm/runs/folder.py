"""The folder of a run: what it is of, so that a resumed run is the same run; and where everything is."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_vlm.data.pictures import is_address
from hooked_vlm.data.samples import Sample
from hooked_vlm.files import tidy, whole_file
from hooked_vlm.patches import Region
from hooked_vlm.runs.experiment import Experiment

if TYPE_CHECKING:
    from hooked_vlm.models import HookedVLM

FORMAT = 1
_MAY_CHANGE = ("title", "question", "statistics", "model.device", "samples.shapes", "samples.limit")
"""What moves no number that is kept; how many samples there are is seen from themselves."""

_OF_MODELS = (".json", ".safetensors", ".bin", ".pth", ".txt", ".model")


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

        digests = [digest_of(sample, experiment.base) for sample in samples]
        facts = {"revision": model.config.revision, "files": _files_of(experiment)}
        return cls(_plain(experiment.tables()), digests, facts, torch.get_num_threads(), memory, now())


@dataclass(frozen=True)
class Folder:
    """Where a run keeps what it does."""

    path: Path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process is in such a block, of those that are at the same run."""
        from filelock import FileLock

        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock"):
            yield

    def check(self, *, resume: bool) -> None:
        """That the folder may be begun in, or gone on with.

        Raises:
            ResumeError: it holds a run, and is not to be resumed; or other things.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ResumeError(f"{self.path} is a file; a run has a folder of its own")
        # Hidden files are what a process that was killed left before it had begun. This is looked for first: another
        # process may be beginning, and the first file of a run is the one that says what it is.
        is_used = self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir())
        if self.identity() is not None:
            if not resume:
                raise ResumeError(
                    f"{self.path} holds a run already: go on with it (--resume), or choose another folder"
                )
        elif is_used:
            raise ResumeError(f"{self.path} is not empty, and holds no run")

    def begin(self, identity: Identity, experiment: Experiment, *, resume: bool) -> Identity:
        """Make the folder a run's, or find that it is this one's; what the run is of, as it was begun.

        Raises:
            ResumeError: as :meth:`check`; or it holds another run: which settings differ.
        """
        with self.alone():
            self.check(resume=resume)
            known = self.identity()
            if known is not None:
                changed = differences(known, identity, experiment)
                if changed:
                    told = "; ".join(changed)
                    raise ResumeError(f"{self.path} holds another run, which cannot be resumed: {told}")
                # Numbers are as it was begun; titles and the like, and how many samples, as it is gone on with.
                identity = replace(known, experiment=identity.experiment, samples=identity.samples)
            facts = asdict(identity)
            self.write("run.json", {"format": FORMAT, "digest": _digest(facts), **facts})
            with whole_file(self.path / "experiment.toml") as temporary:
                temporary.write_text(experiment.text, encoding="utf-8")
        return identity

    def identity(self) -> Identity | None:
        """What the run is of; None where there is none.

        Raises:
            ResumeError: a run of another version of this library; a damaged file.
        """
        path = self.path / "run.json"
        if not path.exists():
            return None
        try:
            facts = dict(self.read("run.json"))
            version, digest = facts.pop("format"), facts.pop("digest", None)
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path} is damaged ({error}): put back what it was, or choose another folder") from error
        if version != FORMAT:
            raise ResumeError(f"{path} was written by another version of hooked-vlm, and cannot be resumed")
        if digest != _digest(facts):
            raise ResumeError(f"{path} is not what was written: put back what it was, or choose another folder")
        return Identity(**facts)

    def records(self, step: str) -> Path:
        """Where a step's records are."""
        return self.path / "records" / step

    def add_session(self, model: HookedVLM, workers: int, told: Callable[[str], None]) -> None:
        """Note that the run is begun, or gone on with, here and now."""
        path = self.path / "environment.json"
        with self.alone():
            try:
                sessions = list(self.read(path.name)) if path.exists() else []
            except (ValueError, TypeError) as error:
                told(f"{path} is damaged ({error}): what it said of earlier sessions is lost")
                sessions = []
            self.write(path.name, [*sessions, session(model, workers)])

    def tidy(self) -> None:
        """Remove what processes that were killed left; to be called :meth:`alone`."""
        for folder in (self.path, *(self.path / name for name in ("results", "tables", "figures", "pictures"))):
            tidy(folder)

    def read(self, name: str) -> Any:
        """One of its JSON files."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def write(self, name: str, content: Any) -> None:
        """Write one of its JSON files."""
        text = json.dumps(content, indent=1, default=str, ensure_ascii=False)
        with whole_file(self.path / name) as temporary:
            # Half a surrogate pair, which is no letter, as its code: in JSON that is the same.
            temporary.write_bytes(text.encode(errors="backslashreplace"))

    @property
    def bytes_on_disk(self) -> int:
        """Of everything in it."""
        return sum(_size(os.path.join(folder, name)) for folder, _, names in os.walk(self.path) for name in names)


def differences(known: Identity, new: Identity, experiment: Experiment) -> list[str]:
    """What keeps a run from being resumed as another one, in words; nothing if it may be."""
    told = _changed_settings(known.experiment, new.experiment) or _changed_model(known.model, new.model)
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


def _changed_settings(known: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    steps = [own["methods"] for own in (known, new)]
    told = [f"it has the step {name}, which is given no more" for name in steps[0] if name not in steps[1]]
    told += [f"the step {name} is new" for name in steps[1] if name not in steps[0]]
    both = [name for name in steps[0] if name in steps[1]]
    one, other = (
        dict(_flat({**own, "methods": {name: own["methods"][name] for name in both}})) for own in (known, new)
    )
    names = [name for name in dict.fromkeys([*one, *other]) if not _may_change(name)]
    for name in names:
        was, now = (repr(own[name]) if name in own else "not given" for own in (one, other))
        if was != now:
            told.append(f"{name} was {was}, and is {now}")
    return told


def _may_change(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in _MAY_CHANGE)


def _changed_model(known: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    told = []
    if known["revision"] != new["revision"]:
        told.append(f"the model's revision was {known['revision']}, and is {new['revision']}")
    files = {**known["files"], **new["files"]}
    changed = [name for name in files if known["files"].get(name) != new["files"].get(name)]
    return told + [f"the model's file {name} changed" for name in changed]


def digest_of(sample: Sample, base: Path = Path()) -> str:
    """A sample's facts, in a few letters; of pictures, where they lie, which below ``base`` is meant from there."""
    facts = [sample.id, sample.question, sample.answer, sample.foil, sample.question_cf, sample.group]
    pictures = [_place(one, base) if isinstance(one, (str, Path)) else "" for one in (sample.image, sample.image_cf)]
    spans = {name: list(span) for name, span in sample.spans.items()}
    regions = {name: _described(region) for name, region in sample.regions.items()}
    # Of what their file says besides, methods read this.
    facts.append(sample.meta.get("object"))
    text = json.dumps([facts, pictures, spans, regions], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _place(picture: str | Path, base: Path) -> str:
    if is_address(picture):
        return str(picture)
    path, root = os.path.abspath(picture), os.path.join(os.path.abspath(base), "")
    return path.removeprefix(root)


def _described(region: Region) -> list[Any]:
    """A box, or a mask in a few letters."""
    values = np.asarray(region)
    return values.tolist() if values.ndim == 1 else [values.shape, hashlib.sha256(values.tobytes()).hexdigest()]


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
    """Digests of a local model's files."""
    from hooked_vlm import toys
    from hooked_vlm.runs.experiment import is_embedded

    found: dict[str, str] = {}
    for option in ("name", "processor", "vision_tower"):
        given = experiment.model.get(option)
        if given is None:
            continue
        folder = toys.folder(given) if is_embedded(given) else experiment.base / given
        paths = sorted(folder.iterdir()) if folder.is_dir() else [folder] if folder.is_file() else []
        prefix = "" if option == "name" else f"{option}/"
        found |= {f"{prefix}{path.name}": _file_digest(path) for path in paths if path.suffix in _OF_MODELS}
    return found


def _file_digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()[:16]


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _size(path: str) -> int:
    # Another process may have removed what it was writing.
    with suppress(FileNotFoundError):
        return os.lstat(path).st_size
    return 0


def _flat(tables: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tables, Mapping) and tables:
        for name, value in tables.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, tables


def _plain(tables: Any) -> Any:
    """As JSON gives it back, so that what is compared is of one kind."""
    return json.loads(json.dumps(tables, default=str))

"""An experiment, as a file describes it: a model, samples, and what is done with them (docs/running.md)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hooked_vlm.config import AttentionImplementation
from hooked_vlm.data.rows import nearest
from hooked_vlm.data.samples import Samples
from hooked_vlm.runs.built import ExperimentError, check_keys, checked
from hooked_vlm.runs.methods import Method, method

if TYPE_CHECKING:
    from hooked_vlm.models import HookedVLM

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOY = "toy"
"""A table of arguments that take the others' place where the model is an embedded one."""

READY = Path(__file__).parent / "papers"
"""The ready experiments, one a paper."""

_TABLES = ("title", "question", "model", "samples", "keep_correct", "methods", "statistics")


@dataclass(frozen=True)
class Step:
    """One method and its arguments."""

    name: str
    use: str
    given: Mapping[str, Any]
    """What the file says, as it says it."""
    method: Method
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Statistics:
    """How samples are averaged, and what is tested."""

    level: float = 0.95
    resamples: int = 1000
    permutations: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Experiment:
    """A model, samples, and methods with their arguments."""

    title: str
    question: str
    """That it answers."""
    model: Mapping[str, Any]
    """``name``, and options of :meth:`~hooked_vlm.HookedVLM.from_pretrained`."""
    samples: Mapping[str, Any]
    """``file`` and how it is read, or how many questions about ``shapes``."""
    keep_correct: Mapping[str, Any] | None
    """Options of :func:`~hooked_vlm.data.keep_correct`; None where wrongly answered samples are used, too."""
    steps: tuple[Step, ...]
    statistics: Statistics = Statistics()
    base: Path = field(default_factory=Path)
    """What paths of samples are relative to."""
    text: str = ""
    """The file, as it was given."""

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read a file, or one of the ready ones by its name (:func:`ready_names`).

        Raises:
            FileNotFoundError: there is none.
            ExperimentError: it says something that cannot be done.
        """
        path = Path(path)
        is_ready = not path.exists() and str(path) in ready_names()
        if is_ready:
            path = READY / f"{path}.toml"
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no file {path}; ready experiments are {', '.join(ready_names())}"
                + nearest(str(path), ready_names())
            )
        text = path.read_text(encoding="utf-8")
        # A ready file lies in the package: what it is to read lies where the user is.
        return cls.parse(text, base=Path() if is_ready else path.parent, what=str(path))

    @classmethod
    def parse(cls, text: str, *, base: Path | None = None, what: str = "the experiment") -> Experiment:
        """Of the text of a file; raises as :meth:`load`."""
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ExperimentError(f"{what} is not TOML: {error}") from error
        try:
            return cls.of(tables, base=base or Path(), text=text)
        except ExperimentError as error:
            raise ExperimentError(f"{what}: {error}") from error

    @classmethod
    def of(cls, tables: Mapping[str, Any], *, base: Path | None = None, text: str = "") -> Experiment:
        """Of nested tables; raises as :meth:`load`."""
        check_keys(tables, _TABLES, "an experiment")
        for name in ("model", "samples", "methods"):
            if not tables.get(name):
                raise ExperimentError(f"an experiment needs {name}")
        for name in ("title", "question"):
            if not isinstance(tables.get(name, ""), str):
                raise ExperimentError(f"{name} is text, not {tables[name]!r}")
        model = _model(tables["model"])
        is_toy = is_embedded(model["name"])
        statistics = checked(Statistics, _table(tables.get("statistics", {}), "statistics"), "[statistics]")
        return cls(
            title=tables.get("title", ""),
            question=tables.get("question", ""),
            model=model,
            samples=_samples(tables["samples"], base or Path()),
            keep_correct=_keep_correct(tables.get("keep_correct", False), is_toy),
            steps=_steps(_table(tables["methods"], "methods"), is_toy),
            statistics=Statistics(**statistics),
            base=base or Path(),
            text=text,
        )

    def tables(self) -> dict[str, Any]:
        """What it says, as nested tables of plain values, from which :meth:`of` makes it again."""
        return {
            "title": self.title,
            "question": self.question,
            "model": dict(self.model),
            "samples": dict(self.samples),
            "keep_correct": False if self.keep_correct is None else dict(self.keep_correct),
            "methods": {step.name: {"use": step.use, **step.given} for step in self.steps},
            "statistics": vars(self.statistics),
        }

    def on(self, **changes: Any) -> Experiment:
        """With another model, other samples, or the like: tables, as in a file.

        Arguments of methods are those of the file that this was read from, for an embedded model or for others.
        """
        tables = tomllib.loads(self.text) if self.text else self.tables()
        return replace(Experiment.of({**tables, **changes}, base=self.base), text=self.text)

    def load_model(self, device: str | None = None) -> HookedVLM:
        """Its model, on a device of its own or on another one."""
        from hooked_vlm.models import HookedVLM

        options = {name: value for name, value in self.model.items() if name != "name"}
        if "dtype" in options:
            import torch

            options["dtype"] = getattr(torch, options["dtype"])
        name = self.model["name"]
        local = self.base / name
        if not is_embedded(name) and local.exists():
            name = str(local)
        return HookedVLM.from_pretrained(name, **{**options, **({"device": device} if device else {})})

    def read_samples(self, limit: int | None = None) -> Samples:
        """Its samples: those that the file has, or the first ``limit`` of them."""
        from hooked_vlm.data.readers import read_samples
        from hooked_vlm.data.shapes import shapes

        options = dict(self.samples)
        if "shapes" in options:
            number = options.pop("shapes")
            return shapes(number if limit is None else min(number, limit), **{"seed": 0, **options})
        own = options.pop("limit", None)
        limits = [one for one in (own, limit) if one is not None]
        for name in ("file", "images"):
            if name in options:
                options[name] = _located(options[name], self.base)
        return read_samples(options.pop("file"), **options, limit=min(limits) if limits else None)


def ready_names() -> tuple[str, ...]:
    """The ready experiments, each one paper's."""
    return tuple(sorted(path.stem for path in READY.glob("*.toml")))


def is_embedded(name: str) -> bool:
    """Whether a model's name is that of an embedded checkpoint."""
    from hooked_vlm import toys

    return name in toys.names()


def _model(given: Any) -> dict[str, Any]:
    table = {"name": given} if isinstance(given, str) else _table(given, "model")
    return checked(_described_model, table, "[model]")


def _described_model(
    name: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    attention: AttentionImplementation | None = None,
    device: str | None = None,
    revision: str | None = None,
    quantization: Literal["int8"] | None = None,
) -> None:
    """What a file says of a model."""


def _samples(given: Any, base: Path) -> dict[str, Any]:
    from hooked_vlm.data.readers import READERS
    from hooked_vlm.data.shapes import shapes

    table = _table(given, "samples")
    if ("file" in table) == ("shapes" in table):
        raise ExperimentError("[samples] says either file = a path, or shapes = how many questions about shapes")
    if "shapes" in table:
        options = {"n" if name == "shapes" else name: value for name, value in table.items()}
        found = checked(shapes, {"seed": 0, **options}, "[samples]")
        return {"shapes": found.pop("n"), **found}
    format = table.get("format")
    if format is not None and format not in READERS:
        raise ExperimentError(
            f"[samples]: no format is called {format!r}; there are {', '.join(READERS)}{nearest(str(format), READERS)}"
        )
    options = {name: value for name, value in table.items() if name not in ("file", "format")}
    checked(READERS[format or "manifest"], options, "[samples]", without=("path",))
    return dict(table)


def _keep_correct(given: Any, is_toy: bool) -> dict[str, Any] | None:
    from hooked_vlm.data.correct import keep_correct

    if isinstance(given, bool):
        return {} if given else None
    table = _with_toy(_table(given, "keep_correct"), is_toy, "[keep_correct]")
    checked(keep_correct, table, "[keep_correct]", without=("model", "samples", "progress", "batch_size"))
    return table


def _steps(given: Mapping[str, Any], is_toy: bool) -> tuple[Step, ...]:
    steps = []
    for name, own in given.items():
        where = f"[methods.{name}]"
        table = _with_toy(_table(own, where), is_toy, where)
        use = table.pop("use", name)
        chosen = method(use)
        steps.append(Step(name, use, table, chosen, chosen.arguments(table, where)))
    return tuple(steps)


def _with_toy(table: Mapping[str, Any], is_toy: bool, where: str) -> dict[str, Any]:
    own = {name: value for name, value in table.items() if name != TOY}
    return {**own, **_table(table.get(TOY, {}), f"{where}, {TOY}")} if is_toy else own


def _table(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ExperimentError(f"{where} is a table, not {given!r}")
    return dict(given)


def _located(path: str, base: Path) -> str:
    return path if "://" in path else str(base / path)


__all__ = ["Experiment", "ExperimentError", "Statistics", "Step", "is_embedded", "ready_names"]

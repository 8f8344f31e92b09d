"""An experiment, as a file describes it: a model, samples, and what is done with them (docs/running.md)."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hooked_vlm.config import AttentionImplementation
from hooked_vlm.data.rows import nearest
from hooked_vlm.data.samples import Samples
from hooked_vlm.runs.built import ExperimentError, check_keys, checked, made
from hooked_vlm.runs.methods import Method, method
from hooked_vlm.statistics.intervals import check_level

if TYPE_CHECKING:
    from hooked_vlm.models import HookedVLM

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SELECTION = "keep_correct"
"""The step in which the model answers the samples, where only those that it answers rightly are used."""

TOY = "toy"
"""A table of arguments that take the others' place where the model is an embedded one."""

READY = Path(__file__).parent / "papers"
"""The ready experiments, one a paper."""

_TABLES = ("title", "question", "model", "samples", SELECTION, "methods", "statistics")

_PATHS = ("file", "images", "annotations", "instances", "scene_graphs")
"""Where samples lie: what readers take of paths."""


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

    def __post_init__(self) -> None:
        check_level(self.level)
        for name in ("resamples", "permutations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed is at least 0, not {self.seed}")


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
    """The file, as it was given; of tables, as it would be."""

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read a file, or one of the ready ones by its name (:func:`ready_names`).

        Raises:
            FileNotFoundError: there is none.
            ExperimentError: it says something that cannot be done.
        """
        path = Path(path)
        # A run's own folder is called after the ready one that it is of.
        is_ready = not path.is_file() and str(path) in ready_names()
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
        """Of nested tables of plain values; raises as :meth:`load`."""
        check_keys(tables, _TABLES, "an experiment")
        for name in ("model", "samples", "methods"):
            if not tables.get(name):
                raise ExperimentError(f"an experiment needs {name}")
        for name in ("title", "question"):
            if not isinstance(tables.get(name, ""), str):
                raise ExperimentError(f"{name} is text, not {tables[name]!r}")
        model = _model(tables["model"])
        is_toy = is_embedded(model["name"])
        return cls(
            title=tables.get("title", ""),
            question=tables.get("question", ""),
            model=model,
            samples=_samples(tables["samples"]),
            keep_correct=_keep_correct(tables.get(SELECTION, False), is_toy),
            steps=_steps(_table(tables["methods"], "[methods]"), is_toy),
            statistics=made(Statistics, _table(tables.get("statistics", {}), "[statistics]"), "[statistics]"),
            base=base or Path(),
            text=text or _written(tables),
        )

    def tables(self) -> dict[str, Any]:
        """What it says, as nested tables of plain values, from which :meth:`of` makes it again."""
        return {
            "title": self.title,
            "question": self.question,
            "model": dict(self.model),
            "samples": dict(self.samples),
            SELECTION: False if self.keep_correct is None else dict(self.keep_correct),
            "methods": {step.name: {"use": step.use, **step.given} for step in self.steps},
            "statistics": vars(self.statistics),
        }

    def on(self, **changes: Any) -> Experiment:
        """With another model, other samples, or the like: tables, as in a file.

        Arguments of methods are those of the file that this was read from, for an embedded model or for others.
        """
        return Experiment.of({**tomllib.loads(self.text), **changes}, base=self.base)

    def load_model(self, device: str | None = None) -> HookedVLM:
        """Its model, on a device of its own or on another one."""
        from hooked_vlm.models import HookedVLM

        options = {**self.model, **({"device": device} if device else {})}
        if "dtype" in options:
            import torch

            options["dtype"] = getattr(torch, options["dtype"])
        for name in ("name", "processor", "vision_tower"):
            # What is neither embedded nor a folder is on the hub.
            if name in options and not is_embedded(options[name]) and (self.base / options[name]).exists():
                options[name] = str(self.base / options[name])
        return HookedVLM.from_pretrained(options.pop("name"), **options)

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
        options |= {name: _located(options[name], self.base) for name in _PATHS if name in options}
        return read_samples(options.pop("file"), **options, limit=min(limits) if limits else None)


def ready_names() -> tuple[str, ...]:
    """The ready experiments, each one paper's."""
    return tuple(sorted(path.stem for path in READY.glob("*.toml")))


def is_embedded(name: str) -> bool:
    """Whether a model's name is that of an embedded checkpoint."""
    from hooked_vlm import toys

    return name in toys.names()


def _model(given: Any) -> dict[str, Any]:
    table = {"name": given} if isinstance(given, str) else _table(given, "[model]")
    return checked(_described_model, table, "[model]")


def _described_model(
    name: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    attention: AttentionImplementation | None = None,
    device: str | None = None,
    revision: str | None = None,
    quantization: Literal["int8"] | None = None,
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None,
    cross_attention_padding: Literal["mask", "hf"] = "mask",
    variant: Literal["hf", "original"] | None = None,
    processor: str | None = None,
    vision_tower: str | None = None,
) -> None:
    """What a file says of a model."""


def _samples(given: Any) -> dict[str, Any]:
    from hooked_vlm.data.readers import READERS
    from hooked_vlm.data.shapes import shapes

    table = _table(given, "[samples]")
    if ("file" in table) == ("shapes" in table):
        raise ExperimentError("[samples] says either file = a path, or shapes = how many questions about shapes")
    if "shapes" in table:
        options = {"seed": 0, **{name: value for name, value in table.items() if name != "shapes"}}
        options = checked(shapes, {"n": table["shapes"], **options}, "[samples]")
        number = options.pop("n")
        if number < 1:
            raise ExperimentError(f"[samples] needs at least one question about shapes, not {number}")
        made(shapes, {"n": 1, **options}, "[samples]")
        return {"shapes": number, **options}
    checked(_file_of_samples, {name: table[name] for name in ("file", "format") if name in table}, "[samples]")
    format = table.get("format", "manifest")
    if format not in READERS:
        raise ExperimentError(
            f"[samples]: no format is called {format!r}; there are {', '.join(READERS)}{nearest(format, READERS)}"
        )
    options = {name: value for name, value in table.items() if name not in ("file", "format")}
    checked(READERS[format], options, "[samples]", without=("path",))
    return table


def _file_of_samples(file: str, format: str = "manifest") -> None:
    """What a file says of samples in a file, beside what the reader of the format takes."""


def _keep_correct(given: Any, is_toy: bool) -> dict[str, Any] | None:
    from hooked_vlm.data.correct import keep_correct

    if isinstance(given, bool):
        return {} if given else None
    where = f"[{SELECTION}]"
    own, toy = _with_and_for_toys(_table(given, where), where)
    for table in (own, toy):
        checked(keep_correct, table, where, without=("model", "samples", "progress", "batch_size"))
    return toy if is_toy else own


def _steps(tables: Mapping[str, Any], is_toy: bool) -> tuple[Step, ...]:
    steps = []
    for name, own in tables.items():
        where = f"[methods.{name}]"
        table = _table(own, where)
        use = table.pop("use", name)
        if not isinstance(use, str):
            raise ExperimentError(f"{where}: use is a method's name, not {use!r}")
        chosen = method(use)
        # What is not used today is to be right, too: the model is easily changed.
        others, toys = ((given, chosen.arguments(given, where)) for given in _with_and_for_toys(table, where))
        given, arguments = toys if is_toy else others
        steps.append(Step(name, use, given, chosen, arguments))
    _check_names(steps)
    return tuple(steps)


def _check_names(steps: Sequence[Step]) -> None:
    """That each step, and each result derived of one, can have a file of its own; also where case makes no name."""
    taken = {SELECTION: "the choice of samples"}
    for step in steps:
        if not re.fullmatch(r"\w[\w-]*", step.name):
            raise ExperimentError(
                f"[methods] has {step.name!r}: a step's name is that of its files, of letters, digits, '_' and '-'"
            )
        for name in (step.name, *(f"{step.name}_{derived}" for derived in step.method.derived)):
            if name.lower() in taken:
                raise ExperimentError(
                    f"[methods.{step.name}] has a result {name!r}, which would be in the place of "
                    f"{taken[name.lower()]}: give the step another name"
                )
            taken[name.lower()] = f"a result of [methods.{step.name}]"


def _with_and_for_toys(table: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is so of any model; and of an embedded one."""
    own = {name: value for name, value in table.items() if name != TOY}
    return own, {**own, **_table(table.get(TOY, {}), f"{where}, {TOY}")}


def _table(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ExperimentError(f"{where} is a table, not {given!r}")
    return dict(given)


def _written(tables: Mapping[str, Any]) -> str:
    """Tables as a file would say them; what is None is left out."""
    import tomli_w

    def said(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: said(one) for name, one in value.items() if one is not None}
        return [said(one) for one in value] if isinstance(value, list | tuple) else value

    try:
        return tomli_w.dumps(said(tables))
    except TypeError as error:
        raise ExperimentError(f"a file has no form for a value: {error}") from error


def _located(path: str, base: Path) -> str:
    return path if "://" in path else str(base / path)


__all__ = ["Experiment", "ExperimentError", "Statistics", "Step", "is_embedded", "ready_names"]

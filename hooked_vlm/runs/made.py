"""What a run makes of its steps' results: files of results, tables and figures; and who was used, and who not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_vlm.data.samples import Dropped, Sample, Samples
from hooked_vlm.experiments.parts.loop import Failed
from hooked_vlm.files import whole_file
from hooked_vlm.results import save
from hooked_vlm.runs.experiment import Statistics, Step
from hooked_vlm.runs.folder import Folder
from hooked_vlm.statistics import summarize, write_table

if TYPE_CHECKING:
    import xarray as xr

EXAMPLES = 12
"""How many samples' pictures a run keeps."""

PICTURE_SIZE = 256


@dataclass(frozen=True)
class Made:
    """What has been made of a step."""

    step: Step
    results: dict[str, xr.Dataset]
    """By the name of their file; the step's own first; empty where no sample could be used."""
    left_out: tuple[Dropped, ...]
    seconds: float
    """What its samples took."""
    tables: tuple[str, ...] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    """By the name of their file: their captions."""
    notes: tuple[str, ...] = field(default=())
    """What could not be made, and why."""

    def summary(self) -> dict[str, Any]:
        """Of the step, for the run's summary."""
        failed = [one for one in self.left_out if isinstance(one, Failed)]
        dropped = [one for one in self.left_out if not isinstance(one, Failed)]
        used = next(iter(self.results.values())).attrs["samples_used"] if self.results else 0
        return {
            "method": self.step.use,
            "arguments": dict(self.step.given),
            "used": int(used),
            "dropped": len(dropped),
            "failed": len(failed),
            "reasons": [*reasons(dropped, "dropped"), *reasons(failed, "failed")],
            "seconds": round(self.seconds, 3),
            "results": list(self.results),
            "tables": list(self.tables),
            "figures": list(self.figures),
            "captions": dict(self.figures),
            "notes": list(self.notes),
        }


def make_of(
    folder: Path,
    step: Step,
    result: xr.Dataset,
    statistics: Statistics,
    seconds: float,
    not_read: Sequence[Dropped] = (),
) -> Made:
    """A step's files: its result and what is derived of it, the table of its cells, its figures.

    Args:
        not_read: rows that never became samples, which the result tells of, too.
    """
    notes: list[str] = []
    results = {step.name: result}
    for name, derive in step.method.derived.items():
        derived = _tried(f"the result {name}", partial(derive, result), notes)
        if derived is not None:
            results[f"{step.name}_{name}"] = derived
    (folder / "results").mkdir(exist_ok=True)
    for name, own in results.items():
        save(own, folder / "results" / f"{name}.nc")
    tables = _tables(folder / "tables", step, result, statistics, notes)
    figures = _figures(folder / "figures", step, results, notes)
    unread = set(not_read)
    left_out = tuple(one for one in _left_out(result) if one not in unread)
    return Made(step, results, left_out, seconds, tuple(tables), figures, tuple(notes))


def _tables(folder: Path, step: Step, result: xr.Dataset, statistics: Statistics, notes: list[str]) -> list[str]:
    if step.method.quantity is None:
        return []
    quantity, cells, options = step.method.quantity, step.method.cells, vars(statistics)

    def summarized() -> xr.Dataset:
        return summarize(result if cells is None else cells(result), quantity, against=step.method.null, **options)

    summary = _tried("the table", summarized, notes)
    if summary is None:
        return []
    write_table(summary, folder / f"{step.name}.csv")
    return [step.name]


def _figures(folder: Path, step: Step, results: dict[str, xr.Dataset], notes: list[str]) -> dict[str, str]:
    from hooked_vlm.plots import save_figure

    drawn = {}
    for name, draw in step.method.figures.items():
        key = f"{step.name}_{name}" if name else step.name
        if key in results:
            result = results[key]
            figure = _tried(f"the figure {key}", partial(draw, result, _title(result)), notes)
            if figure is not None:
                folder.mkdir(exist_ok=True)
                save_figure(figure, folder / f"{key}.png")
                drawn[key] = getattr(draw, "caption", "")
    return drawn


def _tried(what: str, make: Callable[[], Any], notes: list[str]) -> Any:
    """What is made; None, and a note, where a result does not lend itself to it: the run is not lost for that."""
    try:
        return make()
    except OSError:
        raise
    except Exception as error:  # your own functions raise what they like
        notes.append(f"{what} could not be made: {type(error).__name__}: {error}")
        return None


def _title(result: xr.Dataset) -> str:
    told = [result.attrs.get("model"), result.attrs.get("corruption"), result.attrs.get("direction")]
    return ", ".join(str(one) for one in told if one)


def _left_out(result: xr.Dataset) -> tuple[Dropped, ...]:
    dropped = [Dropped(id, reason, kind) for id, kind, reason in json.loads(result.attrs.get("dropped", "[]"))]
    failed = [Failed(id, reason, kind) for id, kind, reason in json.loads(result.attrs.get("failed", "[]"))]
    return (*dropped, *failed)


def reasons(left_out: Sequence[Dropped], outcome: str) -> list[dict[str, Any]]:
    """Why samples were left out: kinds of reasons, how often, and some examples; the commonest first."""
    kinds: dict[str, list[Dropped]] = {}
    for one in left_out:
        kinds.setdefault(one.kind, []).append(one)
    return [
        {
            "outcome": outcome,
            "kind": kind,
            "count": len(own),
            "examples": [[one.id, one.reason] for one in own[:3]],
        }
        for kind, own in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]


def write_samples(
    folder: Folder, samples: Samples, chosen: Samples, steps: Sequence[str], made: Sequence[Made]
) -> None:
    """The list of samples and what became of each, and the pictures of the first few."""
    by_step = {own.step.name: {one.id: one for one in own.left_out} for own in made}
    generated = {sample.id: sample.meta.get("generated") for sample in chosen}
    rows = [
        {
            "id": sample.id,
            "question": sample.question,
            "answer": sample.answer,
            "foil": sample.foil,
            "group": sample.group,
            **({"generated": generated[sample.id]} if generated.get(sample.id) else {}),
            "outcome": {step: _outcome(by_step[step].get(sample.id)) for step in steps},
        }
        for sample in samples
    ]
    folder.write("samples.json", rows)
    (folder.path / "pictures").mkdir(exist_ok=True)
    for number, sample in enumerate(samples[:EXAMPLES]):
        _write_picture(folder.path / "pictures" / f"{number:06d}.png", sample)


def _outcome(left_out: Dropped | None) -> str:
    return "used" if left_out is None else "failed" if isinstance(left_out, Failed) else "dropped"


def _write_picture(path: Path, sample: Sample) -> None:
    if sample.image is None:
        return
    try:
        picture = sample.picture()
    except (ValueError, OSError):
        return  # it says so itself: the sample was left out for that
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")

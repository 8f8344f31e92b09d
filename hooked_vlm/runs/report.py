"""The report of a run: one page that needs nothing beside it, made of what the run's folder holds."""

from __future__ import annotations

import base64
import inspect
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hooked_vlm.files import whole_file
from hooked_vlm.runs.report_tables import StatisticsTable, number, read_table

MOST_SAMPLES, MOST_WITHOUT_PICTURES = 12, 6
"""How many are shown."""
LONGEST_TEXT = 600
"""Letters of an argument or attribute; the rest is in the files."""
LONGEST_IN_CALL = 60
TOLD_ELSEWHERE = ("format", "digest", "experiment", "samples")
"""Of what ``run.json`` says, which is for ``--resume``."""
LISTED_ELSEWHERE = ("dropped", "failed")
"""Attributes of results that name every sample left out: the page counts them, with examples."""


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of a run, from what is there: whole, or not at all.

    A run that has not ended, in which no sample could be used, or that lacks figures gives a page that says so.

    Returns:
        Where the page is.

    Raises:
        FileNotFoundError: this is no folder of a run; it lacks one of the files that every run writes.
        ValueError: one of these, or a table, is damaged.
    """
    folder = Path(folder)
    page = _template().render(_contents(folder))
    with whole_file(folder / "report.html") as temporary:
        # A text may hold half of a surrogate pair, which no encoding can write.
        temporary.write_bytes(page.encode("utf-8", errors="replace"))
    return folder / "report.html"


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hooked_vlm.runs", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "size": size, "brief": _brief}
    return environment.get_template("report.html.j2")


def _contents(folder: Path) -> dict[str, Any]:
    """What the template names."""
    summary, samples, run, sessions = (
        _read(folder, f"{name}.json") for name in ("summary", "samples", "run", "environment")
    )
    results = {
        name: _read_result(folder / "results" / f"{name}.nc")
        for step in summary["steps"].values()
        for name in step["results"]
    }
    attributes = {name: result.attributes for name, result in results.items() if not result.problem}
    shared_attributes, own_attributes = _shared(attributes)
    shared_facts, own_facts = _shared({str(i): _flat(session) for i, session in enumerate(sessions, 1)})
    return {
        "summary": summary,
        "steps": {name: _step(folder, name, step, summary) for name, step in summary["steps"].items()},
        "n_samples": len(samples),
        "shown": _shown(folder, samples),
        "groups": Counter(one["group"] for one in samples if one["group"]),
        "experiment": _text(folder / "experiment.toml"),
        "run": _flat({key: value for key, value in run.items() if key not in TOLD_ELSEWHERE}) | shared_facts,
        "keeps_correct": run["experiment"].get("keep_correct", False) is not False,
        "statistics": {"level": 0.95, **run["experiment"].get("statistics", {})},
        "sessions": sessions,
        "shared_facts": shared_facts,
        "own_facts": own_facts,
        "results": results,
        "shared_attributes": shared_attributes,
        "own_attributes": own_attributes,
        "command": _command(sessions),
    }


def _command(sessions: Sequence[Mapping[str, Any]]) -> str:
    """That started the run; one like it where it was started from Python."""
    given = str(sessions[0]["command"]) if sessions else ""
    return given if given.startswith("hooked-vlm run ") else "hooked-vlm run experiment.toml --out FOLDER"


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no folder of a run: it has no {path.name}")
    return path.read_text(encoding="utf-8")


def _read(folder: Path, name: str) -> Any:
    try:
        return json.loads(_text(folder / name))
    except ValueError as error:
        raise ValueError(f"{folder / name} is damaged: {error}") from error


def _step(folder: Path, name: str, step: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """One step, with what its names stand for."""
    done = step["used"] + step["dropped"] + step["failed"]
    captions = step.get("captions", {})
    about = _about(step["method"])
    return {
        **step,
        "left": max(0, summary["read"] - done),
        "notes": step.get("notes", []),
        "about": about,
        "call": _call(step["method"], step["arguments"]),
        "arguments": {key: repr(value) for key, value in step["arguments"].items()},
        "figures": {
            figure: {"picture": _picture(folder / "figures" / f"{figure}.png"), "caption": captions.get(figure, "")}
            for figure in step["figures"]
        },
        "tables": {table: _table(folder / "tables" / f"{table}.csv") for table in step["tables"]},
    }


def _call(method: str, arguments: Mapping[str, Any]) -> str:
    return f"{method}({', '.join(f'{key}={_brief(repr(value), LONGEST_IN_CALL)}' for key, value in arguments.items())})"


def _about(method: str) -> list[str]:
    """What a method does, in the words of its module: what it is and from which paper, and how it works."""
    from hooked_vlm import experiments

    function = getattr(experiments, method, None)
    if not inspect.isfunction(function):
        return []
    told = inspect.cleandoc(sys.modules[function.__module__].__doc__ or "")
    plain = re.sub(r":\w+:`~?([^`]*)`", r"\1", told).replace("``", "")
    return [" ".join(paragraph.split()) for paragraph in plain.split("\n\n")[:2]]


def _table(path: Path) -> StatisticsTable | None:
    return read_table(path) if path.is_file() else None


@dataclass(frozen=True)
class Picture:
    """A picture to be put into the page."""

    address: str
    width: int
    height: int
    """Pixels of the page: of a figure as large as it was drawn, by its dots an inch."""


def _picture(path: Path) -> Picture | None:
    """None for a picture that is missing or damaged."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return None
    scale = 96 / float(image.info.get("dpi", (96, 96))[0])
    width, height = (round(scale * side) for side in image.size)
    return Picture(f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height)


def _shown(folder: Path, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first samples, as far as there are pictures."""
    pictures = [_picture(folder / "pictures" / f"{i:06}.png") for i in range(min(len(samples), MOST_SAMPLES))]
    n_shown = max((i for i, picture in enumerate(pictures, 1) if picture), default=MOST_WITHOUT_PICTURES)
    return [{**sample, "picture": picture} for sample, picture in zip(samples, pictures[:n_shown], strict=False)]


@dataclass(frozen=True)
class ResultFile:
    """What a result's file says of itself."""

    sizes: dict[str, int]
    variables: list[str]
    attributes: dict[str, str]
    problem: str = ""
    """Why it could not be read."""


def _read_result(path: Path) -> ResultFile:
    """Its numbers, which may be many, stay on disk."""
    import xarray as xr

    from hooked_vlm.results import ENGINE

    if not path.is_file():
        return ResultFile({}, [], {}, "missing")
    try:
        with xr.open_dataset(path, engine=ENGINE) as result:
            sizes = {str(name): length for name, length in result.sizes.items()}
            attributes = {str(name): _as_text(value) for name, value in result.attrs.items()}
            variables = [str(name) for name in result.data_vars]
    except OSError:
        return ResultFile({}, [], {}, "damaged")
    return ResultFile(
        sizes, variables, {name: text for name, text in attributes.items() if name not in LISTED_ELSEWHERE}
    )


def _shared(records: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """What all records agree on, and of each the rest."""
    if not records:
        return {}, {}
    first = next(iter(records.values()))
    shared = {key: value for key, value in first.items() if all(one.get(key) == value for one in records.values())}
    own = {name: {key: value for key, value in one.items() if key not in shared} for name, one in records.items()}
    return shared, own


def _flat(record: Mapping[str, Any]) -> dict[str, str]:
    """A record of records as one table; packages, of their versions, go by their own names."""
    flat: dict[str, str] = {}
    for key, value in record.items():
        inner = value if isinstance(value, Mapping) else {"": value}
        flat |= {name if key == "versions" else f"{key} {name}".strip(): _as_text(own) for name, own in inner.items()}
    return flat


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=lambda number: number.tolist())  # netCDF gives NumPy's


def _brief(text: str, longest: int = LONGEST_TEXT) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def duration(seconds: float) -> str:
    """``3725`` as ``1 h 02 min``."""
    if seconds < 100:
        return f"{number(seconds)} s"
    minutes, hours = round(seconds / 60), int(round(seconds / 60) // 60)
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min"


def size(n_bytes: float) -> str:
    """``2500000`` as ``2.50 MB``."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    power = min(4, int(math.log10(n_bytes) // 3))
    return f"{number(n_bytes / 1000**power)} {'kMGT'[power - 1]}B"

"""What a run makes of results: files that say what they are, whatever a method's own functions do."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from hooked_vlm import results
from hooked_vlm.data import Dropped, Sample, Samples
from hooked_vlm.experiments.parts.loop import Failed
from hooked_vlm.runs import Method
from hooked_vlm.runs.experiment import Statistics, Step
from hooked_vlm.runs.folder import Folder
from hooked_vlm.runs.made import EXAMPLES, PICTURE_SIZE, Made, make_of, reasons, write_samples

STATISTICS = Statistics(resamples=20, permutations=20)


@pytest.fixture
def result() -> xr.Dataset:
    values = np.random.default_rng(0).normal(size=(5, 3))
    dropped = [["no row", "a malformed row", "line 7"], ["e", "blank", "e is blank"]]
    attributes = {
        "samples_used": 5,
        "dropped": json.dumps(dropped),
        "failed": json.dumps([["f", "RuntimeError", "RuntimeError: no luck"]]),
    }
    labels = {"sample": list("abcd5"), "layer": [0, 1, 2]}
    return xr.Dataset({"effect": (("sample", "layer"), values)}, labels, attributes)


def step(**options: Any) -> Step:
    return Step("mine", "tests:mine", {"width": 3}, Method(lambda: None, **options), {"width": 3})


def draw(result: xr.Dataset, title: str) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(1, 1))


def raises(error: Exception) -> Callable[..., NoReturn]:
    def function(*_: object) -> NoReturn:
        raise error

    return function


def test_results_tables_and_figures_are_files(result: xr.Dataset, tmp_path: Path) -> None:
    largest = result.max("layer")
    mine = step(
        quantity="effect", derived={"largest": lambda own: own.max("layer")}, figures={"": draw, "largest": draw}
    )
    made = make_of(tmp_path, mine, result, STATISTICS, 1.5, [Dropped("no row", "line 7", "a malformed row")])
    assert results.load(tmp_path / "results" / "mine.nc").identical(result)
    assert results.load(tmp_path / "results" / "mine_largest.nc").identical(largest)
    rows = list(csv.DictReader((tmp_path / "tables" / "mine.csv").open()))
    assert [float(row["mean"]) for row in rows] == pytest.approx(result.effect.mean("sample").values.tolist())
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.p*")}
    assert files == {f"figures/{name}.{ending}" for name in ("mine", "mine_largest") for ending in ("png", "pdf")}
    assert made.summary() == {
        "method": "tests:mine",
        "arguments": {"width": 3},
        "used": 5,
        "dropped": 1,
        "failed": 1,
        "reasons": [
            {"outcome": "dropped", "kind": "blank", "count": 1, "examples": [["e", "e is blank"]]},
            {"outcome": "failed", "kind": "RuntimeError", "count": 1, "examples": [["f", "RuntimeError: no luck"]]},
        ],
        "seconds": 1.5,
        "results": ["mine", "mine_largest"],
        "tables": ["mine"],
        "figures": ["mine", "mine_largest"],
        "captions": {"mine": "", "mine_largest": ""},
        "notes": [],
    }


@pytest.mark.parametrize("error", [ValueError("no cells"), KeyError("layer"), TypeError("what ?"), ZeroDivisionError()])
@pytest.mark.parametrize("where", ["derived", "cells", "figures"])
def test_what_cannot_be_made_is_noted_and_all_else_is_made(
    where: str, error: Exception, result: xr.Dataset, tmp_path: Path
) -> None:
    fails = raises(error)
    mine = step(
        quantity="effect",
        **{where: fails if where == "cells" else {"other": fails} if where == "derived" else {"": fails}},
    )
    made = make_of(tmp_path, mine, result, STATISTICS, 0.0)
    what = {"derived": "the result other", "cells": "the table", "figures": "the figure mine"}[where]
    assert made.notes == (f"{what} could not be made: {type(error).__name__}: {error}",)
    assert results.load(tmp_path / "results" / "mine.nc").identical(result)
    assert made.tables == (() if where == "cells" else ("mine",))
    assert list(made.results) == ["mine"]


def test_a_full_disk_is_no_note(result: xr.Dataset, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        make_of(tmp_path, step(figures={"": raises(full)}), result, STATISTICS, 0.0)


def test_reasons_are_counted_the_commonest_first() -> None:
    left_out = [Dropped(str(number), f"because of {number}", "odd" if number % 3 else "even") for number in range(10)]
    found = reasons(left_out, "dropped")
    assert [(one["kind"], one["count"]) for one in found] == [("odd", 6), ("even", 4)]
    assert found[1]["examples"] == [[str(number), f"because of {number}"] for number in (0, 3, 6)]


def test_samples_are_listed_with_what_became_of_them_and_the_first_have_pictures(tmp_path: Path) -> None:
    wide = Image.new("RGB", (1000, 500), "red")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pictures = [wide, None, tmp_path / "broken.png", *[wide] * 20]
    samples = Samples([Sample(str(number), one, "what ?", answer="red") for number, one in enumerate(pictures)])
    chosen = Samples([replace(one, meta={"generated": "a red one"}) for one in samples[:2]])
    left_out = (Dropped("1", "", ""), Failed("2", "", ""))
    made = [Made(step(), {}, left_out, 0.0), Made(replace(step(), name="other"), {}, (), 0.0)]
    write_samples(Folder(tmp_path), samples, chosen, ["mine", "other"], made)
    rows = json.loads((tmp_path / "samples.json").read_text())
    assert rows[0] == {
        "id": "0",
        "question": "what ?",
        "answer": "red",
        "foil": None,
        "group": None,
        "generated": "a red one",
        "outcome": {"mine": "used", "other": "used"},
    }
    assert [row["outcome"]["mine"] for row in rows[1:4]] == ["dropped", "failed", "used"]
    assert len(rows) == 23
    names = [f"{number:06d}.png" for number in range(EXAMPLES) if number not in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    with Image.open(tmp_path / "pictures" / "000000.png") as small:
        assert small.size == (PICTURE_SIZE, PICTURE_SIZE // 2)

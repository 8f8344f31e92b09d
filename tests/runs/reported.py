"""Folders of runs, made by hand, and their pages."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from PIL import Image

from hooked_vlm import results
from hooked_vlm.runs.report import write_report

LABELS = ("metric", "token", "layer", "last_layer")
STATISTICS = ("n", "mean", "low", "high", "median", "median_low", "median_high", "p", "p_corrected")


def write_csv(path: Path, rows: Sequence[Sequence[Any]], labels: Sequence[str] = LABELS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[*labels, *STATISTICS], *rows])
    return path


def cell(mean: float, p: float = 0.25, n: int = 3) -> list[Any]:
    return [n, mean, mean - 0.1, mean + 0.1, mean, mean, mean, p, min(1.0, 4 * p)]


def session(started: str = "2026-11-21T18:00:00+00:00", **changes: Any) -> dict[str, Any]:
    versions = {"hooked_vlm": "0.1.0", "torch": "2.13.0"}
    facts = {"started": started, "command": "hooked-vlm run color.toml --out runs/color", "versions": versions}
    return {**facts, "cpu_cores": 2, "device_name": "", "workers": 1, **changes}


def a_step(**changes: Any) -> dict[str, Any]:
    reasons = [
        {"outcome": "dropped", "kind": "no region", "count": 1, "examples": [["id-3", "it has no region 'object'"]]},
        {"outcome": "failed", "kind": "OSError", "count": 1, "examples": [["id-4", "image file is truncated"]]},
    ]
    made = {"results": ["flow"], "tables": ["flow"], "figures": ["flow"]}
    return {
        "method": "information_flow",
        "arguments": {"width": 1, "edges": [["image", "last"]] * 30},
        **{"used": 3, "dropped": 1, "failed": 1, "reasons": reasons, "seconds": 3725.0, **made, **changes},
    }


def make_folder(tmp_path: Path) -> Path:
    """Of a run of one step over five samples."""
    for name in ("results", "tables", "figures", "pictures"):
        (tmp_path / name).mkdir()
    effect = xr.Dataset({"effect": (("sample", "layer"), np.zeros((3, 2)))})
    facts = {"model": "toy-llava", "dtype": "float32", "seed": 7, "dropped": '[["id-3", "no region", "a reason"]]'}
    results.save(effect.assign_attrs(facts), tmp_path / "results" / "flow.nc")
    labels = [
        (metric, token, layer) for metric in ("probability", "logit_difference") for token in "ab" for layer in (0, 1)
    ]
    rows = [[*label, label[-1], *cell(0.1 * (i + 1), 0.0 if i == 3 else 0.25)] for i, label in enumerate(labels)]
    write_csv(tmp_path / "tables" / "flow.csv", rows)
    Image.new("RGB", (800, 400), "white").save(tmp_path / "figures" / "flow.png", dpi=(200, 200))
    for place in (0, 1):
        Image.new("RGB", (96, 96), "red").save(tmp_path / "pictures" / f"{place:06}.png")
    (tmp_path / "experiment.toml").write_text('model = "toy-llava"  # a comment\n')
    outcomes = ["used", "used", "used", "dropped", "failed"]
    sample = {"question": "what color is the star ?", "answer": "red", "foil": None, "group": "color"}
    write(
        tmp_path, "samples", [{"id": f"id-{i}", **sample, "outcome": {"flow": own}} for i, own in enumerate(outcomes)]
    )
    experiment = {"statistics": {"level": 0.9}, "keep_correct": False}
    facts = {"format": 1, "digest": "ab12", "experiment": experiment, "samples": ["ab12"] * 5}
    write(tmp_path, "run", {**facts, "model": {"revision": "main"}, "threads": 2})
    write(tmp_path, "environment", [session()])
    cost = {"seconds": 4000.0, "samples_per_hour": 4.5, "bytes_on_disk": 2_500_000}
    asked = {"title": "Where is color read?", "question": "Which tokens does the answer read?", "model": "toy-llava"}
    write(tmp_path, "summary", {**asked, "steps": {"flow": a_step()}, "read": 5, "not_read": [], **cost})
    return tmp_path


def write(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def change(folder: Path, name: str, **changes: Any) -> None:
    write(folder, name, {**json.loads((folder / f"{name}.json").read_text()), **changes})


class Markup(HTMLParser):
    """Tags with their attributes, in order, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append((tag, ""))

    def handle_data(self, data: str) -> None:
        if self.texts:
            tag, text = self.texts[-1]
            self.texts[-1] = (tag, text + data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [own for name, own in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(text for tag, text in self.texts if tag != "style").split())


def page_of(folder: Path) -> Markup:
    assert write_report(folder) == folder / "report.html"
    return Markup((folder / "report.html").read_text(encoding="utf-8"))

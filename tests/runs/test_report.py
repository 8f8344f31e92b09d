"""The report of a run: what it says of a folder, and that a browser shows it whole."""

from __future__ import annotations

import base64
import errno
import json
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from PIL import Image

from hooked_vlm import results
from hooked_vlm.runs.report import duration, size, write_report
from tests.runs.browser import needs_browser, open_page
from tests.runs.reported import a_step, cell, change, make_folder, page_of, session, write, write_csv

NASTY = '<script>alert(1)</script> & "quotes" <img src="http://example.com/x.png" onerror="alert(2)">'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def test_it_says_what_was_asked_done_and_found(folder: Path) -> None:
    words = page_of(folder).words
    for told in (
        "Where is color read?",
        "Which tokens does the answer read?",
        "The model toy-llava was run on 5 samples",
        "3 of 5 samples were used, 1 dropped, 1 failed with an error",
        "1 h 02 min",
        "Cross-modal information flow by attention knockout (Zhang et al. 2025",
        "that is where the edge carries it.",
        "no region 1 id-3: it has no region 'object'",
        "OSError 1 id-4: image file is truncated",
        "the 90% bootstrap interval",
        'model = "toy-llava" # a comment',
        "torch 2.13.0",
        "model revision main",
        "dtype float32",
        "seed 7",
        "sample 3, layer 2",
        "2.50 MB (500 kB a sample)",
        "hooked-vlm run color.toml --out runs/color",
        'hooked_vlm.results.load("results/flow.nc")',
    ):
        assert told in words, told
    assert "ab12" not in words, "digests of samples are for --resume"
    assert "a reason" not in words, "the list of all dropped samples stays in the result"
    assert "not finished" not in words
    assert "could not be read" not in words


def test_figures_and_pictures_are_in_the_page_as_they_are(folder: Path) -> None:
    images = page_of(folder).attributes("img")
    files = ["figures/flow.png", "pictures/000000.png", "pictures/000001.png"]
    for image, file in zip(images, files, strict=True):
        assert base64.b64decode(str(image["src"]).partition("base64,")[2]) == (folder / file).read_bytes()
        assert image["alt"]
    assert (images[0]["width"], images[0]["height"]) == ("384", "192"), "four inches wide, as it was drawn"


def test_it_needs_nothing_beside_it(folder: Path) -> None:
    page = page_of(folder)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
    anchors = {str(own["href"])[1:] for own in page.attributes("a")}
    assert anchors == {own["id"] for _, own in page.tags if "id" in own}
    policy = {own.get("http-equiv"): own.get("content") for own in page.attributes("meta")}["Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    style = "".join(text for tag, text in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_it_is_put_together_as_a_page_should_be(folder: Path) -> None:
    page = page_of(folder)
    assert page.attributes("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.attributes("table")) == len(page.attributes("caption")) == len(page.attributes("thead"))
    assert all(own.get("scope") in ("col", "row", "rowgroup") for own in page.attributes("th"))


def test_the_same_folder_gives_the_same_page(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    assert write_report(str(folder)).read_bytes() == first


@needs_browser
def test_a_browser_shows_it_whole(folder: Path, tmp_path: Path) -> None:
    page = open_page(write_report(folder), widths=(1400, 1000, 700), screenshot=tmp_path / "page.png")
    assert page.problems == []
    assert page.title == "Where is color read?"
    assert page.n_images == 3
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == 1400
        assert shot.height > 1500


def make_nasty(folder: Path) -> None:
    (folder / "experiment.toml").write_text(f"# {NASTY}")
    samples = json.loads((folder / "samples.json").read_text())
    write(
        folder,
        "samples",
        [{**samples[0], "id": NASTY, "question": NASTY, "answer": NASTY, "foil": NASTY, "group": NASTY}],
    )
    reasons = [{"outcome": "dropped", "kind": NASTY, "count": 1, "examples": [[NASTY, "x" * 300]]}]
    step = a_step(
        arguments={NASTY: NASTY, "long": "x" * 3000}, reasons=reasons, notes=[NASTY], captions={"flow": NASTY}
    )
    change(folder, "summary", title=NASTY, question=NASTY, model=NASTY, steps={NASTY: step})
    rows = [[NASTY, NASTY, "x" * 300, i, *cell(1.0 + i)] for i in range(4)]
    write_csv(folder / "tables" / "flow.csv", [*rows, [NASTY, "\n", "b", 0, *cell(0.1)]])
    result = xr.Dataset({NASTY.replace("/", ""): ("sample", [1.0])}, attrs={"name": NASTY, "long": "x" * 3000})
    results.save(result, folder / "results" / "flow.nc")
    write(folder, "environment", [session(command=f"hooked-vlm run {NASTY}"), session(platform=NASTY)])


def test_texts_stay_texts(folder: Path) -> None:
    make_nasty(folder)
    page = page_of(folder)
    assert not page.attributes("script")
    assert len(page.attributes("img")) == 2
    assert page.words.count(" ".join(NASTY.split())) > 20
    assert "x" * 599 + "…" in page.words
    assert "x" * 600 not in page.words
    assert "\\n" in page.words


@needs_browser
def test_a_browser_takes_texts_for_texts(folder: Path) -> None:
    make_nasty(folder)
    page = open_page(write_report(folder))
    assert page.problems == []
    assert page.title == NASTY
    assert page.text.count(NASTY) > 15


def test_half_of_a_surrogate_pair_can_be_written(folder: Path) -> None:
    change(folder, "summary", title="half \ud83d of a pair")
    assert "half ? of a pair" in page_of(folder).words


def test_samples_that_are_left_are_told(folder: Path) -> None:
    change(folder, "summary", read=9)
    words = page_of(folder).words
    assert "This run has not finished. In step flow 4 of 9 samples are still to be done. " in words
    assert "hooked-vlm run color.toml --out runs/color --resume" in words


def empty(**changes: Any) -> dict[str, Any]:
    return a_step(used=0, results=[], tables=[], figures=[], **changes)


NOTHING_DONE = {"read": 0, "bytes_on_disk": 0, "samples_per_hour": 0.0, "seconds": 0.0, "steps": {}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": {"flow": empty(dropped=4)}}, "No sample could be used in step flow. "),
        ({"steps": {"flow": empty(dropped=4)}}, "There is no figure of this step, for want of samples."),
        ({"steps": {"flow": empty(dropped=4)}}, "There are no statistics of this step, for want of samples."),
        ({"steps": {"flow": empty(dropped=4)}}, "There are no results."),
        ({"steps": {"flow": a_step(figures=[])}}, "There is no figure of this step."),
        ({"steps": {"flow": a_step(figures=["gone"])}}, "figures/gone.png is missing or damaged."),
        ({"steps": {"flow": a_step(tables=["gone"])}}, "tables/gone.csv is missing."),
        ({"steps": {"flow": a_step(results=["gone", "flow"])}}, "results/gone.nc missing"),
        ({"steps": {"flow": a_step(notes=["the figure flow could not be made"])}}, "the figure flow could not be made"),
        ({"steps": {"flow": a_step(captions={"flow": "An edge is a line."})}}, "Figure 1. An edge is a line."),
        ({"steps": {"flow": a_step(reasons=[])}}, "No sample was dropped, and none failed."),
        ({"steps": {"flow": a_step(used=5, dropped=0, failed=0)}}, ": all samples were used."),
        ({"steps": {"mine": a_step(method="package.module:function")}}, "package.module:function(width=1"),
        ({"not_read": [{"kind": "no picture", "count": 2, "examples": [["row 3", "gone"]]}]}, "2 further rows"),
        ({"title": "", "question": ""}, "A run of toy-llava"),
        (NOTHING_DONE, "0 samples"),
    ],
)
def test_what_is_not_there_is_said(changes: Mapping[str, Any], told: str, folder: Path) -> None:
    change(folder, "summary", **changes)
    assert told in page_of(folder).words


def test_a_method_is_explained_once(folder: Path) -> None:
    change(folder, "summary", steps={"one": a_step(), "other": a_step(arguments={"width": 3})})
    words = page_of(folder).words
    assert words.count("that is where the edge carries it.") == 1
    assert "The method is explained at step one." in words


@pytest.mark.parametrize(("keep_correct", "is_told"), [(False, False), ({}, True)])
def test_that_only_right_answers_were_used_is_said(keep_correct: Any, is_told: bool, folder: Path) -> None:
    change(folder, "run", experiment={"keep_correct": keep_correct})
    words = page_of(folder).words
    assert ("Only samples that the model answers rightly were used." in words) == is_told
    assert "the 95% bootstrap interval" in words


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def test_damaged_files_are_said(folder: Path) -> None:
    for file in ("figures/flow.png", "results/flow.nc", "pictures/000000.png"):
        cut_short(folder / file)
    page = page_of(folder)
    assert "figures/flow.png is missing or damaged." in page.words
    assert "results/flow.nc damaged" in page.words
    assert len(page.attributes("img")) == 1


def test_samples_without_pictures(folder: Path) -> None:
    for file in (folder / "pictures").iterdir():
        file.unlink()
    samples = json.loads((folder / "samples.json").read_text())
    write(folder, "samples", [{**samples[0], "answer": None, "generated": "blue", "outcome": {}}] * 20)
    words = page_of(folder).words
    assert words.count("No picture.") == words.count("no answer given") == words.count("flow: to be done") == 6
    assert "generated blue" in words
    assert "The first 6 of 20 samples" in words


def test_sessions_are_held_against_each_other(folder: Path) -> None:
    write(folder, "environment", [session(), session("2026-11-22T09:00:00+00:00", workers=2)])
    words = page_of(folder).words
    assert (
        "What differs between sessions. session started workers 1 2026-11-21T18:00:00+00:00 1 2 2026-11-22T09" in words
    )
    assert words.count("torch 2.13.0") == 1


def test_a_run_that_python_started_is_repeated_by_its_file(folder: Path) -> None:
    write(folder, "environment", [session(command="my_script.py")])
    assert "hooked-vlm run experiment.toml --out FOLDER" in page_of(folder).words


def test_attributes_are_told_once_or_for_each_result(folder: Path) -> None:
    loaded = results.load(folder / "results" / "flow.nc")
    results.save(loaded.assign_attrs(seed=8), folder / "results" / "peaks.nc")
    change(folder, "summary", steps={"flow": a_step(results=["flow", "peaks"])})
    words = page_of(folder).words
    assert words.count("dtype float32") == 1
    assert "Attributes of flow alone" in words
    assert (words.count("seed 7"), words.count("seed 8")) == (1, 1)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "summary.json").unlink(), FileNotFoundError, "no folder of a run: it has no summary"),
        (lambda folder: (folder / "experiment.toml").unlink(), FileNotFoundError, "it has no experiment.toml"),
        (lambda folder: cut_short(folder / "samples.json"), ValueError, "samples.json is damaged"),
        (lambda folder: write_csv(folder / "tables" / "flow.csv", [["a"]]), ValueError, "longer or shorter"),
        (
            lambda folder: (folder / "tables" / "flow.csv").write_text("a,n,mean\n"),
            ValueError,
            "lacks low, high, median",
        ),
        (
            lambda folder: write_csv(folder / "tables" / "flow.csv", [["m", "a", 0, 0, *cell(0.1)[:-1], "much"]]),
            ValueError,
            "flow.csv is damaged: .*'much'",
        ),
    ],
)
def test_no_page_of_what_is_no_run(
    spoil: Callable[[Path], Any], error: type[Exception], message: str, folder: Path
) -> None:
    (folder / "report.html").write_text("before")
    spoil(folder)
    with pytest.raises(error, match=message):
        write_report(folder)
    assert (folder / "report.html").read_text() == "before"
    assert not list(folder.glob(".report*"))


def test_a_full_disk_leaves_the_page_that_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder / "report.html").write_text("before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "before"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.500 s"), (99.0, "99.0 s"), (3570, "1 h 00 min"), (600, "10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (75_800, "75.8 kB"), (2e15, "2,000 TB")]
)
def test_sizes(n_bytes: float, text: str) -> None:
    assert size(n_bytes) == text


BAD_PAGES = {
    "<img src='gone.png'>": ["error: Failed to load", "request: file:", "no picture: file:"],
    "<img src='data:image/png;base64,AAAA'>": ["no picture: data:"],
    "<script>throw new Error('boom')</script>": ["error: Error: boom"],
    "<script>setTimeout(() => undefined_name)</script>": ["error: ReferenceError"],
    "<script>console.error('ouch')</script>": ["error: ouch"],
    "<script>fetch('http://example.com/').catch(() => 0)</script>": ["error: Failed", "request: http://example.com/"],
    "<link rel=stylesheet href='https://example.com/a.css'>": ["error: Failed", "request: https://example.com/a.css"],
    "<details><div style='width: 900px'>wide</div></details>": ["wider than the window: 908 px in 700 px"],
    "<p>all is well</p>": [],
}


@needs_browser
@pytest.mark.parametrize("body", BAD_PAGES)
def test_the_browser_finds_what_is_wrong(body: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{body}")
    problems = open_page(tmp_path / "page.html").problems
    assert len(problems) == len(BAD_PAGES[body])
    assert all(found.startswith(told) for found, told in zip(problems, BAD_PAGES[body], strict=True)), problems

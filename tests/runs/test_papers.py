"""The ready experiments, one a paper: to the end on the toys, and with the paper's arguments on anything else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from hooked_vlm import results
from hooked_vlm.commands.reproduce import FORMATS
from hooked_vlm.corruptions import AdditiveGaussian, Scaled
from hooked_vlm.data.readers import READERS
from hooked_vlm.experiments import paper_conditions
from hooked_vlm.experiments.information_flow import EDGES
from hooked_vlm.experiments.parts.token_choice import ObjectTokens, OtherTokens, RandomTokens
from hooked_vlm.runs import METHODS, Experiment, Run, ready_names, run
from hooked_vlm.runs.experiment import READY, tomllib
from tests.runs.browser import find_browser, needs_browser, open_page

PAPERS = ("basu", "neo", "notice", "palit", "zhang")

STEPS = {
    "basu": {"constraint": ("constraint", "constraint_peaks")},
    "neo": {"visual_tokens": ("visual_tokens",)},
    "notice": {
        **{f"modules_{pair}": (f"modules_{pair}",) for pair in ("sip", "str")},
        **{f"heads_{pair}": (f"heads_{pair}", f"heads_{pair}_selected") for pair in ("sip", "str")},
    },
    "palit": {"scaled": ("scaled",), "noise": ("noise",)},
    "zhang": {"flow": ("flow",), "answer": ("answer",)},
}
"""Of each paper its steps, and the results of each."""


@pytest.fixture(scope="module", params=PAPERS)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Run]]:
    """A paper's run over four samples. Signatures are checked where its methods have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield request.param, run(request.param, tmp_path_factory.mktemp("runs") / request.param, limit=4)


def check_run(paper: str, ended: Run) -> None:
    """That every step used every sample, and that all that is to come of it is there."""
    summary, n = ended.summary, ended.summary["read"]
    assert summary["title"] == Experiment.load(paper).title
    assert ended.counts == dict.fromkeys(STEPS[paper], (n, 0, 0))
    for step, names in STEPS[paper].items():
        own = summary["steps"][step]
        assert tuple(own["results"]) == names
        assert own["tables"] == [step]
        assert own["figures"]
        assert own["notes"] == []
        for name in names:
            assert results.load(ended.folder / "results" / f"{name}.nc").attrs["samples_used"] == n
        for figure in own["figures"]:
            assert (ended.folder / "figures" / f"{figure}.png").stat().st_size > 5000
            assert (ended.folder / "figures" / f"{figure}.pdf").stat().st_size > 5000
        header, *rows = (ended.folder / "tables" / f"{step}.csv").read_text(encoding="utf-8").splitlines()
        tested = {"p", "p_corrected"} if METHODS[own["method"]].null is not None else set()
        assert {"n", "mean", "low", "high", "median", *tested} <= set(header.split(","))
        assert rows
    assert (ended.folder / "experiment.toml").read_text() == (READY / f"{paper}.toml").read_text()


def check_report(ended: Run) -> None:
    page = open_page(ended.folder / "report.html")
    assert page.problems == []
    assert page.title == ended.summary["title"]
    figures = sum(len(own["figures"]) for own in ended.summary["steps"].values())
    assert page.n_images > figures
    assert ended.summary["question"] in page.text


def test_it_runs_to_the_end_on_a_toy(ended: tuple[str, Run]) -> None:
    paper, its_run = ended
    assert its_run.summary["read"] == 4
    check_run(paper, its_run)


@needs_browser
def test_a_browser_shows_its_report(ended: tuple[str, Run]) -> None:
    check_report(ended[1])


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_it_runs_as_it_is(paper: str, tmp_path: Path, unchecked: None) -> None:
    whole = run(paper, tmp_path / paper)
    assert whole.summary["read"] == Experiment.load(paper).samples["shapes"]
    check_run(paper, whole)
    if find_browser():
        check_report(whole)


def test_each_paper_has_its_own_file_with_a_title_and_a_question() -> None:
    assert ready_names() == PAPERS == tuple(FORMATS)
    for paper in PAPERS:
        found = Experiment.load(paper)
        assert re.search(r" 20\d\d", found.title)
        assert re.fullmatch(r"[A-Z][^?.]*\?", found.question)


def arguments(paper: str, model: str) -> dict[str, dict[str, Any]]:
    return {step.name: dict(step.arguments) for step in Experiment.load(paper).on(model=model).steps}


def test_on_another_model_the_arguments_are_the_papers() -> None:
    palit = arguments("palit", "Salesforce/blip-vqa-base")
    as_in_figures = {"corruption": Scaled(0.7691), "sites": ["resid"], "scored": "own"}
    assert palit == {"scaled": as_in_figures, "noise": {**as_in_figures, "corruption": AdditiveGaussian(3.0, 10)}}

    asked = {"prompt": "{question} Answer in a few words."}
    assert arguments("basu", "llava-hf/llava-1.5-7b-hf") == {
        "constraint": {"span": "constraint", "by": "Paris", "widths": [1, 3, 6], **asked}
    }
    assert arguments("notice", "Salesforce/blip-vqa-base") == {
        f"{what}_{pair}": {"corruption": pair} for what in ("modules", "heads") for pair in ("sip", "str")
    }
    asked = {"prompt": "{question} \nAnswer the question using a single word or phrase."}
    zhang = Experiment.load("zhang").on(model="llava-hf/llava-1.5-13b-hf")
    assert zhang.keep_correct == asked
    flow, answer = (dict(step.arguments) for step in zhang.steps)
    assert tuple(map(tuple, flow.pop("edges"))) == EDGES
    assert flow == {"width": 9, **asked}
    assert answer == {"norm": False, **asked}

    neo = arguments("neo", "llava-hf/llava-1.5-7b-hf")["visual_tokens"]
    assert repr(neo.pop("conditions")) == repr(paper_conditions())
    assert neo == {"replace_by": "mean", "evaluate": ["caption", "poll", "vqa"]}


def test_on_a_toy_they_are_the_toys() -> None:
    given = {paper: {step.name: step.arguments for step in Experiment.load(paper).steps} for paper in PAPERS}
    assert given["palit"]["scaled"]["corruption"] == Scaled(0.5)
    assert given["palit"]["noise"]["corruption"] == AdditiveGaussian(draws=3)
    assert given["basu"]["constraint"]["widths"] == [1, 2]
    assert given["zhang"]["flow"]["width"] == 1
    assert Experiment.load("zhang").keep_correct == {"prompt": "{question}"}
    assert given["notice"]["heads_sip"]["positions"] == "subject"
    assert given["neo"]["visual_tokens"]["conditions"] == {
        "object": ObjectTokens(),
        "object +1": ObjectTokens(dilate=1),
        "all but the object": OtherTokens(),
        "random 9": RandomTokens(9),
    }


def test_only_notice_and_zhang_keep_what_the_model_answers_rightly() -> None:
    assert [paper for paper in PAPERS if Experiment.load(paper).keep_correct is not None] == ["notice", "zhang"]


LINES = re.compile(r"^#   (model = .*)\n#   (samples = .*)$", re.MULTILINE)
"""What a ready file says its two lines may be changed to."""

CHANGES = [(paper, *lines) for paper in PAPERS for lines in LINES.findall((READY / f"{paper}.toml").read_text("utf-8"))]


def with_lines(paper: str, model: str, samples: str) -> str:
    """A ready file's text, with those two lines in the place of its own."""
    text = (READY / f"{paper}.toml").read_text(encoding="utf-8")
    for name, line in (("model", model), ("samples", samples)):
        text, count = re.subn(rf"^{name} = .*$", lambda _, line=line: line, text, flags=re.MULTILINE)
        assert count == 1
    return text


@pytest.mark.parametrize(("paper", "model", "samples"), CHANGES, ids=[f"{one[0]} {one[1]}" for one in CHANGES])
def test_two_lines_make_it_the_published_experiment(paper: str, model: str, samples: str) -> None:
    found = Experiment.parse(with_lines(paper, model, samples))
    name = found.model["name"]
    assert "/" in name
    assert found.samples["format"] == FORMATS[paper]
    assert FORMATS[paper] in READERS
    same = Experiment.load(paper).on(model=name)
    assert [repr(step.arguments) for step in found.steps] == [repr(step.arguments) for step in same.steps]
    assert found.keep_correct == same.keep_correct
    assert tomllib.loads(model)["model"] == found.model


def test_every_paper_says_its_two_lines() -> None:
    assert {paper for paper, _, _ in CHANGES} == set(PAPERS)


@pytest.mark.reference_data
@pytest.mark.parametrize(("paper", "n"), [("palit", 200), ("zhang", 40)])
def test_the_published_files_are_read(paper: str, n: int, reference_data: Path) -> None:
    (model, samples), *_ = (lines for own, *lines in CHANGES if own == paper)
    # Of the longer files there are the first rows alone.
    text = with_lines(paper, model, samples.replace("ChooseAttr.csv", "ChooseAttr.head40.csv"))
    found = Experiment.parse(text, base=reference_data / paper).read_samples()
    assert len(found) + len(found.dropped) == n
    assert len(found) >= n - 1

"""The file of an experiment: what it says, and every way in which it may be wrong."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hooked_vlm import toys
from hooked_vlm.cli import app
from hooked_vlm.corruptions import AdditiveGaussian
from hooked_vlm.data import shapes, write_manifest
from hooked_vlm.experiments.parts.heads import Head
from hooked_vlm.runs import Experiment, ExperimentError, Method, ready_names
from hooked_vlm.runs.experiment import READY, Statistics, tomllib

FILE = """
title = "Flow"
question = "Where to?"
model = "toy-llava"
samples = { shapes = 3, seed = 7 }

[methods.flow]
use = "information_flow"
width = 3
prompt = "In a word: {question}"
toy = { width = 1 }

[methods.answer_by_layer]
"""


def tables(**changes: Any) -> dict[str, Any]:
    """Those of the file, with others in their place; None: without."""
    return {name: value for name, value in {**tomllib.loads(FILE), **changes}.items() if value is not None}


def flow(**options: Any) -> dict[str, Any]:
    return tables(methods={"flow": {"use": "information_flow", **options}})


def trace(corruption: Any) -> dict[str, Any]:
    return tables(methods={"causal_trace": {"corruption": corruption}})


def test_what_a_file_says() -> None:
    found = Experiment.parse(FILE)
    assert (found.title, found.question, found.text) == ("Flow", "Where to?", FILE)
    assert found.model == {"name": "toy-llava"}
    assert found.samples == {"shapes": 3, "seed": 7}
    assert found.keep_correct is None
    assert found.statistics == Statistics(level=0.95, resamples=1000, permutations=1000, seed=0)
    first, second = found.steps
    assert (first.name, first.use) == ("flow", "information_flow")
    assert first.arguments == first.given == {"width": 1, "prompt": "In a word: {question}"}
    assert (second.name, second.use, second.arguments) == ("answer_by_layer", "answer_by_layer", {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (tables(titel="x"), "an experiment has no 'titel'; it has title, question, model.*did you mean 'title'?"),
        (tables(title=3), "title is text, not 3"),
        (tables(model=None), "an experiment needs model"),
        (tables(samples=None), "an experiment needs samples"),
        (tables(methods=None), "an experiment needs methods"),
        (tables(methods={}), "an experiment needs methods"),
        (tables(model=3), r"\[model\] is a table, not 3"),
        (tables(model={"nmae": "x"}), r"\[model\] has no 'nmae'; it has name, .*did you mean 'name'?"),
        (tables(model={"dtype": "float32"}), r"\[model\] needs name"),
        (tables(model={"name": 3}), r"\[model\]: name = 3 does not fit: Input should be a valid string"),
        (tables(model={"name": "x", "dtype": "float64"}), "dtype = 'float64' does not fit: .*'bfloat16' or 'float16'"),
        (tables(samples="x.csv"), r"\[samples\] is a table, not 'x.csv'"),
        (tables(samples={"seed": 3}), "either file = a path, or shapes = how many"),
        (tables(samples={"file": "x.csv", "shapes": 3}), "either file = a path, or shapes = how many"),
        (tables(samples={"shapes": "many"}), r"\[samples\]: n = 'many' does not fit: Input should be a valid integer"),
        (tables(samples={"shapes": 0}), "at least one question about shapes, not 0"),
        (tables(samples={"shapes": 3, "sede": 1}), r"\[samples\] has no 'sede'.*did you mean 'seed'?"),
        (tables(samples={"shapes": 3, "seed": -1}), r"\[samples\]: seed and index must not be negative"),
        (tables(samples={"shapes": 3, "kinds": ["colour"]}), r"\[samples\]: kinds must be some of"),
        (tables(samples={"file": 3}), r"\[samples\]: file = 3 does not fit"),
        (tables(samples={"file": "x", "format": ["a"]}), r"\[samples\]: format = \['a'\] does not fit"),
        (tables(samples={"file": "x", "format": "zang"}), "no format is called 'zang'; .*did you mean 'zhang'?"),
        (tables(samples={"file": "x", "imags": "y"}), r"\[samples\] has no 'imags'.*did you mean 'images'?"),
        (tables(samples={"file": "x", "instances": "y"}), r"\[samples\] has no 'instances'; it has images, on_bad_row"),
        (tables(samples={"file": "x", "limit": "all"}), r"\[samples\]: limit = 'all' does not fit"),
        (tables(keep_correct=3), r"\[keep_correct\] is a table, not 3"),
        (tables(keep_correct={"promt": "x"}), r"\[keep_correct\] has no 'promt'.*did you mean 'prompt'?"),
        (tables(keep_correct={"toy": {"promt": "x"}}), r"\[keep_correct\] has no 'promt'"),
        (tables(keep_correct={"batch_size": 8}), r"\[keep_correct\] has no 'batch_size'"),
        (tables(keep_correct={"match": "nearly"}), r"\[keep_correct\]: match = 'nearly' does not fit"),
        (tables(methods="flow"), r"\[methods\] is a table, not 'flow'"),
        (tables(methods={"flow": 3}), r"\[methods.flow\] is a table, not 3"),
        (tables(methods={"flow": {}}), "no method is called 'flow'; there are causal_trace, notice, .*or say 'package"),
        (flow(use="information_flwo"), "no method is called 'information_flwo'.*did you mean 'information_flow'?"),
        (flow(use=3), r"\[methods.flow\]: use is a method's name, not 3"),
        (flow(widht=3), r"\[methods.flow\] has no 'widht'; it has edges, width, .*did you mean 'width'?"),
        (flow(progress=True), r"\[methods.flow\] has no 'progress'"),
        (flow(width="wide"), r"\[methods.flow\]: width = 'wide' does not fit: Input should be a valid integer"),
        (flow(edges=[["question"]]), r"\[methods.flow\]: edges = \[\['question'\]\] does not fit"),
        (flow(toy={"widht": 3}), r"\[methods.flow\] has no 'widht'"),
        (flow(toy=3), r"\[methods.flow\], toy is a table, not 3"),
        (tables(methods={"causal_trace": {}}), r"\[methods.causal_trace\] needs corruption"),
        (trace({"kind": "Scald"}), r"\[methods.causal_trace\], corruption: no kind is called 'Scald'; .*'Scaled'?"),
        (trace({"kind": ["Scaled"]}), r"no kind is called \['Scaled'\]"),
        (trace({"kind": "Scaled", "facto": 1}), "corruption, Scaled has no 'facto'; .*did you mean 'factor'?"),
        (trace({"kind": "Scaled", "factor": "x"}), "corruption, Scaled: factor = 'x' does not fit"),
        (trace({"kind": "ReplaceTokens"}), "corruption, ReplaceTokens needs "),
        (trace("sipp"), "corruption = 'sipp' does not fit"),
        (
            tables(methods={"visual_tokens": {"conditions": {"it": {"kind": "ObjectToken"}}}}),
            r"\[methods.visual_tokens\], conditions, it: no kind is called 'ObjectToken'",
        ),
        (tables(statistics=3), r"\[statistics\] is a table, not 3"),
        (tables(statistics={"levle": 0.9}), r"\[statistics\] has no 'levle'.*did you mean 'level'?"),
        (tables(statistics={"permutations": "many"}), r"\[statistics\]: permutations = 'many' does not fit"),
        (tables(statistics={"level": 95}), r"\[statistics\]: the level of an interval lies between 0 and 1, not 95"),
        (tables(statistics={"resamples": 0}), r"\[statistics\]: resamples is at least 1, not 0"),
        (tables(statistics={"seed": -1}), r"\[statistics\]: seed is at least 0, not -1"),
        (tables(methods={"../flow": {"use": "information_flow"}}), r"\[methods\] has '../flow': a step's name is that"),
        (
            tables(methods={"keep_correct": {"use": "notice"}}),
            "'keep_correct', .*in the place of the choice of samples",
        ),
        (
            tables(methods={"w": {"use": "window_study"}, "W_peaks": {"use": "notice"}}),
            r"\[methods.W_peaks\] has a result 'W_peaks', .*in the place of a result of \[methods.w\]",
        ),
        (flow(use="nowhere.to_be:found"), "the method 'nowhere.to_be:found' cannot be imported: No module"),
        (flow(use="hooked_vlm.runs:nothing"), "the method 'hooked_vlm.runs:nothing' cannot be imported"),
        (flow(use="hooked_vlm.runs:__all__"), r"the method 'hooked_vlm.runs:__all__' is no function, but \["),
    ],
)
def test_what_is_wrong_is_said(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        Experiment.of(given)


def test_what_only_embedded_models_take_is_looked_at_for_others_too() -> None:
    for name in ("toy-llava", "llava-hf/llava-1.5-7b-hf"):
        for step in ({"width": "wide", "toy": {"width": 1}}, {"width": 1, "toy": {"width": "wide"}}):
            with pytest.raises(ExperimentError, match="width = 'wide'"):
                Experiment.of({**flow(**step), "model": name})


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('model = "toy-llava\n')
    with pytest.raises(ExperimentError, match=r"mine.toml is not TOML: .*line 1"):
        Experiment.load(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text('model = "toy-llava"\n')
    with pytest.raises(ExperimentError, match=r"mine.toml: an experiment needs samples"):
        Experiment.load(tmp_path / "mine.toml")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="no file plait; ready experiments are basu, .*did you mean 'palit'?"):
        Experiment.load("plait")


def test_a_ready_file_is_found_beside_the_folder_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "palit").mkdir()
    assert Experiment.load("palit").text == (READY / "palit.toml").read_text()
    (tmp_path / "palit").rmdir()
    (tmp_path / "palit").write_text(FILE)
    assert Experiment.load("palit").text == FILE, "a file of that name is what was meant"


def same(one: Experiment, other: Experiment) -> bool:
    steps = [
        [(step.name, step.use, repr(sorted(step.arguments.items()))) for step in own.steps] for own in (one, other)
    ]
    return one.tables() == other.tables() and steps[0] == steps[1]


@pytest.mark.parametrize("name", ready_names())
@pytest.mark.parametrize("model", ["toy-llava", "somebody/llava"])
def test_tables_make_it_again(name: str, model: str) -> None:
    found = Experiment.load(name).on(model=model)
    assert same(Experiment.of(found.tables()), found)
    assert same(Experiment.parse(found.text), found)


def test_on_another_model_and_back() -> None:
    toy = Experiment.parse(FILE, base=Path("somewhere"))
    other = toy.on(model={"name": "somebody/llava", "device": "cuda:0"}, samples={"file": "x.jsonl"})
    assert (toy.steps[0].arguments["width"], other.steps[0].arguments["width"]) == (1, 3)
    assert other.base == toy.base
    assert tomllib.loads(other.text)["samples"] == {"file": "x.jsonl"}
    assert same(other.on(model="toy-llava", samples=toy.samples), toy)
    assert other.on(keep_correct=True).keep_correct == {}
    with pytest.raises(ExperimentError, match="has no 'modle'"):
        toy.on(modle="toy-llava")


def test_heads_and_corruptions_may_be_given_as_tables() -> None:
    head = {"tower": "question_encoder", "attention": "cross_attn", "layer": 3, "number": 1}
    found = Experiment.of(
        tables(
            methods={
                "head_function": {"heads": [head]},
                "ablate": {"components": {"one": ["L3.H1"], "two": [head]}},
                "path_patch": {"corruption": {"kind": "AdditiveGaussian", "draws": 2}},
            }
        )
    )
    looks, ablated, patched = (step.arguments for step in found.steps)
    assert looks["heads"] == [Head(**head)]
    assert ablated["components"] == {"one": ["L3.H1"], "two": [Head(**head)]}
    assert patched["corruption"] == AdditiveGaussian(draws=2)


def test_show_prints_the_file_as_it_is() -> None:
    shown = CliRunner().invoke(app, ["run", "notice", "--show"])
    assert (shown.exit_code, shown.output) == (0, (READY / "notice.toml").read_text())


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an experiment's file, its samples and its model, while we are in another."""
    folder = tmp_path / "mine"
    write_manifest(shapes(3, seed=7), folder / "data" / "few.jsonl", pictures=folder / "data" / "pictures")
    shutil.copytree(toys.folder("toy-llava"), folder / "model")
    (folder / "few.toml").write_text(
        'model = { name = "model", dtype = "bfloat16", processor = "model" }\n'
        'samples = { file = "data/few.jsonl", limit = 2 }\n[methods.answer_by_layer]\n'
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_paths_are_relative_to_the_file(elsewhere: Path) -> None:
    found = Experiment.load(elsewhere / "few.toml")
    assert [len(found.read_samples(limit)) for limit in (None, 1, 3)] == [2, 1, 2]
    assert found.read_samples()[0].picture().size == shapes(1, seed=7)[0].picture().size
    model = found.load_model()
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"
    assert found.load_model("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("images", "where"),
    [
        (None, "mine/data/pictures"),
        ("data/pictures", "mine/data/pictures/pictures"),
        ("https://example.org/of", "https://example.org/of/pictures"),
    ],
)
def test_pictures_are_relative_to_it_too(images: str | None, where: str, elsewhere: Path) -> None:
    samples = {"file": "data/few.jsonl", **({} if images is None else {"images": images})}
    one = Experiment.load(elsewhere / "few.toml").on(samples=samples).read_samples(1)[0]
    assert str(one.image).startswith(where if "://" in where else str(elsewhere.parent / where))


def test_annotations_are_relative_to_it_too(elsewhere: Path) -> None:
    samples = {"file": "q.json", "format": "object-tokens", "instances": "i.json"}
    found = Experiment.load(elsewhere / "few.toml").on(samples=samples)
    (elsewhere / "q.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{elsewhere}/i.json"):
        found.read_samples()


def test_shapes_are_as_many_as_are_wanted() -> None:
    found = Experiment.parse(FILE)
    assert [len(found.read_samples(limit)) for limit in (None, 2, 9)] == [3, 2, 3]
    assert [one.id for one in found.read_samples()] == [one.id for one in shapes(3, seed=7)]


def own_method(model: Any, samples: Any, times: int, *, progress: bool = False) -> None:
    """For the tests below."""


OWN = Method(own_method, quantity="found")


def test_a_method_of_ones_own() -> None:
    step = Experiment.of(flow(use=f"{__name__}:own_method", times=3)).steps[0]
    assert (step.method.call, step.method.quantity, step.arguments) == (own_method, None, {"times": 3})
    assert Experiment.of(flow(use=f"{__name__}:OWN", times=3)).steps[0].method is OWN
    with pytest.raises(ExperimentError, match=r"\[methods.flow\] needs times"):
        Experiment.of(flow(use=f"{__name__}:own_method"))
    with pytest.raises(ExperimentError, match=r"\[methods.flow\]: times = 'x' does not fit"):
        Experiment.of(flow(use=f"{__name__}:own_method", times="x"))
    with pytest.raises(ExperimentError, match=r"\[methods.flow\] has no 'time'.*did you mean 'times'?"):
        Experiment.of(flow(use=f"{__name__}:own_method", time=3))


def test_it_may_lie_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lying_here.py").write_text("def mine(model, samples): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    assert Experiment.of(flow(use="lying_here:mine")).steps[0].method.call.__module__ == "lying_here"
    monkeypatch.delitem(sys.modules, "lying_here")

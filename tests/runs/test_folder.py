"""The folder of a run: what it is of, when it may be gone on with, and what is said when it may not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hooked_vlm import HookedVLM, toys
from hooked_vlm.data import Sample, Samples, shapes, write_manifest
from hooked_vlm.runs import Experiment, ResumeError
from hooked_vlm.runs.folder import Folder, Identity, digest_of
from tests.runs.disturbed import tables

Tables = dict[str, Any]
Change = Callable[[Tables], None]


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture
def identity(model: HookedVLM) -> Callable[..., Identity]:
    def of(given: Tables, samples: Samples | None = None, base: Path = Path(), memory: int = 1) -> Identity:
        experiment = Experiment.of(given, base=base)
        return Identity.of(experiment, model, experiment.read_samples() if samples is None else samples, memory)

    return of


def two_steps() -> Tables:
    """A step that looks at each sample alone, and one whose samples all depend on each other."""
    given = tables(samples=3)
    given["methods"]["means"] = {"use": "ablate", "components": ["answer_decoder.L0.attn.H0"], "how": "mean"}
    return given


# Going on with a run --------------------------------------------------------------------------------------------------


def changed(identity: Any, change: Change, known: Tables | None = None) -> str:
    """Why a run cannot be gone on with whose file has changed so; it is as it was, then."""
    known = known or two_steps()
    new = json.loads(json.dumps(known))
    change(new)
    folder, told = Folder(Path("run")), ""
    folder.begin(identity(known), Experiment.of(known), resume=False)
    before = (folder.path / "run.json").read_bytes()
    try:
        folder.begin(identity(new), Experiment.of(new), resume=True)
    except ResumeError as error:
        told = str(error)
    assert ((folder.path / "run.json").read_bytes() == before) == bool(told)
    shutil.rmtree(folder.path)
    return told.removeprefix("run holds another run, which cannot be resumed: ")


def setting(*path: str, value: Any) -> Change:
    def change(given: Tables) -> None:
        for name in path[:-1]:
            given = given[name]
        given[path[-1]] = value

    return change


def gone(*path: str) -> Change:
    def change(given: Tables) -> None:
        for name in path[:-1]:
            given = given[name]
        del given[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (setting("methods", "numbers", "scale", value=2.0), "methods.numbers.scale was not given, and is 2.0"),
        (setting("methods", "means", "how", value="zero"), "methods.means.how was 'mean', and is 'zero'"),
        (
            setting("methods", "means", "components", value=["answer_decoder.L0.mlp"]),
            "methods.means.components was ['answer_decoder.L0.attn.H0'], and is ['answer_decoder.L0.mlp']",
        ),
        (gone("methods", "numbers"), "it has the step numbers, which is given no more"),
        (setting("methods", "answer_by_layer", value={}), "the step answer_by_layer is new"),
        (
            setting("methods", "numbers", value={"use": "answer_by_layer"}),
            "methods.numbers.use was 'tests.runs.disturbed:NUMBERS', and is 'answer_by_layer'; "
            "methods.numbers.log was '', and is not given",
        ),
        (
            setting("model", value="toy-llava"),
            "model.name was 'toy-blip-vqa', and is 'toy-llava'",
        ),
        (
            setting("model", value={"name": "toy-blip-vqa", "dtype": "bfloat16"}),
            "model.dtype was not given, and is 'bfloat16'",
        ),
        (
            setting("model", value={"name": "toy-blip-vqa", "device_map": "auto"}),
            "model.device_map was not given, and is 'auto'",
        ),
        (setting("keep_correct", value=True), "keep_correct was False, and is {}"),
        (setting("keep_correct", value={"match": "contains"}), "keep_correct was False, and is not given; "),
        (
            setting("samples", "seed", value=6),
            "samples.seed was 5, and is 6",
        ),
        (
            setting("samples", "shapes", value=2),
            "it has 3 samples, and now 2 are given (a larger --limit, or none, goes on with it)",
        ),
        (
            setting("samples", "shapes", value=4),
            "it has 3 samples, and now 4 are given: what means finds of a sample depends on all the others",
        ),
        (setting("title", value="another"), ""),
        (setting("question", value="another"), ""),
        (setting("statistics", value={"seed": 1, "resamples": 5, "level": 0.9}), ""),
        (setting("model", value={"name": "toy-blip-vqa", "device": "cpu"}), ""),
    ],
)
def test_a_changed_experiment_is_refused_and_what_changed_is_named(
    change: Change, told: str, identity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = changed(identity, change)
    assert found.startswith(told)
    assert bool(found) == bool(told)


@pytest.mark.parametrize(
    ("use", "given", "depends"),
    [
        ("visual_tokens", {"replace_by": "mean"}, True),
        ("visual_tokens", {}, True),
        ("visual_tokens", {"replace_by": "zero"}, False),
        ("ablate", {"components": ["language_model.L0.mlp"], "how": "resample"}, True),
        ("ablate", {"components": ["language_model.L0.mlp"], "how": "zero"}, False),
        ("head_function", {}, False),
        ("answer_by_layer", {}, False),
    ],
)
def test_more_samples_are_taken_where_none_depends_on_others(
    use: str, given: Tables, depends: bool, identity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {**tables(samples=2), "model": "toy-llava", "methods": {"mine": {"use": use, **given}}}
    told = changed(identity, setting("samples", "shapes", value=3), known)
    assert told == (
        "it has 2 samples, and now 3 are given: what mine finds of a sample depends on all the others"
        if depends
        else ""
    )


def manifest(folder: Path, samples: list[Sample] | Samples) -> Tables:
    folder.mkdir(exist_ok=True)
    write_manifest(samples, folder / "samples.jsonl", pictures="pictures")
    return {**tables(), "samples": {"file": "samples.jsonl"}}


def test_changed_samples_are_refused(identity: Any, tmp_path: Path) -> None:
    """Their facts, their order, the places of their pictures; wherever the experiment lies, and whoever looks."""
    listed = list(shapes(4, seed=5, kinds=("color",)))
    given = manifest(tmp_path / "a", listed)
    folder = Folder(tmp_path / "run")
    folder.begin(identity(given, base=tmp_path / "a"), Experiment.of(given), resume=False)

    def told(samples: list[Sample], place: str) -> str:
        new = manifest(tmp_path / place, samples)
        try:
            folder.begin(identity(new, base=tmp_path / place), Experiment.of(new), resume=True)
        except ResumeError as error:
            return str(error).partition("resumed: ")[2]
        return ""

    assert told(listed, "b") == ""
    assert told([*listed[:2], replace(listed[2], question="what is it ?", spans={}), listed[3]], "c") == (
        "1 of its samples changed, the first of them number 2"
    )
    assert told(listed[::-1], "d") == "4 of its samples changed, the first of them number 0"
    assert told([listed[0], replace(listed[1], image=listed[2].image), *listed[2:]], "e") == ""
    assert told([replace(listed[0], id="another"), *listed[1:]], "f").startswith("1 of its samples")
    assert told(listed[:3], "g").startswith("it has 4 samples, and now 3 are given")


def test_a_samples_digest_is_of_all_that_methods_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((4, 4), bool)
    one = Sample(
        "a", "pictures/a.png", "what color is it ?", "red", "blue", spans={"color": (5, 10)}, regions={"it": mask}
    )
    other = mask.copy()
    other[1, 1] = True
    changes: list[Tables] = [
        {"id": "b"},
        {"image": "pictures/b.png"},
        {"image": "https://somewhere/a.png"},
        {"image_cf": "pictures/a.png"},
        {"question": "what colour is it?"},
        {"question_cf": "what shape is it ?"},
        {"answer": None},
        {"foil": "green"},
        {"group": "color"},
        {"spans": {"color": (5, 9)}},
        {"regions": {"it": other}},
        {"regions": {"it": (0, 0, 4, 4)}},
        {"meta": {"object": "it"}},
    ]
    digests = {digest_of(one), *(digest_of(replace(one, **change)) for change in changes)}
    assert len(digests) == 1 + len(changes)
    assert digest_of(replace(one, meta={"anything": object()})) == digest_of(one)
    # The same picture, from wherever the experiment is begun.
    monkeypatch.chdir(tmp_path)
    here = digest_of(replace(one, image="files/pictures/a.png"), Path("files"))
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path / "files")
    assert digest_of(one, Path()) == digest_of(
        replace(one, image=tmp_path / "files/pictures/a.png"), tmp_path / "files"
    )
    assert digest_of(one, Path()) == here
    assert digest_of(replace(one, image="/elsewhere/a.png"), Path()) == digest_of(
        replace(one, image="/elsewhere/a.png"), tmp_path
    )


def test_changed_weights_are_refused(identity: Any, tmp_path: Path) -> None:
    shutil.copytree(toys.folder("toy-blip-vqa"), tmp_path / "mine")
    given = {**tables(samples=2), "model": "mine"}
    folder, experiment = Folder(tmp_path / "run"), Experiment.of(given, base=tmp_path)
    folder.begin(identity(given, base=tmp_path), experiment, resume=False)
    (tmp_path / "mine" / "notes.md").write_text("nothing to the numbers")
    folder.begin(identity(given, base=tmp_path), experiment, resume=True)
    weights = tmp_path / "mine" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ResumeError, match="cannot be resumed: the model's file model.safetensors changed$"):
        folder.begin(identity(given, base=tmp_path), experiment, resume=True)


def test_a_run_goes_on_as_it_was_begun_and_says_what_is_said_now(identity: Any, tmp_path: Path) -> None:
    """Rounding as before, whatever this machine would do by itself; titles and the like, and more samples, as given."""
    folder, given = Folder(tmp_path / "run"), tables(samples=2)
    begun = folder.begin(identity(given, memory=7), Experiment.of(given), resume=True)
    new = {**tables(samples=3), "title": "another"}
    known = folder.begin(replace(identity(new, memory=9), threads=99), Experiment.of(new), resume=True)
    assert (known.memory, known.threads, known.created) == (7, begun.threads, begun.created)
    assert (known.experiment["title"], len(known.samples)) == ("another", 3)
    assert folder.identity() == known
    assert (folder.path / "experiment.toml").read_text() == Experiment.of(new).text


# Damaged, and not a run's ---------------------------------------------------------------------------------------------


def test_a_damaged_identity_is_an_error_that_says_so(identity: Any, tmp_path: Path) -> None:
    """Whatever byte has changed: nothing is gone on with under other settings."""
    folder, given = Folder(tmp_path / "run"), tables(samples=2)
    known = folder.begin(identity(given), Experiment.of(given), resume=False)
    path = folder.path / "run.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
        try:
            assert folder.identity() == known  # a space became another
        except ResumeError as error:
            told = str(error)
            assert "run.json" in told
    for data in (b"", b"[]", b"3", b'"text"', b"{}", b"\xff\xfe", whole[:-2], whole + b"}"):
        path.write_bytes(data)
        for check in (folder.identity, lambda: folder.check(resume=True)):
            with pytest.raises(ResumeError, match="run.json is damaged .*: put back what it was, or choose another"):
                check()
    path.write_text(json.dumps({**json.loads(whole), "threads": 99}))
    with pytest.raises(ResumeError, match="run.json is not what was written"):
        folder.identity()
    path.write_text(json.dumps({**json.loads(whole), "format": 2}))
    with pytest.raises(ResumeError, match="was written by another version of hooked-vlm, and cannot be resumed"):
        folder.identity()


def test_damaged_notes_of_sessions_are_begun_anew(model: HookedVLM, tmp_path: Path) -> None:
    folder, told = Folder(tmp_path), list[str]()
    for _ in range(2):
        folder.add_session(model, 1, told.append)
    assert len(folder.read("environment.json")) == 2
    assert told == []
    for data in (b"", b"[{", b"\xff", b"3"):
        (tmp_path / "environment.json").write_bytes(data)
        folder.add_session(model, 1, told.append)
        assert [session["device"] for session in folder.read("environment.json")] == ["cpu"]
    assert [one.partition(" (")[0] for one in told] == [f"{tmp_path / 'environment.json'} is damaged"] * 4


def test_a_folder_with_other_things_is_left_alone(identity: Any, tmp_path: Path) -> None:
    given = tables(samples=1)
    experiment, new = Experiment.of(given), identity(given)
    (tmp_path / "file").touch()
    (tmp_path / "full" / "notes").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(ResumeError, match="file is a file; a run has a folder of its own"):
            Folder(tmp_path / "file").check(resume=resume)
        with pytest.raises(ResumeError, match="full is not empty, and holds no run"):
            Folder(tmp_path / "full").begin(new, experiment, resume=resume)
    assert [path.name for path in (tmp_path / "full").iterdir() if path.name != ".lock"] == ["notes"]


def test_what_a_process_left_that_was_killed_as_it_began_is_no_hindrance(identity: Any, tmp_path: Path) -> None:
    given, folder = tables(samples=1), Folder(tmp_path)
    for name in (".lock", ".run-abcd_123.json", ".experiment-12345678.toml"):
        (tmp_path / name).touch()
    folder.begin(identity(given), Experiment.of(given), resume=False)
    folder.tidy()
    assert sorted(os.listdir(tmp_path)) == [".lock", "experiment.toml", "run.json"]
    with pytest.raises(ResumeError, match="holds a run already: go on with it"):
        folder.check(resume=False)


def test_what_is_written_can_be_read_whatever_the_letters(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    said = {"id": "half a pair: \ud83d, é 🟥 \0 </script>", "path": Path("a")}
    folder.write("said.json", said)
    assert folder.read("said.json") == {**said, "path": "a"}
    assert "é 🟥".encode() in (tmp_path / "said.json").read_bytes()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "more").write_bytes(b"x" * 1000)
    (tmp_path / "deep" / "gone").symlink_to("nowhere")
    assert 0 <= folder.bytes_on_disk - 1000 - (tmp_path / "said.json").stat().st_size < 20

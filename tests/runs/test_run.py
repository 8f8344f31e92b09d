"""Whole runs: the numbers of bare calls, whatever has gone wrong on the way, and an account of every sample."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.data import Samples, keep_correct, shapes, write_manifest
from hooked_vlm.runs import Experiment, ResumeError, Run, run
from hooked_vlm.runs.folder import Identity
from hooked_vlm.runs.run import as_begun
from hooked_vlm.sweep import batches
from tests.runs.disturbed import a_model, tables, turns, values_of

LLAVA = {
    "ablate": {"components": ["language_model.L1.attn.H0", "language_model.L2.mlp"], "how": "mean", "by": "global"},
    "visual_tokens": {"replace_by": "mean", "conditions": {"all": {"kind": "AllTokens"}}},
    "answer_by_layer": {},
}

runner = sys.modules["hooked_vlm.runs.run"]  # beside which the package has a function of that name


@pytest.fixture(autouse=True)
def quick(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are loaded once, and nothing here is about signatures, figures or the disk."""
    monkeypatch.setattr(Experiment, "load_model", lambda self, device=None: a_model(self.model["name"]))
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("hooked_vlm.runs.made._figures", lambda *_: [])


def carried_out(given: dict[str, Any], out: Path, base: Path = Path(), **options: Any) -> Run:
    return run(Experiment.of(given, base=base), out, **options)


def written_at(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*.record"))}


# The numbers of bare calls --------------------------------------------------------------------------------------------


def test_numbers_are_those_of_bare_calls(tmp_path: Path) -> None:
    """Of methods that make a mean of all samples first, too; of those that the model answers rightly; gone on with."""
    model = a_model("toy-llava")
    listed = [replace(one, image=None if place == 4 else one.image) for place, one in enumerate(shapes(5, seed=5))]
    listed[1] = replace(listed[1], answer="purple")
    given = manifest(tmp_path, listed) | {"model": "toy-llava", "keep_correct": True, "methods": LLAVA}
    first = carried_out(given, tmp_path / "run", tmp_path)
    experiment = Experiment.of(given, base=tmp_path)
    bare = keep_correct(model, experiment.read_samples())
    assert [one.id for one in bare.dropped] == [listed[1].id, listed[4].id]
    said = json.loads((tmp_path / "run" / "samples.json").read_text())
    generated = {one.id: one.meta["generated"] for one in bare}
    assert {one["id"]: one["generated"] for one in said if "generated" in one} == generated
    for step in experiment.steps:
        expected = step.method.call(model, bare, **step.arguments)
        assert first.results[step.name].identical(expected)
    shared = tmp_path / "run" / "records" / "ablate" / "shared" / "means.safetensors"
    shared.write_bytes(shared.read_bytes()[:-1])
    told: list[str] = []
    values, before = values_of(tmp_path / "run"), written_at(tmp_path / "run")
    again = carried_out(given, tmp_path / "run", tmp_path, resume=True, told=told.append)
    assert told == [f"{shared} is not what was written; it is made again"]
    assert (values_of(tmp_path / "run"), written_at(tmp_path / "run")) == (values, before)
    assert all(again.results[name].identical(result) for name, result in first.results.items())
    # Of these, a mean of others would be another.
    assert first.counts == dict.fromkeys(LLAVA, (3, 2, 0))


def manifest(folder: Path, samples: Any) -> dict[str, Any]:
    write_manifest(samples, folder / "samples.jsonl", pictures="pictures")
    return {**tables(), "samples": {"file": "samples.jsonl"}}


def test_a_run_computes_as_it_was_begun() -> None:
    """On as many threads, in chunks as large, whatever this machine would take by itself."""
    threads = torch.get_num_threads()
    with as_begun(Identity({}, [], {}, threads=threads + 1, memory=12345)):
        assert (torch.get_num_threads(), batches._BUDGET.get()) == (threads + 1, 12345)
    assert (torch.get_num_threads(), batches._BUDGET.get()) == (threads, None)


# What becomes of samples ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples: pictures cut off in the middle, one that is missing, one that is a text, two that are whole."""
    folder = tmp_path_factory.mktemp("broken")
    listed = shapes(6, seed=5, kinds=("color",))
    write_manifest(listed, folder / "samples.jsonl", pictures="pictures")
    pictures = sorted((folder / "pictures").glob("*color.png"))
    for place, ending in ((0, ".png"), (2, ".jpg")):
        listed[place].picture().save(folder / f"half{ending}")
        data = (folder / f"half{ending}").read_bytes()
        pictures[place].write_bytes(data[: len(data) // 2])
    pictures[3].unlink()
    pictures[5].write_text("no picture")
    return folder


@pytest.mark.parametrize("gate", [False, True])
def test_samples_whose_pictures_cannot_be_read_are_dropped_in_every_step(
    gate: bool, broken: Path, tmp_path: Path
) -> None:
    given = {"model": "toy-llava", "samples": {"file": "samples.jsonl"}, "keep_correct": gate, "methods": LLAVA}
    found = carried_out(given, tmp_path / "run", broken)
    listed = json.loads((tmp_path / "run" / "samples.json").read_text())
    for name, step in found.summary["steps"].items():
        assert (step["used"], step["dropped"], step["failed"]) == (2, 4, 0)
        (reason,) = step["reasons"]
        assert (reason["outcome"], reason["kind"], reason["count"]) == ("dropped", "a picture that cannot be read", 4)
        assert [id for id, _ in reason["examples"]] == [f"shapes-5-{number}-color" for number in (0, 2, 3)]
        assert "damaged" in reason["examples"][0][1]
        assert "does not exist" in reason["examples"][2][1]
        outcomes = [one["outcome"][name] for one in listed]
        assert outcomes == ["dropped", "used", "dropped", "dropped", "used", "dropped"]
    assert found.summary["read"] == 6
    assert [path.name for path in sorted((tmp_path / "run" / "pictures").iterdir())] == ["000001.png", "000004.png"]


def test_a_picture_that_is_mended_is_tried_again(broken: Path, tmp_path: Path) -> None:
    shutil.copytree(broken, tmp_path / "samples")
    given = {**tables(tmp_path / "log"), "samples": {"file": "samples.jsonl"}, "keep_correct": True}
    base, out = tmp_path / "samples", tmp_path / "run"
    assert carried_out(given, out, base).counts == {"numbers": (2, 4, 0)}
    shapes(1, seed=5, kinds=("color",))[0].picture().save(sorted((base / "pictures").glob("*color.png"))[0])
    assert carried_out(given, out, base, resume=True).counts == {"numbers": (2, 4, 0)}
    assert carried_out(given, out, base, resume=True, retry_failed=True).counts == {"numbers": (3, 3, 0)}
    assert len(turns(tmp_path / "log", "begins")) == 3


def test_samples_on_which_others_depend_are_tried_again_with_them(broken: Path, tmp_path: Path) -> None:
    """A mean of all samples is another when a picture comes back."""
    shutil.copytree(broken, tmp_path / "samples")
    base, out = tmp_path / "samples", tmp_path / "run"
    ablate = {"components": ["answer_decoder.L0.mlp"], "how": "mean", "by": "global"}
    given = {**tables(), "samples": {"file": "samples.jsonl"}, "methods": {"ablate": ablate, "answer_by_layer": {}}}
    carried_out(given, out, base)
    shapes(1, seed=5, kinds=("color",))[0].picture().save(sorted((base / "pictures").glob("*color.png"))[0])
    with pytest.raises(
        ResumeError, match=f"depends on all the others, .*: remove {out / 'records' / 'ablate'}, and all"
    ):
        carried_out(given, out, base, resume=True, retry_failed=True)
    shutil.rmtree(out / "records" / "ablate")
    assert carried_out(given, out, base, resume=True, retry_failed=True).counts["ablate"] == (3, 3, 0)
    carried_out(given, tmp_path / "other", base)
    assert values_of(out) == values_of(tmp_path / "other")


def test_every_sample_is_accounted_for(tmp_path: Path) -> None:
    """Rows that never became samples, those that the gate keeps back, and those that the step drops, or fails at."""
    listed = list(shapes(7, seed=5, kinds=("color",)))
    listed[0] = replace(listed[0], answer="purple" if listed[0].answer != "purple" else "red")
    given = manifest(tmp_path, listed)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"id": "no question"}\n')
    odd = {listed[2].id: "dropped", listed[3].id: "failed", listed[4].id: "huge", listed[5].id: "unwritable"}
    given["methods"]["numbers"] |= {"odd": odd, "log": str(tmp_path / "log")}
    given |= {"keep_correct": True, "samples": {"file": "samples.jsonl", "on_bad_row": "skip"}}
    found = carried_out(given, tmp_path / "run", tmp_path)
    assert found.counts == {"numbers": (2, 2, 3)}
    summary = found.summary["steps"]["numbers"]
    kinds = {(one["outcome"], one["kind"]): one["count"] for one in summary["reasons"]}
    assert kinds == {("dropped", "a wrong answer"): 1, ("dropped", "odd samples"): 1, ("failed", "RuntimeError"): 3}
    assert [one["count"] for one in found.summary["not_read"]] == [1]
    assert found.summary["read"] == 7 == sum(found.counts["numbers"])
    outcomes = [one["outcome"]["numbers"] for one in json.loads((tmp_path / "run" / "samples.json").read_text())]
    assert outcomes == ["dropped", "used", "dropped", "failed", "failed", "failed", "used"]
    # Again: only those that failed.
    carried_out(given, tmp_path / "run", tmp_path, resume=True, retry_failed=True)
    assert [turn.sample for turn in turns(tmp_path / "log", "begins")[6:]] == [one.id for one in listed[3:6]]
    assert len((tmp_path / "run" / "summary.json").read_text()) < 100_000


def test_a_gate_that_fails_at_a_sample_is_tried_again_and_moves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**tables(samples=5), "keep_correct": True}
    expected = carried_out(given, tmp_path / "expected")

    def fails(model: HookedVLM, samples: Any, **options: Any) -> Samples:
        if samples[0].id == "shapes-5-1-color":
            raise RuntimeError("no luck")
        return keep_correct(model, samples, **options)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "keep_correct", fails)
        assert carried_out(given, out).counts == {"numbers": (4, 0, 1)}
    before = written_at(out)
    assert carried_out(given, out, resume=True).counts == {"numbers": (4, 0, 1)}
    assert written_at(out) == before
    assert carried_out(given, out, resume=True, retry_failed=True).counts == expected.counts == {"numbers": (5, 0, 0)}
    now = written_at(out)
    changed = [path.relative_to(out).as_posix() for path in now if now[path] != before.get(path)]
    assert changed == ["records/keep_correct/000/000001.record", "records/numbers/000/000001.record"]
    assert values_of(out) == values_of(tmp_path / "expected")


def test_a_run_none_of_whose_samples_can_be_used_ends_in_order(tmp_path: Path) -> None:
    wrong = [replace(one, answer="wrong") for one in shapes(2, seed=5, kinds=("color",))]
    told: list[str] = []
    given = {**manifest(tmp_path, wrong), "keep_correct": {"check_foil": False}}
    found = carried_out(given, tmp_path / "run", tmp_path, told=told.append)
    assert found.counts == {"numbers": (0, 2, 0)}
    assert told == ["numbers was given no samples: 2 dropped (a wrong answer: 2)"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_the_gate_keeps_back_is_counted_where_the_step_can_use_none(tmp_path: Path) -> None:
    wrong, odd = shapes(2, seed=5, kinds=("color",))
    given = manifest(tmp_path, [replace(wrong, answer="wrong"), odd])
    given["methods"]["numbers"]["odd"] = {odd.id: "failed"}
    found = carried_out({**given, "keep_correct": {"check_foil": False}}, tmp_path / "run", tmp_path)
    assert found.counts == {"numbers": (0, 1, 1)}


def test_samples_of_any_name(tmp_path: Path) -> None:
    names = ["a/b", "../../c", "é 🟥", "d" * 5000, "-e", ".f", "g\nh"]
    listed = [replace(one, id=name) for one, name in zip(shapes(7, seed=5), names, strict=True)]
    given = manifest(tmp_path, listed)
    found = carried_out(given, tmp_path / "run", tmp_path)
    assert found.results["numbers"].sample.values.tolist() == names
    assert [one["id"] for one in json.loads((tmp_path / "run" / "samples.json").read_text())] == names
    values = values_of(tmp_path / "run")
    carried_out(given, tmp_path / "run", tmp_path, resume=True)
    assert values_of(tmp_path / "run") == values


def test_samples_of_one_name_are_refused_before_anything_begins(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"id": "a", "question": "what ?"}\n' * 2)
    given = {**tables(), "samples": {"file": "samples.jsonl"}, "keep_correct": True}
    with pytest.raises(ValueError, match="there is a sample 'a' already"):
        carried_out(given, tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


# Going on -------------------------------------------------------------------------------------------------------------


def test_more_samples_and_other_statistics(tmp_path: Path) -> None:
    """What a run goes on to is what it would have been from the first, and nothing is done again."""
    log, given = tmp_path / "log", tables(tmp_path / "log", samples=6)
    carried_out(given, tmp_path / "run", limit=2)
    carried_out(given, tmp_path / "run", limit=5, resume=True)
    carried_out({**given, "statistics": {"resamples": 30, "level": 0.9}}, tmp_path / "run", resume=True)
    assert len(turns(log, "begins")) == 6
    carried_out({**given, "statistics": {"resamples": 30, "level": 0.9}}, tmp_path / "other")
    assert values_of(tmp_path / "run") == values_of(tmp_path / "other")
    carried_out(given, tmp_path / "run", resume=True)
    assert values_of(tmp_path / "run") != values_of(tmp_path / "other")
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 4


def test_results_of_fewer_samples_do_not_take_the_place_of_those_of_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another process has gone on meanwhile, and has come to the end before."""
    given, out, step = tables(samples=4), tmp_path / "run", runner.carried_out

    def overtaken(*arguments: Any) -> Any:
        found = step(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(runner, "carried_out", step)
            carried_out(given, out, resume=True)
        return found

    monkeypatch.setattr(runner, "carried_out", overtaken)
    with pytest.raises(
        ResumeError, match="another process has gone on with .*, with more samples; its results are there"
    ):
        carried_out(given, out, limit=2)
    monkeypatch.setattr(runner, "carried_out", step)
    carried_out(given, tmp_path / "other")
    assert values_of(out) == values_of(tmp_path / "other")


def test_damaged_files_are_made_again(tmp_path: Path) -> None:
    out, told, given = tmp_path / "run", list[str](), tables(tmp_path / "log", samples=5)
    carried_out(given, out)
    expected, log = values_of(out), tmp_path / "log"
    for name in ("results/numbers.nc", "tables/numbers.csv", "samples.json", "summary.json", "environment.json"):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[: len(data) // 2])
    (out / "results" / "numbers_largest.nc").unlink()
    (out / "results" / ".numbers-abcd1234.nc").touch()
    record = out / "records" / "numbers" / "000" / "000003.record"
    record.write_bytes(record.read_bytes()[::-1])
    carried_out(given, out, resume=True, told=told.append)
    assert told[0].endswith("what it said of earlier sessions is lost")
    assert told[1:] == [f"{record} is damaged: it is not what was written; shapes-5-3-color is done again"]
    assert values_of(out) == expected
    assert len(turns(log, "begins")) == 6
    assert not (out / "results" / ".numbers-abcd1234.nc").exists()


def test_an_experiment_is_gone_on_with_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its samples lie where its file lies, wherever one is."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    given = manifest(tmp_path / "a", shapes(2, seed=5))
    log = tmp_path / "log"
    given["methods"]["numbers"]["log"] = str(log)
    for place, base in ((tmp_path, "a"), (tmp_path / "a", ""), (tmp_path / "a" / "b", "..")):
        monkeypatch.chdir(place)
        carried_out(given, tmp_path / "run", Path(base), resume=True)
    assert len(turns(log, "begins")) == 2

"""A manifest says everything that a sample does, and what is not a manifest is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from hooked_vlm.data import Sample, SampleError, Samples, shapes
from hooked_vlm.data.manifest import KEYS, mask_of_runs, read_manifest, runs_of_mask, write_manifest
from hooked_vlm.data.readers import read_samples
from hooked_vlm.data.rows import RowError

# The checker of the signatures looks at a random item of a list, also while hypothesis draws.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
FULL: dict[str, Any] = {
    "id": "one",
    "image": "pictures/one.png",
    "question": "Is the dog wet, or dry?",
    "answer": "wet",
    "foil": "dry",
    "image_cf": "https://host/x.png",
    "question_cf": "Is the dog red, or blue?",
    "spans": {"subject": [7, 10], "foil": "dry"},
    "regions": {"object": [1, 2.5, 4, 8], "rest": {"size": [2, 3], "runs": [1, 2, 3]}},
    "group": "texture",
    "meta": {"level": 3, "list": [1, "a"]},
}

words = st.text("aB9 ,;'\"\\/{}[]-\t\n\r\u2028é\U0001f431", min_size=1, max_size=8)
jsonable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
masks = arrays.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 4)))
boxes = st.tuples(*[st.integers(0, 9) | st.floats(0, 9)] * 4)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    question = draw(words)
    end = draw(st.integers(1, len(question)))
    maybe = st.none() | words
    return Sample(
        draw(words),
        draw(st.sampled_from([None, "/a/b.png", "hf://datasets/o/n/c.png", "relative/d.png"])),
        question,
        draw(maybe),
        draw(maybe),
        image_cf=draw(st.sampled_from([None, "http://host/e.png"])),
        question_cf=draw(maybe),
        spans=draw(st.dictionaries(words, st.just((draw(st.integers(0, end - 1)), end)), max_size=2)),
        regions=draw(st.dictionaries(words, boxes | masks, max_size=2)),
        group=draw(maybe),
        meta=draw(st.dictionaries(words, jsonable, max_size=2)),
    )


def write(path: Path, *lines: dict[str, Any]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
            writer.writeheader()
            writer.writerows(
                {key: json.dumps(cell) if isinstance(cell, dict) else cell for key, cell in line.items()}
                for line in lines
            )
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assert_same(one: Sample, other: Sample, images: bool = True) -> None:
    names = [key for key in KEYS if key != "regions" and (images or not key.startswith("image"))]
    assert {name: getattr(one, name) for name in names} == {name: getattr(other, name) for name in names}
    assert one.regions.keys() == other.regions.keys()
    for name, region in one.regions.items():
        assert type(other.regions[name]) is type(region)
        assert np.array_equal(other.regions[name], region)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@given(written=st.lists(samples(), max_size=3, min_size=1, unique_by=lambda sample: sample.id))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_as_the_same(suffix: str, written: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / f"samples{suffix}"
    write_manifest(Samples(written), path)
    read = read_manifest(path)
    assert not read.dropped
    for one, other in zip(written, read, strict=True):
        in_full = str(Path("relative/d.png").absolute())
        assert other.image == (in_full if one.image == "relative/d.png" else one.image)
        assert_same(one, other, images=False)


@given(masks)
def test_a_mask_is_its_runs(mask: np.ndarray) -> None:
    written = runs_of_mask(mask)
    assert all(run > 0 for run in written["runs"][1:])
    assert np.array_equal(mask_of_runs(**written), mask)


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.csv", "SAMPLES.CSV"])
def test_every_key_is_read(name: str, tmp_path: Path) -> None:
    if name.isupper():
        write(tmp_path / "samples.csv", FULL).rename(tmp_path / name)
    else:
        write(tmp_path / name, FULL)
    (sample,) = read_samples(tmp_path / name)
    assert (sample.id, sample.image, sample.image_cf) == (
        "one",
        str(tmp_path / "pictures" / "one.png"),
        "https://host/x.png",
    )
    assert (sample.question, sample.question_cf) == (FULL["question"], FULL["question_cf"])
    assert (sample.answer, sample.foil, sample.group, dict(sample.meta)) == ("wet", "dry", "texture", FULL["meta"])
    assert dict(sample.spans) == {"subject": (7, 10), "foil": (19, 22)}
    assert sample.regions["object"] == (1, 2.5, 4, 8)
    assert sample.regions["rest"].tolist() == [[False, True, True], [False, False, False]]
    elsewhere = read_manifest(tmp_path / name, images="hf://datasets/o/n")
    assert elsewhere[0].image == "hf://datasets/o/n/pictures/one.png"


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.csv"])
def test_a_question_is_enough(name: str, tmp_path: Path) -> None:
    (sample,) = read_manifest(write(tmp_path / name, {"question": "What?"}))
    assert_same(sample, Sample("samples:0", None, "What?"))


def test_masks_in_files(tmp_path: Path) -> None:
    mask = np.array([[True, False, False], [False, True, True]])
    np.save(tmp_path / "a.npy", mask)
    Image.fromarray(mask).save(tmp_path / "b.png")
    Image.fromarray(mask.astype(np.uint8) * 7).save(tmp_path / "c.png")
    np.save(tmp_path / "wrong.npy", np.array([0, 2]))
    regions = {"a": "a.npy", "b": "b.png", "c": str(tmp_path / "c.png")}
    (sample,) = read_manifest(write(tmp_path / "m.jsonl", {"question": "What?", "regions": regions}))
    assert all(np.array_equal(region, mask) and region.dtype == bool for region in sample.regions.values())
    for file, said in (
        ("none.png", "does not exist"),
        ("none.npy", "No such file"),
        ("wrong.npy", "not .height width. of true"),
    ):
        with pytest.raises(RowError, match=f"m.jsonl, line 1, column 'regions': the mask .*{file}.*{said}"):
            read_manifest(write(tmp_path / "m.jsonl", {"question": "What?", "regions": {"a": file}}))


@pytest.mark.parametrize(
    ("change", "column", "said"),
    [
        ({"qestion": "What?"}, "qestion", r"no such key; did you mean 'question'"),
        ({"zzz": 1}, "zzz", "no such key; there are id, image, question"),
        ({"question": None}, "question", "None is not text"),
        ({"answer": 3}, "answer", "3 is not text"),
        ({"spans": {"a": "cat"}}, "spans", "'cat' does not occur in 'Is the dog"),
        ({"spans": {"a": [1, 2, 3]}}, "spans", r"\[1, 2, 3\] is neither"),
        ({"spans": [1, 2]}, "spans", "is not an object"),
        ({"regions": {"a": [1, 2, 3]}}, "regions", "is neither a box"),
        ({"regions": {"a": [1, 2, 3, True]}}, "regions", "is neither a box"),
        ({"regions": {"a": {"size": [2, 2], "runs": [1, 2]}}}, "regions", "are 3 pixels long, and its size is"),
        ({"regions": {"a": {"size": [2, 2], "runs": [-1, 5]}}}, "regions", "whole numbers"),
    ],
)
def test_what_is_malformed_is_named(change: dict, column: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", {"question": "fine ?"}, FULL | change)
    with pytest.raises(RowError, match=f"m.jsonl, line 2, column '{column}': .*{said}"):
        read_manifest(path)
    samples = read_manifest(path, on_bad_row="skip")
    assert ([one.id for one in samples], [one.id for one in samples.dropped]) == (["m:0"], ["m.jsonl:2"])


def test_spans_outside_the_question_and_ids_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", FULL, FULL | {"id": "two", "spans": {"a": [5, 99]}}, FULL)
    samples = read_manifest(path, on_bad_row="skip")
    assert [(one.id, one.kind) for one in samples.dropped] == [
        ("m.jsonl:2", "a span outside the question"),
        ("m.jsonl:3", "an id that occurred before"),
    ]


def test_a_table_s_mappings_are_json(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="m.csv, line 2, column 'meta': no JSON: "):
        read_manifest(write(tmp_path / "m.csv", {"question": "What?", "meta": "{a: 1}"}))


def test_pictures_below_the_manifest_are_written_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = {"a": "data/x/a.png", "b": tmp_path / "data" / "b.png", "c": tmp_path / "c.png", "d": "file:///d.png"}
    write_manifest(Samples(Sample(id, source, "?") for id, source in sources.items()), "data/m.jsonl")
    lines = [json.loads(line) for line in Path("data/m.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["x/a.png", "b.png", str(tmp_path / "c.png"), "file:///d.png"]
    assert [one.image for one in read_manifest("data/m.jsonl")][:2] == [
        str(Path("data/x/a.png")),
        str(Path("data/b.png")),
    ]


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
def test_pictures_in_no_file_are_saved_beside_the_manifest(name: str, tmp_path: Path) -> None:
    drawn = shapes(3, seed=0)
    write_manifest(drawn, tmp_path / "new" / name, pictures="pictures")
    read = read_manifest(tmp_path / "new" / name)
    assert sorted(path.name for path in (tmp_path / "new" / "pictures").iterdir()) == [
        f"shapes-0-{index}{cf}.png" for index in range(3) for cf in ("-cf", "")
    ]
    for one, other in zip(drawn, read, strict=True):
        assert_same(one, other, images=False)
        assert one.picture().tobytes() == other.picture().tobytes()
        assert one.picture_cf().tobytes() == other.picture_cf().tobytes()


def test_pictures_of_like_names_do_not_overwrite_each_other(tmp_path: Path) -> None:
    written = Samples([Sample("a/b", PIXELS, "?"), Sample("a:b", 255 - PIXELS, "?"), Sample("a_b", PIXELS // 2, "?")])
    write_manifest(written, tmp_path / "m.jsonl", pictures="p")
    read = read_manifest(tmp_path / "m.jsonl")
    assert [np.asarray(one.picture()).tolist() for one in read] == [one.image.tolist() for one in written]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ([Sample("a", PIXELS, "?")], r"image of a is in no file; give pictures=FOLDER"),
        ([Sample("a", None, "?"), Sample("a", None, "?")], "two samples are called 'a'"),
        ([Sample("a", None, "?", meta={"x": object()})], "a cannot be written as JSON: <object"),
        ([Sample("a", None, "?", meta={"x": float("nan")})], "a cannot be written as JSON: Out of range"),
    ],
)
def test_what_cannot_be_written_leaves_all_as_it_was(written: list[Sample], said: str, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("before")
    with pytest.raises(SampleError, match=said):
        write_manifest(Samples([Sample("first", None, "?"), *written]), tmp_path / "m.jsonl")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.jsonl", "before")]


def test_a_table_cannot_tell_an_empty_answer_from_none(tmp_path: Path) -> None:
    sample = Sample("a", None, "", answer="")
    with pytest.raises(SampleError, match="answer of a is empty, which a table cannot tell from none; write JSONL"):
        write_manifest(Samples([sample]), tmp_path / "m.csv")
    write_manifest(Samples([sample]), tmp_path / "m.jsonl")
    assert_same(read_manifest(tmp_path / "m.jsonl")[0], sample)


def test_what_is_no_manifest(tmp_path: Path) -> None:
    for use in (read_manifest, lambda path: write_manifest(Samples([]), path)):
        with pytest.raises(SampleError, match=r"m.json: a manifest ends in .jsonl or .csv, not in '.json'"):
            use(tmp_path / "m.json")
    with pytest.raises(SampleError, match="say which format it has: clevr, "):
        read_samples(tmp_path / "m.json")
    with pytest.raises(SampleError, match=r"no format is called 'coco_qa'; .*did you mean 'coco-qa'"):
        read_samples(tmp_path / "m.csv", "coco_qa")
    with pytest.raises(SampleError, match="m.csv has no column 'question'; it has 'prompt'"):
        read_samples(write(tmp_path / "m.csv", {"prompt": "What?"}))
    assert len(read_samples(write(tmp_path / "m.csv", {"question": "What?"}), limit=1)) == 1

"""What all readers share: rows are checked, and what is malformed is named, or skipped and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hooked_vlm.data import Sample, SampleError
from hooked_vlm.data.readers.common import box_of, noun_in, opposite, picture, spans_in
from hooked_vlm.data.rows import LeftOutError, Row, RowError, collect, csv_rows, json_rows, jsonl_rows

ROW = Row(
    Path("folder/file.csv"), "7", {"a": " word ", "n": "3", "x": 2.5, "no": "", "dash": "-", "list": [1], "t": True}
)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def as_sample(row: Row) -> Sample:
    return Sample(row.text("id"), None, row.text("question"), meta={"place": row.place})


def test_a_row_gives_what_its_columns_hold() -> None:
    assert (ROW.text("a"), ROW.text("n"), ROW.text("x"), ROW.integer("n"), ROW.number("x")) == (
        "word",
        "3",
        "2.5",
        3,
        2.5,
    )
    assert (ROW.maybe("no"), ROW.maybe("none"), ROW.maybe("dash"), ROW.maybe("dash", ("-",))) == (None, None, "-", None)
    assert (ROW.value("list", list), ROW.one_of("a", ["word"]), ROW.rest("a", "n", "list")) == (
        [1],
        "word",
        {"x": 2.5, "dash": "-", "t": True},
    )
    assert [Row(Path(), "", {"f": text}).flag("f") for text in ("True", "0", "yes", False, 1)] == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("ask", "column", "said"),
    [
        (lambda: ROW.text("answer"), "answer", "there is none; there is 'a', 'n', 'x'"),
        (lambda: ROW.text("no"), "no", "is empty"),
        (lambda: ROW.text("list"), "list", r"\[1\] is not text or a number$"),
        (lambda: ROW.text("t"), "t", "True is not text"),
        (lambda: ROW.integer("x"), "x", "'2.5' is not a whole number"),
        (lambda: ROW.number("a"), "a", "'word' is not a number"),
        (lambda: Row(ROW.path, "7", {"x": "nan"}).number("x"), "x", "'nan' is not a number"),
        (lambda: ROW.flag("n"), "n", "'3' is neither true nor false"),
        (lambda: ROW.one_of("a", ["b", "c"]), "a", "'word' is none of b, c"),
        (lambda: ROW.value("a", dict), "a", "' word ' is not an object"),
    ],
)
def test_what_is_malformed_is_named_by_file_line_and_column(ask: Callable[[], Any], column: str, said: str) -> None:
    with pytest.raises(RowError, match=f"file.csv, line 7, column '{column}': {said}") as caught:
        ask()
    assert (caught.value.place, caught.value.column) == ("7", column)


def test_lines_are_counted_with_those_that_cells_span(tmp_path: Path) -> None:
    """And a byte order mark, Windows' line ends and blank lines change nothing."""
    path = write(tmp_path / "a.csv", '\ufeffid,question\r\n1,"two\r\nlines"\r\n\r\n2,"a ""b"", c"\r\n')
    samples = collect(csv_rows(path, ("id", "question")), as_sample)
    assert [(one.id, one.question, one.meta["place"]) for one in samples] == [
        ("1", "two\r\nlines", "2"),
        ("2", 'a "b", c', "5"),
    ]


CSV = "id,question\n1,what ?\n2,\n3,how ?,more\n1,again ?\n5,why ?\n"
JSONL = '{"id": 1, "question": "what ?"}\n{"id": 2, "question": ""}\n\n[3]\n{"id"\n{"id": 1, "question": "again ?"}\n'
JSON = '{"all": [{"id": 1, "question": "what ?"}, {"id": 2}, 3, {"id": 1, "question": "again ?"}]}'


@pytest.mark.parametrize(
    ("name", "text", "kept", "places", "kinds"),
    [
        (
            "a.csv",
            CSV,
            ["1", "5"],
            ["3", "4", "5"],
            ["an empty 'question'", "a malformed row", "an id that occurred before"],
        ),
        (
            "a.jsonl",
            JSONL,
            ["1"],
            ["2", "4", "5", "6"],
            ["an empty 'question'", "a malformed row", "a malformed row", "an id that occurred before"],
        ),
        (
            "a.json",
            JSON,
            ["1"],
            ["all[1]", "all[2]", "all[3]"],
            ["no 'question'", "a malformed row", "an id that occurred before"],
        ),
    ],
)
def test_malformed_rows_are_an_error_or_skipped_and_counted(
    name: str, text: str, kept: list[str], places: list[str], kinds: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / name, text)
    read = {".csv": csv_rows, ".jsonl": jsonl_rows, ".json": lambda path: json_rows(path, "all")}[path.suffix]
    samples = collect(read(path), as_sample, on_bad_row="skip")
    assert [one.id for one in samples] == kept
    assert [one.id for one in samples.dropped] == [f"{name}:{place}" for place in places]
    assert [one.kind for one in samples.dropped] == kinds
    assert samples.report().startswith(f"{len(places)} dropped (")
    where = places[0] if name == "a.json" else f"line {places[0]}"
    with pytest.raises(RowError, match="question") as caught:
        collect(read(path), as_sample)
    assert str(caught.value).startswith(f"{path}, {where}, column 'question'")


def test_rows_that_the_file_leaves_out_are_never_an_error(tmp_path: Path) -> None:
    def make(row: Row) -> Sample:
        if row.index == 0:
            raise LeftOutError("not this one", "left out")
        return as_sample(row)

    samples = collect(csv_rows(write(tmp_path / "a.csv", "id,question\n1,what ?\n2,how ?\n")), make)
    assert ([one.id for one in samples], samples.report()) == (["2"], "1 dropped (left out: 1)")


def test_the_limit_counts_samples_and_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,question\n1,\n2,what ?\n3,how ?\n4,\n")
    samples = collect(csv_rows(path), as_sample, on_bad_row="skip", limit=2)
    assert ([one.id for one in samples], len(samples.dropped)) == (["2", "3"], 1)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        collect(csv_rows(path), as_sample, limit=0)
    with pytest.raises(ValueError, match="'raise' or 'skip', not 'ignore'"):
        collect(csv_rows(path), as_sample, on_bad_row="ignore")


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (csv_rows, None, "there is no file"),
        (csv_rows, "", "is empty"),
        (csv_rows, "id,question\n", "a header and no rows"),
        (
            csv_rows,
            "id,questions\n1,what ?\n",
            r"no column 'question'; it has 'id', 'questions'; did you mean 'questions'\?",
        ),
        (csv_rows, "id,id\n1,2\n", "more than one column 'id'"),
        (csv_rows, 'id,question\n1,"what\n2,how\n', "near line 4: no table that can be read"),
        (csv_rows, b"id,question\n1,\xff\xfe\n", "no table that can be read: .*utf-8"),
        (jsonl_rows, "\n \n", "is empty"),
        (jsonl_rows, b"\xff\xfe", "no text in UTF-8"),
        (json_rows, "", "is empty"),
        (json_rows, "{\n 1}", "line 2, character 2: no JSON"),
        (json_rows, '"text"', "holds a str, not a list or an object"),
        (json_rows, "[]", "holds no samples"),
        (lambda path: json_rows(path, "all"), '{"any": []}', "has no 'all'; there is 'any'"),
        (lambda path: json_rows(path, "all"), "[1]", "has no 'all'; there is a list"),
    ],
)
def test_files_of_another_form(read, text: str | bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    required = {"required": ("id", "question")} if read is csv_rows and "id,id" not in str(text) else {}
    with pytest.raises(SampleError, match=f"{path}.*{said}|{said}.*{path}"):
        collect(read(path, **required), as_sample)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="is a folder; give the file"):
        list(jsonl_rows(tmp_path))


@pytest.mark.parametrize(
    ("images", "path"),
    [
        (None, str(Path("folder/000042.jpg"))),
        ("pictures", str(Path("pictures/000042.jpg"))),
        (Path("a{b"), str(Path("a{b/000042.jpg"))),
        ("http://host/x/", "http://host/x/000042.jpg"),
        ("hf://datasets/o/n/{id}-{id:03d}.png", "hf://datasets/o/n/42-042.png"),
    ],
)
def test_pictures_are_in_a_folder_at_an_address_or_by_a_template(images: str | Path | None, path: str) -> None:
    assert picture(ROW, images, "{id:06d}.jpg", id=42) == path


def test_a_template_with_other_fields_says_which_there_are() -> None:
    with pytest.raises(
        RowError, match=r"images='\{name\}.jpg' cannot be filled in \('name'\); its fields are \{id\} \(42\)"
    ):
        picture(ROW, "{name}.jpg", "{id}.jpg", id=42)


def test_boxes_that_reach_out_a_little_are_cut_off() -> None:
    assert box_of(ROW, "x", [1, 2, 3, 4.5]) == (1, 2, 4, 6.5)
    assert box_of(ROW, "x", [-1, 0, 12, 7], (10, 5)) == (0, 0, 10, 5)
    for box, said in (
        ([0, 0, 12.5, 5], r"from \(0, 0\) to \(12.5, 5\) reaches out of the picture of 10x5"),
        ([-3, 0, 5, 5], "reaches out"),
        ([4, 0, 0, 5], "is empty"),
        ([10, 0, 2, 5], "is empty"),
        ([1, 2, 3], "is not a box"),
    ):
        with pytest.raises(RowError, match=f"line 7, column 'x'.*{said}"):
            box_of(ROW, "x", box, (10, 5))


def test_words_of_a_question() -> None:
    question = "Is the Dog beside two dogs or benches?"
    spans = spans_in(question, {"subject": "dog", "object": "cat", "none": None, "end": "benches?"})
    assert {name: question[slice(*span)] for name, span in spans.items()} == {"subject": "Dog", "end": "benches?"}
    assert [noun_in(question, noun) for noun in ("dog", "bench", "cats", None)] == ["dog", "benches", None, None]
    assert [opposite(answer) for answer in ("yes", "No", "red", None)] == ["no", "yes", None, None]

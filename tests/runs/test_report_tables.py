"""The tables of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hooked_vlm.runs.report_tables import number, p_value, read_table, visible
from tests.runs.reported import cell, make_folder, page_of, write_csv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def texts(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [[cell.text for cell in row] for row in rows]


def test_a_table_shows_the_largest_cells_of_each_metric(folder: Path) -> None:
    table = read_table(folder / "tables" / "flow.csv")
    assert table.constant == {"n": "3"}
    assert table.largest.titles == ["token", "layer", "mean", "low", "high", "median", "p", "p corrected"]
    assert table.largest.is_number == [False, *7 * [True]]
    assert list(table.largest.groups) == ["probability", "logit difference"]
    assert texts(table.largest.groups["probability"])[:2] == [
        ["b", "1", "0.400", "0.300", "0.500", "0.400", "< 0.001", "< 0.001"],
        ["b", "0", "0.300", "0.200", "0.400", "0.300", "0.250", "1.000"],
    ]
    assert table.whole is None, "it would be the same table again"


def test_the_whole_table_is_in_its_own_order(tmp_path: Path) -> None:
    table = read_table(write_csv(tmp_path / "t.csv", [[f"m{i % 2}", "a", i, i, *cell(i)] for i in range(12)]))
    assert {kind: [row[0].text for row in rows] for kind, rows in table.largest.groups.items()} == {
        "m0": ["10", "8", "6", "4", "2"],
        "m1": ["11", "9", "7", "5", "3"],
    }
    assert table.whole is not None
    assert table.whole.titles[:2] == ["metric", "layer"]
    assert [row[1] for row in texts(table.whole.groups[""])] == [str(i) for i in range(12)]


def test_points_stand_under_points(tmp_path: Path) -> None:
    means = (1234.0, 12.0, -0.5, 0.00123, 1e-12, math.nan)
    rows = [["m", "t", i, -i, *cell(mean)] for i, mean in enumerate(means)]
    whole = read_table(write_csv(tmp_path / "t.csv", rows)).whole
    assert whole is not None
    shown = [row[whole.titles.index("mean")] for row in whole.groups[""]]
    assert [cell.text for cell in shown] == ["1,234", "12.0", "−0.500", "0.00123", "1.00e−12", "–"]
    ends = [len(cell.text + cell.pad) - (cell.text + cell.pad).index(".") for cell in shown[:4]]
    assert ends == [6, 6, 6, 6]
    assert shown[4].pad == "", "an exponent does not push the others aside"
    largest = read_table(tmp_path / "t.csv").largest.groups[""]
    assert [row[0].text for row in largest] == ["0", "1", "2", "3", "4"], "what has no mean is not among the largest"


@pytest.mark.parametrize(("n", "is_whole"), [(11, True), (300, True), (301, False)])
def test_long_tables_stay_in_their_file(n: int, is_whole: bool, folder: Path) -> None:
    write_csv(folder / "tables" / "flow.csv", [["m", "a", i, 0, *cell(i)] for i in range(n)])
    table = read_table(folder / "tables" / "flow.csv")
    assert (table.whole is not None) == is_whole
    assert table.n_shown == len(table.largest.groups[""]) == 10
    words = page_of(folder).words
    assert (f"All {n} cells are in" in words) == (not is_whole)


def test_a_table_without_a_test_or_without_numbers(folder: Path) -> None:
    untested = [[label, *row] for label, row in zip("ab", [[3, 1.0, 0.9, 1.1, 1.0, "", "", "", ""]] * 2, strict=True)]
    table = read_table(write_csv(folder / "tables" / "flow.csv", untested, labels=["head"]))
    assert not table.has_p
    assert table.largest.titles == ["head", "mean", "low", "high", "median"]
    assert "flips" not in page_of(folder).words
    write_csv(folder / "tables" / "flow.csv", [])
    assert "tables/flow.csv has no cell with a number." in page_of(folder).words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.9996, "1.00"),
        (9.996, "10.0"),
        (-0.012345, "−0.0123"),
        (0.0001, "0.000100"),
        (0.00001, "1.00e−5"),
        (99.96, "100"),
        (22831.4, "22,831"),
        (1.5e9, "1.50e9"),
        (math.nan, "–"),
        (-math.inf, "−inf"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("p", "text"), [(0.0, "< 0.001"), (0.0009999, "< 0.001"), (0.001, "0.001"), (1.0, "1.000")])
def test_p_is_never_0(p: float, text: str) -> None:
    assert p_value(p) == text


@pytest.mark.parametrize(("label", "text"), [("cat", "cat"), (" cat", "“ cat”"), ("\n", "\\n"), ("", "")])
def test_white_space_in_labels_is_seen(label: str, text: str) -> None:
    assert visible(label) == text

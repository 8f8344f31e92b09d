"""Tables of statistics as a reader wants them: largest cells first, numbers rounded, and points under points."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STATISTICS = {
    "n": "n",
    "mean": "mean",
    "low": "low",
    "high": "high",
    "median": "median",
    "p": "p",
    "p_corrected": "p corrected",
}
"""Columns that are shown beside the labels, and their titles."""
UNTESTED = ("p", "p_corrected")
"""That a table lacks where nothing was tested."""
NOT_SHOWN = ("median_low", "median_high")
KINDS = ("quantity", "metric")
"""Labels that say what is measured. Numbers are compared within them: nats are no probabilities."""
LONGEST_TABLE = 300
MOST_CELLS, MOST_CELLS_A_KIND = 10, 5
"""How many of the largest cells are shown: of one thing measured, and of each of several."""
MINUS = "\N{MINUS SIGN}"


class Cell(NamedTuple):
    """What stands in a cell."""

    text: str
    pad: str = ""
    """Digits to put behind it, unseen, that bring its point under the others."""


@dataclass(frozen=True)
class Rows:
    """A table's body: rows in groups, which have a title where there are several."""

    titles: list[str]
    is_number: list[bool]
    """Of each column: whether it is set to the right."""
    groups: dict[str, list[list[Cell]]]


@dataclass(frozen=True)
class StatisticsTable:
    """What a page shows of a file of statistics."""

    n_cells: int
    constant: dict[str, str]
    """Columns that are the same in all cells."""
    has_p: bool
    largest: Rows
    """The cells with the largest absolute means."""
    whole: Rows | None
    """All cells, where they are more than these, and not too many."""

    @property
    def n_shown(self) -> int:
        """How many the largest are."""
        return sum(map(len, self.largest.groups.values()))


def read_table(path: Path) -> StatisticsTable:
    """Read what :func:`hooked_vlm.statistics.write_table` wrote: columns of labels, then statistics.

    Raises:
        ValueError: a file with other columns, or a statistic that is no number.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
        columns = list(reader.fieldnames or ())
    if missing := [name for name in STATISTICS if name not in columns and name not in UNTESTED]:
        raise ValueError(f"{path} is no table of statistics: it lacks {', '.join(missing)}")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is damaged: a row is longer or shorter than the header")
    try:
        return _table(rows, [name for name in columns if name not in NOT_SHOWN])
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _table(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> StatisticsTable:
    numbers = [name for name in columns if name in STATISTICS]
    empty = [name for name in numbers if all(math.isnan(_value(row[name])) for row in rows)]
    same = [name for name in columns if len({row[name] for row in rows}) == 1 < len(rows)]
    constant = {name: visible(rows[0][name]) for name in same if name not in numbers or name == "n"}
    shown = [name for name in columns if name not in constant and name not in empty]
    shown = [name for name in shown if not _repeats(name, shown, rows)]
    kinds: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row[name] for name in KINDS if name in shown), []).append(row)
    most = MOST_CELLS if len(kinds) == 1 else MOST_CELLS_A_KIND
    largest = {", ".join(filter(None, kind)).replace("_", " "): _largest(own, most) for kind, own in kinds.items()}
    return StatisticsTable(
        n_cells=len(rows),
        constant=constant,
        has_p="p" in shown,
        largest=_rows(
            {kind: own for kind, own in largest.items() if own}, [name for name in shown if name not in KINDS]
        ),
        whole=_rows({"": rows}, shown) if sum(map(len, largest.values())) < len(rows) <= LONGEST_TABLE else None,
    )


def _repeats(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether a label is that of a column before it, in all rows: the first and last layer of a window of one."""
    labels = [one for one in columns if one not in STATISTICS]
    return name in labels and any(all(row[name] == row[one] for row in rows) for one in labels[: labels.index(name)])


def _largest(rows: Sequence[Mapping[str, str]], most: int) -> list[Mapping[str, str]]:
    known = [row for row in rows if not math.isnan(_value(row["mean"]))]
    return sorted(known, key=lambda row: -abs(_value(row["mean"])))[:most]


def _rows(groups: Mapping[str, Sequence[Mapping[str, str]]], columns: Sequence[str]) -> Rows:
    rows = [row for group in groups.values() for row in group]
    cells = [_column(name, [row[name] for row in rows]) for name in columns]
    in_order = iter(zip(*cells, strict=True))
    return Rows(
        titles=[STATISTICS.get(name, name.replace("_", " ")) for name in columns],
        is_number=[all(_is_number(row[name]) for row in rows) for name in columns],
        groups={name: [list(next(in_order)) for _ in group] for name, group in groups.items()},
    )


def _column(name: str, values: Sequence[str]) -> list[Cell]:
    if name not in STATISTICS:
        return [Cell(visible(value)) for value in values]
    if name == "n":
        return [Cell(f"{_value(value):.0f}") for value in values]
    texts = [(p_value if name.startswith("p") else number)(_value(value)) for value in values]
    longest = max((len(_fraction(text)) for text in texts), default=0)
    return [Cell(text, _pad(text, longest)) for text in texts]


def _fraction(text: str) -> str:
    """The point of a number, and what is behind it; nothing of one with an exponent, which stands for itself."""
    return "" if "e" in text else text[len(text.partition(".")[0]) :]


def _pad(text: str, longest: int) -> str:
    own = _fraction(text)
    if "e" in text or len(own) == longest:
        return ""
    return ("0" if own else ".") + "0" * (longest - len(own) - 1)


def _value(text: str) -> float:
    return float(text) if text else math.nan


def _is_number(text: str) -> bool:
    try:
        _value(text)
    except ValueError:
        return False
    return True


def visible(label: str) -> str:
    """A label, such as a token, whose white space is seen."""
    escaped = label.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return escaped if escaped == escaped.strip() else f"“{escaped}”"


def number(value: float) -> str:
    """Three significant digits, and all before the point: ``0.0123``, ``12,345``, ``−1.20e−7``; a dash for NaN."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if math.isinf(value):
        return str(value).replace("-", MINUS)
    exponent = math.floor(math.log10(abs(float(f"{value:.2e}"))))
    if -4 <= exponent < 7:
        return f"{value:,.{max(0, 2 - exponent)}f}".replace("-", MINUS)
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(power)}".replace("-", MINUS)


def p_value(p: float) -> str:
    """Three decimals, and never 0."""
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"

"""Rows of sample files, read one by one: what is malformed is named by file, line and column, or skipped and counted.

A reader is a function that makes a sample of a :class:`Row`, and :func:`collect` over the rows of a file.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

from hooked_vlm.data.samples import Dropped, Sample, SampleError, Samples


@runtime_checkable
class HasId(Protocol):
    """What a row is made into."""

    @property
    def id(self) -> str: ...


Named = TypeVar("Named", bound=HasId)


class RowError(SampleError):
    """A malformed row: in which file, at which line (of JSON: under which key) and in which column."""

    def __init__(self, path: Path, place: str, column: str | None, message: str, kind: str = "") -> None:
        where = f"{path}, {_spelled(place)}" + (f", column {column!r}" if column is not None else "")
        super().__init__(f"{where}: {message}", kind or (f"a malformed {column!r}" if column else "a malformed row"))
        self.path, self.place, self.column = path, place, column


class LeftOutError(SampleError):
    """A well-formed row that its own file says is not to be used. It is always dropped, and never an error."""


@dataclass(frozen=True)
class Row:
    """One row of a table, or one entry of a JSON file, that checks what is asked of it."""

    path: Path
    place: str
    """The line on which it begins, counted from 1; of JSON the keys that lead to it, such as ``questions[3]``."""
    values: Mapping[str, Any]
    index: int = 0
    """Which row of its file, counted from 0."""
    key: str = ""
    """Under which key it stands, where it is an entry of a JSON object."""
    fault: str = ""
    """Why it cannot be read at all."""

    @property
    def id(self) -> str:
        """A name for samples whose file gives them none."""
        return f"{self.path.stem}:{self.index}"

    def error(self, column: str | None, message: str, kind: str = "") -> RowError:
        return RowError(self.path, self.place, column, message, kind)

    def value(self, column: str, *types: type) -> Any:
        """What stands in a column.

        Raises:
            RowError: there is no such column, or what stands there is of none of ``types``.
        """
        if column not in self.values:
            raise self.error(column, f"there is none; there is {_listed(self.values)}", f"no {column!r}")
        value = self.values[column]
        if types and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            wanted = " or ".join(dict.fromkeys(_TYPES.get(one, one.__name__) for one in types))
            raise self.error(column, f"{_short(value)} is not {wanted}")
        return value

    def text(self, column: str) -> str:
        """Words, or a number as words; never empty."""
        text = str(self.value(column, str, int, float)).strip()
        if not text:
            raise self.error(column, "is empty", f"an empty {column!r}")
        return text

    def maybe(self, column: str, absent: Sequence[str] = ("",)) -> str | None:
        """The text of a column that need not be there, nor hold anything."""
        value = self.values.get(column)
        if value is None or (isinstance(value, str) and value.strip() in absent):
            return None
        return self.text(column)

    def maybe_object(self, column: str) -> dict[str, Any]:
        """A JSON object that need not be there."""
        return self.value(column, dict) if self.values.get(column) is not None else {}

    def integer(self, column: str) -> int:
        text = self.text(column)
        try:
            return int(text)
        except ValueError:
            raise self.error(column, f"{_short(text)} is not a whole number") from None

    def number(self, column: str) -> float:
        text = self.text(column)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.error(column, f"{_short(text)} is not a number")
        return number

    def flag(self, column: str) -> bool:
        """True or false, as pandas, JSON or a table of numbers write it."""
        text = str(self.value(column, bool, str, int)).strip().lower()
        if text not in _FLAGS:
            raise self.error(column, f"{_short(text)} is neither true nor false")
        return _FLAGS[text]

    def one_of(self, column: str, options: Sequence[str]) -> str:
        text = self.text(column)
        if text not in options:
            raise self.error(column, f"{_short(text)} is none of {', '.join(options)}")
        return text

    def rest(self, *read: str) -> dict[str, Any]:
        """The other columns, as far as they hold something."""
        return {name: value for name, value in self.values.items() if name and name not in read and value != ""}


def csv_rows(path: str | Path, required: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a table with a header; a cell may span lines.

    Raises:
        SampleError: a file that is missing, empty, no such table, or lacks one of the columns ``required``.
    """
    path = _existing(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise SampleError(f"{path} is empty", "an empty file")
            _check_columns(path, header, required)
            before, number = reader.line_num, 0
            for cells in reader:
                if cells:
                    yield _row_of(path, str(before + 1), header, cells, number)
                    number += 1
                before = reader.line_num
        except (csv.Error, UnicodeDecodeError) as error:
            raise SampleError(f"{path}, near line {reader.line_num + 1}: no table that can be read: {error}") from error
    if not number:
        raise SampleError(f"{path} has a header and no rows", "an empty file")


def json_rows(path: str | Path, *keys: str, found: Any = None) -> Iterator[Row]:
    """The entries of a JSON list or object, which stands under ``keys``; ``found`` is the file's content, if known.

    Raises:
        SampleError: a file that is missing, empty, no JSON, or holds neither a list nor an object there.
    """
    path = _existing(path)
    found = load_json(path) if found is None else found
    for depth, key in enumerate(keys):
        if not isinstance(found, dict) or key not in found:
            there = _listed(found) if isinstance(found, dict) else f"a {type(found).__name__}"
            raise SampleError(f"{path} has no {'.'.join(keys[: depth + 1])!r}; there is {there}", f"no {key!r}")
        found = found[key]
    if not isinstance(found, list | dict):
        raise SampleError(f"{path} holds a {type(found).__name__}, not a list or an object of samples")
    if not found:
        raise SampleError(f"{path} holds no samples", "an empty file")
    entries = found.items() if isinstance(found, dict) else enumerate(found)
    for number, (key, values) in enumerate(entries):
        place, name = f"{'.'.join(keys)}[{json.dumps(key)}]", key if isinstance(found, dict) else ""
        if isinstance(values, dict):
            yield Row(path, place, values, number, name)
        else:
            yield Row(path, place, {"": values}, number, name, f"{_short(values)} is not an object")


def jsonl_rows(path: str | Path) -> Iterator[Row]:
    """The lines of a JSONL file, one object each; blank lines do not count.

    Raises:
        SampleError: a file that is missing or empty.
    """
    path, number = _existing(path), 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield _json_line(path, str(line), text, number)
                    number += 1
        except UnicodeDecodeError as error:
            raise SampleError(f"{path} is no text in UTF-8: {error}") from error
    if not number:
        raise SampleError(f"{path} is empty", "an empty file")


def load_json(path: str | Path) -> Any:
    """What a JSON file holds; raises :class:`SampleError`."""
    path = _existing(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SampleError(f"{path} is no text in UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        if not error.doc.strip():
            raise SampleError(f"{path} is empty", "an empty file") from error
        raise SampleError(f"{path}, line {error.lineno}, character {error.colno}: no JSON: {error.msg}") from error


def collect(
    rows: Iterable[Row], make: Callable[[Row], Sample], *, on_bad_row: str = "raise", limit: int | None = None
) -> Samples:
    """The samples that ``make`` makes of rows; see :func:`gather`."""
    return Samples(*gather(rows, make, on_bad_row=on_bad_row, limit=limit))


def gather(
    rows: Iterable[Row], make: Callable[[Row], Named], *, on_bad_row: str = "raise", limit: int | None = None
) -> tuple[list[Named], list[Dropped]]:
    """What ``make`` makes of rows, and which rows were dropped.

    Args:
        make: raises :class:`SampleError` for a row that is malformed, :class:`LeftOutError` for one not to be used.
        on_bad_row: "raise" an error at the first malformed row, or "skip" it; skipped rows are among those dropped,
            under ``FILE:LINE``. A row of which something is made with the ``id`` of an earlier one is malformed.
        limit: stop after this many.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row is 'raise' or 'skip', not {on_bad_row!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is the most samples to read, at least 1, not {limit}")
    made: dict[str, Named] = {}
    dropped: list[Dropped] = []
    for row in rows:
        if limit is not None and len(made) >= limit:
            break
        try:
            one = _made(row, make)
            if one.id in made:
                raise row.error(None, f"there is a sample {one.id!r} already", "an id that occurred before")
        except SampleError as error:
            if on_bad_row == "raise" and not isinstance(error, LeftOutError):
                raise
            dropped.append(Dropped.of(f"{row.path.name}:{row.place}", error))
        else:
            made[one.id] = one
    return list(made.values()), dropped


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that are most like one, as the end of a sentence; empty if none is."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_TYPES: dict[type, str] = {str: "text", int: "a number", float: "a number", dict: "an object", list: "a list"}


def _made(row: Row, make: Callable[[Row], Named]) -> Named:
    if row.fault:
        raise row.error(None, row.fault)
    try:
        return make(row)
    except (RowError, LeftOutError):
        raise
    except SampleError as error:
        raise row.error(None, str(error), error.kind) from error


def _row_of(path: Path, place: str, header: list[str], cells: list[str], number: int) -> Row:
    row = Row(path, place, dict(zip(header, cells, strict=False)), number)
    if len(cells) == len(header):
        return row
    return replace(row, fault=f"it has {len(cells)} cells, and the header {len(header)}")


def _json_line(path: Path, place: str, text: str, number: int) -> Row:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return Row(path, place, {}, number, fault=f"no JSON: {error.msg}, at character {error.colno}")
    if not isinstance(values, dict):
        return Row(path, place, {}, number, fault=f"{_short(values)} is not an object")
    return Row(path, place, values, number)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise SampleError(f"there is no file {path}", "no such file")
    if path.is_dir():
        raise SampleError(f"{path} is a folder; give the file with the samples", "no such file")
    return path


def _check_columns(path: Path, header: Sequence[str], required: Sequence[str]) -> None:
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise SampleError(f"{path} has more than one column {twice[0]!r}")
    missing = [name for name in required if name not in header]
    if missing:
        _missing(path, missing, header)


def _missing(path: Path, missing: Sequence[str], header: Sequence[str]) -> NoReturn:
    names = ", ".join(map(repr, missing))
    hint = next((found for name in missing if (found := nearest(name, header))), "")
    raise SampleError(f"{path} has no column {names}; it has {_listed(header)}{hint}", f"no column {missing[0]!r}")


def _spelled(place: str) -> str:
    return f"line {place}" if place[:1].isdigit() else place


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names if name) or "nothing"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Statistics of cells as rows of a table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_vlm.files import whole_file

if TYPE_CHECKING:
    import xarray as xr


def to_rows(summary: xr.Dataset) -> list[dict[str, Any]]:
    """One row for each cell that has a number: its labels, then what is said of it.

    Args:
        summary: of :func:`~hooked_vlm.statistics.summarize`.

    Raises:
        ValueError: what is no summary.
    """
    columns = _columns(summary)
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [row for row in rows if row["n"]]


def write_table(summary: xr.Dataset, path: str | Path) -> None:
    """:func:`to_rows` as a CSV file, whole or not at all; numbers are read back as they were.

    Raises:
        ValueError: what is no summary.
    """
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(_columns(summary)))
        table.writeheader()
        table.writerows(to_rows(summary))


def _columns(summary: xr.Dataset) -> dict[str, list[Any]]:
    """Each column of all cells: dims, other labels of cells, variables."""
    if "n" not in summary:
        raise ValueError("a table is made of what summarize returns, which has n for each cell")
    cells = summary["n"]
    labels = [*cells.dims, *(name for name in cells.coords if name not in cells.dims)]
    found = {str(name): cells[name] for name in labels} | {str(name): own for name, own in summary.data_vars.items()}
    return {name: own.broadcast_like(cells).values.reshape(-1).tolist() for name, own in found.items()}

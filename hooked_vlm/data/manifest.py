"""Manifests: a list of samples as a file, JSONL or CSV, beside its pictures."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Bool

from hooked_vlm.data.pictures import is_address, load_picture, resolve
from hooked_vlm.data.rows import Row, collect, csv_rows, jsonl_rows, nearest
from hooked_vlm.data.samples import Sample, SampleError, Samples, span_of
from hooked_vlm.files import whole_file, whole_folder
from hooked_vlm.patches import Region
from hooked_vlm.processing import ImageError

SUFFIXES = (".jsonl", ".csv")

TEXTS = ("id", "image", "question", "answer", "foil", "image_cf", "question_cf", "group")
MAPPINGS = ("spans", "regions", "meta")
KEYS = (*TEXTS, *MAPPINGS)
"""The keys of a line, or the columns of a table. All but ``question`` may be missing."""


def read_manifest(
    path: str | Path,
    *,
    images: str | Path | None = None,
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """The samples of a manifest; ``docs/data.md`` describes the format.

    Args:
        path: JSONL or CSV, by its suffix.
        images: from where relative paths of pictures are meant, a folder or an address; by default the manifest's.
        on_bad_row: "raise", or "skip" to count malformed rows in ``dropped``.

    Raises:
        SampleError: a file that is missing, empty or in another format; a malformed row, by file, line and column.
    """
    path = Path(path)
    root = path.parent if images is None else images

    def sample(row: Row) -> Sample:
        unknown = [name for name in row.values if name not in KEYS]
        if unknown:
            hint = nearest(unknown[0], KEYS) or f"; there are {', '.join(KEYS)}"
            raise row.error(unknown[0], f"a manifest has no such key{hint}", "an unknown key")
        question = row.value("question", str)
        texts = {name: _text(row, name) for name in TEXTS}
        spans, regions, meta = (_mapping(row, name) for name in MAPPINGS)
        return Sample(
            texts["id"] or row.id,
            _source(texts["image"], root),
            question,
            texts["answer"],
            texts["foil"],
            image_cf=_source(texts["image_cf"], root),
            question_cf=texts["question_cf"],
            spans={name: _span(row, question, span) for name, span in spans.items()},
            regions={name: _region(row, region, path.parent) for name, region in regions.items()},
            group=texts["group"],
            meta=meta,
        )

    return collect(_rows(path), sample, on_bad_row=on_bad_row, limit=limit)


def write_manifest(samples: Sequence[Sample], path: str | Path, *, pictures: str | Path | None = None) -> None:
    """Write samples as a manifest, whole or not at all; :func:`read_manifest` gives the same again.

    Paths of pictures below the manifest's folder are written relative to it, others in full, addresses as they are.
    Tuples in ``meta`` become lists, as JSON has it.

    Args:
        path: JSONL or CSV, by its suffix.
        pictures: a folder, meant from the manifest's, in which pictures that are in no file (functions, PIL, arrays)
            are saved as PNG. Without it they are an error.

    Raises:
        SampleError: a picture that is in no file, two samples of one id, what JSON (or CSV: empty words) cannot say.
    """
    path = Path(path)
    _check_suffix(path)
    ids = [sample.id for sample in samples]
    twice = next((id for index, id in enumerate(ids) if id in ids[:index]), None) if len(set(ids)) < len(ids) else None
    if twice is not None:
        raise SampleError(f"two samples are called {twice!r}; in a manifest each has a name of its own")
    folder = None if pictures is None else path.parent / pictures
    with whole_file(path) as temporary, whole_folder(folder) if folder else nullcontext() as room:
        lines = [_line(sample, path, room, folder) for sample in samples]
        with temporary.open("w", encoding="utf-8", newline="") as file:
            (_write_csv if path.suffix.lower() == ".csv" else _write_jsonl)(lines, file)


def _rows(path: Path) -> Iterator[Row]:
    _check_suffix(path)
    return csv_rows(path, ("question",)) if path.suffix.lower() == ".csv" else jsonl_rows(path)


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise SampleError(f"{path}: a manifest ends in {' or '.join(SUFFIXES)}, not in {path.suffix or 'nothing'!r}")


def _text(row: Row, name: str) -> str | None:
    """Words, or None where there are none: null, or an empty cell of a table."""
    value = row.values.get(name)
    if value is None or (value == "" and _is_table(row)):
        return None
    return row.value(name, str)


def _mapping(row: Row, name: str) -> Mapping[str, Any]:
    value = row.values.get(name)
    if value is None or value == "":
        return {}
    if _is_table(row):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise row.error(name, f"no JSON: {error.msg}, at character {error.colno}") from error
    if not isinstance(value, dict):
        raise row.error(name, f"{value!r} is not an object")
    return value


def _is_table(row: Row) -> bool:
    return row.path.suffix.lower() == ".csv"


def _source(source: str | None, root: str | Path) -> str | None:
    return None if source is None else resolve(source, root)


def _span(row: Row, question: str, span: Any) -> tuple[int, int]:
    """[first, one past the last] character, or the phrase itself."""
    if isinstance(span, str):
        try:
            return span_of(question, span)
        except SampleError as error:
            raise row.error("spans", str(error), error.kind) from error
    if isinstance(span, list) and len(span) == 2 and all(type(one) is int for one in span):
        return span[0], span[1]
    raise row.error("spans", f"{span!r} is neither [first, one past the last] character nor a phrase")


def _region(row: Row, region: Any, folder: Path) -> Region:
    """A box, the runs of a mask, or the file of one."""
    if isinstance(region, str):
        return _mask_file(row, Path(resolve(region, folder)))
    if isinstance(region, dict) and region.keys() == {"size", "runs"}:
        try:
            return mask_of_runs(region["size"], region["runs"])
        except SampleError as error:
            raise row.error("regions", str(error), error.kind) from error
    if isinstance(region, list) and len(region) == 4 and all(type(side) in (int, float) for side in region):
        return tuple(region)
    raise row.error(
        "regions",
        f"{region!r} is neither a box [left, top, right, bottom], nor the runs of a mask "
        '{"size": [height, width], "runs": [...]}, nor the file of one (PNG or npy)',
    )


def _mask_file(row: Row, path: Path) -> Bool[np.ndarray, "height width"]:
    try:
        if path.suffix.lower() == ".npy":
            mask = np.load(path, allow_pickle=False)
        else:
            mask = np.asarray(load_picture(path, what="the mask").convert("L")) > 0
    except (OSError, ValueError, ImageError) as error:
        raise row.error("regions", f"the mask {path} cannot be read: {error}", "a mask that cannot be read") from error
    if mask.ndim != 2 or not np.isin(mask, (0, 1)).all():
        raise row.error("regions", f"the mask {path} is not [height width] of true and false, but {mask.shape}")
    return mask.astype(bool)


def runs_of_mask(mask: Bool[np.ndarray, "height width"]) -> dict[str, list[int]]:
    """A mask as the lengths of its runs, row after row: first of pixels outside (perhaps 0), then inside, and so on."""
    flat = mask.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = [0, *([0] if flat.size and flat[0] else []), *edges.tolist(), flat.size]
    return {"size": list(mask.shape), "runs": np.diff(bounds).tolist()}


def mask_of_runs(size: list[int], runs: list[int]) -> Bool[np.ndarray, "height width"]:
    """The mask of :func:`runs_of_mask`; raises :class:`SampleError` for runs that do not fill it."""
    if not all(isinstance(one, list) and all(type(n) is int and n >= 0 for n in one) for one in (size, runs)):
        raise SampleError(f"a mask's size and runs are whole numbers, not {size!r} and {str(runs)[:40]}")
    if len(size) != 2 or sum(runs) != size[0] * size[1]:
        raise SampleError(f"the runs of a mask are {sum(runs)} pixels long, and its size is {size}, [height, width]")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size)


def _line(sample: Sample, path: Path, room: Path | None, folder: Path | None) -> dict[str, Any]:
    """What is written of a sample: nothing for what it does not have."""
    values = {name: getattr(sample, name) for name in ("id", "question", "answer", "foil", "question_cf", "group")}
    sources = {name: _written_source(sample, name, path, room, folder) for name in ("image", "image_cf")}
    regions = {name: _written_region(region) for name, region in sample.regions.items()}
    mappings = {"spans": {name: list(span) for name, span in sample.spans.items()}, "regions": regions}
    line = {**values, **sources, **mappings, "meta": dict(sample.meta)}
    kept = {key: line[key] for key in KEYS if line[key] is not None and line[key] != {}}
    try:
        return json.loads(json.dumps(kept, default=_plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SampleError(f"{sample.id} cannot be written as JSON: {error}", "what JSON cannot say") from error


def _written_region(region: Region) -> Any:
    if isinstance(region, np.ndarray) and region.dtype == bool:
        return runs_of_mask(region)
    return [side.item() if isinstance(side, np.generic) else side for side in region]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _written_source(sample: Sample, name: str, path: Path, room: Path | None, folder: Path | None) -> str | None:
    """A picture's path or address; what is in no file is saved into ``room``, which becomes ``folder``."""
    source = getattr(sample, name)
    if source is None or is_address(source):
        return source
    if isinstance(source, str | Path):
        return _relative(Path(source), path.parent)
    if room is None or folder is None:
        raise SampleError(
            f"{name} of {sample.id} is in no file; give pictures=FOLDER, and it is saved there", "a picture in no file"
        )
    stem = re.sub(r"[^\w.-]+", "_", sample.id)[:80] + ("" if name == "image" else "-cf")
    file, numbers = f"{stem}.png", itertools.count(2)
    while (room / file).exists():
        file = f"{stem}-{next(numbers)}.png"
    load_picture(source, what=f"{name} of {sample.id}").save(room / file)
    return _relative(folder / file, path.parent)


def _relative(path: Path, folder: Path) -> str:
    """From the manifest's folder if it is below that, and in full otherwise."""
    path, folder = path.absolute(), folder.absolute()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _write_jsonl(lines: list[dict[str, Any]], file: IO[str]) -> None:
    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _write_csv(lines: list[dict[str, Any]], file: IO[str]) -> None:
    columns = [key for key in KEYS if key == "question" or any(key in line for line in lines)]
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    for line in lines:
        empty = [key for key in TEXTS if line.get(key) == "" and key != "question"]
        if empty:
            raise SampleError(f"{empty[0]} of {line['id']} is empty, which a table cannot tell from none; write JSONL")
        cells = {key: json.dumps(line[key], ensure_ascii=False) if key in MAPPINGS else line[key] for key in line}
        writer.writerow(cells)

"""ShapeWorld (Kuhnle & Copestake 2017): captions that are true of a picture or not, and the pictures as worlds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hooked_vlm.data.readers.common import Box, Images, box_of, picture
from hooked_vlm.data.readers.worlds import Thing, World, Worlds
from hooked_vlm.data.rows import Row, collect, gather, json_rows
from hooked_vlm.data.samples import Sample, SampleError, Samples

# By how much of its picture's side an entity may reach over the edge, where the generator lets it.
_OVER = 0.25


def read_shapeworld(
    path: str | Path,
    *,
    images: Images = None,
    question: str = "{caption}",
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """A folder that ShapeWorld's ``generate.py`` has written for an agreement task.

    Files: ``caption.txt`` (a caption a line; where a picture has several, a blank line after each picture's),
    ``agreement.txt`` (a line a picture: 1.0 where a caption is true, 0.0 where it is not, with ";" between) and the
    pictures, ``world-0.bmp`` and so on (of any format; ``{id}`` of ``images``). The answer is "yes" or "no", with the
    other as its foil; the group is the folder's name.

    Args:
        question: how a caption is asked, for example ``"is it true that {caption}"``.
    """
    folder = _folder(path)

    def sample(row: Row) -> Sample:
        agreement = row.number("agreement")
        if agreement not in (0.0, 1.0):
            raise row.error("agreement", f"{agreement:g} is neither 0, for false, nor 1, for true")
        answer = "yes" if agreement else "no"
        return Sample(
            f"{folder.name}:{row.key}:{row.index}",
            picture(row, images, "world-{id}.{format}", id=row.key, format=_format(folder)),
            question.format(caption=row.text("caption")),
            answer,
            "no" if agreement else "yes",
            group=folder.name,
            meta={"caption": row.text("caption"), "world": int(row.key)},
        )

    return collect(_captions(folder), sample, on_bad_row=on_bad_row, limit=limit)


def shapeworld_worlds(
    path: str | Path, *, images: Images = None, on_bad_row: str = "raise", limit: int | None = None
) -> Worlds:
    """What is in the pictures of such a folder, from its ``world_model.json``.

    A list of worlds with ``size`` (of the picture, in pixels) and ``entities``, each with ``shape``, ``color`` and
    ``texture`` (of each the ``name``) and ``bounding_box`` (``topleft`` and ``bottomright``, as shares of the picture).
    """
    folder = _folder(path)

    def world(row: Row) -> World:
        size = row.value("size", int)
        things = [_thing(row, index, one, size) for index, one in enumerate(row.value("entities", list))]
        image = picture(row, images, "world-{id}.{format}", id=row.index, format=_format(folder))
        return World(f"{folder.name}:{row.index}", image, tuple(things))

    return Worlds(*gather(json_rows(folder / "world_model.json"), world, on_bad_row=on_bad_row, limit=limit))


def _thing(row: Row, index: int, entity: Any, size: int) -> Thing:
    try:
        attributes = {name: str(entity[name]["name"]) for name in ("color", "shape", "texture")}
        return Thing(attributes, _box(row, entity["bounding_box"], size))
    except (KeyError, TypeError) as error:
        raise row.error("entities", f"number {index} is no entity: {error!r}") from error


def _box(row: Row, box: Mapping[str, Mapping[str, float]], size: int) -> Box:
    (left, top), (right, bottom) = ((box[one]["x"], box[one]["y"]) for one in ("topleft", "bottomright"))
    sides = [size * side for side in (left, top, right - left, bottom - top)]
    return box_of(row, "entities", sides, (size, size), slack=_OVER * size)


def _captions(folder: Path) -> Iterator[Row]:
    """One row for each caption of each picture."""
    captions = [(line, text) for line, text in _lines(folder / "caption.txt") if text]
    worlds = enumerate(text.split(";") for _, text in _lines(folder / "agreement.txt"))
    marks = [(str(world), index, mark) for world, found in worlds for index, mark in enumerate(found)]
    if len(captions) != len(marks):
        raise SampleError(f"{folder}: caption.txt has {len(captions)} captions, and agreement.txt {len(marks)} entries")
    for (line, caption), (world, index, mark) in zip(captions, marks, strict=True):
        yield Row(folder / "caption.txt", str(line), {"caption": caption, "agreement": mark}, index, world)


def _lines(path: Path) -> list[tuple[int, str]]:
    if not path.is_file():
        raise SampleError(f"there is no {path}, which ShapeWorld writes for agreement tasks", "no such file")
    return [(number, line.strip()) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise SampleError(f"there is no folder {path}", "no such file")
    return path


def _format(folder: Path) -> str:
    return next((found.suffix[1:] for found in sorted(folder.glob("world-0.*"))), "bmp")

"""CLEVR (Johnson et al. 2017): its questions, and its scenes as worlds of which concepts are true or not."""

from __future__ import annotations

from pathlib import Path

from hooked_vlm.data.readers.common import Images, opposite, picture
from hooked_vlm.data.readers.worlds import Thing, World, Worlds
from hooked_vlm.data.rows import Row, collect, gather, json_rows
from hooked_vlm.data.samples import Sample, Samples

ATTRIBUTES = ("color", "shape", "size", "material")


def read_clevr(
    path: str | Path, *, images: Images = None, on_bad_row: str = "raise", limit: int | None = None
) -> Samples:
    """CLEVR's questions, such as ``CLEVR_val_questions.json``.

    An object with ``questions``, each with ``question``, ``answer`` (missing in the test file), ``image_filename`` (the
    ``{file}`` of ``images``), ``split``, ``question_index`` and ``program``; others go to ``meta``. The group is what
    the program does last, such as ``exist``, ``count`` or ``query_color``. Of "yes" and "no" the foil is the other.
    """

    def sample(row: Row) -> Sample:
        file, answer = row.text("image_filename"), row.maybe("answer")
        return Sample(
            f"{row.maybe('split') or row.path.stem}:{row.maybe('question_index') or row.index}",
            picture(row, images, "{file}", file=file, split=row.maybe("split")),
            row.text("question"),
            answer,
            opposite(answer),
            group=_last_step(row),
            meta=row.rest("question", "answer"),
        )

    return collect(json_rows(path, "questions"), sample, on_bad_row=on_bad_row, limit=limit)


def _last_step(row: Row) -> str | None:
    """What the released files call ``function``, and newly generated ones ``type``."""
    program = row.values.get("program")
    if not isinstance(program, list) or not program or not isinstance(program[-1], dict):
        return None
    return program[-1].get("function") or program[-1].get("type")


def clevr_worlds(
    path: str | Path, *, images: Images = None, on_bad_row: str = "raise", limit: int | None = None
) -> Worlds:
    """CLEVR's scenes, such as ``CLEVR_val_scenes.json``.

    An object with ``scenes``, each with ``image_filename`` (the ``{file}`` of ``images``), ``split`` and ``objects``,
    each with ``color``, ``shape``, ``size`` and ``material``. The files have no boxes, so that things have no region.
    """

    def world(row: Row) -> World:
        file = row.text("image_filename")
        things = []
        for index, one in enumerate(row.value("objects", list)):
            missing = [name for name in ATTRIBUTES if not (isinstance(one, dict) and isinstance(one.get(name), str))]
            if missing:
                raise row.error("objects", f"number {index} has no {', '.join(missing)}")
            things.append(Thing({name: one[name] for name in ATTRIBUTES}))
        image = picture(row, images, "{file}", file=file, split=row.maybe("split"))
        return World(Path(file).stem, image, tuple(things))

    return Worlds(*gather(json_rows(path, "scenes"), world, on_bad_row=on_bad_row, limit=limit))

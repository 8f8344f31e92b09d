"""GQA (Hudson & Manning 2019): the filtered files of Zhang et al. (2025), and the questions as published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from hooked_vlm.data.readers.common import Box, Images, box_of, noun_in, opposite, picture, spans_in
from hooked_vlm.data.rows import Row, collect, csv_rows, json_rows, load_json
from hooked_vlm.data.samples import Sample, SampleError, Samples
from hooked_vlm.patches import Region

COLUMNS = ("question_id", "img_id", "question", "answer", "type_semantic", "type_structural", "image_w", "image_h")

OBJECTS = {
    "central object": ("subject", "object"),
    "object1": ("object1", "object1"),
    "object2": ("object2", "object2"),
}
"""How an object is called in the columns of Zhang et al., as a span, and as a region."""

_ABSENT = ("", "-")


def read_zhang(
    path: str | Path, *, images: Images = None, on_bad_row: str = "raise", limit: int | None = None
) -> Samples:
    """One of the six files ``GQA_val_correct_question_with_*.csv`` of Zhang et al. (2025).

    Columns: ``question_id``, ``img_id`` (the picture is called so, with ``.jpg``), ``question``, ``answer``,
    ``type_structural`` and ``type_semantic`` (the group is both: ``ChooseAttr``), ``image_w``, ``image_h``; where the
    file has them ``true option`` and ``false option`` (the foil; of "yes" and "no" it is the other), and for
    ``central object``, ``object1`` and ``object2`` each ``name``, ``x``, ``y``, ``w``, ``h``, of which "-" says that
    there is none. Others go to ``meta``.

    Regions are the boxes: ``object``, or ``object1`` and ``object2``. A box that reaches out of the picture by up to
    two pixels, as some fifty of all do, is cut off; by more (three of all), it is malformed. Spans are the options
    (``answer``, ``foil``) and the objects' names (``subject``, or ``object1`` and ``object2``), where they occur.
    """

    def sample(row: Row) -> Sample:
        question, answer = row.text("question"), row.text("answer")
        options = {"answer": row.maybe("true option", _ABSENT), "foil": row.maybe("false option", _ABSENT)}
        objects = [name for name in OBJECTS if row.maybe(f"{name} name", _ABSENT)]
        names = {OBJECTS[name][0]: noun_in(question, row.text(f"{name} name")) for name in objects}
        boxes = [name for name in objects if row.maybe(f"{name} x", _ABSENT)]
        read = [f"{name} {side}" for name in objects for side in "xywh"]
        return Sample(
            row.text("question_id"),
            picture(row, images, "{id}.jpg", id=row.text("img_id")),
            question,
            answer,
            options["foil"] or opposite(answer),
            spans=spans_in(question, {**options, **names}),
            regions={OBJECTS[name][1]: _box(row, name) for name in boxes},
            group=row.text("type_structural").title() + row.text("type_semantic").title(),
            meta={"image_id": row.text("img_id"), **row.rest(*COLUMNS, "true option", "false option", *read)},
        )

    return collect(csv_rows(path, COLUMNS), sample, on_bad_row=on_bad_row, limit=limit)


def _box(row: Row, name: str) -> Box:
    size = (row.number("image_w"), row.number("image_h"))
    return box_of(row, f"{name} x", [row.number(f"{name} {side}") for side in "xywh"], size)


def read_gqa(
    path: str | Path,
    *,
    images: Images = None,
    scene_graphs: str | Path | None = None,
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """GQA's questions, such as ``val_balanced_questions.json``, and the boxes of its scene graphs.

    An object from question ids to ``question``, ``imageId`` (the picture is called so, with ``.jpg``), ``answer``
    (missing in test files), ``types`` (the group is their ``structural``) and ``annotations``, whose ``question`` says
    which words are which object of the scene graph. Others go to ``meta``.

    Args:
        scene_graphs: the file of scene graphs that goes with it, such as ``val_sceneGraphs.json``: a picture's
            ``width``, ``height`` and ``objects``, each with ``x``, ``y``, ``w``, ``h``.

    Spans and regions are the objects of the question: ``object`` if there is one, otherwise ``object1``, ``object2``
    and so on. Regions need ``scene_graphs``; words that stand for several objects have the mask of all their boxes.
    """
    graphs = None if scene_graphs is None else load_json(scene_graphs)

    def sample(row: Row) -> Sample:
        question, answer, image = row.text("question"), row.maybe("answer"), row.text("imageId")
        annotated = row.maybe_object("annotations").get("question", {})
        names = ["object"] if len(annotated) == 1 else [f"object{index}" for index in range(1, len(annotated) + 1)]
        objects = {name: str(ids).split(",") for name, ids in zip(names, annotated.values(), strict=True)}
        return Sample(
            row.key,
            picture(row, images, "{id}.jpg", id=image),
            question,
            answer,
            opposite(answer),
            spans={name: _words(row, question, place) for name, place in zip(names, annotated, strict=True)},
            regions={} if graphs is None else _regions(row, graphs, image, objects),
            group=row.maybe_object("types").get("structural"),
            meta={"image_id": image, "objects": objects, **row.rest("question", "imageId", "answer")},
        )

    return collect(json_rows(path), sample, on_bad_row=on_bad_row, limit=limit)


def _words(row: Row, question: str, place: str) -> tuple[int, int]:
    """The characters of some words of a question, counted from 0: "4" for one, or "4:6" for two."""
    words, end, spans = question.split(), 0, []
    for word in words:
        start = question.index(word, end)
        end = start + len(word)
        spans.append((start, start + len(word.rstrip(".,?!"))))
    first, _, stop = place.partition(":")
    try:
        chosen = spans[int(first) : int(stop or int(first) + 1)]
    except ValueError:
        chosen = []
    if not chosen:
        raise row.error("annotations", f"{place!r} are no words of {question!r}, which has {len(words)}")
    return chosen[0][0], chosen[-1][1]


def _regions(
    row: Row, graphs: Mapping[str, Any], image: str, objects: Mapping[str, Sequence[str]]
) -> dict[str, Region]:
    """The box of each object; of words that stand for several objects the mask of all their boxes."""
    try:
        graph = graphs[image]
        size = (int(graph["width"]), int(graph["height"]))
        found = {name: [graph["objects"][key] for key in keys] for name, keys in objects.items()}
        sides = {name: [[one[side] for side in "xywh"] for one in several] for name, several in found.items()}
    except (KeyError, TypeError) as error:
        raise SampleError(f"the scene graphs have no {error} for picture {image}", "no scene graph") from error
    boxes = {name: [box_of(row, "annotations", one, size) for one in several] for name, several in sides.items()}
    return {name: several[0] if len(several) == 1 else _mask(several, size) for name, several in boxes.items()}


def _mask(boxes: Sequence[Box], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    mask = np.zeros(size[::-1], dtype=bool)
    for box in boxes:
        left, top, right, bottom = (round(side) for side in box)
        mask[top:bottom, left:right] = True
    return mask

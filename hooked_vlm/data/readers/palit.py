"""The sample files of Palit et al. (2023): COCO-QA by kind of question, and yes/no questions about CLEVR."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hooked_vlm.data.readers.common import COCO, Images, picture, spans_in
from hooked_vlm.data.rows import Row, collect, csv_rows
from hooked_vlm.data.samples import Sample, Samples

COCO_QA = ("train_image_id_count", "question_count", "answer_count")
CLEVR = ("Image_IDs", "Questions_Answers")

_COLORED = re.compile(r"what is the color of (?:the |a |an )?(.+)", re.IGNORECASE)
_RELATED = re.compile(r"Is the (.+) (right of|left of|behind|in front of) the (.+)\?", re.IGNORECASE)


def read_coco_qa(
    path: str | Path,
    *,
    images: Images = f"{COCO}/train2017/{{id:012d}}.jpg",
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """``color_coco_qa.csv``, ``count_coco_qa.csv`` or ``location_coco_qa.csv`` of Palit et al. (2023).

    Columns: ``train_image_id_count`` (a COCO id of train2017), ``question_count``, ``answer_count`` (the suffix is the
    same in all three files), and an index without a name, which becomes the sample's id. The group is the kind, from
    the file's name. Of "what is the color of the X", X is the span ``subject``.
    """
    kind = Path(path).stem.removesuffix("_coco_qa")

    def sample(row: Row) -> Sample:
        question = row.text("question_count")
        colored = _COLORED.fullmatch(question)
        number = row.integer("train_image_id_count")
        return Sample(
            f"{row.path.stem}:{row.maybe('') or row.index}",
            picture(row, images, "{id:012d}.jpg", id=number),
            question,
            row.text("answer_count"),
            spans=spans_in(question, {"subject": colored and colored[1]}),
            group=kind,
            meta={"image_id": number},
        )

    return collect(csv_rows(path, COCO_QA), sample, on_bad_row=on_bad_row, limit=limit)


def read_clevr_pairs(
    path: str | Path, *, images: Images = None, on_bad_row: str = "raise", limit: int | None = None
) -> Samples:
    """``clevr_vqa_dataset_3.csv`` of Palit et al. (2023): two objects of a CLEVR picture, and a relation between them.

    Columns: ``Image_IDs`` (such as ``CLEVR_val_000145``; the picture is called so, with ``.png``) and
    ``Questions_Answers``, a Python list of ``{'question': ..., 'answer': 0 or 1}``. Each of these is a sample, answered
    "no" or "yes", with the other as its foil. The group is the relation; the spans ``subject`` and ``object`` are what
    it relates.
    """

    def sample(row: Row) -> Sample:
        question, answer = row.text("question"), ("no", "yes")[row.flag("answer")]
        related = _RELATED.fullmatch(question)
        name = row.text("image")
        return Sample(
            f"{name}:{row.index}",
            picture(row, images, "{id}.png", id=name),
            question,
            answer,
            "no" if answer == "yes" else "yes",
            spans={"subject": related.span(1), "object": related.span(3)} if related else {},
            group=related[2] if related else None,
            meta={"image_id": name},
        )

    return collect(_questions(path), sample, on_bad_row=on_bad_row, limit=limit)


def _questions(path: str | Path) -> Iterator[Row]:
    """One row for each question of a row."""
    for row in csv_rows(path, CLEVR):
        found = None if row.fault else _literal(row.values["Questions_Answers"])
        if not isinstance(found, list):
            yield replace(row, fault=row.fault or "column 'Questions_Answers' is no Python list")
            continue
        for index, entry in enumerate(found):
            place = f"{row.place}, Questions_Answers[{index}]"
            if isinstance(entry, dict):
                yield replace(row, place=place, values={**entry, "image": row.values["Image_IDs"]}, index=index)
            else:
                yield replace(row, place=place, fault=f"{entry!r} is not a question with its answer")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None

"""Questions and annotations in the format of VQA: VQA (Antol et al. 2015), VQAv2 (Goyal et al. 2017), OK-VQA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hooked_vlm.data.readers.common import COCO, Images, opposite, picture
from hooked_vlm.data.rows import Row, collect, json_rows, load_json
from hooked_vlm.data.samples import Sample, SampleError, Samples

OK_VQA_KINDS = {
    "one": "vehicles and transportation",
    "two": "brands, companies and products",
    "three": "objects, material and clothing",
    "four": "sports and recreation",
    "five": "cooking and food",
    "six": "geography, history, language and culture",
    "seven": "people and everyday life",
    "eight": "plants and animals",
    "nine": "science and technology",
    "ten": "weather and climate",
}
"""What OK-VQA's ``question_type`` stands for; "other" stands for itself."""


def read_vqa(
    path: str | Path,
    *,
    annotations: str | Path | None = None,
    images: Images = COCO,
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """VQA's and VQAv2's questions, such as ``v2_OpenEnded_mscoco_val2014_questions.json``.

    Args:
        path: an object with ``questions``, each with ``question_id``, ``image_id`` (a COCO id) and ``question``, and
            with ``data_subtype``, such as ``val2014``: pictures are ``val2014/COCO_val2014_000000000042.jpg``.
        annotations: the file that goes with it, such as ``v2_mscoco_val2014_annotations.json``: an object with
            ``annotations``, each with ``question_id``, ``answers`` (each with ``answer``) and, but for OK-VQA,
            ``multiple_choice_answer``; with ``answer_type`` and ``question_type``. Without it there are no answers.
        images: its fields are the ``id`` and the ``subset``.

    The answer is ``multiple_choice_answer``, or else the most frequent of ``answers`` (of several, the first), which
    are in ``meta`` with ``answer_type`` and ``question_type``. The group is ``answer_type``.
    """

    def group(note: Row | None) -> str | None:
        return None if note is None else note.maybe("answer_type")

    return _read(path, annotations, images, on_bad_row, limit, group)


def read_ok_vqa(
    path: str | Path,
    *,
    annotations: str | Path | None = None,
    images: Images = COCO,
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """OK-VQA's questions (Marino et al. 2019), such as ``OpenEnded_mscoco_val2014_questions.json``.

    As :func:`read_vqa`; the group is the kind of knowledge, which ``question_type`` stands for ("four": sports).
    """

    def group(note: Row | None) -> str | None:
        kind = None if note is None else note.maybe("question_type")
        return OK_VQA_KINDS.get(kind, kind) if kind else None

    return _read(path, annotations, images, on_bad_row, limit, group)


def _read(
    path: str | Path,
    annotations: str | Path | None,
    images: Images,
    on_bad_row: str,
    limit: int | None,
    group: Callable[[Row | None], str | None],
) -> Samples:
    found = load_json(path)
    subset = _subset(path, found)
    notes = {} if annotations is None else _by_question(annotations)

    def sample(row: Row) -> Sample:
        name, image = row.text("question_id"), row.integer("image_id")
        if annotations is not None and name not in notes:
            raise row.error("question_id", f"{name} is not in {annotations}", "a question without annotation")
        note = notes.get(name)
        answers = None if note is None else _answers(note)
        answer = None if note is None else _answer(note, answers)
        return Sample(
            name,
            picture(row, images, "{subset}/COCO_{subset}_{id:012d}.jpg", id=image, subset=subset),
            row.text("question"),
            answer,
            opposite(answer),
            group=group(note),
            meta={"image_id": image, **_meta(note, answers)},
        )

    rows = json_rows(path, "questions", found=found)
    return collect(rows, sample, on_bad_row=on_bad_row, limit=limit)


def _by_question(annotations: str | Path) -> dict[str, Row]:
    """The annotation of each question, by its id."""
    rows = json_rows(annotations, "annotations")
    return {str(row.values.get("question_id")): row for row in rows}


def _answers(note: Row) -> list[str]:
    found = note.value("answers", list)
    if not all(isinstance(one, dict) and isinstance(one.get("answer"), str) for one in found):
        raise note.error("answers", "these are not objects with an 'answer' each")
    return [one["answer"] for one in found]


def _answer(note: Row, answers: Sequence[str] | None) -> str:
    chosen = note.maybe("multiple_choice_answer")
    if chosen is not None:
        return chosen
    if not answers:
        raise note.error("answers", "there are none", "no answer")
    return Counter(answers).most_common(1)[0][0]


def _meta(note: Row | None, answers: Sequence[str] | None) -> dict[str, Any]:
    if note is None:
        return {}
    kept = {key: note.values[key] for key in ("answer_type", "question_type", "confidence") if key in note.values}
    return {"answers": answers, **kept}


def _subset(path: str | Path, found: Any) -> str:
    """``val2014`` and the like; the pictures of ``test-dev2015`` are among those of ``test2015``."""
    subset = found.get("data_subtype") if isinstance(found, dict) else None
    if not isinstance(subset, str) or not subset:
        raise SampleError(f"{path} has no 'data_subtype', so the names of its pictures are not known")
    return subset.replace("test-dev", "test")

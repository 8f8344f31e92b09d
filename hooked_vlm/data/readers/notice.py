"""The sample files of NOTICE (Golovanevsky et al. 2025): SVO-Probes, MIT-States and facial expressions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from hooked_vlm.data.readers.common import Images, picture, spans_in
from hooked_vlm.data.rows import Row, collect, csv_rows
from hooked_vlm.data.samples import Sample, Samples

COLUMNS = ("clean_prompt", "correct_answer")

PICTURES = (("clean_image_path", "corrupt_image_path"), ("correct_image_path", "incorrect_image_path"))
"""The columns of the two pictures: in the files for BLIP (and all of SVO-Probes), and in those for LLaVA."""

ELEMENTS = ("subj", "verb", "obj")
"""Of SVO-Probes: in which element of a triplet the two pictures differ (``subj_neg``, ``verb_neg``, ``obj_neg``)."""

# As many first letters an inflected word of the prompt must share with its option: "sitting" with "sit".
_STEM = 3


def read_notice(
    path: str | Path, *, images: Images = None, on_bad_row: str = "raise", limit: int | None = None
) -> Samples:
    """``BLIP_final_TASK.csv`` or ``LLAVA_final_TASK.csv`` of NOTICE (Golovanevsky et al. 2025).

    Columns: ``clean_prompt``, ``correct_answer``; ``clean_image_path`` and ``corrupt_image_path``, or in files for
    LLaVA ``correct_image_path`` and ``incorrect_image_path`` (the ``{path}`` of ``images``); ``corrupt_prompt`` (the
    question by symmetric token replacement, where the file has one); ``incorrect_answer`` (the foil), or of SVO-Probes
    ``pos_triplet``, ``neg_triplet``, ``subj_neg``, ``verb_neg`` and ``obj_neg``, from which it follows, and
    ``correct_answer_MC``, which wins over ``correct_answer``; ``correct_first``, or else found in the prompt. Others,
    such as ``generated_text``, go to ``meta``.

    The spans ``answer`` and ``foil`` are the two options. Where the prompt inflects one ("sit": "is he sitting or
    standing?"), it is the word beside "or" that begins alike; where none does, the span is missing. The ``noun`` of
    MIT-States is the span ``subject``. The group is the ``state`` (MIT-States), the element in question (SVO-Probes),
    or the emotion.
    """

    def sample(row: Row) -> Sample:
        clean, corrupt = next((pair for pair in PICTURES if pair[0] in row.values), PICTURES[0])
        question = row.text("clean_prompt")
        answer = row.maybe("correct_answer_MC") or row.text("correct_answer")
        foil = row.maybe("incorrect_answer") or _other_element(row, answer)
        options = {"answer": _option(question, answer), "foil": _option(question, foil)}
        spans = spans_in(question, {**options, "subject": row.maybe("noun")})
        return Sample(
            row.id,
            picture(row, images, "{path}", path=row.text(clean)),
            question,
            answer,
            foil,
            image_cf=picture(row, images, "{path}", path=row.text(corrupt)),
            question_cf=row.maybe("corrupt_prompt"),
            spans=spans,
            group=row.maybe("state") or _element(row) or answer,
            meta={**row.rest(*COLUMNS, clean, corrupt, "corrupt_prompt"), **_correct_first(row, spans)},
        )

    return collect(csv_rows(path, COLUMNS), sample, on_bad_row=on_bad_row, limit=limit)


def _element(row: Row) -> str | None:
    return next((name for name in ELEMENTS if f"{name}_neg" in row.values and row.flag(f"{name}_neg")), None)


def _other_element(row: Row, answer: str) -> str:
    """What the other picture of an SVO-Probes pair shows where this one shows the answer."""
    element = _element(row)
    if element is None:
        raise row.error("incorrect_answer", "there is none, and no 'subj_neg', 'verb_neg' or 'obj_neg' is true")
    index = ELEMENTS.index(element)
    pair = [_triplet(row, column)[index] for column in ("pos_triplet", "neg_triplet")]
    others = [word for word in pair if word.lower() != answer.lower()]
    if len(others) != 1:
        raise row.error("correct_answer", f"{answer!r} is not one of {pair[0]!r} and {pair[1]!r}")
    return others[0]


def _triplet(row: Row, column: str) -> list[str]:
    """``subject,verb,object``, or a Python list whose first entry is that."""
    text = row.text(column)
    try:
        found = ast.literal_eval(text)
        text = found[0] if isinstance(found, list) and found else text
    except (ValueError, SyntaxError):
        pass
    words = [word.strip() for word in str(text).split(",")]
    if len(words) != len(ELEMENTS) or not all(words):
        raise row.error(column, f"{text!r} is not subject,verb,object")
    return words


def _option(question: str, option: str) -> str | None:
    """An option as it stands in the question, inflected perhaps."""
    if spans_in(question, {"option": option}):
        return option
    choice = re.search(r"(\w+) or (?:an? |the )?(\w+)", question)
    beside = choice.groups() if choice else ()
    alike = [word for word in beside if word.lower().startswith(option[:_STEM].lower())]
    return alike[0] if len(alike) == 1 else None


def _correct_first(row: Row, spans: dict[str, tuple[int, int]]) -> dict[str, bool]:
    if row.maybe("correct_first") is not None:
        return {"correct_first": row.flag("correct_first")}
    return {"correct_first": spans["answer"] < spans["foil"]} if {"answer", "foil"} <= spans.keys() else {}

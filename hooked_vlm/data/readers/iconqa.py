"""IconQA (Lu et al. 2021): questions about diagrams, with choices in words or in pictures, or a blank to fill in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hooked_vlm.data.readers.common import Images, picture
from hooked_vlm.data.rows import Row, collect, json_rows
from hooked_vlm.data.samples import Sample, Samples

KINDS = ("choose_txt", "choose_img", "fill_in_blank")


def read_iconqa(
    path: str | Path,
    *,
    images: Images = None,
    kinds: Sequence[str] = KINDS,
    splits: Sequence[str] = ("train", "val", "test"),
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """IconQA's ``problems.json``.

    An object from problem ids to ``question``, ``answer``, ``ques_type``, ``split`` and, for questions with choices,
    ``choices``, of which ``answer`` is the index; others go to ``meta``. The picture is
    ``iconqa/SPLIT/QUES_TYPE/ID/image.png``; a template has the fields ``id``, ``split``, ``kind`` and ``file``.

    The group is ``ques_type``. Of ``choose_txt`` the answer is the choice in words, and the foil the other one, if
    there are two. Of ``choose_img`` the choices are pictures, so that there is no answer in words: their paths and the
    right one's index are in ``meta``, as ``choices`` and ``answer_index``.

    Args:
        kinds: of which ``ques_type``.
        splits: of which ``split``. Samples of others are not counted as dropped.
    """

    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds are some of {', '.join(KINDS)}, not {', '.join(kinds) or 'none'}")

    def sample(row: Row) -> Sample:
        kind, split = row.one_of("ques_type", KINDS), row.text("split")

        def file(name: str) -> str:
            known = {"id": row.key, "split": split, "kind": kind, "file": name}
            return picture(row, images, "iconqa/{split}/{kind}/{id}/{file}", **known)

        answer: str | None = row.text("answer")
        foil: str | None = None
        meta = row.rest("question", "answer", "ques_type", "choices")
        if kind != "fill_in_blank":
            choices = [str(choice) for choice in row.value("choices", list)]
            index = row.integer("answer")
            if not 0 <= index < len(choices):
                raise row.error("answer", f"{index} is none of {len(choices)} choices, counted from 0")
            meta |= {"choices": choices, "answer_index": index}
            answer = choices[index]
            foil = choices[1 - index] if len(choices) == 2 else None
        if kind == "choose_img":
            meta["choices"] = [file(choice) for choice in meta["choices"]]
            answer, foil = None, None
        return Sample(row.key, file("image.png"), row.text("question"), answer, foil, group=kind, meta=meta)

    rows = (row for row in json_rows(path) if row.values.get("ques_type") in (*kinds, None))
    chosen = (row for row in rows if row.values.get("split") in (*splits, None))
    return collect(chosen, sample, on_bad_row=on_bad_row, limit=limit)

"""References to objects in pictures: FineCops-Ref (Liu et al. 2024) and COOCO (Merlo et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hooked_vlm.data.readers.common import Images, box_of, picture, spans_in
from hooked_vlm.data.rows import LeftOutError, Row, collect, json_rows, load_json
from hooked_vlm.data.samples import Sample, SampleError, Samples

EDITS = ("image", "text")
"""FineCops-Ref's ``negative_cate``: what of a positive sample was changed."""


def read_finecops(
    path: str | Path,
    *,
    images: Images = None,
    question: str = "{expression}",
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """FineCops-Ref in its COCO format, such as ``expression_pos_final_val_set_coco_format.json``.

    An object with ``images``, one for each expression, with ``id``, ``file_name`` (the ``{file}`` of ``images``),
    ``caption`` (the expression), ``width`` and ``height``; and ``annotations``, one for each of these, with
    ``image_id`` and ``bbox`` (x, y, width, height; the region ``object``). ``level`` and ``tuple_type`` go to ``meta``.

    Negative samples have besides ``negative_type`` (the group), ``negative_level``, ``positive_id`` and
    ``negative_cate``: "image" if the picture was changed so that nothing in it is what the expression says, or "text"
    if the expression was. Their answer is "no", and "yes" of the positive ones, which are in the group "positive".
    Where the positive sample is in the same file, a negative one has its picture as ``image_cf`` or its expression as
    ``question_cf``, of which the answer is "yes", the foil.

    Args:
        question: how an expression is asked, for example ``"is there {expression}"``.
    """
    found = load_json(path)

    def sample(row: Row) -> Sample:
        file, caption = row.text("file_name"), row.text("caption")
        kind = row.maybe("negative_type")
        size = (row.number("width"), row.number("height"))
        changed = {} if kind is None else _positive(row, images, question)
        asked = question.format(expression=caption)
        known = row.rest("file_name", "caption", "width", "height", "bbox", "segmentation", "image_id", "id", "file")
        return Sample(
            row.text("id"),
            picture(row, images, "{file}", file=file),
            asked,
            "yes" if kind is None else "no",
            "no" if kind is None else "yes",
            **changed,
            spans=spans_in(asked, {"expression": caption}),
            regions={"object": box_of(row, "bbox", row.value("bbox", list), size)},
            group=kind or "positive",
            meta={key: value for key, value in known.items() if key != "positive"},
        )

    return collect(_annotated(path, found), sample, on_bad_row=on_bad_row, limit=limit)


def _annotated(path: str | Path, found: Any) -> Iterator[Row]:
    """Each entry of ``images`` together with its annotation, and with the entry of its positive sample."""
    annotations = {str(row.values.get("image_id")): row for row in json_rows(path, "annotations", found=found)}
    entries = list(json_rows(path, "images", found=found))
    by_id = {str(row.values.get("id")): row.values for row in entries}
    for row in entries:
        note = annotations.get(str(row.values.get("id")))
        if note is None or row.fault:
            yield replace(row, fault=row.fault or "it has no annotation")
            continue
        positive = by_id.get(str(note.values.get("positive_id")))
        yield replace(row, values={**note.values, **row.values, "positive": positive}, fault=note.fault)


def _positive(row: Row, images: Images, question: str) -> dict[str, str]:
    """What the positive sample has in place of what was changed."""
    edit, positive = row.one_of("negative_cate", EDITS), row.values["positive"]
    if positive is None:
        return {}
    own = replace(row, values=positive)
    if edit == "image":
        return {"image_cf": picture(row, images, "{file}", file=own.text("file_name"))}
    return {"question_cf": question.format(expression=own.text("caption"))}


def read_cooco(
    path: str | Path,
    *,
    images: Images = None,
    question: str = "what is this object ?",
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """COOCO's data file: objects in scenes that they suit, and others put in their place.

    An object from the names of pictures (the ``{file}`` of ``images``) to ``scene``, ``target`` (the object that was
    there), ``target_bbox`` (x, y, width, height; the region ``object``), ``swapped_object`` (what is there instead),
    ``rel_level`` (how much it suits the scene: low, middle, high, or ``same_target``; the group) and ``rel_score``;
    ``excluded`` marks pictures not to be used, which are dropped. The name of a picture without change ends in
    ``_original.jpg`` (the group ``original``), and of one whose object was removed in ``_clean.jpg``: that has no
    object to ask for, so that it is no sample, but ``meta`` of the others has its path as ``clean``.

    The answer is the object that is there. A changed picture has the original as ``image_cf``, and its ``target`` as
    the foil, but for ``same_target``, where the answer stays the same. The file does not say how large pictures are, so
    that boxes are not held against them.

    Args:
        question: what is asked of every picture.
    """
    found = load_json(path)
    if not isinstance(found, dict):
        raise SampleError(f"{path} holds a {type(found).__name__}, not an object from pictures to what is in them")
    siblings = _siblings(found)

    def sample(row: Row) -> Sample:
        if row.values.get("excluded"):
            raise LeftOutError(f"{row.key} is marked as excluded", "excluded in the file")
        target = _words(row.text("target"))
        versions = siblings[_scene(row.key, row.values)]
        is_original = row.key.endswith(_ORIGINAL)
        answer = target if is_original else _words(row.text("swapped_object"))
        original = None if is_original else versions.get(_ORIGINAL)
        paths = {kind: picture(row, images, "{file}", file=name) for kind, name in versions.items()}
        meta = {**row.rest("target_bbox", "fixations", "excluded"), "file": row.key}
        return Sample(
            row.key.rpartition(".")[0],
            picture(row, images, "{file}", file=row.key),
            question,
            answer,
            target if not is_original and target != answer else None,
            image_cf=None if original is None else paths[_ORIGINAL],
            regions={"object": box_of(row, "target_bbox", row.value("target_bbox", list))},
            group=row.maybe("rel_level") or ("original" if is_original else None),
            meta={**meta, **({"clean": paths[_CLEAN]} if _CLEAN in paths else {})},
        )

    rows = (row for row in json_rows(path, found=found) if not row.key.endswith(_CLEAN))
    return collect(rows, sample, on_bad_row=on_bad_row, limit=limit)


_ORIGINAL, _CLEAN = "_original.jpg", "_clean.jpg"


def _scene(name: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """What all versions of a picture have in common: COCO's id, and the object that was there."""
    return name.partition("_")[0], str(values.get("target"))


def _siblings(found: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, str]]:
    """The names of the original picture and of the one without the object, for each scene."""
    siblings: dict[tuple[str, str], dict[str, str]] = {}
    for name, values in found.items():
        versions = siblings.setdefault(_scene(name, values if isinstance(values, dict) else {}), {})
        versions.update({kind: name for kind in (_ORIGINAL, _CLEAN) if name.endswith(kind)})
    return siblings


def _words(name: str) -> str:
    return name.replace("_", " ")

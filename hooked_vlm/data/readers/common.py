"""What readers share: where pictures are, boxes, words of a question, and answers that have one alternative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hooked_vlm.data.pictures import resolve
from hooked_vlm.data.rows import Row
from hooked_vlm.data.samples import SampleError, span_of

Images: TypeAlias = str | Path | None
"""Where pictures are: a folder, the beginning of an address, or a template for the whole of either, such as
``http://images.cocodataset.org/train2017/{id:012d}.jpg``; None for the folder of the file that names them."""

COCO = "http://images.cocodataset.org"

Box: TypeAlias = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

SLACK = 2.0
"""Pixels by which a published box may reach out of its picture, and is cut off there: boxes of Visual Genome, and so of
GQA, often do by one. Beyond that it is another picture's box, or no box."""


def picture(row: Row, images: Images, name: str, **fields: Any) -> str:
    """The path or address of a row's picture.

    Args:
        images: a template is filled in with ``fields``; below a folder or an address the picture is called ``name``,
            filled in likewise.
        fields: what the reader knows of the picture: its ``id``, its ``path``.

    Raises:
        RowError: a template with other fields.
    """
    is_template = isinstance(images, str) and "{" in images
    try:
        filled = (str(images) if is_template else name).format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{field}}} ({value!r})" for field, value in fields.items())
        raise row.error(None, f"images={images!r} cannot be filled in ({error}); its fields are {known}") from None
    return filled if is_template else resolve(filled, row.path.parent if images is None else images)


def box_of(
    row: Row, column: str, xywh: Sequence[float], size: tuple[float, float] | None = None, slack: float = SLACK
) -> Box:
    """A box that is given as x, y, width and height, in a picture of ``size`` (width, height).

    Raises:
        RowError: a box that is empty, or that reaches out of the picture by more than ``slack``.
    """
    if len(xywh) != 4 or not all(isinstance(side, int | float) for side in xywh):
        raise row.error(column, f"{xywh!r} is not a box: x, y, width, height", "a malformed box")
    x, y, width, height = (float(side) for side in xywh)
    left, top, right, bottom = x, y, x + width, y + height
    if size is not None:
        if max(-left, -top, right - size[0], bottom - size[1]) > slack:
            raise row.error(
                column,
                f"the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) reaches out of the picture of "
                f"{size[0]:g}x{size[1]:g} pixels",
                "a box outside the picture",
            )
        left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1])
    if not (left < right and top < bottom):
        raise row.error(column, f"the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) is empty", "an empty box")
    return left, top, right, bottom


def spans_in(question: str, phrases: Mapping[str, str | None]) -> dict[str, tuple[int, int]]:
    """Which characters of a question the phrases are, by name, of those that occur in it as whole words."""
    found = {}
    for name, phrase in phrases.items():
        try:
            found[name] = span_of(question, phrase or "")
        except SampleError:
            continue
    return found


def noun_in(question: str, noun: str | None) -> str | None:
    """A noun as it stands in a question, in the singular or the plural; None if it does not."""
    if noun is None:
        return None
    forms = (noun, f"{noun}s", f"{noun}es", noun.removesuffix("s"))
    return next((form for form in forms if spans_in(question, {"noun": form})), None)


def opposite(answer: str | None) -> str | None:
    """The foil of "yes" and of "no"; None for other answers."""
    return {"yes": "no", "no": "yes"}.get((answer or "").lower())

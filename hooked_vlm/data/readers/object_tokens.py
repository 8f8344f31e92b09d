"""The object-token file of Neo et al. (2025): COCO pictures with one small object, and questions about some."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from hooked_vlm.data.readers.common import COCO, Images, picture
from hooked_vlm.data.rows import Row, collect, load_json
from hooked_vlm.data.samples import Sample, SampleError, Samples

AREA = (1000, 2000)
"""Between which sizes, in pixels, an object is small."""

MOST_OBJECTS = 3
"""The most objects that a picture may have annotated."""


def read_object_tokens(
    path: str | Path,
    *,
    instances: str | Path | None = None,
    question: str | None = None,
    images: Images = f"{COCO}/train2017/{{id:012d}}.jpg",
    on_bad_row: str = "raise",
    limit: int | None = None,
) -> Samples:
    """``clean_questions.json`` of Neo et al. (2025).

    An object from COCO ids of train2017 to lists of questions, most of them empty; each question is a sample.

    Args:
        instances: COCO's ``instances_train2017.json``, which says what the object is: of a picture with at most three
            annotations, the first of 1000 to 2000 pixels that is the only one of its category. The category is then
            the answer and the group, and its segmentation (filled as Pillow fills polygons) the region ``object``.
        question: what to ask of the pictures that have no question of their own, as "Describe this image." in the
            paper's first experiment; without it, there is no sample of them.
    """
    objects = None if instances is None else Instances.of(instances)

    def sample(row: Row) -> Sample:
        number = row.integer("image_id")
        target = None if objects is None else objects.small_object(number)
        if objects is not None and target is None:
            raise row.error("image_id", f"{instances} has no single small object in {number}", "no small object")
        category = None if target is None else target.category
        return Sample(
            f"{number}:{row.index}" if row.index else str(number),
            picture(row, images, "{id:012d}.jpg", id=number),
            row.text("question"),
            category,
            regions={} if target is None else {"object": target.mask},
            group=category,
            meta={"image_id": number},
        )

    return collect(_questions(path, question), sample, on_bad_row=on_bad_row, limit=limit)


def _questions(path: str | Path, default: str | None) -> Iterator[Row]:
    found = load_json(path)
    if not isinstance(found, dict):
        raise SampleError(f"{path} holds a {type(found).__name__}, not an object from picture ids to questions")
    for key, questions in found.items():
        place = f"[{json.dumps(key)}]"
        if not isinstance(questions, list):
            yield Row(Path(path), place, {}, fault=f"{questions!r} is no list of questions")
            continue
        for index, question in enumerate(questions or [default] * (default is not None)):
            yield Row(Path(path), f"{place}[{index}]", {"image_id": key, "question": question}, index)


@dataclass(frozen=True, eq=False)
class Target:
    """One annotated object: what it is, and which pixels it covers."""

    category: str
    annotation: Mapping[str, Any]
    size: tuple[int, int]
    """(width, height) of the picture."""

    @property
    def mask(self) -> Bool[np.ndarray, "height width"]:
        return segmentation_mask(self.annotation["segmentation"], self.size)


@dataclass(frozen=True, eq=False)
class Instances:
    """COCO's object annotations (``instances_*.json``), by picture."""

    annotations: Mapping[int, Sequence[Mapping[str, Any]]]
    sizes: Mapping[int, tuple[int, int]]
    categories: Mapping[int, str]

    @classmethod
    def of(cls, path: str | Path) -> Instances:
        """Raises :class:`SampleError` for a file of another form."""
        found = load_json(path)
        annotations: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        try:
            for one in found["annotations"]:
                annotations[one["image_id"]].append(one)
            sizes = {one["id"]: (one["width"], one["height"]) for one in found["images"]}
            categories = {one["id"]: one["name"] for one in found["categories"]}
        except (KeyError, TypeError) as error:
            raise SampleError(f"{path} is no file of COCO's object annotations: {error!r}") from error
        return cls(annotations, sizes, categories)

    def small_object(self, image: int) -> Target | None:
        """The picture's one object of a kind that is small; None if it has none, or too many objects."""
        here = self.annotations.get(image, ())
        kinds = [one["category_id"] for one in here]
        if image not in self.sizes or len(here) > MOST_OBJECTS:
            return None
        small = [one for one in here if kinds.count(one["category_id"]) == 1 and AREA[0] < one["area"] < AREA[1]]
        return Target(self.categories[small[0]["category_id"]], small[0], self.sizes[image]) if small else None


def segmentation_mask(segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """COCO's segmentation as a mask: a list of polygons (x, y, x, y, ...), or runs down the columns, first outside.

    Raises:
        SampleError: another form, or runs of another number of pixels than ``size`` (width, height) has.
    """
    from PIL import Image, ImageDraw

    width, height = size
    if isinstance(segmentation, Mapping) and isinstance(segmentation.get("counts"), list):
        counts = segmentation["counts"]
        if sum(counts) != width * height:
            raise SampleError(f"the segmentation has runs of {sum(counts)} pixels, and the picture {width * height}")
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return flat.reshape(width, height).T.copy()
    if not isinstance(segmentation, list) or not all(isinstance(one, list) and len(one) >= 6 for one in segmentation):
        raise SampleError("the segmentation is neither a list of polygons nor an object with the 'counts' of its runs")
    canvas = Image.new("1", size)
    draw = ImageDraw.Draw(canvas)
    for polygon in segmentation:
        draw.polygon(polygon, fill=1)
    return np.asarray(canvas, dtype=bool)

"""VQA-Constraints (Basu et al. 2024): questions with the phrase that stands for what the picture shows."""

from __future__ import annotations

from pathlib import Path

from hooked_vlm.data.readers.common import Images, picture
from hooked_vlm.data.rows import Row, collect, csv_rows
from hooked_vlm.data.samples import Sample, SampleError, Samples, span_of

COLUMNS = ("question", "main_entity", "image_url")


def read_constraints(
    path: str | Path, *, images: Images = None, on_bad_row: str = "raise", limit: int | None = None
) -> Samples:
    """``okvqa.csv``, ``multimodal_known.csv`` or ``multimodal_movies.csv`` of VQA-Constraints (Basu et al. 2024).

    Columns: ``question``, ``main_entity`` (the constraint, which becomes the span of that name), ``image_url`` (a path
    such as ``./val2014/COCO_val2014_000000297147.jpg`` or ``./A photo of Space Needle``, as the ``{path}`` of
    ``images``), and an index without a name, which becomes the sample's id; others (``subject``, ``director``) go to
    ``meta``. There are no answers. The group is the file's name.

    Some constraints do not occur in their question. These rows are malformed; give ``on_bad_row="skip"`` to drop them.
    """

    def sample(row: Row) -> Sample:
        question, constraint = row.text("question"), row.text("main_entity")
        try:
            span = span_of(question, constraint)
        except SampleError as error:
            raise row.error("main_entity", str(error), "a constraint that is not in the question") from error
        return Sample(
            f"{row.path.stem}:{row.maybe('') or row.index}",
            picture(row, images, "{path}", path=row.text("image_url").removeprefix("./")),
            question,
            spans={"constraint": span},
            group=row.path.stem,
            meta=row.rest(*COLUMNS),
        )

    return collect(csv_rows(path, COLUMNS), sample, on_bad_row=on_bad_row, limit=limit)

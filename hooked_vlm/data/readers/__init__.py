"""Readers of published sample files: each takes a path, and gives :class:`~hooked_vlm.data.Samples`.

All take ``images`` (where the pictures are: a folder, the beginning of an address, or a template), ``on_bad_row``
("raise", or "skip" to count malformed rows in ``dropped``) and ``limit``. Pictures are looked for when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hooked_vlm.data.manifest import SUFFIXES, read_manifest
from hooked_vlm.data.readers.clevr import clevr_worlds, read_clevr
from hooked_vlm.data.readers.concept_sets import binding_contrast, concept_sets, single_atom_accuracy
from hooked_vlm.data.readers.concepts import And, Atom, Concept, ConceptError, Not, Or, parse_concept
from hooked_vlm.data.readers.constraints import read_constraints
from hooked_vlm.data.readers.gqa import read_gqa, read_zhang
from hooked_vlm.data.readers.iconqa import read_iconqa
from hooked_vlm.data.readers.notice import read_notice
from hooked_vlm.data.readers.object_tokens import read_object_tokens
from hooked_vlm.data.readers.palit import read_clevr_pairs, read_coco_qa
from hooked_vlm.data.readers.references import read_cooco, read_finecops
from hooked_vlm.data.readers.shapeworld import read_shapeworld, shapeworld_worlds
from hooked_vlm.data.readers.vqa import read_ok_vqa, read_vqa
from hooked_vlm.data.readers.worlds import Thing, World, Worlds, shape_worlds
from hooked_vlm.data.rows import nearest
from hooked_vlm.data.samples import SampleError, Samples

READERS: dict[str, Callable[..., Samples]] = {
    "clevr": read_clevr,
    "clevr-pairs": read_clevr_pairs,
    "coco-qa": read_coco_qa,
    "constraints": read_constraints,
    "cooco": read_cooco,
    "finecops": read_finecops,
    "gqa": read_gqa,
    "iconqa": read_iconqa,
    "manifest": read_manifest,
    "notice": read_notice,
    "object-tokens": read_object_tokens,
    "ok-vqa": read_ok_vqa,
    "shapeworld": read_shapeworld,
    "vqa": read_vqa,
    "zhang": read_zhang,
}
"""Every reader, by the name of its format."""


def read_samples(path: str | Path, format: str | None = None, **options: Any) -> Samples:
    """The samples of a file in one of the formats of :data:`READERS`; without ``format``, of a manifest.

    Args:
        options: the reader's own.

    Raises:
        SampleError: a format that is not known, a file that is no manifest, or what the reader raises.
    """
    if format is not None and format not in READERS:
        raise SampleError(f"no format is called {format!r}; there are {', '.join(READERS)}{nearest(format, READERS)}")
    if format is None and Path(path).suffix.lower() not in SUFFIXES:
        raise SampleError(
            f"{path} is no manifest, which ends in {' or '.join(SUFFIXES)}; say which format it has: "
            f"{', '.join(name for name in READERS if name != 'manifest')}"
        )
    return READERS[format or "manifest"](path, **options)


__all__ = [
    "READERS",
    "And",
    "Atom",
    "Concept",
    "ConceptError",
    "Not",
    "Or",
    "Thing",
    "World",
    "Worlds",
    "binding_contrast",
    "clevr_worlds",
    "concept_sets",
    "parse_concept",
    "read_clevr",
    "read_clevr_pairs",
    "read_coco_qa",
    "read_constraints",
    "read_cooco",
    "read_finecops",
    "read_gqa",
    "read_iconqa",
    "read_notice",
    "read_object_tokens",
    "read_ok_vqa",
    "read_samples",
    "read_shapeworld",
    "read_vqa",
    "read_zhang",
    "shape_worlds",
    "shapeworld_worlds",
    "single_atom_accuracy",
]

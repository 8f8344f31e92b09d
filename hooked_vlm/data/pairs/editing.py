"""A sample's own picture with a region painted anew, and all else as it was."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool
from torch.nn import functional as F

from hooked_vlm.data.pairs.editors import ImageEditor
from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.files import whole_file
from hooked_vlm.patches import Region, region_cells

if TYPE_CHECKING:
    from PIL.Image import Image

Prompt: TypeAlias = str | Callable[[Sample], str]


@dataclass(frozen=True)
class Edits:
    """How pictures are edited, and where they are kept."""

    editor: ImageEditor
    region: str
    prompt: Prompt
    dilate: int
    folder: Path | None
    seed: int

    def __post_init__(self) -> None:
        if self.dilate < 0:
            raise ValueError(f"a region is made larger by 0 pixels or more, not {self.dilate}")

    def __call__(self, sample: Sample) -> Sample:
        """The sample with its picture edited.

        Raises:
            SampleError: no such region, or one outside of the picture; nothing that the prompt needs; an edit that
                changes nothing.
            ImageError: a picture that cannot be read.
        """
        if self.region not in sample.regions:
            known = ", ".join(sample.regions) or "none"
            raise SampleError(
                f"{sample.id} has no region {self.region!r}; it has {known}", f"no region {self.region!r}"
            )
        picture, prompt = sample.picture(), _prompt(sample, self.prompt)
        mask = _grown(_mask(sample, self.region, picture), self.dilate)
        seed = zlib.crc32(repr((self.seed, sample.id)).encode())
        how = {
            "editor": _name(self.editor),
            "region": self.region,
            "prompt": prompt,
            "dilate": self.dilate,
            "seed": seed,
        }
        return replace(sample, image_cf=self._kept(sample, picture, mask, how), meta={**sample.meta, "edit": how})

    def _kept(self, sample: Sample, picture: Image, mask: np.ndarray, how: Mapping[str, Any]) -> Image | str:
        if self.folder is None:
            return self._edited(sample, picture, mask, how)
        path = (
            self.folder
            / f"{re.sub(r'[^0-9A-Za-z._-]+', '_', sample.id)[:80]}-{_digest(sample, picture, mask, how)}.png"
        )
        if not path.exists():
            edited = self._edited(sample, picture, mask, how)
            with whole_file(path) as temporary:
                edited.save(temporary)
        return str(path)

    def _edited(self, sample: Sample, picture: Image, mask: np.ndarray, how: Mapping[str, Any]) -> Image:
        import PIL.Image

        edited = self.editor(picture, mask, how["prompt"], how["seed"])
        if not isinstance(edited, PIL.Image.Image) or edited.size != picture.size:
            given = edited.size if isinstance(edited, PIL.Image.Image) else type(edited).__name__
            raise ValueError(f"an editor gives a PIL picture of {picture.size}, as it was given, not {given}")
        old, new = (np.asarray(image.convert("RGB")) for image in (picture, edited))
        pixels = np.where(mask[..., None], new, old)
        if np.array_equal(pixels, old):
            raise SampleError(f"{sample.id}: the edit changes nothing", "an edit that changes nothing")
        return PIL.Image.fromarray(pixels)


def _mask(sample: Sample, name: str, picture: Image) -> Bool[np.ndarray, "height width"]:
    """The pixels that a region touches."""
    region: Region = sample.regions[name]
    try:
        xs, ys, inside = region_cells(region, (picture.height, picture.width))
    except ValueError as error:
        raise SampleError(f"{sample.id}: the region {name!r}: {error}", "a region that does not fit") from error
    if inside.shape == (picture.height, picture.width):
        return inside.astype(bool)
    mask = np.zeros((picture.height, picture.width), dtype=bool)
    mask[int(np.floor(ys[0])) : int(np.ceil(ys[1])), int(np.floor(xs[0])) : int(np.ceil(xs[1]))] = True
    return mask


def _grown(mask: Bool[np.ndarray, "height width"], by: int) -> Bool[np.ndarray, "height width"]:
    pixels = torch.from_numpy(mask).float()[None]
    return (F.max_pool2d(pixels, 2 * by + 1, stride=1, padding=by)[0] > 0).numpy()


def _prompt(sample: Sample, prompt: Prompt) -> str:
    if callable(prompt):
        return prompt(sample)
    known = {"answer": sample.answer, "foil": sample.foil, "question": sample.question, **sample.meta}
    for _, name, _, _ in Formatter().parse(prompt):
        if name is not None and known.get(name) is None:
            raise SampleError(f"{sample.id} has no {name!r}, which the prompt {prompt!r} needs", f"no {name!r}")
    return prompt.format_map(known)


def _name(editor: ImageEditor) -> str:
    """An editor's name and settings, the same in every run."""
    name = getattr(editor, "__qualname__", None) or repr(editor)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", name)


def _digest(sample: Sample, picture: Image, mask: np.ndarray, how: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(repr((sample.id, sorted(how.items()), picture.size)).encode())
    digest.update(np.packbits(mask).tobytes())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:12]

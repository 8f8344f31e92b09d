"""What changes a region of a picture: one plain filler, and inpainting with diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool

from hooked_vlm.data.samples import SampleError

if TYPE_CHECKING:
    from PIL.Image import Image


@runtime_checkable
class ImageEditor(Protocol):
    """Changes a picture where a mask says, as a prompt says; gives a picture of the same size.

    What it does outside of the mask is not used. A picture that it cannot change raises a :class:`SampleError`, and is
    dropped.
    """

    def __call__(self, image: Image, mask: Bool[np.ndarray, "height width"], prompt: str, seed: int) -> Image: ...


@dataclass(frozen=True)
class FillRegion:
    """One colour over the region, whatever the prompt: what was there is gone, and nothing is in its place.

    ``color``: red, green and blue, from 0 to 255, or the mean of the rest of the picture.
    """

    color: Literal["mean"] | tuple[int, int, int] = "mean"

    def __call__(self, image: Image, mask: Bool[np.ndarray, "height width"], prompt: str, seed: int) -> Image:
        import PIL.Image

        pixels = np.asarray(image.convert("RGB")).copy()
        if self.color == "mean":
            rest = pixels[~mask] if not mask.all() else pixels[mask]
            pixels[mask] = rest.mean(0).round()
        else:
            pixels[mask] = self.color
        return PIL.Image.fromarray(pixels)


@dataclass(frozen=True)
class DiffusersInpainting:
    """An inpainting pipeline of diffusers: the region is painted anew, as the prompt says (Bhattad et al. 2025).

    The pipeline is loaded when it is first called. What is None is left to it.

    Attributes:
        model_id: a hub id or a folder, for ``AutoPipelineForInpainting``.
        num_inference_steps, strength, guidance_scale, negative_prompt: as the pipeline takes them.
        multiple: of how many pixels its pictures' sides are; a picture is resized to the next larger, and back.
        pipeline: one that is loaded already.
    """

    model_id: str
    revision: str | None = None
    num_inference_steps: int | None = None
    strength: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    multiple: int = 8
    dtype: torch.dtype | None = None
    device: str | None = field(default=None, repr=False)
    """By default the GPU, where there is one."""
    pipeline: Any = field(default=None, repr=False, compare=False)

    def __call__(self, image: Image, mask: Bool[np.ndarray, "height width"], prompt: str, seed: int) -> Image:
        import PIL.Image

        width, height = (math.ceil(side / self.multiple) * self.multiple for side in image.size)
        painted = PIL.Image.fromarray(mask.astype(np.uint8) * 255)
        given = ("num_inference_steps", "strength", "guidance_scale", "negative_prompt")
        options = {name: getattr(self, name) for name in given if getattr(self, name) is not None}
        result = self._loaded(
            prompt=prompt,
            image=image.resize((width, height), PIL.Image.Resampling.LANCZOS),
            mask_image=painted.resize((width, height), PIL.Image.Resampling.NEAREST),
            height=height,
            width=width,
            # On the CPU, so that a seed gives the same noise on every device.
            generator=torch.Generator("cpu").manual_seed(seed),
            **options,
        )
        withheld: Sequence[bool] = getattr(result, "nsfw_content_detected", None) or [False]
        if withheld[0]:
            raise SampleError(
                "the pipeline's safety checker withheld the picture", "an edited picture that was withheld"
            )
        return result.images[0].convert("RGB").resize(image.size, PIL.Image.Resampling.LANCZOS)

    @cached_property
    def _loaded(self) -> Any:
        if self.pipeline is not None:
            return self.pipeline
        try:
            loader = import_module("diffusers").AutoPipelineForInpainting
        except ImportError as error:
            raise ImportError(
                f"DiffusersInpainting needs diffusers ({error}): pip install 'hooked-vlm[diffusers]'"
            ) from error
        revision = {} if self.revision is None else {"revision": self.revision}
        pipeline = loader.from_pretrained(self.model_id, **revision)
        pipeline.set_progress_bar_config(disable=True)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return pipeline.to(device) if self.dtype is None else pipeline.to(device, self.dtype)

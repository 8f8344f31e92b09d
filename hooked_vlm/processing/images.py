"""Pictures from files, arrays and PIL, upright and in RGB."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageError(ValueError):
    """A picture that cannot be read; says which, and why."""


def load_image(image: Any, *, what: str = "image") -> Image:
    """One upright RGB picture from a PIL image, a path, or an array.

    Arrays are ``[height width 3]`` or ``[3 height width]`` (4 channels with opacity), or two-dimensional for grey:
    uint8, or floats in 0..1. Transparency is put on white, as HF does; an EXIF rotation is carried out; 16 bits of grey
    become 8 (HF cuts them off at 255); of several frames the first is taken.

    Raises:
        ImageError: a file that is missing, truncated, no picture or suspiciously large; an array of another form.
    """
    import PIL.Image

    if isinstance(image, (str, Path)):
        return _read_file(image, f"{what} {image}")
    if isinstance(image, (np.ndarray, Tensor)):
        return _to_rgb(_from_array(_to_numpy(image), what), what)
    if isinstance(image, PIL.Image.Image):
        return _decode(image, what)
    raise ImageError(f"{what} is a {type(image).__name__}; give a PIL image, a path or an array")


def load_images(images: Any) -> list[Image]:
    """A list of pictures from one or several; see :func:`load_image`."""
    import PIL.Image

    is_array = isinstance(images, (np.ndarray, Tensor))
    if isinstance(images, (str, Path, PIL.Image.Image)) or (is_array and images.ndim <= 3):
        return [load_image(images)]
    if not is_array and not isinstance(images, Iterable):
        raise ImageError(f"images are a {type(images).__name__}; give PIL images, paths or arrays")
    pictures = [load_image(image, what=f"image {index}") for index, image in enumerate(images)]
    if not pictures:
        raise ImageError("no images were given")
    return pictures


def _read_file(path: str | Path, what: str) -> Image:
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            opened = PIL.Image.open(path)
    except FileNotFoundError as error:
        raise ImageError(f"{what} does not exist") from error
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise ImageError(
            f"{what} is too large to be safe ({error}); give a smaller one, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # decoders raise what they like
        raise ImageError(f"{what} cannot be read as a picture: {error}") from error
    with opened:
        return _decode(opened, what)


def _decode(image: Image, what: str) -> Image:
    try:
        image.load()
        return _to_rgb(_upright(image), what)
    except ImageError:
        raise
    except Exception as error:  # decoders raise what they like
        raise ImageError(f"{what} cannot be read, its data are damaged: {error}") from error


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data beside a good picture
        return image


def _to_numpy(array: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    return (array.float() if array.dtype == torch.bfloat16 else array).numpy()


def _from_array(array: np.ndarray, what: str) -> Image:
    import PIL.Image

    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ImageError(f"{what} has shape {array.shape}; give [height width 3], [3 height width] or [height width]")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageError(f"{what} holds floats outside 0..1; give uint8, or floats in 0..1")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"{what} has dtype {array.dtype}; give uint8, or floats in 0..1")
    return PIL.Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image, what: str) -> Image:
    import PIL.Image

    if 0 in image.size:
        raise ImageError(f"{what} is empty: {image.width}x{image.height} pixels")
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ImageError(
            f"{what} has 32 bits of grey (mode {image.mode}), and which of them are black and white is not said; "
            "give 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

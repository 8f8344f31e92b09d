"""Pictures and texts to :class:`VLMInputs`, through the checkpoint's own HF processor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.config import BlipConfig
from hooked_vlm.inputs import Span, TextPiece, VLMInputs

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageError(ValueError):
    """A picture that cannot be read; says which, and why."""


def load_processor(name_or_path: str | Path) -> Any:
    """The HF processor of a checkpoint; transformers finds its class."""
    from transformers import AutoProcessor

    if not str(name_or_path):
        raise ValueError("the model has no processor: pass processor= when loading it")
    try:
        return AutoProcessor.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no processor at {name_or_path} ({reason}); pass processor= when loading the model"
        ) from error


def load_image(image: Any, *, what: str = "image") -> Image:
    """One upright RGB picture from a PIL image, a path, or an array.

    Arrays are ``[height width 3]`` or ``[3 height width]``, or two-dimensional for grey: uint8, or floats in 0..1.
    Transparency is put on white, as HF does; an EXIF rotation is carried out.

    Raises:
        ImageError: a file that is missing, truncated, no picture or suspiciously large; an array of another form.
    """
    import PIL.Image
    from PIL import ImageOps

    if isinstance(image, (str, Path)):
        what = f"{what} {image}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            if isinstance(image, (str, Path)):
                image = PIL.Image.open(image)
            elif isinstance(image, (np.ndarray, Tensor)):
                image = _from_array(np.asarray(image), what)
            elif not isinstance(image, PIL.Image.Image):
                raise ImageError(f"{what} is a {type(image).__name__}; give a PIL image, a path or an array")
            image = ImageOps.exif_transpose(image)
            image.load()
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise ImageError(f"{what} is too large to be safe: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{what} does not exist") from error
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{what} cannot be read: {error}") from error
    return _to_rgb(image)


def load_images(images: Any) -> list[Image]:
    """A list of pictures from one or several; see :func:`load_image`."""
    import PIL.Image

    if isinstance(images, (str, Path, PIL.Image.Image)) or (
        isinstance(images, (np.ndarray, Tensor)) and images.ndim <= 3
    ):
        return [load_image(images)]
    pictures = [load_image(image, what=f"image {index}") for index, image in enumerate(images)]
    if not pictures:
        raise ImageError("no images were given")
    return pictures


def _from_array(array: np.ndarray, what: str) -> Image:
    import PIL.Image

    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
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
    return PIL.Image.fromarray(array)


def _to_rgb(image: Image) -> Image:
    import PIL.Image

    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def blip_inputs(
    processor: Any,
    config: BlipConfig,
    images: Any,
    texts: str | Sequence[str] | None,
    *,
    text_tower: str,
    text_span: str,
    last_tower: str,
    interpolate_pos_encoding: bool = False,
) -> VLMInputs:
    """What BLIP's ``prepare`` methods share. ``text_span`` names the span of the text's own words."""
    pictures = load_images(images)
    texts = [texts] if isinstance(texts, str) else None if texts is None else list(texts)
    if texts is not None and len(pictures) == 1:
        pictures = pictures * len(texts)
    if texts is not None and len(texts) != len(pictures):
        raise ValueError(f"{len(pictures)} images and {len(texts)} texts: give one text an image, or one image")
    pixel_values = _pixels(processor, pictures, keep_size=interpolate_pos_encoding)
    n_patches = (pixel_values.shape[-2] // config.vision.patch_size) * (
        pixel_values.shape[-1] // config.vision.patch_size
    )
    spans = {"image": _same_in_all("vision_encoder", range(1, n_patches + 1), len(pictures))}
    if texts is None:
        spans["last"] = _same_in_all(last_tower, [0], len(pictures))
        return VLMInputs(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            spans=spans,
            text_tower=text_tower,
        )
    text = _text(processor, config, texts, first={"text_decoder": config.bos_token_id}.get(text_tower))
    words = tuple(
        tuple(position for position, offset in enumerate(piece.offsets) if offset is not None)
        for piece in text["texts"]
    )
    spans[text_span] = Span(text_tower, words)
    lengths = text["attention_mask"].sum(1).tolist()
    last = [length - 1 for length in lengths] if last_tower == text_tower == "text_decoder" else [0] * len(texts)
    spans["last"] = Span(last_tower, tuple((position,) for position in last))
    return VLMInputs(
        pixel_values=pixel_values,
        interpolate_pos_encoding=interpolate_pos_encoding,
        spans=spans,
        text_tower=text_tower,
        **text,
    )


def _pixels(processor: Any, pictures: list[Image], *, keep_size: bool) -> Float[Tensor, "b 3 height width"]:
    # `keep_size`: the picture's own size, for position embeddings that are resized to it.
    options = {"do_resize": False} if keep_size else {}
    return processor.image_processor(pictures, return_tensors="pt", **options).pixel_values


def _text(processor: Any, config: BlipConfig, texts: list[str], *, first: int | None) -> dict[str, Any]:
    """Token ids padded on the right, token strings and character offsets.

    ``first``: the token that takes ``[CLS]``'s place in a text that is to be continued, which then has no ``[SEP]``.
    """
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"text {index} is empty")
    tokenizer = processor.tokenizer
    encoded = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    rows = []
    for text, ids, offsets, special in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
    ):
        if first is not None:
            ids, offsets, special = [first, *ids[1:-1]], offsets[:-1], special[:-1]
        if len(ids) > config.text.n_ctx:
            raise ValueError(
                f"a text of {len(ids)} tokens is too long for the model's {config.text.n_ctx}: {text[:60]!r}..."
            )
        places = tuple(
            None if is_special else tuple(offset) for offset, is_special in zip(offsets, special, strict=True)
        )
        rows.append((ids, TextPiece(text, places)))
    length = max(len(ids) for ids, _ in rows)
    padded = [ids + [config.pad_token_id] * (length - len(ids)) for ids, _ in rows]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
        "tokens": tuple(tuple(_token_strings(tokenizer, ids)) for ids in padded),
        "texts": tuple(piece for _, piece in rows),
    }


def _token_strings(tokenizer: Any, ids: list[int]) -> list[str]:
    # An id that the tokenizer does not know ([DEC] in some BLIP vocabularies) still has its number.
    return [
        token if token is not None else f"[{token_id}]"
        for token, token_id in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)
    ]


def _same_in_all(tower: str, positions: Sequence[int], rows: int) -> Span:
    return Span(tower, (tuple(positions),) * rows)

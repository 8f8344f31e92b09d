"""Pictures and texts to :class:`VLMInputs`, through the checkpoint's own HF processor."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.config import BlipConfig, ViTConfig
from hooked_vlm.inputs import Span, TextPiece, VLMInputs

if TYPE_CHECKING:
    from PIL.Image import Image


PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer.model")


class ImageError(ValueError):
    """A picture that cannot be read; says which, and why."""


def has_processor(processor: Any) -> bool:
    """Whether a processor, or the folder that it would be loaded from, is one."""
    return not isinstance(processor, Path) or any((processor / name).exists() for name in PROCESSOR_CONFIGS)


def load_processor(name_or_path: str | Path) -> Any:
    """The HF processor of a checkpoint, by embedded name, folder or hub id; transformers finds its class.

    Raises:
        ValueError: there is none, or not a whole one.
    """
    from transformers import AutoProcessor

    from hooked_vlm.loading import resolve

    if not str(name_or_path):
        raise ValueError("the model has no processor; pass processor= when loading it")
    try:
        folder = resolve(name_or_path, weights=False)
        for names in (PROCESSOR_CONFIGS, TOKENIZER_FILES):
            if not any((folder / name).exists() for name in names):
                raise FileNotFoundError(f"there is no {' or '.join(names)}")
        return AutoProcessor.from_pretrained(str(folder))
    except Exception as error:  # a damaged file can raise anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"no processor at {name_or_path} ({reason}); pass processor= when loading the model"
        ) from error


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
    if texts is not None and len(texts) != len(pictures) and (len(pictures) > 1 or not texts):
        raise ValueError(f"{len(pictures)} images and {len(texts)} texts: give one text an image, or one image")
    pixel_values = _pixels(processor, config.vision, pictures, keep_size=interpolate_pos_encoding)
    if texts is not None and len(pictures) == 1:
        pixel_values = pixel_values.repeat(len(texts), 1, 1, 1)
    patch = config.vision.patch_size
    n_patches = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
    inputs = VLMInputs(
        pixel_values=pixel_values,
        interpolate_pos_encoding=interpolate_pos_encoding,
        spans={
            "image": _same_in_all("vision_encoder", range(1, n_patches + 1), len(pixel_values)),
            "last": _same_in_all(last_tower, [0], len(pixel_values)),
        },
    )
    if texts is None:
        return inputs
    return with_texts(
        processor, config, inputs, texts, text_tower=text_tower, text_span=text_span, last_tower=last_tower
    )


def with_texts(
    processor: Any,
    config: BlipConfig,
    inputs: VLMInputs,
    texts: Sequence[str],
    *,
    text_tower: str,
    text_span: str,
    last_tower: str,
) -> VLMInputs:
    """``inputs`` with other texts, one a row."""
    if len(texts) != len(inputs):
        raise ValueError(f"{len(texts)} texts for {len(inputs)} rows")
    continues = text_tower == "text_decoder"
    text = _text(processor, config, list(texts), first=config.bos_token_id if continues else None)
    words = tuple(
        tuple(position for position, offset in enumerate(piece.offsets) if offset is not None)
        for piece in text["texts"]
    )
    lengths = text["attention_mask"].sum(1).tolist()
    last = [length - 1 if continues else 0 for length in lengths]
    spans = {
        **inputs.spans,
        text_span: Span(text_tower, words),
        "last": Span(last_tower, tuple((position,) for position in last)),
    }
    return replace(inputs, spans=spans, text_tower=text_tower, **text)


def _pixels(
    processor: Any, config: ViTConfig, pictures: list[Image], *, keep_size: bool
) -> Float[Tensor, "b 3 height width"]:
    """Pixel values in the model's image size; or in the pictures' own, for position embeddings that are resized."""
    if not keep_size:
        # Said, because the processor may be another checkpoint's: a research file has none.
        size = {"height": config.image_size, "width": config.image_size}
        return processor.image_processor(pictures, return_tensors="pt", size=size).pixel_values
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise ImageError(
            f"with interpolate_pos_encoding=True the images of a batch must have one size, not {listed}; "
            "resize them, or run them one at a time"
        )
    if min(min(size) for size in sizes) < config.patch_size:
        width, height = sizes.pop()
        raise ImageError(
            f"{width}x{height} pixels are smaller than one patch of {config.patch_size}x{config.patch_size}"
        )
    return processor.image_processor(pictures, return_tensors="pt", do_resize=False).pixel_values


def _text(processor: Any, config: BlipConfig, texts: list[str], *, first: int | None) -> dict[str, Any]:
    """Token ids padded on the right, token strings and character offsets.

    ``first``: the token that takes ``[CLS]``'s place in a text that is to be continued, which then has no ``[SEP]``.
    """
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {index} is a {type(text).__name__}, not a string")
        if not text.strip():
            raise ValueError(f"text {index} is empty")
    tokenizer = processor.tokenizer
    encoded = tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    rows = []
    columns = (encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
    for index, (text, ids, offsets, special) in enumerate(zip(texts, *columns, strict=True)):
        if first is not None:
            ids, offsets, special = [first, *ids[1:-1]], offsets[:-1], special[:-1]
        if len(ids) > config.text.n_ctx:
            raise ValueError(
                f"text {index} has {len(ids)} tokens, more than the model's {config.text.n_ctx}: {text[:60]!r}..."
            )
        if all(special):
            raise ValueError(f"text {index} has no words for the tokenizer: {text!r}")
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
        "tokens": tuple(tuple(token_strings(tokenizer, ids)) for ids in padded),
        "texts": tuple(piece for _, piece in rows),
    }


def token_strings(tokenizer: Any, ids: list[int]) -> list[str]:
    """Token ids as strings, for axes."""
    # An id that the tokenizer does not know ([DEC] in some BLIP vocabularies) still has its number.
    return [
        token if token is not None else f"[{token_id}]"
        for token, token_id in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)
    ]


def _same_in_all(tower: str, positions: Sequence[int], rows: int) -> Span:
    return Span(tower, (tuple(positions),) * rows)

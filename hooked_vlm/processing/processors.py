"""A checkpoint's own HF processor: loading it, and what all models ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.config import ViTConfig
from hooked_vlm.inputs import Span, TextPiece, VLMInputs
from hooked_vlm.patches import PatchGrid
from hooked_vlm.processing.images import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer.model")


def has_processor(processor: Any) -> bool:
    """Whether a processor, or the folder that it would be loaded from, is one."""
    return not isinstance(processor, Path) or any((processor / name).exists() for name in PROCESSOR_CONFIGS)


def load_processor(name_or_path: str | Path, *, reads_text: bool = True) -> Any:
    """The HF processor of a checkpoint, by embedded name, folder or hub id; transformers finds its class.

    Raises:
        ValueError: there is none, or not a whole one.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    from hooked_vlm.loading import resolve

    if not str(name_or_path):
        raise ValueError("the model has no processor; pass processor= when loading it")
    try:
        folder = resolve(name_or_path, weights=False)
        for names in (PROCESSOR_CONFIGS, TOKENIZER_FILES) if reads_text else (PROCESSOR_CONFIGS,):
            if not any((folder / name).exists() for name in names):
                raise FileNotFoundError(f"there is no {' or '.join(names)}")
        return (AutoProcessor if reads_text else AutoImageProcessor).from_pretrained(str(folder))
    except Exception as error:  # a damaged file can raise anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"no processor at {name_or_path} ({reason}); pass processor= when loading the model"
        ) from error


def image_inputs(
    processor: Any, config: ViTConfig, images: Any, *, interpolate_pos_encoding: bool = False, **size: Any
) -> VLMInputs:
    """One picture a row, its patches in ``vision_encoder``. ``size``: what the image processor is told besides."""
    from hooked_vlm.processing.images import load_images

    pictures = load_images(images)
    image_processor = getattr(processor, "image_processor", processor)
    if interpolate_pos_encoding:
        pixel_values = _at_own_size(image_processor, config, pictures)
    else:
        pixel_values = image_processor(pictures, return_tensors="pt", **size).pixel_values
    rows, columns = (int(pixels) // config.patch_size for pixels in pixel_values.shape[-2:])
    positions = tuple(range(1, rows * columns + 1))
    grids = tuple(
        PatchGrid.of(
            None if interpolate_pos_encoding else image_processor,
            (picture.height, picture.width),
            positions,
            image_size=(picture.height, picture.width) if interpolate_pos_encoding else config.image_size,
            patch_size=config.patch_size,
            settings=size,
            tower="vision_encoder",
            image=row,
            row=row,
        )
        for row, picture in enumerate(pictures)
    )
    return VLMInputs(
        pixel_values=pixel_values,
        interpolate_pos_encoding=interpolate_pos_encoding,
        spans={
            "image": same_in_all("vision_encoder", positions, len(pictures)),
            "last": same_in_all("vision_encoder", [0], len(pictures)),
        },
        patch_grid=grids,
    )


def _at_own_size(image_processor: Any, config: ViTConfig, pictures: list[Image]) -> Float[Tensor, "b 3 height width"]:
    """Pixel values in the pictures' own size, for position embeddings that are resized."""
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
    no_crop = {"do_center_crop": False} if getattr(image_processor, "do_center_crop", None) else {}
    return image_processor(pictures, return_tensors="pt", do_resize=False, **no_crop).pixel_values


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, n_ctx: int, pad_token_id: int, first: int | None = None
) -> dict[str, Any]:
    """Token ids padded on the right, token strings and character offsets: entries of :class:`VLMInputs`.

    ``first``: the token that takes the first one's place in a text that is to be continued, which then has no end.
    """
    check_texts(texts)
    encoded = tokenizer(list(texts), return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    rows = []
    columns = (encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
    for index, (text, ids, offsets, special) in enumerate(zip(texts, *columns, strict=True)):
        if first is not None:
            ids, offsets, special = [first, *ids[1:-1]], offsets[:-1], special[:-1]
        if len(ids) > n_ctx:
            raise ValueError(f"text {index} has {len(ids)} tokens, more than the model's {n_ctx}: {text[:60]!r}...")
        if all(special):
            raise ValueError(f"text {index} has no words for the tokenizer: {text!r}")
        places = tuple(
            None if is_special else tuple(offset) for offset, is_special in zip(offsets, special, strict=True)
        )
        rows.append((ids, TextPiece(text, places)))
    length = max(len(ids) for ids, _ in rows)
    padded = [ids + [pad_token_id] * (length - len(ids)) for ids, _ in rows]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
        "tokens": tuple(tuple(token_strings(tokenizer, ids)) for ids in padded),
        "texts": tuple(piece for _, piece in rows),
    }


def check_texts(texts: Sequence[str]) -> None:
    """That each is a text, with something in it."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {index} is a {type(text).__name__}, not a string")
        if not text.strip():
            raise ValueError(f"text {index} is empty")


def words_of(texts: Sequence[TextPiece], tower: str) -> Span:
    """The positions of all that is no special token."""
    return Span(
        tower,
        tuple(
            tuple(position for position, offset in enumerate(piece.offsets) if offset is not None) for piece in texts
        ),
    )


def token_strings(tokenizer: Any, ids: list[int]) -> list[str]:
    """Token ids as strings, for axes."""
    # An id that the tokenizer does not know ([DEC] in some BLIP vocabularies) still has its number.
    return [
        token if token is not None else f"[{token_id}]"
        for token, token_id in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)
    ]


def labels_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """:func:`token_strings` that can be seen: a line break as ``\\n``."""
    return [token.replace("\n", "\\n") for token in token_strings(tokenizer, ids)]


def label_tokens(tokenizer: Any, ids: Int[Tensor, "b p"], mask: Int[Tensor, "b p"] | None) -> list[list[str]]:
    """Each position's token, row by row; empty strings for padding."""
    kept = torch.ones_like(ids) if mask is None else mask
    return [
        [token if keep else "" for token, keep in zip(labels_of(tokenizer, row), keeps, strict=True)]
        for row, keeps in zip(ids.tolist(), kept.tolist(), strict=True)
    ]


def label_patches(inputs: VLMInputs, config: ViTConfig) -> list[list[str]]:
    """Each position of a vision tower: the class token, then patches as row and column."""
    height, width = inputs.pixel_values.shape[-2:] if inputs.pixel_values is not None else (0, 0)
    patches = [
        f"{row},{column}" for row in range(height // config.patch_size) for column in range(width // config.patch_size)
    ]
    n_images = 0 if inputs.pixel_values is None else len(inputs.pixel_values)
    return [["[class]", *patches]] * n_images


def same_in_all(tower: str, positions: Sequence[int], rows: int) -> Span:
    """A span that is the same in every row."""
    return Span(tower, (tuple(positions),) * rows)

"""LLaVA's inputs: prompts with pictures in them.

A text that holds the image token is a whole prompt and is taken as it is; any other is a question, and is put into the
checkpoint's chat template. Rows are padded on the left, so that every row ends where its answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hooked_vlm.config import LlavaConfig
from hooked_vlm.inputs import Span, TextPiece, VLMInputs
from hooked_vlm.patches import NEWLINE, PatchGrid, image_tokens
from hooked_vlm.processing.images import load_images
from hooked_vlm.processing.processors import check_texts, token_strings

if TYPE_CHECKING:
    from PIL.Image import Image

TOWER = "language_model"
ANSWER_MARKS = ("ASSISTANT:", "[/INST]", "<|assistant|>", "<|im_start|>assistant", "assistant")
"""How prompts end, before the answer."""


@dataclass(frozen=True)
class Prompt:
    """What the language model is given: a whole prompt, with one image token a picture."""

    text: str
    question: tuple[int, int] | None
    """Which characters of it are the question."""
    adds_special_tokens: bool = True


@dataclass(frozen=True)
class Encoded:
    """One prompt's tokens, with every image token as often as its picture has features."""

    ids: list[int]
    piece: TextPiece
    images: list[tuple[int, ...]]
    """The positions of each picture."""

    def padded(self, length: int) -> Encoded:
        """The same, moved to the right end of ``length`` positions."""
        by = length - len(self.ids)
        return Encoded(
            self.ids,
            replace(self.piece, offsets=(None,) * by + self.piece.offsets),
            [tuple(position + by for position in positions) for positions in self.images],
        )


def llava_inputs(
    processor: Any, config: LlavaConfig, images: Any, texts: str | Sequence[str] | None, *, template: str | None = None
) -> VLMInputs:
    """What :meth:`HookedLlava.prepare` does."""
    if texts is None:
        raise ValueError("LLaVA needs a text: a question, or a whole prompt")
    texts = [texts] if isinstance(texts, str) else list(texts)
    check_texts(texts)
    marker = _marker(processor)
    pictures = _by_row(images, [text.count(marker) if marker in text else None for text in texts], marker)
    prompts = [_prompt(processor, text, len(row), template) for text, row in zip(texts, pictures, strict=True)]
    flat = [picture for row in pictures for picture in row]
    rows = [index for index, row in enumerate(pictures) for _ in row]
    sizes = [(picture.height, picture.width) for picture in flat]
    places = [_places(config, size) for size in sizes]
    encoded = _encode_all(
        processor, config, prompts, [[len(places[i]) for i in _of(rows, row)] for row in range(len(texts))]
    )
    positions = [positions for row in encoded for positions in row.images]
    grids = tuple(
        PatchGrid.of(
            processor.image_processor,
            size,
            image_size=config.vision.image_size,
            patch_size=config.vision.patch_size,
            pinpoints=config.pinpoints,
            has_class_token=config.select == "full",
            positions=positions[image],
            tower=TOWER,
            image=image,
            row=row,
        )
        for image, (size, row) in enumerate(zip(sizes, rows, strict=True))
    )
    pixels = processor.image_processor(flat, return_tensors="pt") if flat else {}
    return VLMInputs(
        pixel_values=pixels.get("pixel_values"),
        image_sizes=pixels.get("image_sizes") if config.pinpoints else None,
        image_rows=tuple(rows) if flat else None,
        patch_grid=grids,
        **_entries(processor, config, encoded, grids),
    )


def with_prompts(processor: Any, config: LlavaConfig, inputs: VLMInputs, texts: Sequence[str]) -> VLMInputs:
    """``inputs`` with other questions, one a row, each in its row's own prompt; or with other whole prompts."""
    if inputs.texts is None:
        raise ValueError("these inputs do not know their prompts; make them with model.prepare")
    if len(texts) != len(inputs):
        raise ValueError(f"{len(texts)} texts for {len(inputs)} rows")
    check_texts(texts)
    marker = _marker(processor)
    prompts = [_reworded(piece, text, marker) for piece, text in zip(inputs.texts, texts, strict=True)]
    rows = [grid.row for grid in inputs.patch_grid]
    counts = [[len(inputs.patch_grid[image].places) for image in _of(rows, row)] for row in range(len(texts))]
    encoded = _encode_all(processor, config, prompts, counts)
    positions = [positions for row in encoded for positions in row.images]
    grids = tuple(replace(grid, positions=own) for grid, own in zip(inputs.patch_grid, positions, strict=True))
    return replace(inputs, patch_grid=grids, **_entries(processor, config, encoded, grids))


def label_sequence(processor: Any, inputs: VLMInputs) -> list[list[str]]:
    """Each position of the language model: tokens, and patches as row and column (of several pictures or tiles, after
    their numbers); empty strings for padding."""
    assert inputs.input_ids is not None
    mask = torch.ones_like(inputs.input_ids) if inputs.attention_mask is None else inputs.attention_mask
    labels = [
        [token if keep else "" for token, keep in zip(token_strings(processor.tokenizer, ids), keeps, strict=True)]
        for ids, keeps in zip(inputs.input_ids.tolist(), mask.tolist(), strict=True)
    ]
    for grid in inputs.patch_grid:
        own = [other.image for other in inputs.patch_grid if other.row == grid.row]
        picture = f"{own.index(grid.image)}:" if len(own) > 1 else ""
        is_tiled = any(place.tile > 0 for place in grid.places)
        for position, place in zip(grid.positions, grid.places, strict=True):
            if place.tile == NEWLINE:
                labels[grid.row][position] = f"{picture}newline {place.row}"
                continue
            tile = f"{place.tile}/" if is_tiled else ""
            labels[grid.row][position] = f"{picture}{tile}" + (
                "[class]" if place.row < 0 else f"{place.row},{place.column}"
            )
    return labels


def _marker(processor: Any) -> str:
    return getattr(processor, "image_token", None) or "<image>"


def _of(rows: Sequence[int], row: int) -> list[int]:
    return [index for index, own in enumerate(rows) if own == row]


def _places(config: LlavaConfig, size: tuple[int, int]) -> tuple[Any, ...]:
    return image_tokens(
        size,
        image_size=config.vision.image_size,
        patch_size=config.vision.patch_size,
        pinpoints=config.pinpoints,
        has_class_token=config.select == "full",
    )


def _by_row(images: Any, counts: list[int | None], marker: str) -> list[list[Image]]:
    """Each row's pictures. ``counts``: how many image tokens a prompt holds; None for a question.

    Raises:
        ValueError: numbers of pictures and image tokens that do not fit.
    """
    n_rows = len(counts)
    if images is None:
        pictures: list[list[Image]] = [[] for _ in counts]
    elif isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images):
        if len(images) != n_rows:
            raise ValueError(f"pictures of {len(images)} rows, and {n_rows} texts")
        pictures = [
            load_images(row)
            if isinstance(row, (list, tuple)) and row
            else []
            if isinstance(row, (list, tuple))
            else load_images(row)
            for row in images
        ]
    else:
        flat = load_images(images)
        wanted = [1 if count is None else count for count in counts]
        if len(flat) == sum(wanted):
            starts = [sum(wanted[:row]) for row in range(n_rows)]
            pictures = [flat[start : start + count] for start, count in zip(starts, wanted, strict=True)]
        elif len(flat) == 1 and max(wanted) == 1:
            pictures = [flat * count for count in wanted]
        elif n_rows == 1 and counts[0] is None:
            pictures = [flat]
        else:
            raise ValueError(
                f"{len(flat)} images were given, and the texts have places for {sum(wanted)} "
                f"({', '.join(map(str, wanted))}): give as many as there are {marker}, or a list of images a text"
            )
    for row, (own, count) in enumerate(zip(pictures, counts, strict=True)):
        if count is not None and len(own) != count:
            raise ValueError(f"text {row} has {count} {marker} and {len(own)} images")
    return pictures


def _prompt(processor: Any, text: str, n_images: int, template: str | None) -> Prompt:
    marker = _marker(processor)
    if marker in text:
        return Prompt(text, _question_in(text, marker))
    if template is not None:
        if "{question}" not in template or template.count(marker) != n_images:
            raise ValueError(
                f"template {template!r} should hold {{question}}, and {marker} once for each of {n_images} images"
            )
        prompt, adds_special_tokens = template.replace("{question}", text), True
    elif getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        begin = processor.tokenizer.bos_token
        adds_special_tokens = not (begin and prompt.startswith(begin))
    else:
        prompt, adds_special_tokens = "USER: " + f"{marker}\n" * n_images + f"{text} ASSISTANT:", True
    start = prompt.rfind(text)
    return Prompt(prompt, None if start < 0 else (start, start + len(text)), adds_special_tokens)


def _question_in(prompt: str, marker: str) -> tuple[int, int] | None:
    """What is asked in a whole prompt: what follows the last picture, but for the mark where the answer begins."""
    start, end = prompt.rfind(marker) + len(marker), len(prompt.rstrip())
    mark = next((mark for mark in ANSWER_MARKS if prompt[start:end].endswith(mark)), "")
    own = prompt[start : end - len(mark)]
    start, end = start + len(own) - len(own.lstrip()), start + len(own.rstrip())
    return (start, end) if start < end else None


def _reworded(piece: TextPiece, text: str, marker: str) -> Prompt:
    if marker in text:
        if text.count(marker) != piece.text.count(marker):
            raise ValueError(
                f"{text!r} has {text.count(marker)} {marker}, and its row {piece.text.count(marker)} images"
            )
        return Prompt(text, _question_in(text, marker))
    if piece.question is None:
        raise ValueError(f"where the question is in {piece.text!r} is not known: give the whole prompt")
    start, end = piece.question
    return Prompt(piece.text[:start] + text + piece.text[end:], (start, start + len(text)))


def _encode_all(processor: Any, config: LlavaConfig, prompts: list[Prompt], counts: list[list[int]]) -> list[Encoded]:
    encoded = [
        _encode(processor, config, prompt, own, f"text {index}")
        for index, (prompt, own) in enumerate(zip(prompts, counts, strict=True))
    ]
    length = max(len(row.ids) for row in encoded)
    return [row.padded(length) for row in encoded]


def _encode(processor: Any, config: LlavaConfig, prompt: Prompt, counts: list[int], what: str) -> Encoded:
    """``counts``: how many features each picture has."""
    marker = _marker(processor)
    between = prompt.text.split(marker)
    expanded = between[0] + "".join(marker * count + text for count, text in zip(counts, between[1:], strict=True))
    coded = processor.tokenizer(
        expanded,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
        add_special_tokens=prompt.adds_special_tokens,
    )
    ids = list(coded["input_ids"])
    is_image = [token == config.image_token_id for token in ids]
    if sum(is_image) != sum(counts):
        raise ValueError(
            f"{what} has {sum(is_image)} tokens of id {config.image_token_id}, the model's image token, and {sum(counts)} "
            f"image features: the processor's {marker!r} should be that token"
        )
    if len(ids) > config.text.n_ctx and not config.text.stretches:
        raise ValueError(
            f"{what} has {len(ids)} tokens, {sum(counts)} of them of images: more than the model's context of "
            f"{config.text.n_ctx}"
        )
    # Back from the expanded text: where each picture's copies end, and how many characters they have added till then.
    ends, added, reached = [], [0], 0
    for text, count in zip(between, counts, strict=False):
        reached += len(text) + count * len(marker)
        ends.append(reached)
        added.append(added[-1] + (count - 1) * len(marker))
    offsets = tuple(
        None
        if special or image
        else (start - added[sum(start >= end for end in ends)], stop - added[sum(stop > end for end in ends)])
        for (start, stop), special, image in zip(
            coded["offset_mapping"], coded["special_tokens_mask"], is_image, strict=True
        )
    )
    image_positions = [position for position, image in enumerate(is_image) if image]
    starts = [sum(counts[:image]) for image in range(len(counts))]
    return Encoded(
        ids,
        TextPiece(prompt.text, offsets, prompt.question),
        [tuple(image_positions[start : start + count]) for start, count in zip(starts, counts, strict=True)],
    )


def _entries(
    processor: Any, config: LlavaConfig, encoded: list[Encoded], grids: tuple[PatchGrid, ...]
) -> dict[str, Any]:
    """Entries of :class:`VLMInputs` that depend on the text."""
    length = len(encoded[0].piece.offsets)
    padded = [[config.pad_token_id] * (length - len(row.ids)) + row.ids for row in encoded]
    questions = [() if row.piece.question is None else row.piece.positions_of(*row.piece.question) for row in encoded]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor([[0] * (length - len(row.ids)) + [1] * len(row.ids) for row in encoded]),
        "tokens": tuple(tuple(token_strings(processor.tokenizer, ids)) for ids in padded),
        "texts": tuple(row.piece for row in encoded),
        "text_tower": TOWER,
        "spans": {
            **_image_spans(grids, len(encoded)),
            "question": Span(TOWER, tuple(questions)),
            "last": Span(TOWER, ((length - 1,),) * len(encoded)),
        },
    }


def _image_spans(grids: tuple[PatchGrid, ...], n_rows: int) -> dict[str, Span]:
    """``image``; of its k-th picture ``image.k``; in LLaVA-NeXT ``image.k.tile.t`` (0 is the whole picture, small) and
    ``newline``."""
    found: dict[str, list[list[int]]] = {"image": [[] for _ in range(n_rows)]}

    def note(name: str, row: int, position: int) -> None:
        found.setdefault(name, [[] for _ in range(n_rows)])[row].append(position)

    seen = [0] * n_rows
    for grid in grids:
        name = f"image.{seen[grid.row]}"
        seen[grid.row] += 1
        for position, place in zip(grid.positions, grid.places, strict=True):
            note("image", grid.row, position)
            note(name, grid.row, position)
            if place.tile == NEWLINE:
                note("newline", grid.row, position)
            elif any(other.tile == NEWLINE for other in grid.places[-1:]):
                note(f"{name}.tile.{place.tile}", grid.row, position)
    return {name: Span(TOWER, tuple(map(tuple, rows))) for name, rows in found.items()}

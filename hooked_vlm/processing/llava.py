"""LLaVA's inputs: prompts with pictures in them.

A text that holds the image token is a whole prompt and is taken as it is; any other is a question, and is put into the
checkpoint's chat template. Rows are padded on the left, so that every row ends where its answer begins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from hooked_vlm.config import LlavaConfig
from hooked_vlm.inputs import Span, TextPiece, VLMInputs
from hooked_vlm.patches import NEWLINE, PatchGrid, Place, Size, image_tokens
from hooked_vlm.processing.images import load_images
from hooked_vlm.processing.processors import check_texts, label_tokens, token_strings

if TYPE_CHECKING:
    from PIL.Image import Image

TOWER = "language_model"
QUESTION_MARKS = (
    *("USER:", "Human:", "[INST]", "<|user|>", "<|im_start|>user"),
    "<|start_header_id|>user<|end_header_id|>",
)
"""What stands before a question in prompts."""
ANSWER_MARKS = (
    *("ASSISTANT:", "Assistant:", "[/INST]", "<|assistant|>", "<|im_start|>assistant"),
    "<|start_header_id|>assistant<|end_header_id|>",
    *("<|im_end|>", "<|eot_id|>", "<|end|>", "###"),
)
"""What stands between a question and its answer."""


@dataclass(frozen=True)
class Prompt:
    """What the language model is given: a whole prompt, with one image token a picture."""

    text: str
    question: tuple[int, int] | None
    """Which characters of it are the question."""
    adds_special_tokens: bool = True
    """Whether the tokenizer still has to add the first token."""

    @classmethod
    def around(cls, before: str, question: str, after: str, *, adds_special_tokens: bool = True) -> Prompt:
        return cls(before + question + after, (len(before), len(before) + len(question)), adds_special_tokens)


class Expanded:
    """A prompt with every image token as often as its picture has features."""

    def __init__(self, prompt: str, marker: str, counts: Sequence[int]) -> None:
        """``counts``: how many features each picture has."""
        first, *others = prompt.split(marker)
        copies = [marker * count for count in counts]
        self.text = first + "".join(copied + text for copied, text in zip(copies, others, strict=True))
        lengths = [len(text) + len(copied) for text, copied in zip([first, *others], copies, strict=False)]
        self._ends = list(accumulate(lengths))
        self._added = list(accumulate((len(copied) - len(marker) for copied in copies), initial=0))

    def back(self, start: int, stop: int) -> tuple[int, int]:
        """Where a token of the expanded text, from ``start`` to ``stop``, is in the prompt."""
        # No token reaches from before a picture to behind it.
        added = self._added[bisect_right(self._ends, start)]
        return start - added, stop - added


@dataclass(frozen=True)
class Encoded:
    """One prompt's tokens."""

    ids: list[int]
    piece: TextPiece
    images: list[tuple[int, ...]]
    """The positions of each picture."""

    def padded(self, length: int) -> Encoded:
        """The same tokens, at the right end of ``length`` positions."""
        by = length - len(self.ids)
        return Encoded(
            self.ids,
            replace(self.piece, offsets=(None,) * by + self.piece.offsets),
            [tuple(position + by for position in positions) for positions in self.images],
        )


# What the models call -------------------------------------------------------------------------------------------------


def llava_inputs(
    processor: Any, config: LlavaConfig, images: Any, texts: str | Sequence[str] | None, *, template: str | None = None
) -> VLMInputs:
    """What :meth:`HookedLlava.prepare` does."""
    if texts is None:
        raise ValueError("LLaVA needs a text: a question, or a whole prompt")
    texts = [texts] if isinstance(texts, str) else list(texts)
    check_texts(texts)
    pictures = _by_row(images, [text.count(_marker(processor)) or None for text in texts], _marker(processor))
    prompts = [_prompt(processor, text, len(row), template) for text, row in zip(texts, pictures, strict=True)]
    sizes = [[(picture.height, picture.width) for picture in row] for row in pictures]
    counts = [[len(_places(config, size)) for size in row] for row in sizes]
    encoded = _encode_all(processor, config, prompts, counts)
    grids = _grids(processor, config, sizes, encoded)
    entries = _entries(processor, config, encoded, grids)
    flat = [picture for row in pictures for picture in row]
    if not flat:
        return VLMInputs(**entries)
    # As HF's processor does, whatever its image processor says: pictures of fewer tiles get empty ones.
    pixels = processor.image_processor(flat, return_tensors="pt", **({"do_pad": True} if config.pinpoints else {}))
    return VLMInputs(
        pixel_values=pixels["pixel_values"],
        image_sizes=pixels["image_sizes"] if config.pinpoints else None,
        image_rows=tuple(grid.row for grid in grids),
        patch_grid=grids,
        **entries,
    )


def with_prompts(processor: Any, config: LlavaConfig, inputs: VLMInputs, texts: Sequence[str]) -> VLMInputs:
    """``inputs`` with other questions, one a row, each in its row's own prompt; or with other whole prompts."""
    if inputs.texts is None or inputs.tokens is None:
        raise ValueError("these inputs do not know their prompts; make them with model.prepare")
    if len(texts) != len(inputs):
        raise ValueError(f"{len(texts)} texts for {len(inputs)} rows")
    check_texts(texts)
    prompts = [
        _reworded(processor, piece, tokens, text, row)
        for row, (piece, tokens, text) in enumerate(zip(inputs.texts, inputs.tokens, texts, strict=True))
    ]
    counts: list[list[int]] = [[] for _ in texts]
    for grid in inputs.patch_grid:
        counts[grid.row].append(len(grid.places))
    encoded = _encode_all(processor, config, prompts, counts)
    positions = [positions for row in encoded for positions in row.images]
    grids = tuple(replace(grid, positions=own) for grid, own in zip(inputs.patch_grid, positions, strict=True))
    return replace(inputs, patch_grid=grids, **_entries(processor, config, encoded, grids))


def label_sequence(processor: Any, inputs: VLMInputs) -> list[list[str]]:
    """Each position of the language model: tokens, and patches as row and column (of several pictures or tiles, after
    their numbers); empty strings for padding."""
    assert inputs.input_ids is not None
    labels = label_tokens(processor.tokenizer, inputs.input_ids, inputs.attention_mask)
    for grid in inputs.patch_grid:
        own = [other.image for other in inputs.patch_grid if other.row == grid.row]
        picture = f"{own.index(grid.image)}:" if len(own) > 1 else ""
        is_tiled = any(place.tile == NEWLINE for place in grid.places)
        for position, place in zip(grid.positions, grid.places, strict=True):
            labels[grid.row][position] = picture + _label(place, is_tiled)
    return labels


def _label(place: Place, is_tiled: bool) -> str:
    if place.tile == NEWLINE:
        return f"newline {place.row}"
    patch = "[class]" if place.row < 0 else f"{place.row},{place.column}"
    return f"{place.tile}/{patch}" if is_tiled else patch


# Pictures -------------------------------------------------------------------------------------------------------------


def _by_row(images: Any, counts: Sequence[int | None], marker: str) -> list[list[Image]]:
    """Each row's pictures. ``counts``: how many image tokens a prompt holds; None for a question.

    Raises:
        ValueError: numbers of pictures and image tokens that do not fit.
    """
    if images is None:
        pictures: list[list[Image]] = [[] for _ in counts]
    elif isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images):
        if len(images) != len(counts):
            raise ValueError(f"pictures of {len(images)} rows, and {len(counts)} texts")
        pictures = [[] if isinstance(row, (list, tuple)) and not row else load_images(row) for row in images]
    else:
        pictures = _dealt(load_images(images), counts, marker)
    for row, (own, count) in enumerate(zip(pictures, counts, strict=True)):
        if count is not None and len(own) != count:
            raise ValueError(f"text {row} has {count} {marker} and {len(own)} images")
    return pictures


def _dealt(pictures: list[Image], counts: Sequence[int | None], marker: str) -> list[list[Image]]:
    """To each row as many pictures as it has places for, which a question does not say: mostly one."""
    if len(counts) == 1 and counts[0] is None:
        return [pictures]
    wanted = [1 if count is None else count for count in counts]
    if len(pictures) == 1 and set(wanted) == {1}:
        return [pictures for _ in counts]
    if len(pictures) != sum(wanted):
        raise ValueError(
            f"{len(pictures)} images were given, and the texts have places for {sum(wanted)} "
            f"({', '.join(map(str, wanted))}): give as many as there are {marker}, or a list of images a text"
        )
    stops = list(accumulate(wanted))
    return [pictures[stop - count : stop] for stop, count in zip(stops, wanted, strict=True)]


def _places(config: LlavaConfig, size: Size) -> tuple[Place, ...]:
    """The tokens of a picture of this size."""
    return image_tokens(
        size,
        image_size=config.vision.image_size,
        patch_size=config.vision.patch_size,
        pinpoints=config.pinpoints,
        has_class_token=config.select == "full",
    )


def _grids(
    processor: Any, config: LlavaConfig, sizes: Sequence[Sequence[Size]], encoded: Sequence[Encoded]
) -> tuple[PatchGrid, ...]:
    grids: list[PatchGrid] = []
    for row, (own, code) in enumerate(zip(sizes, encoded, strict=True)):
        for size, positions in zip(own, code.images, strict=True):
            grid = PatchGrid.of(
                processor.image_processor,
                size,
                positions,
                image_size=config.vision.image_size,
                patch_size=config.vision.patch_size,
                pinpoints=config.pinpoints,
                has_class_token=config.select == "full",
                tower=TOWER,
                image=len(grids),
                row=row,
            )
            grids.append(grid)
    return tuple(grids)


# Prompts --------------------------------------------------------------------------------------------------------------


def _marker(processor: Any) -> str:
    return getattr(processor, "image_token", None) or "<image>"


def _prompt(processor: Any, text: str, n_images: int, template: str | None) -> Prompt:
    marker = _marker(processor)
    if marker in text:
        return Prompt(text, _question_in(text, marker))
    if template is not None:
        if "{question}" not in template or template.count(marker) != n_images:
            raise ValueError(
                f"template {template!r} should hold {{question}}, and {marker} once for each of {n_images} images"
            )
        before, _, after = template.rpartition("{question}")
        return Prompt.around(before.replace("{question}", text), text, after)
    if getattr(processor, "chat_template", None):
        return _chat(processor, text, n_images, marker)
    return Prompt.around("USER: " + f"{marker}\n" * n_images, text, " ASSISTANT:")


def _chat(processor: Any, text: str, n_images: int, marker: str) -> Prompt:
    """A question in the processor's chat template.

    Raises:
        ValueError: a template without places for pictures.
    """

    def written(question: str) -> str:
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
        conversation = [{"role": "user", "content": content}]
        return processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    prompt = written(text)
    if prompt.count(marker) != n_images:
        raise ValueError(
            f"the processor's chat template puts {prompt.count(marker)} {marker} into a prompt with {n_images} images; "
            "give template="
        )
    begin = processor.tokenizer.bos_token
    adds_special_tokens = not (begin and prompt.startswith(begin))
    # The question is where another one would be; templates take spaces off its ends.
    before, found, after = written("{question}").partition("{question}")
    question = next((own for own in (text, text.strip()) if found and prompt == before + own + after), None)
    if question is None:
        return Prompt(prompt, None, adds_special_tokens)
    return Prompt.around(before, question, after, adds_special_tokens=adds_special_tokens)


def _question_in(prompt: str, marker: str) -> tuple[int, int] | None:
    """What a whole prompt asks last: the text beside the pictures, between the marks of question and answer."""
    asked = prompt.rstrip()
    while mark := next((mark for mark in ANSWER_MARKS if asked.endswith(mark)), ""):
        asked = asked.removesuffix(mark).rstrip()
    end = len(asked)
    start = max((at + len(mark) for mark in QUESTION_MARKS if (at := prompt.rfind(mark, 0, end)) >= 0), default=0)
    while start < end:
        picture = prompt.rfind(marker, start, end)
        first = start if picture < 0 else picture + len(marker)
        if words := prompt[first:end].strip():
            first = prompt.index(words, first)
            return first, first + len(words)
        end = picture
    return None


def _reworded(processor: Any, piece: TextPiece, tokens: Sequence[str], text: str, row: int) -> Prompt:
    marker = _marker(processor)
    if marker in text:
        wanted, given = piece.text.count(marker), text.count(marker)
        if given != wanted:
            raise ValueError(f"text {row} has {given} {marker}, and its row has {wanted} images")
        return Prompt(text, _question_in(text, marker))
    if piece.question is None:
        raise ValueError(f"where the question is in {piece.text!r} is not known: give the whole prompt")
    start, end = piece.question
    begin = processor.tokenizer.bos_token
    writes_begin = begin is not None and piece.text.startswith(begin)
    return Prompt.around(
        piece.text[:start],
        text,
        piece.text[end:],
        # A prompt that begins with the first token may have been given a second one, or not.
        adds_special_tokens=not writes_begin or tokens.count(begin) > piece.text.count(begin),
    )


# Tokens ---------------------------------------------------------------------------------------------------------------


def _encode_all(
    processor: Any, config: LlavaConfig, prompts: Sequence[Prompt], counts: Sequence[Sequence[int]]
) -> list[Encoded]:
    """``counts``: how many features each of a row's pictures has."""
    encoded = [
        _encode(processor, config, prompt, own, f"text {row}")
        for row, (prompt, own) in enumerate(zip(prompts, counts, strict=True))
    ]
    length = max(len(row.ids) for row in encoded)
    return [row.padded(length) for row in encoded]


def _encode(processor: Any, config: LlavaConfig, prompt: Prompt, counts: Sequence[int], what: str) -> Encoded:
    expanded = Expanded(prompt.text, _marker(processor), counts)
    coded = processor.tokenizer(
        expanded.text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
        add_special_tokens=prompt.adds_special_tokens,
    )
    ids = list(coded["input_ids"])
    of_images = [position for position, token in enumerate(ids) if token == config.image_token_id]
    _check_tokens(processor, config, len(ids), len(of_images), sum(counts), what)
    has_text = [not special for special in coded["special_tokens_mask"]]
    for position in of_images:
        has_text[position] = False
    offsets = tuple(
        expanded.back(*offset) if own else None for offset, own in zip(coded["offset_mapping"], has_text, strict=True)
    )
    stops = accumulate(counts)
    images = [tuple(of_images[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)]
    return Encoded(ids, TextPiece(prompt.text, offsets, prompt.question), images)


def _check_tokens(processor: Any, config: LlavaConfig, n_tokens: int, found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise ValueError(
            f"{what} has {found} tokens of id {config.image_token_id}, the model's image token, and its images have "
            f"{wanted} features: the processor's {_marker(processor)!r} should be that token"
        )
    if n_tokens > config.text.n_ctx and not config.text.stretches:
        raise ValueError(
            f"{what} has {n_tokens} tokens, {wanted} of them of images: more than the model's context of "
            f"{config.text.n_ctx}"
        )


def _entries(
    processor: Any, config: LlavaConfig, encoded: Sequence[Encoded], grids: Sequence[PatchGrid]
) -> dict[str, Any]:
    """Entries of :class:`VLMInputs` that depend on the text."""
    length = len(encoded[0].piece.offsets)
    own_pad = processor.tokenizer.pad_token_id
    pad = config.pad_token_id if own_pad is None else own_pad
    ids = [[pad] * (length - len(row.ids)) + row.ids for row in encoded]
    pieces = [row.piece for row in encoded]
    questions = [() if piece.question is None else piece.positions_of(*piece.question) for piece in pieces]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor([[0] * (length - len(row.ids)) + [1] * len(row.ids) for row in encoded]),
        "tokens": tuple(tuple(token_strings(processor.tokenizer, row)) for row in ids),
        "texts": tuple(pieces),
        "text_tower": TOWER,
        "spans": {
            **_image_spans(grids, len(encoded)),
            "question": Span(TOWER, tuple(questions)),
            "last": Span(TOWER, ((length - 1,),) * len(encoded)),
        },
    }


def _image_spans(grids: Sequence[PatchGrid], n_rows: int) -> dict[str, Span]:
    """``image``; of its k-th picture ``image.k``; in LLaVA-NeXT ``image.k.tile.t`` (0 is the whole picture, small) and
    ``newline``."""
    found: dict[str, list[list[int]]] = {"image": [[] for _ in range(n_rows)]}

    def note(name: str, row: int, position: int) -> None:
        found.setdefault(name, [[] for _ in range(n_rows)])[row].append(position)

    seen = [0] * n_rows
    for grid in grids:
        name = f"image.{seen[grid.row]}"
        seen[grid.row] += 1
        is_tiled = any(place.tile == NEWLINE for place in grid.places)
        for position, place in zip(grid.positions, grid.places, strict=True):
            note("image", grid.row, position)
            note(name, grid.row, position)
            if is_tiled:
                note("newline" if place.tile == NEWLINE else f"{name}.tile.{place.tile}", grid.row, position)
    return {name: Span(TOWER, tuple(map(tuple, rows))) for name, rows in found.items()}

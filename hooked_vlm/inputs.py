"""What goes into a model: tensors under HF's names, and where in them the words and patches are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

TENSORS = (
    "pixel_values",
    "input_ids",
    "attention_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "token_type_ids",
)
"""The entries of :class:`VLMInputs` that are tensors, one row a sample."""


class SpanError(ValueError):
    """A span that a text does not have, or has more than once."""


@dataclass(frozen=True)
class Span:
    """Positions in one tower's sequence, for each row of the batch."""

    tower: str
    rows: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[int, ...]:
        return self.rows[row]


@dataclass(frozen=True)
class TextPiece:
    """A row's text, and which characters each position of ``input_ids`` stands for (None for special tokens)."""

    text: str
    offsets: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True, eq=False)
class VLMInputs:
    """One batch for a model: HF's tensors, with token strings and named spans where :meth:`HookedVLM.prepare` made it.

    ``VLMInputs(**hf_batch)`` takes what any HF processor returns.

    Raises:
        ValueError: pixel values that are not finite; row counts that differ; a mask of another shape than its ids.
        TypeError: something else than tensors; whole-number pixels or fractional ids.
    """

    pixel_values: Float[Tensor, "..."] | None = None
    input_ids: Int[Tensor, "b p"] | None = None
    attention_mask: Int[Tensor, "b p"] | None = None
    decoder_input_ids: Int[Tensor, "b p_answer"] | None = None
    decoder_attention_mask: Int[Tensor, "b p_answer"] | None = None
    token_type_ids: Int[Tensor, "b p"] | None = None
    """Accepted, because some processors return it; BLIP's and LLaVA's towers have no token types."""
    interpolate_pos_encoding: bool = False
    """Resize the position embeddings to an image of another size than the checkpoint's."""
    tokens: tuple[tuple[str, ...], ...] | None = None
    """Token strings of ``input_ids``, for axes."""
    spans: Mapping[str, Span] = field(default_factory=dict)
    texts: tuple[TextPiece, ...] | None = None
    text_tower: str = ""
    """The tower that reads ``input_ids``."""

    def __post_init__(self) -> None:
        self._check_types()
        sizes = {name: len(tensor) for name, tensor in self.tensors().items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"inputs have different numbers of rows: {sizes}")
        if self.pixel_values is not None and not bool(torch.isfinite(self.pixel_values).all()):
            bad = int((~torch.isfinite(self.pixel_values)).sum())
            raise ValueError(f"pixel_values hold {bad} values that are NaN or infinite")

    def _check_types(self) -> None:
        for name in TENSORS:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name} is a {type(value).__name__}, not a tensor; HF processors take return_tensors='pt'"
                )
            if name != "pixel_values" and value.ndim != 2:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; it should be [b p]")
            if name != "pixel_values" and value.shape[1] == 0:
                raise ValueError(f"{name} hold no tokens")
            if value.is_floating_point() != (name == "pixel_values"):
                wanted = "floats, normalised as the processor does" if name == "pixel_values" else "whole numbers"
                raise TypeError(f"{name} is {value.dtype}; it should hold {wanted}")
        for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            shapes = [tuple(getattr(self, name).shape) for name in (ids, mask) if getattr(self, name) is not None]
            if len(set(shapes)) > 1:
                raise ValueError(f"{mask} has shape {shapes[1]}, and {ids} has {shapes[0]}")

    @classmethod
    def of(cls, inputs: VLMInputs | Mapping[str, Any]) -> VLMInputs:
        """``inputs`` as they are, or made from an HF batch."""
        if isinstance(inputs, VLMInputs):
            return inputs
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs are a {type(inputs).__name__}; give what model.prepare or an HF processor returns")
        known = {entry.name for entry in fields(cls)}
        unknown = [name for name in inputs if name not in known]
        if unknown:
            raise ValueError(f"inputs have unknown entries {unknown}; known: {sorted(known)}")
        return cls(**inputs)

    def checked(self, d_vocab: int) -> VLMInputs:
        """These inputs, for a model that sees three channels and has a vocabulary of ``d_vocab`` tokens.

        Raises:
            ValueError: pixel values of another shape; token ids that the model does not have.
        """
        if self.pixel_values is not None and (self.pixel_values.ndim != 4 or self.pixel_values.shape[1] != 3):
            raise ValueError(f"pixel_values have shape {tuple(self.pixel_values.shape)}; give [b 3 height width]")
        for name in ("input_ids", "decoder_input_ids"):
            ids = getattr(self, name)
            if ids is None or len(ids) == 0:
                continue
            lowest, highest = (int(bound) for bound in ids.aminmax())
            if lowest < 0 or highest >= d_vocab:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"{name} hold {wrong}, and the model's tokens are 0 to {d_vocab - 1}")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by HF's name."""
        return {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}

    def __repr__(self) -> str:
        shapes = [f"{name} {list(tensor.shape)}" for name, tensor in self.tensors().items()]
        texts = [repr(piece.text) for piece in self.texts or ()]
        return f"VLMInputs({'; '.join([*shapes, *texts, *([f'spans {list(self.spans)}'] if self.spans else [])])})"

    def __len__(self) -> int:
        """Rows in the batch."""
        return next((len(tensor) for tensor in self.tensors().values()), 0)

    def __iter__(self) -> Iterator[VLMInputs]:
        return (self.rows([row]) for row in range(len(self)))

    def to(self, device: torch.device | str) -> VLMInputs:
        """The same on a device; itself where it is there already."""
        tensors = self.tensors()
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
        return self if all(moved[name] is tensors[name] for name in moved) else replace(self, **moved)

    def rows(self, rows: Sequence[int]) -> VLMInputs:
        """A batch of some rows, in the order given; a row may be given several times."""
        index = torch.as_tensor(list(rows), dtype=torch.long)
        picked: dict[str, Any] = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors().items()}
        if self.tokens is not None:
            picked["tokens"] = tuple(self.tokens[row] for row in rows)
        if self.texts is not None:
            picked["texts"] = tuple(self.texts[row] for row in rows)
        picked["spans"] = {
            name: Span(span.tower, tuple(span.rows[row] for row in rows)) for name, span in self.spans.items()
        }
        return replace(self, **picked)

    def repeat(self, times: int) -> VLMInputs:
        """Each row ``times`` times, copies beside each other."""
        return self.rows([row for row in range(len(self)) for _ in range(times)])

    def with_pixels(self, pixel_values: Float[Tensor, "..."]) -> VLMInputs:
        """The same texts before other pictures."""
        return replace(self, pixel_values=pixel_values)

    def span(self, text: str, *, occurrence: int | None = None) -> Span:
        """Positions of the tokens of ``text`` in each row, found as whole words, whatever their case.

        Args:
            occurrence: which one, from 0, where the text occurs several times.

        Raises:
            SpanError: ``text`` does not occur in a row, occurs several times without ``occurrence``, or the inputs
                were made without :meth:`HookedVLM.prepare` and do not know their texts.
        """
        if self.texts is None:
            raise SpanError("these inputs do not know their texts; make them with model.prepare(images, texts)")
        return Span(self.text_tower, tuple(_find(piece, text, occurrence) for piece in self.texts))

    def positions(self, span: str, occurrence: int | None = None) -> Span:
        """A span by its name, or else by its text."""
        if span in self.spans:
            return self.spans[span]
        try:
            return self.span(span, occurrence=occurrence)
        except SpanError as error:
            raise SpanError(f"{error}; named spans: {', '.join(self.spans) or 'none'}") from None


def _find(piece: TextPiece, wanted: str, occurrence: int | None) -> tuple[int, ...]:
    matches = list(re.finditer(_pattern(wanted), piece.text, flags=re.IGNORECASE)) if wanted.strip() else []
    if not matches:
        raise SpanError(f"{wanted!r} does not occur in {piece.text!r}")
    if occurrence is None and len(matches) > 1:
        raise SpanError(
            f"{wanted!r} occurs {len(matches)} times in {piece.text!r}; say which with occurrence=0, 1, ..."
        )
    if not 0 <= (occurrence or 0) < len(matches):
        raise SpanError(
            f"{wanted!r} occurs {len(matches)} times in {piece.text!r}; there is no occurrence {occurrence}"
        )
    start, end = matches[occurrence or 0].span()
    positions = tuple(
        position
        for position, offset in enumerate(piece.offsets)
        if offset is not None and offset[0] < end and offset[1] > start
    )
    if not positions:
        raise SpanError(f"{wanted!r} has no tokens of its own in {piece.text!r}")
    return positions


def _pattern(wanted: str) -> str:
    """Whole words, with any space between them. A word ends where no letter follows, punctuation where it does."""
    words = wanted.split()
    before = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if re.search(r"\w$", words[-1]) else ""
    return before + r"\s+".join(map(re.escape, words)) + after

"""Words of a text taken out, and its length kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hooked_vlm.corruptions.corrupted import Corrupted, DrawnOnce
from hooked_vlm.inputs import Span, SpanError, TextPiece, VLMInputs
from hooked_vlm.models import HookedVLM


@dataclass(frozen=True)
class ReplaceTokens(DrawnOnce):
    """Every token of a span becomes one and the same: the first piece of another word (Basu et al. 2024, section 3).

    The text keeps its length. What it reads is no likely text where the span has several tokens ("Paris Paris"); a
    counterfactual question is (:class:`CounterfactualQuestion`). ``inputs.tokens`` say what is read, and
    ``inputs.texts`` still what was asked, so that spans are found as before.

    Attributes:
        span: the span's name, or its words ("this place"), one for all rows or one a row; or positions.
        by: the word, one for all rows or one a row. Its piece is the one that it would begin with in that place.
        occurrence: which one, where the words occur several times.
    """

    span: str | tuple[str, ...] | Span
    by: str | tuple[str, ...]
    occurrence: int | None = None

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        if clean.texts is None or clean.tokens is None or clean.input_ids is None:
            raise ValueError("to replace tokens, inputs must know their texts; make them with model.prepare")
        words = (self.by,) * len(clean) if isinstance(self.by, str) else self.by
        if len(words) != len(clean):
            raise ValueError(f"{len(words)} words for {len(clean)} rows")
        ids, tokens = clean.input_ids.clone(), list(clean.tokens)
        for row, (piece, word, positions) in enumerate(zip(clean.texts, words, self._positions(clean), strict=True)):
            token = _first_piece(model.processor.tokenizer, piece, positions, word, f"row {row}")
            ids[row, list(positions)] = token
            name = model.token_strings(ids[row, positions[:1]])[0]
            tokens[row] = tuple(name if place in positions else own for place, own in enumerate(tokens[row]))
        return Corrupted(replace(clean, input_ids=ids, tokens=tuple(tokens)))

    def _positions(self, clean: VLMInputs) -> tuple[tuple[int, ...], ...]:
        if isinstance(self.span, tuple):
            if len(self.span) != len(clean):
                raise SpanError(f"{len(self.span)} spans for {len(clean)} rows")
            rows = [own.positions(name, self.occurrence) for own, name in zip(clean, self.span, strict=True)]
            span = Span(rows[0].tower, tuple(row[0] for row in rows))
        else:
            span = self.span if isinstance(self.span, Span) else clean.positions(self.span, self.occurrence)
        if span.tower != clean.text_tower:
            raise SpanError(f"tokens are {clean.text_tower}'s, and these positions are {span.tower}'s")
        return span.rows


def _first_piece(tokenizer: Any, piece: TextPiece, positions: tuple[int, ...], word: str, what: str) -> int:
    """The token that ``word`` begins with where the positions begin."""
    offsets = [piece.offsets[position] for position in positions]
    if not offsets or None in offsets:
        raise SpanError(f"{what}: only words of {piece.text!r} can be replaced, no pictures and no special tokens")
    start = min(offset[0] for offset in offsets if offset is not None)
    while piece.text[start : start + 1].isspace():
        start += 1
    coded = tokenizer(piece.text[:start] + word, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = [token for token, (_, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True) if end > start]
    if not found or found[0] == tokenizer.unk_token_id:
        raise ValueError(f"{word!r} has no tokens that this model knows")
    return found[0]

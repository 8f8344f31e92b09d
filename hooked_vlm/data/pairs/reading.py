"""Where the words of a question stand among a model's tokens; no picture is needed for it, and no forward."""

from __future__ import annotations

from dataclasses import dataclass

from hooked_vlm.data.samples import SampleError
from hooked_vlm.inputs import TextPiece
from hooked_vlm.models import HookedVLM


@dataclass(frozen=True)
class Read:
    """A question as a model reads it."""

    ids: tuple[int, ...]
    """Of the whole prompt."""
    piece: TextPiece
    start: int
    """Where in the prompt the question begins."""

    def positions(self, span: tuple[int, int]) -> tuple[int, ...]:
        """Of the tokens of some of the question's characters."""
        return self.piece.positions_of(self.start + span[0], self.start + span[1])


class Reader:
    """Reads questions as :meth:`HookedVLM.prepare` does, all beside one blank picture."""

    def __init__(self, model: HookedVLM) -> None:
        from PIL import Image

        self._model = model
        self._beside = model.prepare(Image.new("RGB", (32, 32)), ["?"])
        self._unknown = model.processor.tokenizer.unk_token_id

    def __call__(self, question: str) -> Read:
        """The question's tokens.

        Raises:
            SampleError: the model cannot take it.
        """
        try:
            inputs = self._model.reword(self._beside, [question])
        except ValueError as error:
            raise SampleError(f"{question!r}: {error}", "inputs that the model cannot take") from error
        assert inputs.texts is not None
        assert inputs.input_ids is not None
        (piece,) = inputs.texts
        # A chat template may take spaces off the question's ends.
        words = question.strip()
        start = piece.text.find(words, piece.question[0] if piece.question else 0)
        if start < 0:
            raise SampleError(f"the question {question!r} is not in its prompt {piece.text!r} as it is")
        return Read(tuple(inputs.input_ids[0].tolist()), piece, start - question.index(words))

    def aligned(
        self, clean: Read, other: Read, spans: list[tuple[int, int]], other_spans: list[tuple[int, int]]
    ) -> bool:
        """Whether two questions are the same, token by token, but inside their spans, which have the same positions.

        What the tokenizer does not know aligns with nothing.
        """
        if len(other.ids) != len(clean.ids):
            return False
        inside: set[int] = set()
        for span, other_span in zip(spans, other_spans, strict=True):
            positions = clean.positions(span)
            if not positions or other.positions(other_span) != positions:
                return False
            inside.update(positions)
        return all(
            mine == theirs if position not in inside else theirs != self._unknown
            for position, (mine, theirs) in enumerate(zip(clean.ids, other.ids, strict=True))
        )

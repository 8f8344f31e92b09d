"""Samples made ready to run: inputs with named spans, the corrupted run, and the answer that is scored.

A sample's spans stand among the inputs' under their own names, its regions as ``image.NAME``. So an edit can say
``positions="subject"``, ``keys="image.object"`` or ``keys="image - image.object"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.cache import ActivationCache
from hooked_vlm.corruptions import Corrupted, Corruption, CounterfactualImage, CounterfactualQuestion, describe
from hooked_vlm.data.samples import SAME_BEGINNING, UNREADABLE, Sample, SampleError
from hooked_vlm.edits import edit_hooks
from hooked_vlm.inputs import Span, SpanError, TextPiece, VLMInputs
from hooked_vlm.metrics import at
from hooked_vlm.models import HookedVLM
from hooked_vlm.processing import ImageError

QUESTION = "{question}"
"""Where the question stands in a prompt, as of ``"{question} Answer in a few words."``."""

BUILT_IN = ("image", "question", "last", "newline", "rest")
"""Spans that inputs have by themselves, or that methods know."""

Pair = Literal["sip", "str"]
"""The sample's own counterfactual picture, or question."""

CorruptionOf = Corruption | Pair | Callable[[Sample], Corruption]
"""How samples are corrupted: all in one way, by their own counterfactual, or each as a function says."""

Scored = Literal["given", "own"]
"""Which answer is scored: the sample's, where it has one, or the clean run's own."""


@dataclass(frozen=True, eq=False)
class Case:
    """One sample, ready to run. Its inputs have one row."""

    sample: Sample
    clean: VLMInputs
    corruption: Corruption | None
    corrupted: Corrupted | None
    answer: Int[Tensor, "1"]
    """First token of the answer that is scored."""
    foil: Int[Tensor, "1"]
    """First token of the answer that it is held against."""
    clean_logits: Float[Tensor, "1 d_vocab"]
    """Where the answer begins."""
    clean_cache: ActivationCache
    """What was to be kept of the clean run."""

    @property
    def is_correct(self) -> bool:
        """Whether the clean run finds the scored answer likeliest."""
        return int(self.clean_logits.argmax(-1)) == int(self.answer)


@torch.no_grad()
def ready(
    model: HookedVLM,
    sample: Sample,
    corruption: CorruptionOf | None = None,
    *,
    prompt: str = QUESTION,
    scored: Scored = "given",
    keep: Sequence[str] = (),
) -> Case:
    """A sample's clean and corrupted run, and what is scored.

    Args:
        keep: hook points of the clean run that its cache is to hold.
        prompt: what is asked, around the question.
        scored: ``"given"``: the sample's answer against its foil; ``"own"``: what the clean run finds likeliest. A foil
            that is not given is the likeliest other token of the corrupted run (without one: of the clean).

    Raises:
        SampleError: a sample that lacks what is needed, whose parts do not fit, or whose answer and foil begin alike.
    """
    inputs = prepared(model, sample, prompt=prompt).to(model.device)
    all_logits, cache = model.run_with_cache(inputs, names_filter=list(keep))
    logits, corrupted, how = at(all_logits, -1), None, None
    if corruption is not None:
        how = corruption_of(sample, corruption, prompt)
        corrupted = corrupted_run(model, sample, inputs, how)
    answer, form = _answer(model, sample, scored, logits)
    if scored == "given" and sample.foil is not None:
        forms = _first_tokens(model, sample, sample.foil)
        foil = torch.tensor([forms.get(form, next(iter(forms.values())))], device=logits.device)
    else:
        other = logits if corrupted is None else _mean_probabilities(model, corrupted)
        foil = other.scatter(1, answer[:, None], -torch.inf).argmax(-1)
    if int(answer) == int(foil):
        raise SampleError(
            f"{sample.id}: the answer {sample.answer!r} and the foil {sample.foil!r} begin with the same token",
            SAME_BEGINNING,
        )
    return Case(sample, inputs, how, corrupted, answer, foil, logits, cache)


def prepared(model: HookedVLM, sample: Sample, *, prompt: str = QUESTION) -> VLMInputs:
    """A sample's clean inputs, with its spans and regions among their spans.

    Raises:
        SampleError: a picture that cannot be read; a prompt that does not fit; a region outside of the picture, or
            that no patch sees; a span without tokens of its own.
    """
    if prompt.count(QUESTION) != 1:
        raise ValueError(f"a prompt says once where the question stands, as {QUESTION!r}; this one is {prompt!r}")
    try:
        picture = None if sample.image is None else sample.picture()
        inputs = model.prepare(picture, prompt.replace(QUESTION, sample.question))
    except ImageError as error:
        what = "no picture" if sample.image is None else UNREADABLE
        raise SampleError(f"{sample.id}: {error}", what) from error
    except ValueError as error:
        raise SampleError(f"{sample.id}: {error}", "inputs that the model cannot take") from error
    assert inputs.texts is not None
    spans = {**inputs.spans, **_text_spans(inputs, sample, prompt), **_region_spans(inputs, sample)}
    return replace(inputs, spans=spans)


def corruption_of(sample: Sample, how: CorruptionOf, prompt: str = QUESTION) -> Corruption:
    """What corrupts a sample.

    Raises:
        SampleError: it has no such counterfactual.
        ValueError: an unknown name.
    """
    if how == "sip":
        if sample.image_cf is None:
            raise SampleError(f"{sample.id} has no counterfactual picture", "no counterfactual picture")
        try:
            return CounterfactualImage(sample.picture_cf())
        except ImageError as error:
            raise SampleError(str(error), UNREADABLE) from error
    if how == "str":
        if sample.question_cf is None:
            raise SampleError(f"{sample.id} has no counterfactual question", "no counterfactual question")
        return CounterfactualQuestion(prompt.replace(QUESTION, sample.question_cf))
    if isinstance(how, str):
        raise ValueError(f"a corruption is 'sip', 'str', a Corruption or a function of a sample, not {how!r}")
    return how if isinstance(how, Corruption) else how(sample)


def described(how: CorruptionOf) -> dict[str, Any]:
    """A way of corrupting samples, for a result's provenance."""
    if isinstance(how, Corruption):
        return describe(how)
    return {"corruption": how if isinstance(how, str) else getattr(how, "__qualname__", type(how).__name__)}


def corrupted_run(model: HookedVLM, sample: Sample, clean: VLMInputs, corruption: Corruption) -> Corrupted:
    """The corrupted run of a sample.

    Raises:
        SampleError: a counterfactual that does not align with the clean run, position by position.
    """
    try:
        corrupted = corruption(model, clean)
    except ValueError as error:
        raise SampleError(f"{sample.id}: {error}", "a counterfactual that does not align") from error
    for piece, other in zip(clean.texts or (), corrupted.inputs.texts or (), strict=False):
        if other.text != piece.text:
            _check_alignment(sample, piece, other)
    return corrupted


def first_tokens(model: HookedVLM, text: str) -> dict[str, int]:
    """The first token of an answer as it may be written: as given, capitalised, in small letters; with a space.

    Raises:
        SampleError: the model knows none of these.
    """
    tokenizer, text = model.processor.tokenizer, text.strip()
    forms = {"given": text, "capitalised": text[:1].upper() + text[1:], "small": text.lower()}
    found, is_known = {}, False
    for name, form in forms.items():
        for space in ("", " "):
            ids = tokenizer(space + form, add_special_tokens=False).input_ids
            if not ids or ids[0] == tokenizer.unk_token_id:
                continue
            # Some tokenizers write a space as a token of its own, with which many answers begin (LLaMA: numbers).
            is_known = True
            if tokenizer.decode(ids[:1]).strip():
                found[f"{name}{space}"] = ids[0]
    if not found and is_known:
        raise SampleError(
            f"the answer {text!r} begins with a space's own token, as others do: one token cannot tell them apart",
            "an answer that begins with a space's own token",
        )
    if not found:
        raise SampleError(f"the model knows no word of the answer {text!r}", "an answer that the model does not know")
    return found


def _answer(
    model: HookedVLM, sample: Sample, scored: Scored, logits: Float[Tensor, "1 d_vocab"]
) -> tuple[Int[Tensor, "1"], str]:
    """The answer's first token, and the form in which it is written."""
    if scored not in ("given", "own"):
        raise ValueError(f"scored is 'given' or 'own', not {scored!r}")
    if scored == "own" or sample.answer is None:
        return logits.argmax(-1), ""
    forms = _first_tokens(model, sample, sample.answer)
    form = max(forms, key=lambda name: float(logits[0, forms[name]]))
    return torch.tensor([forms[form]], device=logits.device), form


def _mean_probabilities(model: HookedVLM, run: Corrupted) -> Float[Tensor, "1 d_vocab"]:
    with model.hooks(edit_hooks(model, run.inputs, run.edits)):
        return at(model(run.inputs), -1).softmax(-1).mean(0, keepdim=True)


def _first_tokens(model: HookedVLM, sample: Sample, text: str) -> dict[str, int]:
    try:
        return first_tokens(model, text)
    except SampleError as error:
        raise SampleError(f"{sample.id}: {error}", error.kind) from None


def _text_spans(inputs: VLMInputs, sample: Sample, prompt: str) -> dict[str, Span]:
    piece = _piece(inputs)
    start = _question_start(piece, sample, prompt)
    spans = {"question": piece.positions_of(start, start + len(sample.question))}
    for name, (first, end) in sample.spans.items():
        if name in inputs.spans or name in BUILT_IN or name.startswith("image."):
            raise SampleError(
                f"{sample.id} calls a part of its question {name!r}, as the inputs call something else; rename it",
                "a span of a name that is taken",
            )
        spans[name] = piece.positions_of(start + first, start + end)
        if not spans[name]:
            raise SampleError(f"{sample.id}: the span {name!r} has no tokens of its own", "a span without tokens")
    return {name: Span(inputs.text_tower, (positions,)) for name, positions in spans.items()}


def _question_start(piece: TextPiece, sample: Sample, prompt: str) -> int:
    # Within what was asked, whose other words may hold the question too; some models cut off the space around it.
    asked, before = prompt.replace(QUESTION, sample.question), prompt.index(QUESTION)
    cut = len(asked) - len(asked.lstrip())
    places = ((asked, before), (asked.strip(), before - cut))
    found = ((piece.text.find(text), offset) for text, offset in places)
    start = next((at + offset for at, offset in found if at >= 0), piece.text.find(sample.question))
    if start < 0 and piece.text.find(asked.strip()) < 0:
        raise SampleError(
            f"{sample.id}: the question {sample.question!r} is not in its prompt {piece.text!r} as it is",
            "a question that its prompt changes",
        )
    return start


def _region_spans(inputs: VLMInputs, sample: Sample) -> dict[str, Span]:
    spans = {}
    for name, region in sample.regions.items():
        if f"image.{name}" in inputs.spans:
            raise SampleError(
                f"{sample.id} calls a region {name!r}, and the inputs call something else image.{name}; rename it",
                "a region of a name that is taken",
            )
        try:
            span = inputs.positions_in(region)
        except (SpanError, ValueError) as error:
            raise SampleError(f"{sample.id}: the region {name!r}: {error}", "a region that does not fit") from error
        if not span[0]:
            raise SampleError(f"{sample.id}: no patch sees the region {name!r}", "a region that no patch sees")
        spans[f"image.{name}"] = span
    return spans


def _check_alignment(sample: Sample, piece: TextPiece, other: TextPiece) -> None:
    """That words outside of what is replaced stand at the same positions in both texts."""
    ours, theirs = (_words(one) for one in (piece, other))
    pairs = list(zip(ours, theirs, strict=False))
    if len(ours) != len(theirs):
        pairs = [*_same_words(pairs), *_same_words(list(zip(ours[::-1], theirs[::-1], strict=False)))]
    for (word, positions), (other_word, other_positions) in pairs:
        if positions != other_positions:
            raise SampleError(
                f"{sample.id}: {word!r} stands at positions {positions} and {other_word!r}, for it, at "
                f"{other_positions}: replace each word by one of as many tokens",
                "a counterfactual that does not align",
            )


_Word = tuple[str, tuple[int, ...]]


def _words(piece: TextPiece) -> list[_Word]:
    words, start = [], 0
    for word in piece.text.split():
        start = piece.text.index(word, start)
        words.append((word, piece.positions_of(start, start + len(word))))
        start += len(word)
    return words


def _same_words(pairs: list[tuple[_Word, _Word]]) -> list[tuple[_Word, _Word]]:
    different = next((place for place, (own, other) in enumerate(pairs) if own[0] != other[0]), len(pairs))
    return pairs[:different]


def _piece(inputs: VLMInputs) -> TextPiece:
    assert inputs.texts is not None
    return inputs.texts[0]

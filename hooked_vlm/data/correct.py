"""Samples that a model answers rightly: whatever is traced in the others, it is not how the answer comes about."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from hooked_vlm.data.samples import SAME_BEGINNING, UNREADABLE, Dropped, Sample, SampleError, Samples
from hooked_vlm.models import HookedVLM
from hooked_vlm.processing import ImageError
from hooked_vlm.progress import track

QUESTION = "{question}"

Match: TypeAlias = Literal["exact", "first_word", "contains"] | Callable[[str, str], bool]
"""When a model's text is an answer: the two are the same; it begins with it; it has its words in it, side by side; or
as a function of the two, as they were written, says."""

NUMBERS = "zero one two three four five six seven eight nine ten".split()
ARTICLES = ("a", "an", "the")

Asked: TypeAlias = tuple[Any, str]
"""A picture and a question."""

Told: TypeAlias = tuple[str | SampleError, str]
"""What a model says, or why it was not asked; and the text that its answer goes on from, if it does."""


def keep_correct(
    model: HookedVLM,
    samples: Iterable[Sample],
    *,
    max_new_tokens: int = 10,
    match: Match = "exact",
    batch_size: int = 8,
    prompt: str = QUESTION,
    check_foil: bool = True,
    adopt: bool = False,
    progress: bool = False,
) -> Samples:
    """The samples to which the model itself gives the answer, as NOTICE keeps them (Golovanevsky et al. 2025).

    What the model says is ``meta["generated"]``. Dropped are, each by name: what it answers otherwise, with what it
    said; samples without an answer; pictures that cannot be read; questions that the model cannot take.

    Args:
        match: when it is the answer, by :func:`normalized` words: ``"exact"``; ``"first_word"``, it begins with the
            answer; ``"contains"``; or a function of what it said and the answer, as they are written.
        prompt: what is asked, around the question: ``"{question} Answer in one word."``, or a whole prompt.
        check_foil: drop samples whose answer and foil begin with the same token, as the model would write them: what is
            measured at the first token cannot tell them apart.
        adopt: a sample without an answer takes the model's for its own.

    Raises:
        ValueError: a prompt without a place for the question; an unknown ``match``.
    """
    matches = matcher(match)
    kept, dropped = [], [*(samples.dropped if isinstance(samples, Samples) else ())]
    told = told_by(
        model,
        list(samples),
        lambda sample: (sample.picture(), sample.question),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        prompt=prompt,
        progress=progress,
    )
    for sample, said in told:
        try:
            kept.append(_checked(model, sample, said, matches, check_foil=check_foil, adopt=adopt))
        except SampleError as error:
            dropped.append(Dropped.of(sample.id, error))
    return Samples(kept, dropped)


def normalized(text: str) -> list[str]:
    """The words of an answer, as the VQA evaluation compares them (Antol et al. 2015).

    In small letters, without punctuation (but for the points of decimals) and without articles, numbers to ten as
    digits. Apostrophes are left out too, so that "isn't" and "isnt" are one word; an article that stands alone is kept.
    """
    text = re.sub(r"(?<=\d),(?=\d)|['’]", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", text)
    words = re.sub(r"[^\w\s.]|_", " ", text).split()
    kept = [word for word in words if word not in ARTICLES] or words
    digits = {word: str(value) for value, word in enumerate(NUMBERS)}
    return [{"none": "0", **digits}.get(word, word) for word in kept]


def told_by(
    model: HookedVLM,
    samples: Sequence[Sample],
    ask: Callable[[Sample], Asked],
    *,
    max_new_tokens: int,
    batch_size: int,
    prompt: str = QUESTION,
    progress: bool = False,
) -> Iterator[tuple[Sample, Told]]:
    """What the model says about each sample, in their order. ``ask``: the picture and the question."""
    if QUESTION not in prompt:
        raise ValueError(f"a prompt says where the question stands, as {QUESTION!r}; this one is {prompt!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size is 1 or more, not {batch_size}")
    batches = [samples[first : first + batch_size] for first in range(0, len(samples), batch_size)]
    for batch in track(batches, "asking", shown=progress):
        asked: list[Asked | SampleError] = [_asked(sample, ask, prompt) for sample in batch]
        said = iter(_told(model, [one for one in asked if not isinstance(one, SampleError)], max_new_tokens))
        for sample, one in zip(batch, asked, strict=True):
            yield sample, (one, "") if isinstance(one, SampleError) else next(said)


def _asked(sample: Sample, ask: Callable[[Sample], Asked], prompt: str) -> Asked | SampleError:
    try:
        picture, question = ask(sample)
    except ImageError as error:
        return SampleError(str(error), UNREADABLE)
    except SampleError as error:
        return error
    return picture, prompt.replace(QUESTION, question)


def _told(model: HookedVLM, asked: Sequence[Asked], max_new_tokens: int) -> list[Told]:
    if not asked:
        return []
    try:
        inputs = model.prepare([picture for picture, _ in asked], [text for _, text in asked])
    except ValueError as error:
        if len(asked) == 1:
            return [(SampleError(str(error), "inputs that the model cannot take"), "")]
        # One of them: which, is found one by one.
        return [told for one in asked for told in _told(model, [one], max_new_tokens)]
    said: Any = model.generate(inputs, max_new_tokens=max_new_tokens)
    goes_on = inputs.text_tower == model.towers[-1]
    return [(text.strip(), piece.text if goes_on else "") for text, piece in zip(said, inputs.texts or (), strict=True)]


def matcher(match: Match) -> Callable[[str, str], bool]:
    """Whether what a model said is an answer."""
    if callable(match):
        return match
    if match not in ("exact", "first_word", "contains"):
        raise ValueError(f"match is 'exact', 'first_word', 'contains' or a function, not {match!r}")

    def matches(said: str, answer: str) -> bool:
        words, wanted = normalized(said), normalized(answer)
        if match == "exact" or not wanted:
            return words == wanted != []
        last = 0 if match == "first_word" else len(words) - len(wanted)
        return any(words[start : start + len(wanted)] == wanted for start in range(last + 1))

    return matches


def _checked(
    model: HookedVLM,
    sample: Sample,
    told: Told,
    matches: Callable[[str, str], bool],
    *,
    check_foil: bool,
    adopt: bool,
) -> Sample:
    said, before = told
    if isinstance(said, SampleError):
        raise said
    if not said:
        raise SampleError(f"{sample.id}: the model says nothing", "no answer from the model")
    answer = said if adopt and sample.answer is None else sample.answer
    if answer is None:
        raise SampleError(f"{sample.id} has no answer (adopt=True takes the model's)", "no answer")
    if not matches(said, answer):
        raise SampleError(f"{sample.id}: the model says {said!r}, and the answer is {answer!r}", "a wrong answer")
    if check_foil and sample.foil is not None:
        first, other = (_first_token(model, before, _in_case(text, said)) for text in (answer, sample.foil))
        if first == other:
            raise SampleError(
                f"{sample.id}: the answer {answer!r} and the foil {sample.foil!r} begin with the same token",
                SAME_BEGINNING,
            )
    return replace(sample, answer=answer, meta={**sample.meta, "generated": said})


def _in_case(text: str, like: str) -> str:
    """With a capital where the model writes one."""
    return text[:1].upper() + text[1:] if like[:1].isupper() else text


def _first_token(model: HookedVLM, before: str, answer: str) -> int | None:
    """The token that an answer begins with, where it goes on from ``before``; None where it has none."""
    if before and not before[-1].isspace():
        # A space may be a token of its own, or a part of the answer's first.
        before += " "
    coded = model.processor.tokenizer(
        before + answer, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    start = len(before.rstrip(" "))
    return next(
        (token for token, (_, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True) if end > start),
        None,
    )

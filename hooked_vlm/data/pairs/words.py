"""Symmetric token replacement: a question with a word replaced by one of as many tokens (Golovanevsky et al. 2025)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import TypeAlias, overload

from hooked_vlm.data.pairs.likeness import Avoid, Likeness
from hooked_vlm.data.pairs.reading import Reader
from hooked_vlm.data.samples import Sample, SampleError, Samples
from hooked_vlm.inputs import occurrences
from hooked_vlm.models import HookedVLM

Vocabulary: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]]
"""Words, or words for each word, span or group."""

TakesAn = re.compile(r"[ai]|e(?!u)|o(?!nce?\b)|u(?!ni|s[ae]|ti)|hour|hono|heir|honest", re.IGNORECASE)
"""How a word begins that takes "an", and not "a"."""


@overload
def make_str(
    model: HookedVLM,
    samples: Sample,
    *,
    vocabulary: Vocabulary,
    spans: str | Sequence[str] | None = None,
    avoid: Avoid | None = None,
    symmetric: bool = True,
    seed: int = 0,
) -> Sample: ...
@overload
def make_str(
    model: HookedVLM,
    samples: Iterable[Sample],
    *,
    vocabulary: Vocabulary,
    spans: str | Sequence[str] | None = None,
    avoid: Avoid | None = None,
    symmetric: bool = True,
    seed: int = 0,
) -> Samples: ...
def make_str(
    model: HookedVLM,
    samples: Sample | Iterable[Sample],
    *,
    vocabulary: Vocabulary,
    spans: str | Sequence[str] | None = None,
    avoid: Avoid | None = None,
    symmetric: bool = True,
    seed: int = 0,
) -> Sample | Samples:
    """``question_cf`` for each sample: spans of its question replaced by other words, as many tokens long.

    Token for token the two questions are the same but in the spans, and those have the same positions. Each word is
    drawn from ``vocabulary``, in an order that ``seed`` and the sample's id say alone. It is never one of the words
    replaced, the answer or the foil, like one of these, one that the question has elsewhere, or like what another span
    has become. It is written as the word that it stands for (a capital, or all), and after "a" or "an" takes the same.
    ``meta`` says the new words (``words_cf``), and where the spans are in the new question (``spans_cf``).

    Args:
        samples: one, or several.
        vocabulary: words for all spans; or by the word that is replaced, by the span's name, or by the sample's group,
            looked up in this order. For the opposite sentiment, say: each word with those of the other.
        spans: whose words are replaced; by default the two options, ``answer`` and ``foil``, where the question has
            both, and else ``subject``.
        avoid: for each word those that are too much like it; ``symmetric``: and the other way round.

    Returns:
        The sample, or the samples; those for which there is no such word are dropped.

    Raises:
        SampleError: of one sample, that there is none.
    """
    if isinstance(vocabulary, str):
        raise TypeError(f"a vocabulary is a list of words, or a mapping to such lists, not {vocabulary!r}")
    likeness, reader = Likeness(avoid, symmetric=symmetric), Reader(model)
    known = {key.casefold(): words for key, words in vocabulary.items()} if isinstance(vocabulary, Mapping) else {}

    def replaced(sample: Sample) -> Sample:
        names = _names(sample, spans)
        words = {
            name: _options(sample, name, known) if isinstance(vocabulary, Mapping) else vocabulary for name in names
        }
        return _Search(sample, words, likeness, reader, seed).result()

    if isinstance(samples, Sample):
        return replaced(samples)
    return (samples if isinstance(samples, Samples) else Samples(samples)).map(replaced)


def options_vocabulary(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """The answers and foils of a dataset, by group: a vocabulary for its own options. Without a group, under ``""``."""
    found: dict[str, set[str]] = {}
    for sample in samples:
        found.setdefault(sample.group or "", set()).update(word for word in (sample.answer, sample.foil) if word)
    return {group: sorted(words) for group, words in found.items()}


def _names(sample: Sample, spans: str | Sequence[str] | None) -> list[str]:
    if spans is None:
        options = ["answer", "foil"]
        names = options if all(name in sample.spans for name in options) else ["subject"]
    else:
        names = [spans] if isinstance(spans, str) else list(spans)
    for name in names:
        sample.text_of(name)
    names = sorted(names, key=lambda name: sample.spans[name])
    for name, following in pairwise(names):
        if sample.spans[name][1] > sample.spans[following][0]:
            raise SampleError(f"{sample.id}: the spans {name!r} and {following!r} overlap", "spans that overlap")
    return names


def _options(sample: Sample, span: str, vocabulary: Mapping[str, Sequence[str]]) -> Sequence[str]:
    word, group = sample.text_of(span), sample.group or ""
    for key in (word, span, group):
        if key.casefold() in vocabulary:
            return vocabulary[key.casefold()]
    raise SampleError(
        f"{sample.id}: the vocabulary has nothing for the word {word!r}, the span {span!r} or the group {group!r}",
        "a word that the vocabulary does not know",
    )


@dataclass(frozen=True)
class _Reworded:
    """A question with some of its spans replaced."""

    question: str
    spans: dict[str, tuple[int, int]]
    """Where they are now."""

    @classmethod
    def of(cls, sample: Sample, words: Mapping[str, str]) -> _Reworded:
        edits = sorted((sample.spans[name], word) for name, word in words.items())

        def shifted(character: int) -> int:
            return character + sum(len(word) - (end - start) for (start, end), word in edits if end <= character)

        def is_cut(first: int, last: int) -> bool:
            return any(start < last and first < end and not first <= start <= end <= last for (start, end), _ in edits)

        question = sample.question
        for (start, end), word in reversed(edits):
            question = question[:start] + word + question[end:]
        whole = {name: span for name, span in sample.spans.items() if not is_cut(*span)}
        return cls(question, {name: (shifted(start), shifted(end)) for name, (start, end) in whole.items()})


class _Search:
    """One sample's words: the first that fit, in an order of its own."""

    def __init__(
        self, sample: Sample, words: Mapping[str, Sequence[str]], likeness: Likeness, reader: Reader, seed: int
    ) -> None:
        self.sample, self.likeness, self.reader = sample, likeness, reader
        self.names = list(words)
        self.clean = reader(sample.question)
        self.candidates = {name: self._candidates(name, words[name], seed) for name in self.names}
        self._fits: dict[tuple[str, str], bool] = {}

    def result(self) -> Sample:
        found = self._found(0, {})
        if found is None:
            raise SampleError(self._reason(), "no word to put in its place")
        reworded = _Reworded.of(self.sample, found)
        meta = {name: value for name, value in self.sample.meta.items() if name != "answer_str"}
        return replace(
            self.sample,
            question_cf=reworded.question,
            meta={**meta, "words_cf": found, "spans_cf": reworded.spans},
        )

    def _candidates(self, name: str, words: Sequence[str], seed: int) -> list[str]:
        """Those that may stand there, whatever their length, in random order."""
        sample = self.sample
        taken = [*(sample.text_of(other) for other in self.names), *filter(None, (sample.answer, sample.foil))]
        article = re.search(r"\b(an?)\s+$", sample.question[: sample.spans[name][0]], re.IGNORECASE)
        possible = [
            _in_case(word, sample.text_of(name))
            for word in sorted(set(words))
            if word.strip()
            and not any(self.likeness.forbids(other, word) for other in taken)
            and not _occurs(word, sample.question)
            and (article is None or bool(TakesAn.match(word)) == (article[1].lower() == "an"))
        ]
        Random(f"{seed}/{sample.id}/{name}").shuffle(possible)
        return possible

    def _found(self, place: int, chosen: dict[str, str]) -> dict[str, str] | None:
        if place == len(self.names):
            return chosen if self._aligned(chosen) else None
        name = self.names[place]
        for word in self.candidates[name]:
            if any(self.likeness.forbids(other, word) for other in chosen.values()) or not self._may_stand(name, word):
                continue
            found = self._found(place + 1, {**chosen, name: word})
            if found is not None:
                return found
        return None

    def _may_stand(self, name: str, word: str) -> bool:
        if (name, word) not in self._fits:
            self._fits[name, word] = self._aligned({name: word})
        return self._fits[name, word]

    def _aligned(self, words: Mapping[str, str]) -> bool:
        reworded = _Reworded.of(self.sample, words)
        old, new = ([spans[name] for name in words] for spans in (self.sample.spans, reworded.spans))
        try:
            return self.reader.aligned(self.clean, self.reader(reworded.question), old, new)
        except SampleError:
            return False

    def _reason(self) -> str:
        counts = []
        for name in self.names:
            tried = self.candidates[name]
            fit = sum(self._may_stand(name, word) for word in tried)
            counts.append(
                f"for {self.sample.text_of(name)!r} {len(tried)} words may stand, {fit} of which have as many tokens"
            )
        return f"{self.sample.id}: there are no words to put in place: {'; '.join(counts)}"


def _occurs(word: str, question: str) -> bool:
    # Patterns are slow to make, and a vocabulary may be long.
    return word.split()[0].casefold() in question.casefold() and bool(occurrences(question, word))


def _in_case(word: str, like: str) -> str:
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word

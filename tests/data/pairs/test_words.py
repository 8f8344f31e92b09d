"""Questions with a word replaced: as long, token for token, and never by a word that would leave them as they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from hooked_vlm import HookedVLM
from hooked_vlm.data import COLORS, SHAPES, Sample, SampleError, Samples, shapes, span_of
from hooked_vlm.data.pairs import make_str, options_vocabulary
from hooked_vlm.data.pairs.reading import Reader
from tests import llava_processors

TOYS = ("toy-blip-vqa", "toy-llava")
PHRASES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
SAMPLES = shapes(8, seed=7)
SUBJECTS = [*SHAPES, *COLORS, *PHRASES, *(f"{shape}s" for shape in SHAPES), *(f"{color} objects" for color in COLORS)]
WORDS = ["cat", "dog", "red", "square", "circle", "left", "zebra", "yak", "circles", "cats"]


@pytest.fixture(scope="module", params=TOYS)
def model(request: pytest.FixtureRequest) -> HookedVLM:
    return HookedVLM.from_pretrained(request.param)


@pytest.fixture(scope="module")
def blip() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-blip-vqa")


def asked(question: str, *, id: str = "one", **entries: Any) -> Sample:
    """A question with spans given by their words."""
    parts = entries.pop("parts", {})
    return Sample(id, None, question, spans={name: span_of(question, part) for name, part in parts.items()}, **entries)


def choice(first: str, second: str, **entries: Any) -> Sample:
    """A question with two options, of which the first is right."""
    question = f"is it a {first} or a {second} ?"
    return asked(question, parts={"answer": first, "foil": second}, answer=first, foil=second, **entries)


def new_words(sample: Sample) -> dict[str, str]:
    return dict(sample.meta["words_cf"])


def test_questions_align_token_by_token(model: HookedVLM) -> None:
    made = make_str(model, SAMPLES, vocabulary=SUBJECTS)
    assert [one.id for one in made] == [one.id for one in SAMPLES]
    for one in made:
        assert one.question_cf is not None
        image = one.picture()
        clean, other = (model.prepare(image, question) for question in (one.question, one.question_cf))
        start, end = one.meta["spans_cf"]["subject"]
        words = one.question_cf[start:end]
        assert words == new_words(one)["subject"] in SUBJECTS
        assert words != one.text_of("subject")
        positions = clean.span(one.text_of("subject"))
        assert other.span(words) == positions
        changed = [place for place, (a, b) in enumerate(zip(clean.tokens[0], other.tokens[0], strict=True)) if a != b]  # type: ignore[index]
        assert changed
        assert set(changed) <= set(positions[0])


def test_a_word_depends_on_the_seed_and_the_sample_alone(blip: HookedVLM) -> None:
    def questions(samples: Sequence[Sample], vocabulary: Sequence[str] = SUBJECTS, seed: int = 0) -> dict[str, str]:
        made = make_str(blip, samples, vocabulary=vocabulary, seed=seed)
        return {one.id: str(one.question_cf) for one in made}

    whole = questions(SAMPLES)
    assert whole == questions(SAMPLES[::-1], SUBJECTS[::-1])
    assert questions(SAMPLES[2:4]) == {one.id: whole[one.id] for one in SAMPLES[2:4]}
    assert whole != questions(SAMPLES, seed=1)
    twins = questions([replace(SAMPLES[0], id=str(n)) for n in range(6)])
    assert len(set(twins.values())) > 1, "every sample gets the same word"
    alone = make_str(blip, SAMPLES[3], vocabulary=SUBJECTS)
    assert isinstance(alone, Sample)
    assert alone.question_cf == whole[alone.id]


def test_what_else_a_sample_has_stays_but_for_what_no_longer_holds(blip: HookedVLM) -> None:
    one = SAMPLES[0]
    made = make_str(blip, one, vocabulary=SUBJECTS)
    for name in ("id", "image", "question", "answer", "foil", "image_cf", "spans", "group"):
        assert getattr(made, name) is getattr(one, name) or getattr(made, name) == getattr(one, name)
    assert "answer_str" in one.meta, "the answer to the question that it had before"
    assert set(made.meta) == {"words_cf", "spans_cf"}


@pytest.mark.parametrize("kind", ["pieces", "bytes"])
def test_only_words_of_as_many_tokens(kind: str) -> None:
    """Words of these tokenizers have from one token to six."""
    one = llava_processors.model(kind)
    lengths = {}
    for word in WORDS:
        inputs = one.prepare(llava_processors.noise(28, 28), f"what is the {word} ?")
        lengths[word] = len(inputs.span(word)[0])
    assert len(set(lengths.values())) > 2
    for word in ("cat", "circles", "zebra"):
        sample = asked(f"what is the {word} ?", parts={"subject": word})
        allowed = {other for other in WORDS if lengths[other] == lengths[word] and other != word}
        made = make_str(one, [replace(sample, id=str(n)) for n in range(5)], vocabulary=WORDS)
        assert {new_words(own)["subject"] for own in made} <= allowed
        assert bool(allowed) == (len(made) == 5)
        if not allowed:
            assert made.report() == "5 dropped (no word to put in its place: 5)"
            assert f"for {word!r} 9 words may stand, 0 of which have as many tokens" in made.dropped[0].reason
            with pytest.raises(SampleError, match="one: there are no words to put in place"):
                make_str(one, sample, vocabulary=WORDS)


def test_words_that_the_model_does_not_know_are_no_words(blip: HookedVLM) -> None:
    made = make_str(blip, shapes(1, seed=7, kinds=("color",)), vocabulary=["zebra", "yak"])
    assert made.report() == "1 dropped (no word to put in its place: 1)"


def test_what_is_aligned(blip: HookedVLM) -> None:
    read = Reader(blip)
    clean, span = read("what color is the circle ?"), (18, 24)
    for question, other_span, aligned in (
        ("what color is the star ?", (18, 22), True),
        ("what color is the star ?", (14, 17), False),
        ("what color is the circle circle ?", (18, 24), False),
        ("what shape is the star ?", (18, 22), False),
        ("what color is the zebra ?", (18, 23), False),
    ):
        assert read.aligned(clean, read(question), [span], [other_span]) == aligned, question
    assert not read.aligned(clean, clean, [(17, 18)], [(17, 18)]), "a span without tokens"


# Which words ----------------------------------------------------------------------------------------------------------


def made_words(model: HookedVLM, sample: Sample, n: int = 12, **options: Any) -> list[dict[str, str]]:
    """The words put in place of a sample's, under many seeds."""
    return [new_words(make_str(model, sample, seed=seed, **options)) for seed in range(n)]


def test_both_options_become_two_other_words(blip: HookedVLM) -> None:
    for words in made_words(blip, choice("circle", "square"), vocabulary=SHAPES):
        assert set(words) == {"answer", "foil"}
        assert set(words.values()) == {"triangle", "star"}
    found = {words["answer"] for words in made_words(blip, choice("circle", "square"), vocabulary=SHAPES)}
    assert found == {"triangle", "star"}, "always in the same order"


def test_one_span_of_a_question_with_two_options(blip: HookedVLM) -> None:
    for words in made_words(blip, choice("circle", "square"), vocabulary=SHAPES, spans="foil"):
        assert set(words) == {"foil"}
        assert words["foil"] in ("triangle", "star")


def test_words_to_avoid(blip: HookedVLM) -> None:
    sample = asked("is it a red circle ?", parts={"subject": "red"}, answer="green", foil="blue")
    colors = ["red", "green", "blue", "yellow", "purple", "black"]

    def found(**options: Any) -> set[str]:
        return {words["subject"] for words in made_words(blip, sample, n=20, vocabulary=colors, **options)}

    assert found() == {"yellow", "purple", "black"}, "neither the word itself, nor the answer, nor the foil"
    assert found(avoid={"Red": ["purple"]}) == {"yellow", "black"}
    assert found(avoid={"purple": ["red"], "yellow": ["GREEN"]}) == {"black"}
    assert found(avoid={"purple": ["red"]}, symmetric=False) == {"yellow", "purple", "black"}
    assert found(avoid={"green": ["YELLOW"]}, symmetric=False) == {"purple", "black"}
    with pytest.raises(SampleError, match="for 'red' 0 words may stand"):
        make_str(blip, sample, vocabulary=colors, avoid={"red": colors})


def test_new_words_are_not_like_each_other(blip: HookedVLM) -> None:
    avoid = {"red": ["yellow"], "blue": ["purple"]}
    for words in made_words(blip, choice("green", "black"), n=16, vocabulary=list(COLORS), avoid=avoid):
        assert set(words.values()) not in ({"red", "yellow"}, {"blue", "purple"})
        assert len(set(words.values())) == 2


def test_a_word_is_given_up_for_the_others_sake(blip: HookedVLM) -> None:
    vocabulary = {"answer": ["triangle", "star"], "foil": ["star"]}
    for words in made_words(blip, choice("circle", "square"), vocabulary=vocabulary):
        assert words == {"answer": "triangle", "foil": "star"}
    with pytest.raises(SampleError, match="there are no words"):
        make_str(blip, choice("circle", "square"), vocabulary={"answer": ["star"], "foil": ["star"]})


def test_no_word_that_the_question_has_already(blip: HookedVLM) -> None:
    sample = asked("is the circle red or is the square red ?", parts={"subject": "circle"})
    for words in made_words(blip, sample, vocabulary=["square", "star", "red"]):
        assert words == {"subject": "star"}


LETTERS = llava_processors.model("bytes")
"""A model that reads the words of the tests below letter by letter, so that it knows them all."""


@pytest.mark.parametrize(("first", "expected"), [(0, "Yak"), (1, "Hen"), (2, "Bug")])
def test_words_by_word_by_span_and_by_group(first: int, expected: str) -> None:
    sample = asked("is it a Fox ?", parts={"subject": "Fox"}, group="animal")
    vocabulary = {"fox": ["yak"], "subject": ["hen"], "Animal": ["bug"]}
    kept = dict(list(vocabulary.items())[first:])
    assert new_words(make_str(LETTERS, sample, vocabulary=kept)) == {"subject": expected}
    made = make_str(LETTERS, [sample], vocabulary={"color": ["red"]})
    assert made.report() == "1 dropped (a word that the vocabulary does not know: 1)"
    assert "the word 'Fox', the span 'subject' or the group 'animal'" in made.dropped[0].reason


def test_the_vocabulary_of_a_datasets_options(blip: HookedVLM) -> None:
    samples = [
        choice("circle", "square", id="1", group="shape"),
        choice("star", "circle", id="2", group="shape"),
        choice("red", "blue", id="3", group="color"),
        choice("green", "black", id="4", group="color"),
        asked("is it ?", id="5", answer="yes"),
    ]
    vocabulary = options_vocabulary(samples)
    assert vocabulary == {
        "shape": ["circle", "square", "star"],
        "color": ["black", "blue", "green", "red"],
        "": ["yes"],
    }
    made = make_str(blip, samples[2:4], vocabulary=vocabulary)
    assert [set(new_words(one).values()) for one in made] == [{"green", "black"}, {"red", "blue"}]


# How they are written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "expected"), [("fox", "yak"), ("Fox", "Yak"), ("FOX", "YAK")])
def test_a_word_is_written_as_the_one_that_it_stands_for(word: str, expected: str) -> None:
    sample = asked(f"what is {word} ?", parts={"subject": word})
    assert make_str(LETTERS, sample, vocabulary=["yak", "yaks"]).question_cf == f"what is {expected} ?"


@pytest.mark.parametrize(
    ("before", "subject", "vocabulary", "expected"),
    [
        ("a", "fox", ["elk", "yak", "emu"], {"yak"}),
        ("an", "emu", ["elk", "yak", "fox"], {"elk"}),
        ("An", "emu", ["elk", "yak", "fox"], {"elk"}),
        ("the", "emu", ["elk", "yak"], {"elk", "yak"}),
        ("a", "unit", ["hour", "euro", "urns"], {"euro"}),
        ("an", "hour", ["unit", "euro", "urns"], {"urns"}),
    ],
)
def test_articles_fit(before: str, subject: str, vocabulary: list[str], expected: set[str]) -> None:
    sample = asked(f"is it {before} {subject} ?", parts={"subject": subject})
    assert {words["subject"] for words in made_words(LETTERS, sample, vocabulary=vocabulary)} == expected


def test_where_the_spans_of_the_new_question_are() -> None:
    parts = {
        **{"subject": "fox", "constraint": "big hens", "where": "left", "around": "fox left of", "aside": "of the"},
        **{"inside": "big", "across": "the big"},
    }
    sample = asked("is the fox left of the big hens ?", parts=parts)
    vocabulary = {"subject": ["yaks", "yak"], "constraint": ["fabled elk", "fab elks"]}
    made = make_str(LETTERS, sample, vocabulary=vocabulary, spans=["constraint", "subject"])
    question = str(made.question_cf)
    assert question == "is the yak left of the fab elks ?"
    assert {name: question[start:end] for name, (start, end) in made.meta["spans_cf"].items()} == {
        **{"subject": "yak", "constraint": "fab elks", "where": "left", "around": "yak left of", "aside": "of the"},
    }, "what a new word cuts through has no place any more"


def test_spans_move_where_words_are_longer_or_shorter(blip: HookedVLM) -> None:
    made = make_str(blip, choice("star", "triangle"), vocabulary={"answer": ["square"], "foil": ["circle"]})
    question = str(made.question_cf)
    assert question == "is it a square or a circle ?"
    assert {name: question[start:end] for name, (start, end) in made.meta["spans_cf"].items()} == new_words(made)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ("place", "one has no span 'place'; it has subject, other"),
        (["subject", "other"], "the spans 'other' and 'subject' overlap"),
    ],
)
def test_spans_that_cannot_be_replaced(spans: Any, message: str, blip: HookedVLM) -> None:
    sample = asked("is the big cat red ?", parts={"subject": "big cat", "other": "the big"})
    with pytest.raises(SampleError, match=message):
        make_str(blip, sample, vocabulary=["red"], spans=spans)
    assert len(make_str(blip, [sample], vocabulary=["red"], spans=spans).dropped) == 1


def test_what_was_dropped_before_is_still_told(blip: HookedVLM) -> None:
    before = Samples([*SAMPLES[:2], asked("is it ?")]).filter(lambda one: one.id != SAMPLES[0].id, "odd")
    made = make_str(blip, before, vocabulary=SUBJECTS)
    assert [one.id for one in made] == [SAMPLES[1].id]
    assert made.report() == "2 dropped (odd: 1, no span 'subject': 1)"


def test_a_question_that_the_model_cannot_take(blip: HookedVLM) -> None:
    sample = (
        asked("is it red " * 30 + "?", parts={}, spans=None)
        if False
        else Sample("long", None, "what color is the circle ? " * 30, spans={"subject": (18, 24)})
    )
    made = make_str(blip, [sample], vocabulary=SHAPES)
    assert made.report() == "1 dropped (inputs that the model cannot take: 1)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": "circle"}, "a vocabulary is a list of words"),
        ({"vocabulary": ["a"], "avoid": {"red": "blue"}}, "avoid says for each word a list of words"),
    ],
)
def test_a_word_for_a_list_of_words(options: dict[str, Any], message: str, blip: HookedVLM) -> None:
    with pytest.raises(TypeError, match=message):
        make_str(blip, SAMPLES, **options)

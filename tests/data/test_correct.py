"""Only what a model answers rightly is kept, and what is not is told by name, with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hooked_vlm import HookedVLM
from hooked_vlm.data import Sample, Samples, shapes
from hooked_vlm.data.correct import keep_correct, matcher, normalized
from hooked_vlm.inputs import VLMInputs
from tests import llava_processors

SAMPLES = shapes(6, seed=7, kinds=("color", "shape"))


@pytest.fixture(scope="module", params=["toy-blip-vqa", "toy-llava"])
def model(request: pytest.FixtureRequest) -> HookedVLM:
    return HookedVLM.from_pretrained(request.param)


@pytest.fixture(scope="module")
def blip() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-blip-vqa")


def test_right_answers_are_kept_in_their_order(model: HookedVLM) -> None:
    kept = keep_correct(model, SAMPLES, batch_size=4)
    assert [one.id for one in kept] == [one.id for one in SAMPLES]
    assert kept.report() == "none dropped"
    for one, given in zip(kept, SAMPLES, strict=True):
        assert one.meta == {**given.meta, "generated": given.answer}
        assert all(
            getattr(one, name) is getattr(given, name) for name in ("image", "question", "answer", "foil", "image_cf")
        )
    assert [one.id for one in keep_correct(model, iter(SAMPLES), batch_size=1)] == [one.id for one in SAMPLES]


def test_all_else_is_dropped_by_name(model: HookedVLM) -> None:
    one = SAMPLES[0]
    samples = [
        replace(one, id="wrong", answer="green"),
        replace(one, id="fine"),
        replace(one, id="unreadable", image="nowhere.png"),
        replace(one, id="text-alone", image=None),
        replace(one, id="no-answer", answer=None),
        replace(one, id="alike", foil=one.answer),
        replace(one, id="too-long", question=one.question * 60),
        replace(one, id="fine-too"),
    ]
    before = Samples([*samples, one]).filter(lambda sample: sample is not one, "odd")
    for batch_size in (8, 3):
        kept = keep_correct(model, before, batch_size=batch_size)
        assert [sample.id for sample in kept] == ["fine", "fine-too"]
        assert {dropped.id: dropped.kind for dropped in kept.dropped} == {
            one.id: "odd",
            "wrong": "a wrong answer",
            "unreadable": "a picture that cannot be read",
            "text-alone": "no picture",
            "no-answer": "no answer",
            "alike": "answer and foil begin with the same token",
            "too-long": "inputs that the model cannot take",
        }
    reasons = {dropped.id: dropped.reason for dropped in kept.dropped}
    assert reasons["wrong"] == f"wrong: the model says {one.answer!r}, and the answer is 'green'"
    assert "nowhere.png does not exist" in reasons["unreadable"]
    assert f"alike: the answer {one.answer!r} and the foil {one.answer!r} begin with the same token" in reasons["alike"]
    assert "more than the model's" in reasons["too-long"]
    assert len(keep_correct(model, [samples[5]], check_foil=False)) == 1


def test_a_sample_without_an_answer_takes_the_models(model: HookedVLM) -> None:
    samples = [replace(one, answer=None) for one in SAMPLES[:3]]
    assert [one.answer for one in keep_correct(model, samples, adopt=True)] == [one.answer for one in SAMPLES[:3]]
    wrong = keep_correct(model, [replace(SAMPLES[0], answer="green")], adopt=True)
    assert wrong.report() == "1 dropped (a wrong answer: 1)", "an answer that is given is not replaced"
    (alike,) = keep_correct(model, [replace(samples[0], foil=SAMPLES[0].answer)], adopt=True).dropped
    assert alike.kind == "answer and foil begin with the same token"


def test_a_prompt_around_the_question() -> None:
    llava = HookedVLM.from_pretrained("toy-llava")
    whole = "USER: <image>\n{question} ASSISTANT:"
    assert len(keep_correct(llava, SAMPLES, prompt=whole)) == len(SAMPLES)
    samples = [replace(one, question=one.question.removesuffix(" ?")) for one in SAMPLES]
    assert len(keep_correct(llava, samples, prompt="{question} ?")) == len(SAMPLES)
    with pytest.raises(ValueError, match="a prompt says where the question stands"):
        keep_correct(llava, SAMPLES, prompt="what is it ?")


def test_what_is_compared_is_all_that_the_model_says(blip: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def generate(model: HookedVLM, inputs: VLMInputs, *, max_new_tokens: int) -> list[str]:
        told.append(max_new_tokens)
        return [f" The {SAMPLES[0].answer}, I think. "] * len(inputs)

    monkeypatch.setattr(HookedVLM, "generate", generate)
    kept = [keep_correct(blip, SAMPLES[:1], match=match, max_new_tokens=5) for match in MATCHES]
    assert [len(own) for own in kept] == [0, 1, 1]
    assert kept[1][0].meta["generated"] == f"The {SAMPLES[0].answer}, I think."
    assert told == [5, 5, 5]
    monkeypatch.setattr(HookedVLM, "generate", lambda *_, **__: [" "])
    assert keep_correct(blip, SAMPLES[:1], match=always).report() == "1 dropped (no answer from the model: 1)"


MATCHES: tuple[Any, ...] = ("exact", "first_word", "contains")


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    [
        ("red", "Red.", (1, 1, 1)),
        ("a red", "the red", (1, 1, 1)),
        ("yes, it is", "yes", (0, 1, 1)),
        ("it is red", "red", (0, 0, 1)),
        ("redder", "red", (0, 0, 0)),
        ("living room wall", "living room", (0, 1, 1)),
        ("room", "living room", (0, 0, 0)),
        ("the room is living", "living room", (0, 0, 0)),
        ("three", "3", (1, 1, 1)),
        ("", "red", (0, 0, 0)),
        ("red", "!", (0, 0, 0)),
        ("!", "!", (0, 0, 0)),
    ],
)
def test_when_what_is_said_is_the_answer(said: str, answer: str, expected: tuple[int, ...]) -> None:
    assert tuple(int(matcher(match)(said, answer)) for match in MATCHES) == expected


def test_a_match_of_ones_own(blip: HookedVLM) -> None:
    seen = []

    def match(said: str, answer: str) -> bool:
        seen.append((said, answer))
        return said[0] == answer[0]

    samples = [replace(SAMPLES[0], answer=f"{str(SAMPLES[0].answer)[0]}!", foil=None), replace(SAMPLES[0], answer="?")]
    kept = keep_correct(blip, samples, match=match)
    assert len(kept) == 1
    assert seen == [(SAMPLES[0].answer, samples[0].answer), (SAMPLES[0].answer, "?")]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "same"}, "match is 'exact', 'first_word', 'contains' or a function"),
        ({"batch_size": 0}, "batch_size is 1 or more"),
    ],
)
def test_settings_that_are_none(options: dict[str, Any], message: str, blip: HookedVLM) -> None:
    with pytest.raises(ValueError, match=message):
        keep_correct(blip, SAMPLES, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Red\tcar.", "red car"),
        ("It's 2.5, isn’t it?", "its 2.5 isnt it"),
        ("1,000 dogs", "1000 dogs"),
        ("t-shirt/jeans", "t shirt jeans"),
        ("None", "0"),
        ("an ten", "10"),
        ("a", "a"),
        ("U.S.A.", "usa"),
        ("left_hand (right)", "left hand right"),
        ("¿?", ""),
    ],
)
def test_answers_are_compared_as_the_vqa_evaluation_does(text: str, words: str) -> None:
    assert normalized(text) == words.split()


# First tokens, as they are where the answer is written ----------------------------------------------------------------


def always(said: str, answer: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("kind", "answer", "foil", "is_alike"),
    [
        ("pieces", "red", "cat", False),
        ("pieces", "circle", "circles", True),
        ("pieces", "zebra", "yak", True),  # both begin with the space, a token of its own
        ("bytes", "circle", "circles", True),
        ("bytes", "red", "square", False),
        ("bytes", "red", "rex", False),  # which alone begin with an r
        ("words", "red", "square", False),
        ("words", "zebra", "yak", True),  # neither is known
    ],
)
def test_answer_and_foil_are_compared_after_the_prompt(kind: str, answer: str, foil: str, is_alike: bool) -> None:
    one = llava_processors.model(kind)
    picture = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    sample = Sample("one", picture, "what is it ?", answer=answer, foil=foil)
    kept = keep_correct(one, [sample], match=always, max_new_tokens=3)
    assert [own.kind for own in kept.dropped] == (["answer and foil begin with the same token"] if is_alike else [])


@pytest.mark.parametrize(("said", "is_alike"), [("red", False), ("Red", True)])
def test_a_capital_where_the_model_writes_one(said: str, is_alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """This tokenizer knows ``red`` and no ``Red``, which therefore begins as ``Rex`` does."""
    monkeypatch.setattr(HookedVLM, "generate", lambda *_, **__: [said])
    picture = np.zeros((28, 28, 3), dtype=np.uint8)
    sample = Sample("one", picture, "what is it ?", answer="red", foil="rex")
    assert len(keep_correct(llava_processors.model("bytes"), [sample]).dropped) == is_alike

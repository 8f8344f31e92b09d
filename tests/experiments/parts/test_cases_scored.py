"""Samples made ready: which answer is scored, in every form and tokenizer; and pairs that fit, or do not."""

from dataclasses import replace

import pytest
import torch

from hooked_vlm.corruptions import CounterfactualQuestion, Scaled
from hooked_vlm.data import Sample, SampleError, shapes
from hooked_vlm.experiments.parts.cases import corruption_of, described, first_tokens, ready
from tests import llava_processors
from tests.experiments.asking import QUESTION

# Answers --------------------------------------------------------------------------------------------------------------


def test_the_answer_and_its_foil_are_the_samples(toy, shown):
    case = ready(toy, shown, "sip")
    assert toy.token_strings(case.answer) == [shown.answer]
    assert toy.token_strings(case.foil) == [shown.foil]
    assert case.is_correct
    with torch.no_grad():
        assert torch.equal(case.clean_logits, toy(case.clean)[:, -1])
    wrong = ready(toy, replace(shown, answer=shown.foil, foil=shown.answer), "sip")
    assert (int(wrong.answer), int(wrong.foil)) == (int(case.foil), int(case.answer))
    assert not wrong.is_correct


def test_without_an_answer_or_foil_the_runs_say_them(toy, shown):
    own = ready(toy, replace(shown, answer="no", foil="yes"), "sip", scored="own")
    with torch.no_grad():
        clean = toy(own.clean)[0, -1]
        corrupted = toy(own.corrupted.inputs)[0, -1]
    assert int(own.answer) == int(clean.argmax())
    assert own.is_correct
    others = corrupted.clone()
    others[own.answer] = -torch.inf
    assert int(own.foil) == int(others.argmax())
    none = ready(toy, replace(shown, answer=None, foil=None), "sip")
    assert (int(none.answer), int(none.foil)) == (int(own.answer), int(own.foil))
    alone = ready(toy, replace(shown, foil=None))
    clean[alone.answer] = -torch.inf
    assert int(alone.foil) == int(clean.argmax())
    assert (alone.corruption, alone.corrupted) == (None, None)


@pytest.mark.usefixtures("unchecked")
def test_wrong_words(toy, shown):
    with pytest.raises(ValueError, match="scored is 'given' or 'own', not 'mine'"):
        ready(toy, shown, scored="mine")
    with pytest.raises(ValueError, match="'sip', 'str', a Corruption or a function of a sample, not 'blur'"):
        ready(toy, shown, "blur")


@pytest.mark.parametrize("answer", ["YES", "Yes", " yes", "yes ", "yes sir"])
def test_answers_are_found_however_they_are_written(toy, answer):
    sample = shapes(1, seed=7)[0]
    case = ready(toy, replace(sample, answer=answer, foil=answer.lower().replace("yes", "no").upper()), "sip")
    assert toy.token_strings(case.answer) == ["yes"]
    assert toy.token_strings(case.foil) == ["no"]


@pytest.mark.parametrize(("answer", "foil"), [("yes", "yes"), ("yes", "Yes sir"), ("yes", "YES ")])
def test_an_answer_and_a_foil_that_begin_alike(toy, answer, foil):
    sample = replace(shapes(1, seed=7)[0], answer=answer, foil=foil)
    with pytest.raises(SampleError, match=f"{sample.id}.*begin with the same token") as error:
        ready(toy, sample, "sip")
    assert error.value.kind == "answer and foil begin with the same token"


@pytest.mark.parametrize("facts", [{"answer": "zeppelin"}, {"foil": "zeppelin"}, {"answer": ""}, {"foil": " "}])
def test_an_answer_that_the_model_does_not_know(toys, facts):
    """A word of pieces is known by its first; of the toys' tokenizers, a word is known or it is not."""
    for model in toys.values():
        sample = replace(shapes(1, seed=7)[0], **facts)
        with pytest.raises(SampleError, match=sample.id) as error:
            ready(model, sample, "sip")
        assert error.value.kind == "an answer that the model does not know"


def test_an_answer_that_begins_with_a_spaces_own_token_is_said_to():
    """As LLaMA writes numbers: the token would be that of any of them."""
    model = llava_processors.model("pieces", chat=llava_processors.CHAT)
    with pytest.raises(SampleError, match="'blue' begins with a space's own token") as error:
        first_tokens(model, "blue")
    assert error.value.kind == "an answer that begins with a space's own token"


@pytest.mark.parametrize("kind", sorted(llava_processors.TOKENIZERS))
def test_first_tokens_are_words_beginnings_and_never_a_space(kind):
    tokenizer = llava_processors.tokenizer(kind)
    model = llava_processors.model(kind, chat=llava_processors.CHAT)
    for text in ("red", "Red", "dog", "USER: red"):
        found = first_tokens(model, text)
        pieces = {tokenizer.decode([token]).strip() for token in found.values()}
        assert all(piece and text.lower().startswith(piece.lower()) for piece in pieces), (text, pieces)
        assert tokenizer.unk_token_id not in found.values()


@pytest.mark.parametrize("kind", ["pieces", "bytes"])
def test_of_an_answers_forms_the_likeliest_is_scored_and_the_foil_is_written_alike(kind):
    model = llava_processors.model(kind, chat=llava_processors.CHAT)
    several = 0
    for answer, foil in (("red", "dog"), ("circle", "square"), ("cat", "left"), ("what", "now")):
        sample = Sample("a", llava_processors.PICTURES[0], QUESTION, answer, foil)
        case = ready(model, sample)
        answers, foils = first_tokens(model, answer), first_tokens(model, foil)
        several += len(set(answers.values())) > 1
        logits = case.clean_logits[0]
        assert float(logits[case.answer]) == max(float(logits[token]) for token in answers.values())
        forms = {name for name, token in answers.items() if token == int(case.answer)}
        alike = {foils[name] for name in forms if name in foils}
        assert int(case.foil) in (alike or {next(iter(foils.values()))})
        assert case.is_correct == (int(logits.argmax()) in answers.values())
    assert several or kind == "pieces"


def test_an_answer_with_a_space_before_it_is_the_same_answer():
    for kind in ("pieces", "bytes"):
        model = llava_processors.model(kind, chat=llava_processors.CHAT)
        assert set(first_tokens(model, " red ").values()) == set(first_tokens(model, "red").values())


# Counterfactuals ------------------------------------------------------------------------------------------------------


def test_what_a_sample_lacks_is_said(toy, shown):
    for how, what in (("sip", "no counterfactual picture"), ("str", "no counterfactual question")):
        with pytest.raises(SampleError, match=f"{shown.id} has {what}") as error:
            ready(toy, replace(shown, image_cf=None, question_cf=None), how)
        assert error.value.kind == what


@pytest.mark.parametrize("name", ["image", "image_cf"])
def test_pictures_that_cannot_be_read(toy, shown, name, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    for source in (tmp_path / "gone.png", tmp_path / "broken.png"):
        with pytest.raises(SampleError, match=f"{name} of {shown.id}") as error:
            ready(toy, replace(shown, **{name: source}), "sip")
        assert error.value.kind == "a picture that cannot be read"


def test_a_picture_whose_function_fails(toy, shown, tmp_path):
    with pytest.raises(SampleError, match=f"image of {shown.id}"):
        ready(toy, replace(shown, image=(tmp_path / "gone.png").open), "sip")


def test_corruptions_are_given_in_three_ways(shown):
    scaled = Scaled(0.5)
    assert corruption_of(shown, scaled) is scaled
    assert corruption_of(shown, lambda one: CounterfactualQuestion(one.id)).questions == shown.id
    assert corruption_of(shown, "str", prompt="{question} Now.").questions == f"{shown.question_cf} Now."
    assert described("sip") == {"corruption": "sip"}
    assert described(scaled)["factor"] == 0.5
    assert described(test_corruptions_are_given_in_three_ways) == {
        "corruption": "test_corruptions_are_given_in_three_ways"
    }


def test_the_counterfactual_question_is_asked_in_the_same_prompt(toy, shown):
    case = ready(toy, shown, "str", prompt="{question} in this picture")
    assert case.corrupted.inputs.texts[0].text == case.clean.texts[0].text.replace(shown.question, shown.question_cf)
    changed = (case.clean.input_ids != case.corrupted.inputs.input_ids)[0].nonzero()[:, 0].tolist()
    assert changed == list(case.clean.spans["subject"][0])


# blue is five tokens of "pieces" and of "bytes", the others are one each.
ALIGNED = [
    ("is the red dog left of the cat ?", "is the red cat left of the dog ?"),
    ("is the blue dog left of the cat ?", "is the blue dog left of the circle ?"),
    ("is blue it ?", "is red dog cat a an it ?"),
    ("is the red dog ?", "is the red dog ?"),
]
SHIFTED = [
    ("is the blue dog left of the red cat ?", "is the red dog left of the blue cat ?"),
    ("is blue left of red ?", "is red left of blue ?"),
    ("it blue is red ?", "it red is blue ?"),
]
LONGER = [
    ("is the red dog ?", "is the blue dog ?"),
    ("is the red dog ?", "is the red red dog ?"),
    ("is the blue dog ?", "is the red dog ?"),
]


@pytest.mark.parametrize("kind", ["pieces", "bytes"])
@pytest.mark.parametrize(("question", "other"), [*ALIGNED, *SHIFTED, *LONGER])
def test_counterfactual_questions_must_stand_token_by_token(kind, question, other):
    """As many tokens in all are not enough: words between what is replaced must not move."""
    model = llava_processors.model(kind, chat=llava_processors.CHAT)
    sample = Sample("a", llava_processors.PICTURES[0], question, question_cf=other)
    if (question, other) in ALIGNED:
        case = ready(model, sample, "str", prompt="{question} answer in one word")
        assert case.corrupted.inputs.input_ids.shape == case.clean.input_ids.shape
        for word in ("answer", "ASSISTANT:"):
            assert case.clean.positions(word)[0] == case.corrupted.inputs.positions(word)[0]
        return
    with pytest.raises(SampleError, match="as many tokens") as error:
        ready(model, sample, "str")
    assert error.value.kind == "a counterfactual that does not align"
    lengths = {len(model.processor.tokenizer(text).input_ids) for text in (question, other)}
    assert len(lengths) == (1 if (question, other) in SHIFTED else 2)


def test_a_counterfactual_that_the_model_cannot_take(toy, shown):
    for other in ("", "what color is the circle"):
        with pytest.raises(SampleError, match=shown.id) as error:
            ready(toy, replace(shown, question_cf=other), "str")
        assert error.value.kind == "a counterfactual that does not align"


def test_a_picture_of_another_size_is_a_pair_all_the_same(toy, shown):
    """Both are resized to what the model sees."""
    case = ready(toy, replace(shown, image_cf=shown.picture_cf().resize((50, 70))), "sip")
    assert case.corrupted.inputs.pixel_values.shape == case.clean.pixel_values.shape
    assert not torch.equal(case.corrupted.inputs.pixel_values, case.clean.pixel_values)

"""Samples made ready: spans on the right tokens, in every prompt and tokenizer; regions; expressions of spans."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.data import Sample, SampleError, span_of
from hooked_vlm.experiments.parts.cases import prepared
from hooked_vlm.inputs import SpanError
from tests import llava_processors
from tests.experiments.asking import CIRCLE, QUESTION, asked, words_at

# Spans ----------------------------------------------------------------------------------------------------------------

PIECES = ["what", "color", "is", "the", "red", "circle", "left", "of", "blue", "dog"]
PROMPTS = ("{question}", "{question} answer in one word", "is it {question}", "this is the red circle {question} now")


@settings(max_examples=25)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.data())
def test_spans_are_their_words_in_every_tokenizer_and_prompt(listed, data):
    """The tokens of a span hold its words and touch no other; a word may occur several times, in the prompt too."""
    start = data.draw(st.integers(0, len(listed) - 1))
    end = data.draw(st.integers(start + 1, len(listed)))
    first = len(" ".join([*listed[:start], ""]))
    words = " ".join(listed[start:end])
    question = " ".join(listed)
    kind = data.draw(st.sampled_from(sorted(llava_processors.TOKENIZERS)))
    prompt = data.draw(st.sampled_from(PROMPTS))
    model = llava_processors.model(kind, chat=llava_processors.CHAT)
    sample = Sample("a", llava_processors.PICTURES[0], question, spans={"part": (first, first + len(words))})
    inputs = prepared(model, sample, prompt=prompt)
    text, offsets = inputs.texts[0].text, inputs.texts[0].offsets
    # Where the question stands, by the template's own words around it.
    begin = text.index("<image>\n") + len("<image>\n") + prompt.index("{question}") + first
    assert text[begin : begin + len(words)] == words
    touched = {place for place, own in enumerate(offsets) if own and own[0] < begin + len(words) and own[1] > begin}
    assert set(inputs.spans["part"][0]) == touched
    if kind != "words":  # which has not all of these
        tokens = inputs.input_ids[0, list(inputs.spans["part"][0])]
        assert model.processor.tokenizer.decode(tokens).strip() == words


def test_spans_at_the_ends_and_in_words(toy):
    spans = {
        "first": (0, 4),
        "letter": (0, 1),
        "sign": (len(QUESTION) - 1, len(QUESTION)),
        "all": (0, len(QUESTION)),
        "across": (CIRCLE[0] - 2, CIRCLE[0] + 1),
        "padded": (CIRCLE[0] - 1, CIRCLE[1] + 1),
    }
    inputs = prepared(toy, asked(spans=spans))
    found = {name: words_at(inputs, name) for name in spans}
    assert found == {
        "first": ["what"],
        "letter": ["what"],
        "sign": ["?"],
        "all": QUESTION.split(),
        "across": ["red", "circle"],
        "padded": ["circle"],
    }
    assert words_at(inputs, "question") == QUESTION.split()
    with pytest.raises(SampleError, match="a: the span 'space' has no tokens of its own") as error:
        prepared(toy, asked(spans={"space": (4, 5)}))
    assert error.value.kind == "a span without tokens"


def test_a_word_that_occurs_twice_is_the_one_that_is_meant(toy):
    question = "is the red circle the red object ?"
    spans = {f"red {which}": span_of(question, "red", occurrence=which) for which in (0, 1)}
    inputs = prepared(toy, asked(question, spans=spans))
    first = inputs.spans["question"][0][0]
    assert [inputs.spans[f"red {which}"][0] for which in (0, 1)] == [(first + 2,), (first + 5,)]


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("{question}", 0),
        ("{question} Answer in a few words.", 0),
        ("a {question}", 1),
        (f"{QUESTION} yes . {{question}}", 9),
        (f"{{question}} {QUESTION}", 0),
        (f"{QUESTION} {{question}} {QUESTION}", 7),
        ("  is it \n{question} ", None),
    ],
)
def test_spans_stand_where_the_prompt_puts_the_question(toy, prompt, before):
    """Also where the prompt holds the question's words too."""
    inputs = prepared(toy, asked(spans={"circle": CIRCLE, "sign": (29, 30)}), prompt=prompt)
    plain = prepared(toy, asked())
    if before is None:  # whether a new line is a token, tokenizers say differently
        before = list(inputs.tokens[0]).index("what") - plain.spans["question"][0][0]
    shifted = tuple(position + before for position in plain.spans["question"][0])
    assert inputs.spans["question"][0] == shifted
    assert inputs.spans["circle"][0] == shifted[5:6]
    assert inputs.spans["sign"][0] == shifted[6:]
    assert words_at(inputs, "question") == QUESTION.split()


def test_a_question_within_the_prompts_words(toy):
    question = "the circle"
    inputs = prepared(toy, asked(question), prompt="the circle the circle {question} the circle")
    first = prepared(toy, asked(question)).spans["question"][0][0]
    assert inputs.spans["question"][0] == (first + 4, first + 5)


def test_a_whole_prompt_is_taken_as_it_is(toys):
    model = toys["toy-llava"]
    sample = asked(spans={"circle": CIRCLE})
    plain, whole = prepared(model, sample), prepared(model, sample, prompt="USER: <image>\n{question} ASSISTANT:")
    assert torch.equal(plain.input_ids, whole.input_ids)
    assert plain.spans == whole.spans
    other = prepared(model, sample, prompt=f"USER: {QUESTION} <image>\n{{question}} ASSISTANT:")
    assert words_at(other, "question") == QUESTION.split()
    assert other.spans["circle"][0][0] > other.spans["image"][0][-1]


@pytest.mark.parametrize("prompt", ["", "what ?", "{question} {question}", "{}"])
def test_a_prompt_says_once_where_the_question_stands(toy, prompt):
    with pytest.raises(ValueError, match="a prompt says once where the question stands"):
        prepared(toy, asked(), prompt=prompt)


@pytest.mark.parametrize("question", [f"  {QUESTION}", f" \n {QUESTION} "])
def test_spaces_around_a_question_move_no_span(toy, question):
    inputs = prepared(toy, asked(question, spans={"circle": span_of(question, "circle")}))
    assert words_at(inputs, "circle") == ["circle"]


@pytest.mark.parametrize("chat", [llava_processors.CHAT, llava_processors.CHAT_WITH_BEGIN])
def test_a_template_that_trims_its_words(chat):
    model = llava_processors.model("words", chat=chat)
    question = f"{QUESTION} "
    sample = Sample("a", llava_processors.PICTURES[0], question, spans={"circle": CIRCLE})
    for prompt in ("{question}", " is it there ? {question}", "{question} it is"):
        assert words_at(prepared(model, sample, prompt=prompt), "circle") == ["circle"]


@pytest.mark.parametrize("name", ["image", "question", "last", "newline", "rest", "image.object", "image.0"])
def test_names_that_mean_something_else_are_taken(toy, name):
    with pytest.raises(SampleError, match=f"a calls a part of its question '{name}'") as error:
        prepared(toy, asked(spans={name: CIRCLE}))
    assert error.value.kind == "a span of a name that is taken"


@pytest.mark.parametrize("question", ["", "   "])
def test_a_question_without_words(toy, question):
    with pytest.raises(SampleError, match="empty") as error:
        prepared(toy, asked(question))
    assert error.value.kind == "inputs that the model cannot take"


# Regions --------------------------------------------------------------------------------------------------------------


def test_regions_are_patches_under_their_names(toys, shown):
    for model in toys.values():
        inputs = prepared(model, shown)
        for name in ("object", "changed"):
            span = inputs.spans[f"image.{name}"]
            assert span == inputs.positions_in(shown.regions[name])
            assert set(span[0]) < set(inputs.spans["image"][0])


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((90, 90, 200, 200), "reaches out of the picture of 96x96"),
        ((-5, 0, 5, 5), "reaches out of the picture"),
        ((5, 5, 5, 9), "is empty"),
        (np.zeros((96, 96), bool), "the mask is empty"),
        (np.ones((10, 10), bool), r"the mask has shape \(10, 10\)"),
    ],
)
def test_regions_outside_of_the_picture(toy, region, message):
    with pytest.raises(SampleError, match=f"a: the region 'part'.*{message}") as error:
        prepared(toy, asked(regions={"part": region}))
    assert error.value.kind == "a region that does not fit"


def test_a_region_of_a_taken_name_or_without_a_picture(toys):
    llava = toys["toy-llava"]
    with pytest.raises(SampleError, match="a calls a region '0'") as error:
        prepared(llava, asked(regions={"0": (0, 0, 5, 5)}))  # image.0 is the first picture
    assert error.value.kind == "a region of a name that is taken"
    with pytest.raises(SampleError, match="a: the region 'part'"):
        prepared(llava, replace(asked(regions={"part": (0, 0, 5, 5)}), image=None))


# Expressions ----------------------------------------------------------------------------------------------------------

NAMES = ("image", "image.object", "image.changed", "question", "subject", "last")


@settings(max_examples=25)
@given(st.sampled_from(NAMES), st.lists(st.tuples(st.sampled_from("+-"), st.sampled_from(NAMES)), max_size=4))
def test_expressions_are_sums_and_differences_of_sets(toys, shown, first, rest):
    inputs = prepared(toys["toy-llava"], shown)
    expected = set(inputs.spans[first][0])
    for sign, name in rest:
        other = set(inputs.spans[name][0])
        expected = expected | other if sign == "+" else expected - other
    text = " ".join([first, *(f"{sign} {name}" for sign, name in rest)])
    if expected:
        assert inputs.positions(text)[0] == tuple(sorted(expected))
    else:
        with pytest.raises(SpanError, match="nothing is left of"):
            inputs.positions(text)


def test_expressions_over_rows_words_and_occurrences(toys):
    llava = toys["toy-llava"]
    questions = ["is the red circle a red circle ?", "is the red star the red star ?"]
    inputs = llava.prepare([asked().picture()] * 2, questions)
    starts = [row[0] for row in inputs.spans["question"].rows]
    assert inputs.positions("is + ?").rows == tuple((start, start + 7) for start in starts)
    with pytest.raises(SpanError, match="'red' occurs 2 times"):
        inputs.positions("is + red")
    for which, place in ((0, 2), (1, 5)):
        assert inputs.positions("question - red", which).rows == tuple(
            tuple(start + offset for offset in range(8) if offset != place) for start in starts
        )
    with pytest.raises(SpanError, match="'star' does not occur"):
        inputs.positions("image + star", 0)
    shorter = llava.prepare(None, ["can it be the red star ?", "the red star ?"])
    with pytest.raises(SpanError, match=r"nothing is left of 'question - the red star \?' in row 1"):
        shorter.positions("question - the red star ?")


def test_expressions_do_not_mix_towers(toys, shown):
    blip = prepared(toys["toy-blip-vqa"], shown)
    with pytest.raises(SpanError, match="'image' is in vision_encoder, 'subject' in question_encoder"):
        blip.positions("image + subject")
    assert blip.positions("question - subject").tower == "question_encoder"


def test_signs_within_a_text_are_its_own():
    model = llava_processors.model("bytes", chat=llava_processors.CHAT)
    inputs = prepared(model, Sample("a", llava_processors.PICTURES[0], "what is a - the ?"))
    tokens = inputs.input_ids[0, list(inputs.positions("a - the")[0])]
    assert model.processor.tokenizer.decode(tokens).strip() == "a - the"

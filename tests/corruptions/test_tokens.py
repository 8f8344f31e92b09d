"""Tokens of a span replaced by one: the text keeps its length, and all else stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.corruptions import CounterfactualQuestion, ReplaceTokens, describe
from hooked_vlm.data import shapes
from hooked_vlm.inputs import Span, VLMInputs
from tests import llava_processors
from tests.llava_processors import every_tokenizer

SAMPLES = shapes(2, seed=7, kinds=("color",))
TOYS = ("toy-blip-vqa", "toy-llava")


@pytest.fixture(scope="module", params=TOYS)
def model(request: pytest.FixtureRequest) -> HookedVLM:
    return HookedVLM.from_pretrained(request.param)


@pytest.fixture(scope="module")
def clean(model: HookedVLM) -> VLMInputs:
    return model.prepare([one.picture() for one in SAMPLES], [one.question for one in SAMPLES])


SUBJECTS = tuple(one.text_of("subject") for one in SAMPLES)


def ids(inputs: VLMInputs) -> torch.Tensor:
    assert inputs.input_ids is not None
    return inputs.input_ids


def test_the_same_word_changes_nothing(model: HookedVLM, clean: VLMInputs) -> None:
    run = ReplaceTokens(SUBJECTS, SUBJECTS)(model, clean)
    assert torch.equal(ids(run.inputs), ids(clean))
    assert (run.inputs.tokens, run.edits, run.draws) == (clean.tokens, (), 1)
    with torch.no_grad():
        assert torch.equal(model(run.inputs), model(clean))


def test_one_word_for_all_tokens_of_a_span(model: HookedVLM, clean: VLMInputs) -> None:
    before = ids(clean).clone()
    run = ReplaceTokens("what color is the", "green")(model, clean)
    positions = clean.span("what color is the")
    changed = [row.nonzero()[:, 0].tolist() for row in ids(run.inputs) != before]
    assert changed == [list(row) for row in positions.rows]
    assert all(len(row) == 4 for row in changed)
    for row, tokens in enumerate(run.inputs.tokens or ()):
        assert {tokens[position] for position in positions[row]} == {"green"}
        assert tokens == tuple(model.token_strings(ids(run.inputs)[row]))
    assert torch.equal(ids(clean), before), "the clean inputs are written to"
    assert run.inputs.pixel_values is clean.pixel_values
    assert run.inputs.attention_mask is clean.attention_mask
    assert run.inputs.span("what color is the") == positions, "spans are found as before"


def test_a_single_token_is_the_counterfactual_question(model: HookedVLM, clean: VLMInputs) -> None:
    others = tuple(next(word for word in ("star", "circle") if word != own) for own in SUBJECTS)
    questions = tuple(
        one.question.replace(own, other) for one, own, other in zip(SAMPLES, SUBJECTS, others, strict=True)
    )
    run = ReplaceTokens(SUBJECTS, others)(model, clean)
    assert torch.equal(ids(run.inputs), ids(CounterfactualQuestion(questions)(model, clean).inputs))
    alone = ReplaceTokens(SUBJECTS[1:], others[1:])(model, clean.rows([1]))
    assert torch.equal(ids(alone.inputs)[0], ids(run.inputs)[1])


def test_spans_by_name_and_by_position(model: HookedVLM, clean: VLMInputs) -> None:
    by_name = ReplaceTokens("question", "red")(model, clean)
    by_position = ReplaceTokens(clean.spans["question"], "red")(model, clean)
    assert torch.equal(ids(by_name.inputs), ids(by_position.inputs))
    assert (ids(by_name.inputs) != ids(clean)).sum(1).tolist() == [len(row) for row in clean.spans["question"].rows]


@every_tokenizer
@pytest.mark.parametrize("word", ["square", "photograph"])
@pytest.mark.parametrize("span", ["red circle", "what color"])
def test_the_piece_is_the_one_that_the_word_begins_with_there(span: str, word: str, kind: str) -> None:
    """After a space and at the beginning of a line, where tokenizers cut words otherwise."""
    if kind == "words" and word == "photograph":
        pytest.skip("one token a word: this one is not known")
    one, image = llava_processors.model(kind), llava_processors.noise(28, 28)
    question = "what color is the red circle?"
    clean, reworded = (
        one.prepare(image, f"USER: <image>\n{text} ASSISTANT:") for text in (question, question.replace(span, word))
    )
    (positions,), (others,) = clean.span(span).rows, reworded.span(word).rows
    run = ReplaceTokens(span, word)(one, clean)
    assert ids(run.inputs)[0, list(positions)].tolist() == [int(ids(reworded)[0, others[0]])] * len(positions)
    same = ReplaceTokens(span, span)(one, clean)
    assert int(ids(same.inputs)[0, positions[0]]) == int(ids(clean)[0, positions[0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"span": "dog"}, "'dog' does not occur"),
        ({"by": "zebra"}, "'zebra' has no tokens that this model knows"),
        ({"by": ("red",)}, "1 words for 2 rows"),
        ({"span": SUBJECTS[:1]}, "1 spans for 2 rows"),
        ({"span": "image"}, "only words of .* can be replaced|and these positions are vision_encoder's"),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_replaced(arguments: dict[str, Any], message: str, model: HookedVLM, clean: VLMInputs) -> None:
    with pytest.raises(ValueError, match=message):
        ReplaceTokens(**{"span": SUBJECTS, "by": "red", **arguments})(model, clean)


def test_special_tokens_and_unknown_texts(model: HookedVLM, clean: VLMInputs) -> None:
    first = Span(clean.text_tower, ((0,), (0,)))
    for span in (first, Span(clean.text_tower, ((), ()))):
        with pytest.raises(ValueError, match="row 0: only words of"):
            ReplaceTokens(span, "red")(model, clean)
    with pytest.raises(ValueError, match=r"make them with model.prepare"):
        ReplaceTokens("circle", "red")(model, VLMInputs(input_ids=ids(clean)))


@pytest.mark.parametrize(
    ("corruption", "described"),
    [
        (ReplaceTokens("this place", "Paris"), {"span": "this place", "by": "Paris", "occurrence": None}),
        (
            ReplaceTokens(Span("question_encoder", ((1, 2),)), ("Paris",), 1),
            {"span": {"tower": "question_encoder", "rows": [[1, 2]]}, "by": ["Paris"], "occurrence": 1},
        ),
    ],
    ids=lambda value: "",
)
def test_a_description_is_json(corruption: ReplaceTokens, described: dict[str, Any]) -> None:
    assert json.loads(json.dumps(describe(corruption))) == {"corruption": "ReplaceTokens", **described}

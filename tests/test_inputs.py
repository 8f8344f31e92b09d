"""What goes into a model: HF's batches as they are, rows of them, and where in them the words are."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from hooked_vlm import Span, SpanError, VLMInputs
from hooked_vlm.inputs import TextPiece
from tests.processors import model, processor
from tests.tiny_blip import DEC, IMAGE, N_CTX, PATCH, VOCAB, padded_inputs, pixels, token_ids

N_PATCHES = (IMAGE // PATCH) ** 2
PICTURE = np.zeros((30, 40, 3), dtype=np.uint8)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the type checker of the tests, which users do not have either."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def prepared(*texts: str, task: str = "vqa") -> VLMInputs:
    return model(task).prepare(PICTURE, list(texts))


# HF's batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_an_hf_processor_is_taken_as_it_is() -> None:
    batch = processor()(
        images=[PICTURE] * 2, text=["what color ?", "is the circle red ?"], return_tensors="pt", padding=True
    )
    made = [VLMInputs(**batch), VLMInputs.of(batch), VLMInputs.of(dict(batch))]
    for inputs in made:
        assert len(inputs) == 2
        assert inputs.tensors().keys() == batch.keys()
        assert all(inputs.tensors()[name] is batch[name] for name in batch)
    with torch.no_grad():
        assert torch.equal(model("vqa")(batch), model("vqa")(made[0]))


def test_inputs_are_not_made_twice() -> None:
    inputs = prepared("what color ?")
    assert VLMInputs.of(inputs) is inputs
    assert inputs.to("cpu") is inputs


def test_the_token_types_that_some_processors_return_are_taken() -> None:
    batch = processor().tokenizer(["what color ?"], return_tensors="pt", return_token_type_ids=True)
    assert "token_type_ids" in batch
    assert len(VLMInputs(pixel_values=pixels(), **batch)) == 1


def test_unknown_entries_are_named_with_those_known() -> None:
    with pytest.raises(
        ValueError, match=r"unknown entries \['pixels', 'qformer_input_ids'\]; known: \['attention_mask'"
    ):
        VLMInputs.of({"pixels": pixels(), "qformer_input_ids": token_ids(1, 2)})
    with pytest.raises(ValueError, match="unknown entries"):
        model("vqa")({"pixel_values": pixels(), "labels": token_ids(1, 2)})


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_pixels_that_are_no_numbers_are_counted(bad: float) -> None:
    values = pixels(2)
    values[1, 2, 3, :4] = bad
    with pytest.raises(ValueError, match="pixel_values hold 4 values that are NaN or infinite"):
        VLMInputs(pixel_values=values)
    with pytest.raises(ValueError, match="NaN or infinite"):
        prepared("what color ?", "the circle ?").with_pixels(values)


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_rows_that_differ_are_said() -> None:
    with pytest.raises(ValueError, match=r"different numbers of rows: \{'input_ids': 3, 'token_type_ids': 2\}"):
        VLMInputs(input_ids=token_ids(3, 4), token_type_ids=token_ids(2, 4))


def test_a_model_that_sees_one_image_a_row_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"different numbers of rows: \{'pixel_values': 2, 'input_ids': 3\}"):
        model("vqa")(VLMInputs(pixel_values=pixels(2), input_ids=token_ids(3, 4)))


BAD_ENTRIES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"pixel_values": np.zeros((1, 3, 4, 4))},
        TypeError,
        "pixel_values is a ndarray, not a tensor; .*return_tensors='pt'",
    ),
    ({"input_ids": [[1, 2]]}, TypeError, "input_ids is a list, not a tensor"),
    (
        {"pixel_values": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)},
        TypeError,
        "pixel_values is torch.uint8; it should hold",
    ),
    ({"input_ids": torch.ones(1, 4)}, TypeError, "input_ids is torch.float32; it should hold whole numbers"),
    ({"input_ids": torch.tensor([1, 2])}, ValueError, r"input_ids has shape \(2,\); it should be \[b p\]"),
    ({"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.long)}, ValueError, "attention_mask has shape"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("entries", "kind", "message"), BAD_ENTRIES)
def test_entries_that_are_no_tensors_of_the_right_kind(
    entries: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        VLMInputs(**entries)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prefix", ["", "decoder_"])
def test_a_mask_of_another_shape_than_its_ids(prefix: str) -> None:
    ids, mask = f"{prefix}input_ids", "decoder_attention_mask" if prefix else "attention_mask"
    with pytest.raises(ValueError, match=rf"{mask} has shape \(2, 3\), and {ids} has \(2, 4\)"):
        VLMInputs(**{ids: token_ids(2, 4), mask: token_ids(2, 3)})


BAD_FOR_A_MODEL: list[tuple[dict[str, Any], str]] = [
    ({}, "needs"),
    ({"input_ids": token_ids(1, 3)}, "BLIP needs pixel_values"),
    ({"pixel_values": pixels()}, "BLIP needs a question's input_ids"),
    ({"pixel_values": pixels()[0], "input_ids": token_ids(3, 3)}, r"pixel_values have shape \(3, 24, 24\); give \[b 3"),
    ({"pixel_values": pixels()[None], "input_ids": token_ids(1, 3)}, r"pixel_values have shape \(1, 1, 3, 24, 24\)"),
    ({"pixel_values": pixels()[:, :1], "input_ids": token_ids(1, 3)}, r"pixel_values have shape \(1, 1, 24, 24\)"),
    ({"pixel_values": pixels().permute(0, 2, 3, 1), "input_ids": token_ids(1, 3)}, r"have shape \(1, 24, 24, 3\)"),
    ({"pixel_values": pixels(1, 32, 24), "input_ids": token_ids(1, 3)}, "image is 32x24 pixels, .* for 24x24"),
    ({"pixel_values": pixels(), "input_ids": token_ids(1, N_CTX + 1)}, "25 tokens are too many: .* has 24 positions"),
    ({"pixel_values": pixels(), "input_ids": torch.full((1, 2), VOCAB)}, "input_ids hold 99, .* tokens are 0 to 98"),
    (
        {"pixel_values": pixels(), "input_ids": token_ids(1, 2), "decoder_input_ids": torch.tensor([[DEC, -100]])},
        "decoder_input_ids hold -100, and the model's tokens are 0 to 98",
    ),
    (
        {"pixel_values": pixels(), "input_ids": token_ids(1, 2), "decoder_input_ids": token_ids(1, N_CTX + 1)},
        "25 tokens are too many",
    ),
    ({"pixel_values": pixels(), "input_ids": token_ids(1, 1)[:, :0]}, "input_ids hold no tokens"),
]


@pytest.mark.parametrize(("entries", "message"), BAD_FOR_A_MODEL)
def test_a_model_refuses_what_it_cannot_read_by_one_error(entries: dict[str, Any], message: str) -> None:
    for run in (model("vqa"), model("vqa").generate, model("vqa").run_with_cache):
        with pytest.raises(ValueError, match=message) as caught:
            run(entries)
        assert "\n" not in str(caught.value)
    assert not any(point.is_hooked for point in model("vqa").hook_points())


def test_a_tensor_alone_is_no_input(unchecked: None) -> None:
    with pytest.raises(TypeError, match=r"inputs are a Tensor; give what model\.prepare or an HF processor returns"):
        model("vqa")(pixels())


# Rows -----------------------------------------------------------------------------------------------------------------


TEXTS = ["what color is the red circle ?", "is the sheep red ?", "color of a circle"]


def test_rows_carry_everything_that_is_theirs() -> None:
    inputs = prepared(*TEXTS)
    picked = inputs.rows([2, 0, 2])
    assert len(picked) == 3
    for name, tensor in inputs.tensors().items():
        assert torch.equal(picked.tensors()[name], tensor[[2, 0, 2]])
    assert [piece.text for piece in picked.texts] == [TEXTS[2], TEXTS[0], TEXTS[2]]
    assert picked.tokens == tuple(inputs.tokens[row] for row in (2, 0, 2))
    assert picked.spans["question"].rows == tuple(inputs.spans["question"][row] for row in (2, 0, 2))
    assert picked.span("circle").rows == tuple(inputs.rows([row]).span("circle")[0] for row in (2, 0, 2))
    with pytest.raises(IndexError):
        inputs.rows([3])


def test_every_tensor_goes_with_its_row() -> None:
    inputs = VLMInputs(**padded_inputs("vqa"))
    assert set(inputs.tensors()) == {
        "pixel_values",
        "input_ids",
        "attention_mask",
        "decoder_input_ids",
        "decoder_attention_mask",
    }
    for row, one in enumerate(inputs):
        assert len(one) == 1
        assert all(torch.equal(one.tensors()[name][0], tensor[row]) for name, tensor in inputs.tensors().items())
    assert len(list(inputs)) == 3


def test_repeated_rows_stand_beside_each_other() -> None:
    inputs = prepared(*TEXTS)
    assert [piece.text for piece in inputs.repeat(2).texts] == [text for text in TEXTS for _ in range(2)]
    assert torch.equal(inputs.repeat(3).input_ids, inputs.input_ids.repeat_interleave(3, dim=0))
    assert len(inputs.repeat(0)) == 0


def test_inputs_move_whole() -> None:
    inputs = VLMInputs(**padded_inputs("vqa"))
    moved = inputs.to(torch.device("cpu"))
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"cpu"}
    other = inputs.with_pixels(pixels(3))
    assert not torch.equal(other.pixel_values, inputs.pixel_values)
    assert other.input_ids is inputs.input_ids


def test_inputs_are_values_that_can_be_kept_in_sets() -> None:
    inputs = prepared("what color ?")
    assert inputs == inputs
    assert inputs != copy.copy(inputs)
    assert len({inputs, inputs}) == 1


def test_without_anything_there_are_no_rows() -> None:
    assert len(VLMInputs()) == 0
    assert list(VLMInputs()) == []


# Several images in a row ----------------------------------------------------------------------------------------------


def test_images_go_with_their_row() -> None:
    inputs = VLMInputs(
        pixel_values=pixels(4),
        image_sizes=torch.arange(8).reshape(4, 2),
        input_ids=token_ids(3, 5),
        image_rows=(0, 2, 2, 2),
    )
    assert len(inputs) == 3
    picked = inputs.rows([2, 1, 0, 0])
    assert picked.image_rows == (0, 0, 0, 2, 3)
    assert torch.equal(picked.pixel_values, inputs.pixel_values[[1, 2, 3, 0, 0]])
    assert torch.equal(picked.image_sizes, inputs.image_sizes[[1, 2, 3, 0, 0]])
    assert torch.equal(picked.input_ids, inputs.input_ids[[2, 1, 0, 0]])
    assert inputs.rows([1]).image_rows == ()
    assert len(inputs.rows([1]).pixel_values) == 0
    assert [one.image_rows for one in inputs] == [(0,), (), (0, 0, 0)]


@pytest.mark.parametrize("rows", [(0,), (0, 1, 1), (1, 0), (0, 2), (-1, 0)])
def test_rows_of_images_that_cannot_be(rows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image_rows are .*: give a row for each of the 2 images, in ascending order"):
        VLMInputs(pixel_values=pixels(2), input_ids=token_ids(2, 5), image_rows=rows)


def test_rows_whose_images_are_not_known_cannot_be_picked() -> None:
    inputs = VLMInputs(pixel_values=pixels(3), input_ids=token_ids(2, 5))
    with pytest.raises(ValueError, match="^3 images and 2 rows: say which row each image belongs to"):
        inputs.rows([0])


# Named spans ----------------------------------------------------------------------------------------------------------


PLACES = {
    "vqa": ("question", "question_encoder", "answer_decoder", ((0,), (0,))),
    "caption": ("prompt", "text_decoder", "text_decoder", ((5,), (2,))),
    "retrieval": ("text", "text_encoder", "text_encoder", ((0,), (0,))),
}


@pytest.mark.parametrize("task", PLACES)
def test_spans_are_named(task: str) -> None:
    name, tower, last_tower, last = PLACES[task]
    inputs = prepared("is the red circle left", "what color", task=task)
    assert inputs.text_tower == tower
    assert inputs.spans == {
        "image": Span("vision_encoder", (tuple(range(1, N_PATCHES + 1)),) * 2),
        name: Span(tower, ((1, 2, 3, 4, 5), (1, 2))),
        "last": Span(last_tower, last),
    }
    assert inputs.tokens[0][1:6] == ("is", "the", "red", "circle", "left")


def test_a_caption_without_a_beginning_has_its_image_and_its_last() -> None:
    inputs = model("caption").prepare([PICTURE, PICTURE])
    assert set(inputs.spans) == {"image", "last"}
    assert inputs.spans["last"] == Span("text_decoder", ((0,), (0,)))
    assert (inputs.texts, inputs.tokens, inputs.input_ids) == (None, None, None)


# Spans by their text --------------------------------------------------------------------------------------------------


def words_of(inputs: VLMInputs, text: str, row: int = 0, **options: int) -> list[str]:
    return [inputs.tokens[row][position] for position in inputs.span(text, **options)[row]]


QUESTION = "What COLOR is the sheep's green circle, left of the Circles?"
FOUND = [
    ("color", ["color"]),
    ("WHAT color", ["what", "color"]),
    ("what  color\n is", ["what", "color", "is"]),
    ("green", ["gr", "##een"]),
    ("green circle", ["gr", "##een", "circle"]),
    ("green circle,", ["gr", "##een", "circle", ","]),
    ("circle", ["circle"]),
    ("Circles", ["circle", "##s"]),
    ("sheep", ["she", "##ep"]),
    ("sheep's", ["she", "##ep", "'", "s"]),
    ("s", ["s"]),
    ("?", ["?"]),
    ("Circles?", ["circle", "##s", "?"]),
    (", left", [",", "left"]),
    (QUESTION, "what color is the she ##ep ' s gr ##een circle , left of the circle ##s ?".split()),
]


@pytest.mark.parametrize(("text", "tokens"), FOUND)
def test_a_span_is_found_as_whole_words_whatever_their_case(text: str, tokens: list[str]) -> None:
    assert words_of(prepared(QUESTION), text) == tokens


@pytest.mark.parametrize("text", ["blue", "gree", "een", "olor", "circle left", "Circles!", "", "  ", ".*", "[CLS]"])
def test_a_text_that_does_not_occur_is_refused(text: str) -> None:
    with pytest.raises(SpanError, match=r"does not occur in .What COLOR"):
        prepared(QUESTION).span(text)


def test_a_text_that_occurs_twice_needs_its_number() -> None:
    inputs = prepared(QUESTION)
    with pytest.raises(SpanError, match=r"'the' occurs 2 times .* say which with occurrence=0, 1"):
        inputs.span("the")
    first, second = (inputs.span("the", occurrence=number)[0] for number in (0, 1))
    assert (first, second) == ((4,), (15,))
    for number in (2, -1):
        with pytest.raises(SpanError, match=f"there is no occurrence {number}"):
            inputs.span("the", occurrence=number)


def test_a_word_that_the_tokenizer_does_not_know_has_its_one_token() -> None:
    assert words_of(prepared("what zebra is red"), "zebra") == ["[UNK]"]


def test_spans_are_found_in_every_row_of_a_padded_batch() -> None:
    inputs = prepared("the circle", "what color is the green circle ?")
    assert inputs.span("circle") == Span("question_encoder", ((2,), (7,)))
    with pytest.raises(SpanError, match="'color' does not occur in 'the circle'"):
        inputs.span("color")


def test_positions_are_shifted_by_nothing_in_a_prompt_that_starts_with_dec() -> None:
    assert words_of(prepared("a red circle", task="caption"), "red circle") == ["red", "circle"]


def test_a_name_goes_before_a_text() -> None:
    inputs = prepared("what is the red circle")
    assert inputs.positions("image") is inputs.spans["image"]
    assert inputs.positions("red circle") == inputs.span("red circle")
    with pytest.raises(SpanError, match=r"'blue' does not occur .*; named spans: image, last, question"):
        inputs.positions("blue")


def test_inputs_without_texts_say_how_to_get_them() -> None:
    inputs = VLMInputs(**padded_inputs("vqa"))
    with pytest.raises(SpanError, match=r"do not know their texts; make them with model.prepare\(images, texts\)"):
        inputs.span("circle")
    with pytest.raises(SpanError, match="named spans: none"):
        inputs.positions("circle")


def test_a_text_without_tokens_of_its_own_is_refused() -> None:
    piece = TextPiece("a b", ((0, 1), None))
    inputs = VLMInputs(input_ids=token_ids(1, 2), texts=(piece,), text_tower="question_encoder")
    assert inputs.span("a")[0] == (0,)
    with pytest.raises(SpanError, match="'b' has no tokens of its own in 'a b'"):
        inputs.span("b")

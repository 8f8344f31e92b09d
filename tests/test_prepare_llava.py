"""Prompts with pictures in them: what HF's processor makes of them, to the bit, or else one clear error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import BatchFeature

from hooked_vlm import HookedVLM
from tests.llava_processors import (
    APART,
    CHAT,
    CHAT_WITH_BEGIN,
    IMAGE_ID,
    MARKER,
    NONE,
    ONE,
    PICTURES,
    TWO,
    WHOLE,
    assert_same_batch,
    both,
    clip_model,
    dealt,
    every_tokenizer,
    hf_model,
    model,
    noise,
    vit_model,
)
from tests.tiny_llava import IMAGE, N_PATCHES

PROMPTS = {"0": [NONE], "1": [ONE], "2": [TWO], "1, 2": [ONE, TWO], "2, 1, 1": [APART, ONE, ONE + " a"]}


# HF's processor -------------------------------------------------------------------------------------------------------


@both
@every_tokenizer
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_inputs_of_whole_prompts_are_those_of_hfs_processor(kind: str, tiles: bool, prompts: list[str]) -> None:
    vlm = model(kind, tiles=tiles)
    rows = dealt(prompts)
    flat = [picture for row in rows for picture in row] or None
    expected = vlm.processor(images=flat, text=prompts, padding=True, return_tensors="pt")
    assert_same_batch(vlm.prepare(flat, prompts, template=WHOLE), expected)
    inputs = vlm.prepare(rows, prompts, template=WHOLE)
    assert_same_batch(inputs, expected)
    owners = inputs.image_rows
    assert owners == (tuple(row for row, own in enumerate(rows) for _ in own) if flat else None)


@both
def test_rows_with_and_without_pictures(tiles: bool) -> None:
    vlm = model(tiles=tiles)
    inputs = vlm.prepare([[], [PICTURES[1]], []], [NONE, ONE, NONE], template=WHOLE)
    expected = vlm.processor(images=[PICTURES[1]], text=[NONE, ONE, NONE], padding=True, return_tensors="pt")
    assert_same_batch(inputs, expected)
    assert inputs.image_rows == (1,)
    assert [len(row) for row in inputs.spans["image"].rows] == [0, (expected.input_ids == IMAGE_ID).sum(), 0]
    with torch.no_grad():
        assert torch.equal(vlm(inputs), hf_model(tiles=tiles)(**expected).logits)


@both
def test_one_picture_serves_several_prompts(tiles: bool) -> None:
    vlm = model(tiles=tiles)
    prompts = [ONE, "<image> what ?"]
    expected = vlm.processor(images=[PICTURES[1]] * 2, text=prompts, padding=True, return_tensors="pt")
    for images in (PICTURES[1], [PICTURES[1]], np.asarray(PICTURES[1]), [PICTURES[1], PICTURES[1]]):
        inputs = vlm.prepare(images, prompts)
        assert_same_batch(inputs, expected)
        assert inputs.image_rows == (0, 1)


@pytest.mark.parametrize("size", [(1, 3), (9, 250), (251, 37), (28, 29), (300, 20)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    picture = noise(*size)
    for tiles in (False, True):
        vlm = model(tiles=tiles)
        expected = vlm.processor(images=picture, text=[ONE], return_tensors="pt")
        assert_same_batch(vlm.prepare(picture, ONE), expected)


def test_padding_is_the_tokenizers_and_on_the_left_whatever_it_does() -> None:
    right = copy.deepcopy(model().processor)
    right.tokenizer.padding_side = "right"
    right.tokenizer.pad_token = "</s>"
    vlm = HookedVLM.from_hf(hf_model(), processor=right)
    inputs, usual = (each.prepare(PICTURES[0], [ONE, "<image> what ?"]) for each in (vlm, model()))
    assert torch.equal(inputs.attention_mask, usual.attention_mask)
    padding = inputs.attention_mask == 0
    assert set(inputs.input_ids[padding].tolist()) == {right.tokenizer.pad_token_id}
    assert torch.equal(inputs.input_ids[~padding], usual.input_ids[~padding])
    right.tokenizer.pad_token = None
    bare = vlm.prepare(PICTURES[0], [ONE, "<image> what ?"])
    assert set(bare.input_ids[padding].tolist()) == {vlm.config.pad_token_id}


def test_nothing_is_cut_off_silently_whatever_the_tokenizer_is_told() -> None:
    short = copy.deepcopy(model().processor)
    short.tokenizer.model_max_length = 4
    inputs = HookedVLM.from_hf(hf_model(), processor=short).prepare(PICTURES[0], ONE)
    assert_same_batch(inputs, BatchFeature(model().prepare(PICTURES[0], ONE).tensors()))


def test_an_image_processor_that_does_not_pad_is_told_to() -> None:
    """As HF's processor tells it: pictures of fewer tiles get empty ones."""
    ragged = copy.deepcopy(model(tiles=True).processor)
    ragged.image_processor.do_pad = False
    inputs = HookedVLM.from_hf(hf_model(tiles=True), processor=ragged).prepare(PICTURES[:2], TWO)
    assert_same_batch(inputs, ragged(images=PICTURES[:2], text=[TWO], return_tensors="pt"))


# Questions ------------------------------------------------------------------------------------------------------------


def chat_batch(processor: Any, questions: list[str], pictures: list[list[PIL.Image.Image]]) -> BatchFeature:
    """What HF's own chat method makes of them."""
    conversations = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": one} for one in own), {"type": "text", "text": text}],
            }
        ]
        for text, own in zip(questions, pictures, strict=True)
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


@both
@every_tokenizer
@pytest.mark.parametrize("chat", [CHAT, CHAT_WITH_BEGIN], ids=["plain", "with its first token"])
def test_a_question_goes_into_the_chat_template(chat: str, kind: str, tiles: bool) -> None:
    vlm = model(kind, tiles=tiles, chat=chat)
    questions = ["what color is it?", " is it a red circle , or a dog ?"]
    pictures = [[PICTURES[1]], [PICTURES[0], PICTURES[2]]]
    inputs = vlm.prepare(pictures, questions)
    assert_same_batch(inputs, chat_batch(vlm.processor, questions, pictures))
    for row, question in enumerate(questions):
        piece = inputs.texts[row]
        start, end = piece.question
        assert piece.text[start:end] == (question.strip() if chat == CHAT_WITH_BEGIN else question)
        assert piece.text.count(MARKER) == len(pictures[row])


@every_tokenizer
def test_a_question_without_a_chat_template(kind: str) -> None:
    vlm = model(kind)
    inputs = vlm.prepare([[PICTURES[0]], PICTURES[:2], []], ["what color ?"] * 3)
    written = ["USER: " + "<image>\n" * count + "what color ? ASSISTANT:" for count in (1, 2, 0)]
    assert_same_batch(
        inputs, vlm.processor(images=[PICTURES[0], *PICTURES[:2]], text=written, padding=True, return_tensors="pt")
    )
    assert [piece.text for piece in inputs.texts] == written


def test_all_pictures_go_to_a_question_that_is_alone() -> None:
    inputs = model().prepare(PICTURES, "what ?")
    assert inputs.texts[0].text == "USER: " + "<image>\n" * len(PICTURES) + "what ? ASSISTANT:"
    assert inputs.image_rows == (0,) * len(PICTURES)


def test_a_template_may_be_given() -> None:
    template = "{question} {question}\n<image> answer in one word : "
    inputs = model(chat=CHAT).prepare(PICTURES[0], ["what ?", "is it red ?"], template=template)
    written = [template.replace("{question}", question) for question in ("what ?", "is it red ?")]
    assert [piece.text for piece in inputs.texts] == written
    asked = [inputs.tokens[1][position] for position in inputs.spans["question"][1]]
    assert asked == ["is", "it", "red", "?"]
    assert inputs.spans["question"][1][-1] < inputs.spans["image"][1][0]
    assert model().prepare(None, "what ?", template="so: {question}").texts[0].text == "so: what ?"


@pytest.mark.parametrize("template", ["USER: <image>\nwhat ?", "{question} ASSISTANT:", "<image><image>{question}"])
def test_a_template_without_its_places_is_refused(template: str) -> None:
    with pytest.raises(
        ValueError, match=r"template .* should hold \{question\}, and <image> once for each of 1 images"
    ):
        model().prepare(PICTURES[0], "what ?", template=template)


def test_a_chat_template_without_pictures_is_refused() -> None:
    vlm = model(chat="{% for message in messages %}{{ message['content'][-1]['text'] }}{% endfor %}")
    with pytest.raises(ValueError, match="chat template puts 0 <image> into a prompt with 1 images; give template="):
        vlm.prepare(PICTURES[0], "what ?")
    assert vlm.prepare(None, "what ?").texts[0].text == "what ?"


def test_a_question_that_the_chat_template_changes_is_not_found() -> None:
    vlm = model(chat="{% for message in messages %}<image>{{ message['content'][-1]['text'] | upper }}{% endfor %}")
    inputs = vlm.prepare(PICTURES[0], "user: what")
    assert inputs.texts[0].text == "<image>USER: WHAT"
    assert inputs.spans["question"][0] == ()
    with pytest.raises(ValueError, match="where the question is in '<image>USER: WHAT' is not known: give the whole"):
        vlm.reword(inputs, ["is"])


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (ONE, "what color is the red circle?"),
        (TWO, "is the cat left of the dog?"),
        (APART, "and the cat\n?"),
        ("<image>", None),
        ("USER: <image>\n ASSISTANT:", None),
        ("USER: what is <image> \n ASSISTANT: ", "what is"),
        ("[INST] <image>\nwhat is it ? [/INST]", "what is it ?"),
        ("a chat. USER: <image> what ?\nASSISTANT: a dog USER: and it ? ASSISTANT:", "and it ?"),
        ("<|im_start|>system\na<|im_end|><|im_start|>user\n<image>\nwhat ?<|im_end|><|im_start|>assistant\n", "what ?"),
        ("in one word : <image> is it red", "is it red"),
        ("###Human: <image>\nwhat ?###Assistant:", "what ?"),
    ],
)
def test_the_question_of_a_whole_prompt(prompt: str, question: str | None) -> None:
    inputs = model("bytes").prepare([PICTURES[:1] * prompt.count(MARKER)], [prompt])
    found = inputs.texts[0].question
    assert (None if found is None else prompt[slice(*found)]) == question
    assert bool(inputs.spans["question"][0]) == (question is not None)


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (PICTURES[:1], TWO, r"^1 images were given, and the texts have places for 2 \(2\): give as many as there are"),
        (PICTURES[:2], [ONE, TWO], r"^2 images were given, and the texts have places for 3 \(1, 2\)"),
        (PICTURES[:3], ["what ?", "a ?"], r"^3 images were given, and the texts have places for 2 \(1, 1\)"),
        (PICTURES[0], [ONE, TWO], r"^1 images were given, and the texts have places for 3"),
        ([PICTURES[:2], PICTURES[:1]], [ONE, TWO], "^text 0 has 1 <image> and 2 images$"),
        ([PICTURES[:1], []], [ONE, ONE], "^text 1 has 1 <image> and 0 images$"),
        ([PICTURES[:1]], [ONE, ONE], "^pictures of 1 rows, and 2 texts$"),
        (None, ONE, "^text 0 has 1 <image> and 0 images$"),
        (PICTURES[0], None, "^LLaVA needs a text"),
        ([], ONE, "^no images were given"),
        (PICTURES[0], "", "^text 0 is empty$"),
        (PICTURES[:2], ["what", "\n"], "^text 1 is empty$"),
    ],
)
def test_pictures_and_texts_that_do_not_fit(images: Any, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().prepare(images, texts)


def test_a_list_in_which_some_rows_are_a_picture_and_no_list() -> None:
    inputs = model().prepare([PICTURES[0], PICTURES[1:3], ()], [ONE, TWO, NONE])
    assert inputs.image_rows == (0, 1, 1)


def test_a_prompt_may_fill_the_context_and_not_more() -> None:
    vlm = model()
    room = vlm.config.text.n_ctx - N_PATCHES - 1
    assert vlm.prepare(PICTURES[0], "<image>" + " red" * room).input_ids.shape == (1, vlm.config.text.n_ctx)
    with pytest.raises(
        ValueError,
        match=f"^text 1 has {vlm.config.text.n_ctx + 1} tokens, {N_PATCHES} of them of images: more than the model's",
    ):
        vlm.prepare(PICTURES[:2], [ONE, "<image>" + " red" * (room + 1)])


def test_a_tokenizer_without_the_image_token_is_refused() -> None:
    strange = copy.deepcopy(model().processor)
    strange.image_token = "dog"
    vlm = HookedVLM.from_hf(hf_model(), processor=strange)
    with pytest.raises(
        ValueError,
        match=f"^text 0 has 0 tokens of id {IMAGE_ID}, .* {N_PATCHES} features: the processor's 'dog' should",
    ):
        vlm.prepare(PICTURES[0], "what is the dog ?")


def test_a_processor_of_another_size_is_refused() -> None:
    other = copy.deepcopy(model().processor)
    other.image_processor.crop_size = {"height": 2 * IMAGE, "width": 2 * IMAGE}
    with pytest.raises(ValueError, match="the processor makes tiles of"):
        HookedVLM.from_hf(hf_model(), processor=other).prepare(PICTURES[0], ONE)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="takes no interpolate_pos_encoding"):
        model().prepare(PICTURES[0], ONE, interpolate_pos_encoding=True)


# CLIP and ViT ---------------------------------------------------------------------------------------------------------


def test_clips_inputs_are_those_of_hfs_processor() -> None:
    vlm = clip_model()
    texts = ["a photo of a dog", "what", "a red circle"]
    expected = vlm.processor(images=PICTURES[:2], text=texts, padding=True, return_tensors="pt")
    inputs = vlm.prepare(PICTURES[:2], texts)
    assert_same_batch(inputs, expected)
    assert inputs.spans["last"].rows == ((6,), (2,), (4,))
    assert [inputs.tokens[row][position] for row, (position,) in enumerate(inputs.spans["last"].rows)] == ["</s>"] * 3
    assert [len(row) for row in inputs.spans["text"].rows] == [5, 1, 3]
    assert inputs.spans["image"].rows == (tuple(range(1, N_PATCHES + 1)),) * 2
    reworded = vlm.reword(inputs, ["dog"])
    assert_same_batch(reworded, vlm.processor(images=PICTURES[:2], text=["dog"], padding=True, return_tensors="pt"))
    assert reworded.spans["last"].rows == ((2,),)
    for images, words in ((PICTURES[:2], None), (None, texts)):
        alone = vlm.prepare(images, words)
        for name, tensor in alone.tensors().items():
            assert torch.equal(tensor, expected[name])
    with pytest.raises(ValueError, match="give CLIP images, texts or both"):
        vlm.prepare()


def test_a_vits_inputs_are_those_of_hfs_processor() -> None:
    vlm = vit_model()
    assert_same_batch(vlm.prepare(PICTURES), vlm.processor(PICTURES, return_tensors="pt"))
    with pytest.raises(ValueError, match="reads no text"):
        vlm.prepare(PICTURES, ["what"])


# Real photographs -----------------------------------------------------------------------------------------------------


@pytest.mark.reference_data
@both
def test_photographs(reference_data: Path, tiles: bool) -> None:
    paths = sorted((reference_data / "photos").glob("*.jpg"))[:4]
    pictures = [PIL.Image.open(path) for path in paths]
    vlm = model("pieces", tiles=tiles)
    prompts = [ONE] * len(paths)
    inputs = vlm.prepare(paths, prompts)
    assert_same_batch(inputs, vlm.processor(images=pictures, text=prompts, padding=True, return_tensors="pt"))
    for grid, picture in zip(inputs.patch_grid, pictures, strict=True):
        assert grid.size == (picture.height, picture.width)

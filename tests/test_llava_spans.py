"""Where in LLaVA's prompts the pictures and the words are; other questions, other rows, labels and answers.

The judges are the tokens' own strings, and what the model computes at them.
"""

from __future__ import annotations

import pytest
import torch
from transformers import BatchFeature

from hooked_vlm import HookedVLM, SpanError, VLMInputs
from hooked_vlm.patches import NEWLINE
from tests.llava_processors import (
    APART,
    BEGIN,
    CHAT,
    CHAT_WITH_BEGIN,
    IMAGE_ID,
    NONE,
    ONE,
    PAD,
    PICTURES,
    TOKENIZERS,
    TWO,
    WHOLE,
    assert_same_batch,
    both,
    dealt,
    every_tokenizer,
    hf_model,
    model,
)
from tests.tiny_llava import IMAGE, N_PATCHES, PATCH


def decoded(vlm: HookedVLM, inputs: VLMInputs, span: str, row: int) -> str:
    """The text of a span's tokens, word by word."""
    named = inputs.spans[span] if span in inputs.spans else inputs.span(span)
    text = vlm.processor.decode(inputs.input_ids[row, list(named[row])]).strip()
    return text.replace(" ?", "?")


# Spans ----------------------------------------------------------------------------------------------------------------


@both
@every_tokenizer
def test_spans(kind: str, tiles: bool) -> None:
    vlm = model(kind, tiles=tiles)
    inputs = vlm.prepare(dealt([ONE, TWO]), [ONE, TWO])
    length = inputs.input_ids.shape[1]
    for row, images in enumerate((1, 2)):
        image_tokens = (inputs.input_ids[row] == IMAGE_ID).nonzero().flatten().tolist()
        assert inputs.spans["image"][row] == tuple(image_tokens)
        own = [inputs.spans[f"image.{image}"][row] for image in range(images)]
        assert sum(own, ()) == tuple(image_tokens)
        assert all(positions == tuple(range(positions[0], positions[-1] + 1)) for positions in own)
        assert inputs.spans["last"][row] == (length - 1,)
    assert inputs.spans["image.1"][0] == ()
    assert decoded(vlm, inputs, "question", 0) == "what color is the red circle?"
    assert decoded(vlm, inputs, "question", 1) == "is the cat left of the dog?"
    if not tiles:
        assert not [name for name in inputs.spans if "tile" in name or name == "newline"]
        assert {len(inputs.spans["image.0"][row]) for row in range(2)} == {N_PATCHES}


def test_spans_of_tiles() -> None:
    vlm = model(tiles=True)
    pictures = [PICTURES[3], PICTURES[0]]  # two tiles each: the first one fills them, the second one half of them
    inputs = vlm.prepare(pictures, TWO)
    base, wide = N_PATCHES, N_PATCHES * 2
    assert [len(inputs.spans[f"image.0.tile.{tile}"][0]) for tile in range(3)] == [base, wide // 2, wide // 2]
    first = inputs.spans["image.0"][0]
    assert first == tuple(range(first[0], first[0] + base + wide + 4))
    newlines = inputs.spans["newline"][0]
    rows, columns = IMAGE // PATCH, 2 * IMAGE // PATCH
    assert newlines[:rows] == tuple(first[0] + base + columns + row * (columns + 1) for row in range(rows))
    assert len(newlines) == 2 * rows
    # A row of the picture runs through both tiles: half of it in each.
    left, right = (inputs.spans[f"image.0.tile.{tile}"][0] for tile in (1, 2))
    assert left[: columns // 2] == first[base : base + columns // 2]
    assert right[: columns // 2] == first[base + columns // 2 : base + columns]
    tiles = {name for name in inputs.spans if ".tile." in name}
    assert tiles == {f"image.0.tile.{tile}" for tile in range(3)} | {f"image.1.tile.{tile}" for tile in range(3)}
    assert [len(inputs.spans[f"image.1.tile.{tile}"][0]) for tile in range(3)] == [base, base // 2, base // 2]
    with_newlines = {position for name in tiles for position in inputs.spans[name][0]} | set(newlines)
    assert with_newlines == set(inputs.spans["image"][0])


@pytest.mark.parametrize("tiles", [False, True])
def test_image_spans_hold_the_pictures_features(tiles: bool) -> None:
    """What the language model reads there is what the projector writes, or the newline."""
    vlm = model(tiles=tiles)
    inputs = vlm.prepare(dealt([ONE, TWO]), [ONE, TWO])
    names = ["projector.hook_out", "language_model.hook_merged_embed"]
    with torch.no_grad():
        _, cache = vlm.run_with_cache(inputs, names_filter=names)
    features, merged = (cache[name] for name in names)
    tile = 0
    for grid in inputs.patch_grid:
        spans = inputs.spans
        image = [other.image for other in inputs.patch_grid if other.row == grid.row].index(grid.image)
        for own in range(len(grid.views)):
            name = f"image.{image}.tile.{own}" if tiles else f"image.{image}"
            at = list(spans[name][grid.row])
            places = [place for place in grid.places if place.tile == own]
            picked = [place.row * (IMAGE // PATCH) + place.column for place in places]
            assert torch.equal(merged[grid.row, at], features[tile + own, picked])
        if tiles:
            at = [p for p, place in zip(grid.positions, grid.places, strict=True) if place.tile == NEWLINE]
            assert set(at) <= set(spans["newline"][grid.row])
            assert torch.equal(merged[grid.row, at], vlm.image_newline.expand(len(at), -1))
        tile += len(grid.views)
    assert tile == len(features)


@both
@every_tokenizer
@pytest.mark.parametrize(
    ("words", "row", "found"),
    [
        ("red circle", 0, "red circle"),
        ("cat", 1, "cat"),
        ("the dog", 1, "the dog"),
        ("dog?", 1, "dog?"),
        ("assistant:", 0, "ASSISTANT:"),
        ("USER:", 1, "USER:"),
        ("left of the dog? ASSISTANT:", 1, "left of the dog? ASSISTANT:"),
    ],
)
def test_words_are_found_behind_padding_and_pictures(kind: str, tiles: bool, words: str, row: int, found: str) -> None:
    vlm = model(kind, tiles=tiles)
    inputs = vlm.prepare(dealt([ONE, TWO]), [ONE, TWO]).rows([row])
    padded = vlm.prepare(dealt([ONE, TWO]), [ONE, TWO])
    assert decoded(vlm, inputs, words, 0) == found
    shared = [other for other in padded.texts if words.lower() in other.text.lower()]
    if len(shared) == len(padded.texts):
        assert decoded(vlm, padded, words, row) == found
    else:
        with pytest.raises(SpanError, match="does not occur"):
            padded.span(words)


def test_words_on_both_sides_of_pictures() -> None:
    for kind in TOKENIZERS:
        vlm = model(kind)
        inputs = vlm.prepare(PICTURES[:2], APART)
        first, second = (inputs.span("a", occurrence=occurrence)[0] for occurrence in (0, 1))
        images = [inputs.spans[f"image.{image}"][0] for image in range(2)]
        assert first[-1] < images[0][0]
        assert images[0][-1] < second[0]
        assert second[-1] < images[1][0]
        assert decoded(vlm, inputs, "b", 0) in ("b", "<unk>")
        assert inputs.span("b")[0][0] == images[1][-1] + 1
        assert not set(inputs.span(". what")[0]) & set(inputs.spans["image"][0])


@every_tokenizer
def test_a_span_never_takes_in_a_picture(kind: str) -> None:
    inputs = model(kind).prepare(PICTURES[:2], TWO)
    with pytest.raises(SpanError, match="has no tokens of its own"):
        inputs.span("image", occurrence=0)  # the image token's name is no text of the prompt
    every = inputs.span("<image> <image> is the cat left of the dog? ASSISTANT:")[0]
    assert not set(every) & set(inputs.spans["image"][0])


# Other texts, other rows ----------------------------------------------------------------------------------------------


@both
@every_tokenizer
@pytest.mark.parametrize("chat", [None, CHAT, CHAT_WITH_BEGIN], ids=["none", "plain", "with its first token"])
def test_other_questions(chat: str | None, kind: str, tiles: bool) -> None:
    vlm = model(kind, tiles=tiles, chat=chat)
    pictures = [[PICTURES[1]], [PICTURES[0], PICTURES[2]], []]
    first = vlm.prepare(pictures, ["what color is it?", "is it a dog ?", "a red cat ?"])
    others = ["is the cat now left of the red dog?", "what ?", "circle"]
    reworded, fresh = vlm.reword(first, others), vlm.prepare(pictures, others)
    assert_same_inputs(reworded, fresh)
    assert_same_inputs(vlm.reword(reworded, ["what color is it?", "is it a dog ?", "a red cat ?"]), first)


def assert_same_inputs(one: VLMInputs, other: VLMInputs) -> None:
    assert_same_batch(one, BatchFeature(other.tensors()))
    for name in ("spans", "texts", "tokens", "text_tower", "image_rows"):
        assert getattr(one, name) == getattr(other, name), name
    for grid, wanted in zip(one.patch_grid, other.patch_grid, strict=True):
        for name in ("image", "row", "tower", "size", "views", "places", "positions"):
            assert getattr(grid, name) == getattr(wanted, name), name


def test_other_whole_prompts() -> None:
    vlm = model("pieces")
    first = vlm.prepare(dealt([ONE, TWO]), [ONE, TWO])
    others = ["what is <image> ? ASSISTANT:", "<image> dog <image> cat"]
    assert_same_inputs(vlm.reword(first, others), vlm.prepare(dealt([ONE, TWO]), others))
    mixed = vlm.reword(first, ["now?", others[1]])
    assert [piece.text for piece in mixed.texts] == ["USER: <image>\nnow? ASSISTANT:", others[1]]
    with pytest.raises(ValueError, match="^text 1 has 1 <image>, and its row has 2 images$"):
        vlm.reword(first, [others[0], others[0]])
    with pytest.raises(ValueError, match="^1 texts for 2 rows$"):
        vlm.reword(first, ["what"])
    with pytest.raises(ValueError, match="^text 0 is empty$"):
        vlm.reword(first, [" ", "what"])
    with pytest.raises(ValueError, match="do not know their prompts"):
        vlm.reword(VLMInputs(**first.tensors()), ["a", "b"])


def test_a_prompt_with_a_first_token_of_its_own_is_reworded_as_it_was() -> None:
    """HF's processor puts another one before it."""
    vlm = model()
    inputs = vlm.prepare(PICTURES[0], f"{BEGIN}{ONE}")
    expected = vlm.processor(images=PICTURES[0], text=[f"{BEGIN}{ONE}"], return_tensors="pt")
    assert_same_batch(inputs, expected)
    assert inputs.tokens[0][:2] == (BEGIN, BEGIN)
    assert vlm.reword(inputs, ["what ?"]).tokens[0][:3] == (BEGIN, BEGIN, "USER:")


@both
def test_rows_in_another_order(tiles: bool) -> None:
    vlm = model("pieces", tiles=tiles)
    prompts = [ONE, TWO, NONE]
    inputs = vlm.prepare(dealt(prompts), prompts, template=WHOLE)
    order = [1, 2, 0, 1]
    picked = inputs.rows(order)
    rows = [dealt(prompts)[row] for row in order]
    fresh = vlm.prepare(rows, [prompts[row] for row in order], template=WHOLE)
    assert_same_batch(picked, BatchFeature(fresh.tensors()))
    for name in inputs.spans:
        assert picked.spans[name].rows == tuple(inputs.spans[name][row] for row in order)
    assert_same_inputs(picked, fresh)
    assert len(inputs.repeat(2).patch_grid) == 2 * len(inputs.patch_grid)
    assert inputs.repeat(2).image_rows == (0, 1, 2, 2, 3, 3)
    alone = [*inputs][1]
    with torch.no_grad():
        torch.testing.assert_close(vlm(picked)[0], vlm(picked)[3])
        torch.testing.assert_close(vlm(alone)[0, -1], vlm(inputs)[1, -1])
        torch.testing.assert_close(vlm(inputs.rows([2]))[0, -1], vlm(inputs)[2, -1])  # no picture is left


# Labels and answers ---------------------------------------------------------------------------------------------------


def test_labels() -> None:
    vlm = model()
    inputs = vlm.prepare(dealt([ONE, TWO]), [ONE, TWO])
    one, two = vlm.position_labels(inputs, "language_model")
    n_padded = (inputs.attention_mask[0] == 0).sum()
    assert one[:n_padded] == [""] * n_padded
    assert PAD not in one
    patches = [f"{row},{column}" for row in range(IMAGE // PATCH) for column in range(IMAGE // PATCH)]
    assert [one[position] for position in inputs.spans["image"][0]] == patches
    assert [two[position] for position in inputs.spans["image.1"][1]] == [f"1:{patch}" for patch in patches]
    words = [position for position in range(n_padded, len(one)) if position not in inputs.spans["image"][0]]
    assert [one[position] for position in words][:4] == ["<s>", "USER:", "\\n", "what"]
    assert vlm.position_labels(inputs, "vision_encoder") == [["[class]", *patches]] * 3
    assert vlm.position_labels(inputs, "projector") == [patches] * 3
    with pytest.raises(ValueError, match="no tower 'text_encoder'"):
        vlm.position_labels(inputs, "text_encoder")


def test_labels_of_tiles() -> None:
    vlm = model(tiles=True)
    inputs = vlm.prepare(PICTURES[3], ONE)
    (labels,) = vlm.position_labels(inputs, "language_model")
    own = [labels[position] for position in inputs.spans["image"][0]]
    assert own[:N_PATCHES] == [f"0/{row},{column}" for row in range(4) for column in range(4)]
    first = [f"{tile}/0,{column}" for tile in (1, 2) for column in range(4)]
    assert own[N_PATCHES : N_PATCHES + 9] == [*first, "newline 0"]
    assert len(set(own)) == len(own)
    with torch.no_grad():
        _, cache = vlm.run_with_cache(inputs)
    for tower in ("vision_encoder", "projector"):
        shape = cache[f"{tower}.hook_out"].shape
        labels = vlm.position_labels(inputs, tower)
        assert (len(labels), len(labels[0])) == tuple(shape[:2]), tower


@both
def test_labels_are_as_many_as_positions(tiles: bool) -> None:
    vlm = model(tiles=tiles)
    inputs = vlm.prepare(dealt([TWO, ONE]), [TWO, ONE])
    with torch.no_grad():
        _, cache = vlm.run_with_cache(inputs)
    for tower in vlm.towers:
        labels, shape = vlm.position_labels(inputs, tower), cache[f"{tower}.hook_out"].shape
        assert [len(row) for row in labels] == [shape[1]] * shape[0], tower


@both
@every_tokenizer
def test_an_answer_is_told_without_its_prompt(kind: str, tiles: bool) -> None:
    vlm, hf = model(kind, tiles=tiles), hf_model(tiles=tiles)
    inputs = vlm.prepare(dealt([ONE, TWO]), [ONE, TWO])
    answers = vlm.generate(inputs, max_new_tokens=6)
    found = hf.generate(**inputs.tensors(), max_new_tokens=6, do_sample=False)
    own = found[:, inputs.input_ids.shape[1] :]
    assert answers == [text.strip() for text in vlm.processor.batch_decode(own, skip_special_tokens=True)]
    assert not any("ASSISTANT" in answer for answer in answers)
    assert torch.equal(vlm.generate(inputs, max_new_tokens=6, return_type="tokens"), found)
    alone = vlm.prepare(PICTURES[0], ONE)
    if kind == "words":  # elsewhere a random model's bytes make no characters
        assert "".join(vlm.stream(alone, max_new_tokens=6)) == vlm.generate(alone, max_new_tokens=6)[0]

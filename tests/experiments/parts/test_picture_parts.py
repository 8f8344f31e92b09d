"""Which tokens see the picture and which lie together, under any processor: cropped, padded, in tiles."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPImageProcessor, LlavaNextImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from hooked_vlm import HookedVLM, Span, SpanError, VLMInputs
from hooked_vlm.experiments.parts.picture_parts import dilated, picked, with_picture_spans
from hooked_vlm.patches import NEWLINE, PatchGrid, image_tokens
from tests.experiments.planted_words import planted_model, planted_sample

SIDE, PATCH = 56, 14
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168]]
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
FIRST = 3
TOWER = "language_model"
PARTS = ("image.seen", "image.padding", "image.class", "newline")
sizes = st.tuples(st.integers(15, 200), st.integers(15, 200))
kinds = st.sampled_from(["crop", "pad", "tiles", "class"])


def made(size, kind="crop") -> VLMInputs:
    """A prompt of a few tokens around a picture that one of HF's processors has prepared."""
    pinpoints = PINPOINTS if kind == "tiles" else None
    processor = {
        "crop": lambda: CLIPImageProcessor(**CROP),
        "class": lambda: CLIPImageProcessor(**CROP),
        "pad": lambda: LlavaImageProcessorPil(**CROP, do_pad=True),
        "tiles": lambda: LlavaNextImageProcessor(**CROP, image_grid_pinpoints=PINPOINTS),
    }[kind]()
    n_tokens = len(image_tokens(size, SIDE, PATCH, pinpoints, has_class_token=kind == "class"))
    positions = tuple(range(FIRST, FIRST + n_tokens))
    grid = PatchGrid.of(
        *(processor, size, positions),
        **{"image_size": SIDE, "patch_size": PATCH, "pinpoints": pinpoints, "tower": TOWER},
        has_class_token=kind == "class",
    )
    ids = torch.ones(1, FIRST + n_tokens + 4, dtype=torch.long)
    spans = {
        "image": Span(TOWER, (positions,)),
        "question": Span(TOWER, ((FIRST + n_tokens, FIRST + n_tokens + 1),)),
        "last": Span(TOWER, ((FIRST + n_tokens + 3,),)),
    }
    newlines = [at for at, place in zip(positions, grid.places, strict=True) if place.tile == NEWLINE]
    if newlines:
        spans["newline"] = Span(TOWER, (tuple(newlines),))
    return VLMInputs(input_ids=ids, spans=spans, patch_grid=(grid,), text_tower=TOWER)


@settings(max_examples=60)
@given(sizes, kinds)
def test_every_image_token_is_of_one_kind(size, kind):
    inputs = with_picture_spans(made(size, kind))
    parts = [inputs.spans[name][0] for name in PARTS if name in inputs.spans]
    assert sorted(position for part in parts for position in part) == list(inputs.spans["image"][0])
    assert ("newline" in inputs.spans) == (kind == "tiles")
    assert ("image.class" in inputs.spans) == (kind == "class")
    is_padded = kind == "pad" and max(size) / min(size) > 1 + 4 * PATCH / SIDE
    assert ("image.padding" in inputs.spans) or not is_padded
    # A box of the whole picture is all that sees it.
    whole = inputs.positions_in((0, 0, size[1], size[0]))
    assert inputs.spans["image.seen"] == whole


@settings(max_examples=30)
@given(sizes, kinds)
def test_the_rest_is_neither_question_nor_image_nor_last(size, kind):
    inputs = with_picture_spans(made(size, kind))
    end = inputs.spans["last"][0][0]
    assert inputs.spans["rest"][0] == (0, 1, 2, end - 1)


def grid_places(grid: PatchGrid) -> dict[int, tuple[str, int, int]]:
    """Row and column of each patch in the whole picture's grid, or in that of all tiles put together."""
    places, row, column = {}, 0, 0
    for position, place in zip(grid.positions, grid.places, strict=True):
        if place.tile == NEWLINE:
            row, column = row + 1, 0
        elif place.tile == 0:
            places[position] = ("whole", place.row, place.column)
        else:
            places[position] = ("tiles", row, column)
            column += 1
    return {position: place for position, place in places.items() if place[2] >= 0}


@settings(max_examples=60)
@given(sizes, st.sampled_from(["crop", "pad", "tiles"]), st.integers(0, 3), st.data())
def test_a_part_grows_by_its_eight_neighbours(size, kind, by, data):
    inputs = with_picture_spans(made(size, kind))
    (grid,) = inputs.patch_grid
    seen = inputs.spans["image.seen"]
    start = data.draw(st.sets(st.sampled_from(seen[0]), min_size=1, max_size=3))
    grown = dilated(inputs, Span(TOWER, (tuple(start),)), by)
    places = grid_places(grid)
    expected = {
        position
        for position in seen[0]
        for own in start
        if places[own][0] == places[position][0]
        and max(abs(places[own][axis] - places[position][axis]) for axis in (1, 2)) <= by
    }
    assert set(grown[0]) == expected


@settings(max_examples=30)
@given(sizes, kinds, st.data())
def test_parts_grow_one_within_the_other(size, kind, data):
    inputs = with_picture_spans(made(size, kind))
    seen = inputs.spans["image.seen"]
    start = Span(TOWER, (tuple(sorted(data.draw(st.sets(st.sampled_from(seen[0]), min_size=1)))),))
    steps = [set(dilated(inputs, start, by)[0]) for by in range(4)]
    assert steps[0] == set(start[0])
    assert all(one <= other <= set(seen[0]) for one, other in pairwise(steps))
    twice = dilated(inputs, dilated(inputs, start, 1), 1)
    assert set(twice[0]) == steps[2]


@pytest.mark.parametrize("kind", ["pad", "tiles", "class"])
def test_what_is_left_of_a_picture_sees_it(kind):
    size = (40, 160)
    inputs = with_picture_spans(made(size, kind))
    box = inputs.positions_in((0, 0, 40, 40))
    named = VLMInputs(
        input_ids=inputs.input_ids,
        spans={**inputs.spans, "image.object": box},
        patch_grid=inputs.patch_grid,
        text_tower=TOWER,
    )
    left = set(picked(named, "image - image.object")[0])
    assert left == set(inputs.spans["image.seen"][0]) - set(box[0])
    padded = set(picked(named, "image - image.object", padding=True)[0])
    assert padded - left == set(inputs.spans["image.padding"][0] if kind == "pad" else ())
    # Elsewhere all of the picture is meant, its padding, newlines and class token too.
    assert set(picked(named, "image")[0]) == set(inputs.spans["image"][0]) > left
    assert set(picked(named, "image + last")[0]) == {*inputs.spans["image"][0], *inputs.spans["last"][0]}
    assert set(picked(named, "image + last - image")[0]) == set(inputs.spans["last"][0])


def test_of_a_blip_the_class_token_is_of_the_image():
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    plain = model.prepare(np.full((96, 96, 3), 200, np.uint8), "what color is the circle ?")
    inputs = with_picture_spans(plain)
    assert inputs.spans["image"][0] == tuple(range(37))
    assert inputs.spans["image.class"][0] == (0,)
    assert inputs.spans["image.seen"] == plain.spans["image"]
    assert inputs.spans["rest"] == Span("question_encoder", ((0, 7),))
    assert with_picture_spans(inputs).spans == inputs.spans


def test_padding_of_a_text_is_no_rest():
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    picture = np.full((96, 96, 3), 200, np.uint8)
    inputs = with_picture_spans(model.prepare([picture] * 2, ["what color is the circle ?", "is there a star ?"]))
    assert inputs.spans["rest"].rows == ((0, 7), (0, 6))


def test_errors_say_what_is_wrong():
    model = planted_model()
    inputs = model.prepare(planted_sample("red").picture(), "word asking word")
    with pytest.raises(SpanError, match="no patches are known in vision_encoder"):
        dilated(inputs, Span("vision_encoder", ((0,),)), 1)
    with pytest.raises(ValueError, match="0 patches or more"):
        dilated(inputs, inputs.spans["image"], -1)
    text = model.prepare(None, "word asking word")
    with pytest.raises(SpanError, match="no patches are known in language_model: make"):
        dilated(text, Span("language_model", ((0,),)), 1)
    with pytest.raises(SpanError, match="'image.seen'"):
        with_picture_spans(made((60, 60)).__class__(**{**vars(inputs), "spans": {"image.seen": inputs.spans["last"]}}))

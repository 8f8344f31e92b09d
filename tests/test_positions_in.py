"""A part of a picture and its positions: where pixels change, those patches change and no others.

The pixels inside a box are drawn anew, the picture is prepared again, and the towers are run: the positions whose
embeddings changed are compared with those that were foretold. Where the processor resizes, its filter reads over the
box's edges; there the boxes are those whose edges lie far enough inside of patches.
"""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM, Span, SpanError, VLMInputs
from hooked_vlm.patches import PatchGrid
from tests import llava_processors, processors
from tests.tiny_llava import IMAGE, N_PATCHES

PROMPTS = {
    1: "USER: <image>\nwhat is it ?",
    2: "USER: <image> and <image>\nwhat ?",
    3: "<image><image> <image> is it red ?",
}

rng = np.random.default_rng(0)


def picture(height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@cache
def llava(tiles: bool, select: str = "default") -> HookedVLM:
    """One that reads the stream before the first block, in which no patch knows of another."""
    text = {"vocab_size": llava_processors.VOCAB, "max_position_embeddings": 900}
    features = {"vision_feature_layer": [0], "vision_feature_select_strategy": select}
    image_token = {"image_token_index": llava_processors.IMAGE_ID}
    hf = llava_processors.hf_llava(text, tiles=tiles, **features, **image_token)
    return HookedVLM.from_hf(hf, processor=llava_processors.processor("pieces", tiles=tiles))


MODELS = {
    "BLIP": lambda: processors.model("vqa"),
    "CLIP": llava_processors.clip_model,
    "ViT": llava_processors.vit_model,
    "LLaVA": lambda: llava(False),
    "LLaVA, class token too": lambda: llava(False, "full"),
    "LLaVA-NeXT": lambda: llava(True),
}
SITES = {
    "vision_encoder": "vision_encoder.hook_patch_embed",
    "projector": "projector.hook_out",
    "language_model": "language_model.hook_merged_embed",
}
SIZES = {"as it is": (IMAGE, IMAGE), "cropped": (IMAGE, 45), "cropped below": (41, IMAGE)}
RESIZED = [(133, 199), (62, 33), (90, 300), (25, 26)]


def prepared(name: str, pictures: list[np.ndarray]) -> VLMInputs:
    model = MODELS[name]()
    if name.startswith("LLaVA"):
        return model.prepare(pictures, PROMPTS[len(pictures)])
    if name == "ViT":
        return model.prepare(pictures)
    return model.prepare(pictures, ["what color is it ?"] * len(pictures))


def towers_of(name: str) -> tuple[str, ...]:
    return tuple(SITES) if name.startswith("LLaVA") else ("vision_encoder",)


def changed_positions(name: str, one: VLMInputs, other: VLMInputs) -> dict[str, tuple[tuple[int, ...], ...]]:
    """For each tower the positions whose embeddings differ, row by row."""
    model, sites = MODELS[name](), [SITES[tower] for tower in towers_of(name)]
    with torch.no_grad():
        first, second = (model.run_with_cache(inputs, names_filter=sites)[1] for inputs in (one, other))
    found = {}
    for tower in towers_of(name):
        is_changed = (first[SITES[tower]] != second[SITES[tower]]).any(-1)
        # The patches' embeddings come before the class token is put in front of them.
        shift = 1 if tower == "vision_encoder" else 0
        found[tower] = tuple(tuple((row.nonzero().flatten() + shift).tolist()) for row in is_changed)
    return found


def redrawn(old: np.ndarray, region: Any) -> np.ndarray:
    """Another picture inside the region, each of its pixels another."""
    mask = region if isinstance(region, np.ndarray) else mask_of(region, old.shape[:2])
    return np.where(mask[..., None], old + np.uint8(128), old)


def mask_of(box: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    left, top, right, bottom = box
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def boxes(size: tuple[int, int], count: int) -> list[tuple[int, int, int, int]]:
    made = []
    for _ in range(count):
        (left, right), (top, bottom) = (sorted(rng.choice(side + 1, 2, replace=False).tolist()) for side in size[::-1])
        made.append((left, top, right, bottom))
    return made


def assert_foretold(name: str, inputs: VLMInputs, other: VLMInputs, region: Any, image: int = 0) -> int:
    """How many positions changed."""
    n_changed = 0
    for tower, changed in changed_positions(name, inputs, other).items():
        span = inputs.positions_in(region, image=image, tower=tower)
        assert span == Span(tower, changed), (tower, region)
        n_changed += sum(map(len, changed))
    assert inputs.positions_in(region, image=image) == inputs.positions_in(
        region, image=image, tower=inputs.spans["image"].tower
    )
    return n_changed


every_model = pytest.mark.parametrize("name", MODELS)


# Pictures that are not resized ----------------------------------------------------------------------------------------


def own_size(name: str, height: int, width: int) -> tuple[int, int]:
    """A size that this model's processor does not resize."""
    if name in ("BLIP", "ViT"):  # they do not crop
        side = processors.IMAGE if name == "BLIP" else IMAGE
        return side, side
    return height, width


@every_model
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_patches_of_a_box_are_those_that_change(name: str, size: tuple[int, int]) -> None:
    if name == "LLaVA-NeXT":
        size = (IMAGE, 2 * IMAGE)
    old = picture(*own_size(name, *size))
    inputs = prepared(name, [old])
    found = 0
    for box in boxes(old.shape[:2], 8):
        # Of NeXT's tiles, the first one is resized.
        if name == "LLaVA-NeXT" and not is_interior(inputs, box):
            continue
        found += assert_foretold(name, inputs, prepared(name, [redrawn(old, box)]), box)
    assert found


@pytest.mark.parametrize("name", [name for name in MODELS if name != "LLaVA-NeXT"])
def test_the_patches_of_a_mask_are_those_that_change(name: str) -> None:
    old = picture(*own_size(name, IMAGE, 45))
    inputs = prepared(name, [old])
    for share in (0.002, 0.02, 0.3):
        mask = rng.random(old.shape[:2]) < share
        mask[9, 9] = True
        assert assert_foretold(name, inputs, prepared(name, [redrawn(old, mask)]), mask)


# Pictures that are resized --------------------------------------------------------------------------------------------


def moved(box: tuple[int, ...], size: tuple[int, int], by: tuple[float, float]) -> tuple[float, ...]:
    """The box with its sides further out (further in, below zero), but for those on the picture's edges, which are no
    edges for a filter."""
    left, top, right, bottom = box
    (height, width), (down, across) = size, by
    low = [0 if side == 0 else max(side - step, 0) for side, step in ((left, across), (top, down))]
    high = [min(side + step, end) for side, step, end in ((right, across, width), (bottom, down, height))]
    high = [end if side == end else new for side, end, new in zip((right, bottom), (width, height), high, strict=True)]
    return (*low, *high)


def filter_reach(scale: float) -> float:
    """How far, in pixels of the picture, a tile's pixel that is so many of them wide reads over its own edge."""
    return 0.0 if scale == 1 else 2 * max(scale, 1.0) - scale / 2 + 0.5


def bounds(grid: PatchGrid, tile: int, box: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Patches of one tile: those that surely change with the box, and those that may.

    A bicubic filter reads two pixels to each side of its own middle, of the larger ones of picture and tile. What lies
    one pixel of the tile inside the box is surely changed.
    """
    down, across = (float(axis.scale) for axis in grid.views[tile])
    own, wide = grid.of_tile(tile), moved(box, grid.size, (filter_reach(down), filter_reach(across)))
    narrow = moved(box, grid.size, tuple(0.0 if scale == 1 else -scale for scale in (down, across)))
    is_empty = narrow[0] >= narrow[2] or narrow[1] >= narrow[3]
    return () if is_empty else own.positions_in(narrow), own.positions_in(wide)


def is_interior(inputs: VLMInputs, box: tuple[int, ...], image: int = 0) -> bool:
    """Whether it is sure of every patch if it changes with the box."""
    grid = inputs.patch_grid[image]
    return all(sure == possible for sure, possible in (bounds(grid, tile, box) for tile in range(len(grid.views))))


@every_model
@pytest.mark.parametrize("size", RESIZED, ids=lambda size: f"{size[1]}x{size[0]}")
def test_the_patches_of_a_box_in_a_picture_that_is_resized(name: str, size: tuple[int, int]) -> None:
    old = picture(*size)
    inputs = prepared(name, [old])
    candidates = islice((box for box in boxes(size, 400) if is_interior(inputs, box)), 5)
    n_changed = [assert_foretold(name, inputs, prepared(name, [redrawn(old, box)]), box) for box in candidates]
    assert any(n_changed), "no box was tried"


@every_model
@pytest.mark.parametrize("size", [(77, 120), (20, 15)], ids=["120x77", "15x20"])
def test_patches_change_that_the_box_covers_and_none_that_no_filter_reaches(name: str, size: tuple[int, int]) -> None:
    old = picture(*size)
    inputs = prepared(name, [old])
    (grid,) = inputs.patch_grid
    for box in boxes(size, 12):
        changed = changed_positions(name, inputs, prepared(name, [redrawn(old, box)]))["vision_encoder"]
        for tile, found in enumerate(changed):
            sure, possible = bounds(grid, tile, box)
            assert set(sure) <= set(found) <= set(possible)


# Several pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA, class token too", "LLaVA-NeXT"])
def test_one_of_a_rows_pictures(name: str) -> None:
    size = (2 * IMAGE, 2 * IMAGE) if name == "LLaVA-NeXT" else (IMAGE, 45)
    old = [picture(*size), picture(41, IMAGE), picture(*size)]
    inputs = prepared(name, old)
    box = (10, 12, 21, 20) if name != "LLaVA-NeXT" else (7, 7, 35, 35)
    for image in (0, 2):
        assert name != "LLaVA-NeXT" or is_interior(inputs, box, image)
        new = [redrawn(one, box) if place == image else one for place, one in enumerate(old)]
        assert assert_foretold(name, inputs, prepared(name, new), box, image)
        own = set(inputs.spans[f"image.{image}"][0])
        assert set(inputs.positions_in(box, image=image)[0]) < own


@pytest.mark.parametrize("tiles", [False, True])
def test_a_region_for_each_row(tiles: bool) -> None:
    """Rows of one picture and of two, padded; the rows of the vision tower are pictures, or tiles."""
    model = llava(tiles)
    old = [[picture(2 * IMAGE, 2 * IMAGE)], [picture(56, 84), picture(2 * IMAGE, 2 * IMAGE)]]
    texts = [PROMPTS[1], PROMPTS[2]]
    inputs = model.prepare(old, texts)
    regions = [(7, 7, 35, 35), mask_of((14, 21, 49, 49), (56, 84))]
    new = [[redrawn(own[0], region), *own[1:]] for own, region in zip(old, regions, strict=True)]
    name = "LLaVA-NeXT" if tiles else "LLaVA"
    changed = changed_positions(name, inputs, model.prepare(new, texts))
    grown = [(2, 2, 40, 40), (9, 16, 54, 54)]
    for tower, rows in changed.items():
        span, wide = inputs.positions_in(regions, tower=tower), inputs.positions_in(grown, tower=tower)
        assert len(span) == len(rows)
        for foretold, found, more in zip(span.rows, rows, wide.rows, strict=True):
            assert set(foretold) <= set(found) <= set(more)
        if not tiles:
            assert span.rows[2 if tower != "language_model" else 1] != span.rows[0]


@pytest.mark.parametrize("name", ["BLIP", "CLIP", "ViT"])
def test_a_picture_in_each_row(name: str) -> None:
    size = own_size(name, IMAGE, IMAGE)
    old = [picture(*size) for _ in range(3)]
    inputs = prepared(name, old)
    regions = [(0, 0, 5, 5), (9, 9, 20, 14), (23, 3, 24, 24)]
    other = prepared(name, [redrawn(one, box) for one, box in zip(old, regions, strict=True)])
    assert inputs.positions_in(regions).rows == changed_positions(name, inputs, other)["vision_encoder"]


@pytest.mark.parametrize(("n_images", "n_texts"), [(3, 1), (1, 3), (2, 0)])
def test_clips_pictures_are_as_many_as_there_are(n_images: int, n_texts: int) -> None:
    model = llava_processors.clip_model()
    texts = ["what", "a red dog", "cat"][:n_texts] or None
    inputs = model.prepare([picture(IMAGE, IMAGE) for _ in range(n_images)], texts)
    assert inputs.positions_in((0, 0, 7, 7)) == Span("vision_encoder", ((1,),) * n_images)
    with pytest.raises(SpanError, match=f"4 regions for {n_images} pictures"):
        inputs.positions_in([(0, 0, 7, 7)] * 4)


def test_rows_take_their_patches_with_them() -> None:
    model = llava(True)
    inputs = model.prepare([[picture(30, 80)], [picture(56, 28), picture(33, 33)]], [PROMPTS[1], PROMPTS[2]])
    box = (3, 3, 20, 20)
    whole = inputs.positions_in(box)
    assert inputs.rows([1, 0, 1]).positions_in(box).rows == (whole[1], whole[0], whole[1])
    in_vision = inputs.rows([1]).positions_in(box, tower="vision_encoder").rows
    n_tiles = len(inputs.patch_grid[0].views)
    assert in_vision == inputs.positions_in(box, tower="vision_encoder").rows[n_tiles:]
    reworded = model.reword(inputs, ["is it ?", "what color is the red dog of the cat ?"])
    moved = reworded.positions_in(box)
    assert moved.rows != whole.rows
    for row in range(2):
        assert [reworded.tokens[row][position] for position in moved[row]] == ["<image>"] * len(whole[row])
        ends = reworded.spans["image"][row][0] - inputs.spans["image"][row][0]
        assert [position - ends for position in moved[row]] == list(whole[row])


def test_a_share_of_a_patch() -> None:
    inputs = prepared("LLaVA", [picture(IMAGE, IMAGE)])
    first = inputs.spans["image"][0][0]
    box = (0, 0, 10, 7)  # all of the first patch, three sevenths of the second
    assert inputs.positions_in(box)[0] == (first, first + 1)
    assert inputs.positions_in(box, min_overlap=0.42)[0] == (first, first + 1)
    assert inputs.positions_in(box, min_overlap=0.43)[0] == (first,)
    assert inputs.positions_in(box, min_overlap=0.99, tower="vision_encoder")[0] == (1,)
    assert inputs.positions_in(box, min_overlap=0.99, tower="projector")[0] == (0,)


def test_a_part_that_was_cropped_away_has_no_positions() -> None:
    inputs = prepared("LLaVA", [picture(IMAGE, 3 * IMAGE)])
    assert inputs.positions_in((0, 0, IMAGE, IMAGE)).rows == ((),)
    assert len(inputs.positions_in((IMAGE, 0, 2 * IMAGE, IMAGE))[0]) == N_PATCHES


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("LLaVA", {"image": 1}, SpanError, "row 0 has 1 pictures, so there is no picture 1"),
        ("LLaVA", {"image": -1}, SpanError, "row 0 has 1 pictures, so there is no picture -1"),
        ("LLaVA", {"tower": "text_encoder"}, SpanError, "no picture's patches are in 'text_encoder'; .*projector"),
        (
            "BLIP",
            {"tower": "question_encoder"},
            SpanError,
            "no picture's patches are in 'question_encoder'; .*vision_en",
        ),
        ("ViT", {"tower": "projector"}, SpanError, "no picture's patches are in 'projector'; .*vision_encoder"),
        ("LLaVA", {"min_overlap": 1.0}, ValueError, "min_overlap from 0 to below 1"),
        ("LLaVA", {"region": (5, 5, 5, 9)}, ValueError, "is empty"),
        ("LLaVA", {"region": (5, 5, 500, 9)}, ValueError, "reaches out of the picture of 28x28 pixels"),
        ("LLaVA-NeXT", {"region": np.zeros((28, 28), dtype=bool)}, ValueError, "the mask is empty"),
        ("CLIP", {"region": np.ones((5, 28), dtype=bool)}, ValueError, "the mask has shape"),
        ("LLaVA", {"region": [(1, 1, 2, 2)] * 2}, SpanError, "2 regions for 1 "),
    ],
)
def test_what_cannot_be(name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = prepared(name, [picture(28, 28)])
    with pytest.raises(error, match=message):
        inputs.positions_in(
            arguments.get("region", (1, 1, 9, 9)), **{k: v for k, v in arguments.items() if k != "region"}
        )


def test_inputs_that_were_not_prepared_do_not_know_their_patches() -> None:
    inputs = prepared("LLaVA", [picture(28, 28)])
    with pytest.raises(SpanError, match="do not know their patches; make them with model.prepare"):
        VLMInputs(**inputs.tensors()).positions_in((0, 0, 1, 1))
    bare = llava(False).prepare(None, "what ?")
    with pytest.raises(SpanError, match="do not know their patches"):
        bare.positions_in((0, 0, 1, 1))

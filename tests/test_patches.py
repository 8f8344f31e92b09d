"""Where patches lie on the picture. HF is the judge: its image processors, and how it packs features and counts."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextProcessor, SiglipImageProcessorPil
from transformers.image_processing_utils import select_best_resolution
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hooked_vlm.patches import NEWLINE, PatchGrid, Place, best_resolution, frames, image_tokens, is_region, n_tiles

IMAGE, PATCH = 56, 8
SQUARE, SHORTEST = {"height": IMAGE, "width": IMAGE}, {"shortest_edge": IMAGE}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
RAW = {"do_rescale": False, "do_normalize": False}
PROCESSORS = {
    "blip": BlipImageProcessorPil(size=SQUARE, **RAW),
    "vit": ViTImageProcessorPil(size=SQUARE, **RAW),
    "clip": CLIPImageProcessorPil(size=SHORTEST, crop_size=SQUARE, **RAW),
    "clip, crop larger": CLIPImageProcessorPil(size={"shortest_edge": IMAGE - 11}, crop_size=SQUARE, **RAW),
    "llava": LlavaImageProcessorPil(size=SHORTEST, crop_size=SQUARE, **RAW),
    "llava, padded": LlavaImageProcessorPil(size=SHORTEST, crop_size=SQUARE, do_pad=True, **RAW),
    "llava next": LlavaNextImageProcessorPil(size=SHORTEST, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **RAW),
}
SIZES = [(56, 56), (20, 31), (133, 199), (9, 250), (251, 37), (57, 55), (112, 67), (1, 3)]

sides = st.integers(1, 2500)
units = st.tuples(st.integers(1, 5), st.integers(1, 5))
every_processor = pytest.mark.parametrize("name", PROCESSORS)
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[1]}x{size[0]}")


def grid_of(name, size, **changes) -> PatchGrid:
    pinpoints = PINPOINTS if name == "llava next" else None
    arguments = {"image_size": IMAGE, "patch_size": PATCH, "pinpoints": pinpoints, "tower": "t", **changes}
    n_tokens = len(image_tokens(size, arguments["image_size"], PATCH, arguments["pinpoints"]))
    return PatchGrid.of(PROCESSORS.get(name), size, range(5, 5 + n_tokens), **arguments)


def tiles_of(processor, picture, **changes) -> np.ndarray:
    """What the processor makes of [height width 3]: [tiles height width 3]."""
    pixels = processor(Image.fromarray(picture), return_tensors="np", **changes).pixel_values
    return np.asarray(pixels, dtype=float).reshape(-1, 3, *pixels.shape[-2:]).transpose(0, 2, 3, 1)


def patches_of(tiles) -> dict[Place, np.ndarray]:
    return {
        Place(tile, row, column): tiles[tile, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        for tile in range(len(tiles))
        for row in range(tiles.shape[1] // PATCH)
        for column in range(tiles.shape[2] // PATCH)
    }


# The order of the tokens


@given(sides, sides, st.lists(st.tuples(sides, sides), min_size=1, max_size=6), st.integers(20, 700))
def test_best_resolution_and_number_of_tiles_are_hfs(height, width, pinpoints, image_size):
    assert best_resolution((height, width), pinpoints) == select_best_resolution((height, width), pinpoints)
    wanted = image_size_to_num_patches((height, width), pinpoints, image_size)
    assert n_tiles((height, width), image_size, pinpoints) == wanted


def test_of_resolutions_that_are_as_good_the_first_is_taken():
    for pinpoints in ([(56, 112), (112, 56)], [(112, 56), (56, 112)]):
        assert best_resolution((70, 70), pinpoints) == pinpoints[0] == select_best_resolution((70, 70), pinpoints)


@settings(max_examples=300)
@given(sides, sides, st.lists(units, min_size=1, max_size=5), st.sampled_from([(28, 7), (30, 7), (336, 14), (24, 24)]))
@example(220, 352, [(2, 1)], (336, 14))  # HF rounds 14.999999999999998 rows
@example(1127, 1176, [(3, 1)], (336, 14))
@example(1192, 745, [(1, 3)], (336, 14))
def test_tokens_are_in_hfs_order(height, width, units, tower):
    image_size, patch_size = tower
    pinpoints = [[image_size * down, image_size * across] for down, across in units]
    tokens = image_tokens((height, width), image_size, patch_size, pinpoints)

    side = image_size // patch_size
    tiles = n_tiles((height, width), image_size, pinpoints)
    coded = torch.cartesian_prod(torch.arange(tiles), torch.arange(side), torch.arange(side))
    vision = SimpleNamespace(image_size=image_size, patch_size=patch_size)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    (packed,), (n_tokens,) = LlavaNextModel.pack_image_features(
        model, [coded.view(tiles, side**2, 3)], [(height, width)], "default", torch.tensor([NEWLINE, -1, -1])
    )
    assert [place if place.tile != NEWLINE else (-1, -1, -1) for place in tokens] == [*map(tuple, packed.tolist())]
    assert len(tokens) == n_tokens == hf_count((height, width), image_size, patch_size, pinpoints)

    across = best_resolution((height, width), pinpoints)[1] // image_size
    for before, token in pairwise(tokens):
        if token.tile == NEWLINE and before.tile > 0:
            assert token.row == (before.tile - 1) // across * side + before.row


def hf_count(size, image_size, patch_size, pinpoints) -> int:
    image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    processor = SimpleNamespace(image_processor=image_processor, patch_size=patch_size, num_additional_image_tokens=0)
    processor._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(processor)
    return LlavaNextProcessor._get_number_of_features(processor, *size, image_size, image_size)


def test_one_tile_is_read_row_by_row_behind_its_class_token():
    places = image_tokens((99, 9), (30, 20), 10, has_class_token=True)
    assert places == (Place(0, -1, -1), *(Place(0, row, column) for row in range(3) for column in range(2)))
    assert image_tokens((99, 9), 336, 14) == tuple(Place(0, index // 24, index % 24) for index in range(576))


def test_tokens_that_hf_cannot_make_are_errors():
    with pytest.raises(ValueError, match="no resolutions"):
        image_tokens((50, 50), IMAGE, PATCH, [])
    with pytest.raises(ValueError, match="100x56 cannot be cut into tiles of 56x56"):
        image_tokens((50, 50), IMAGE, PATCH, [(100, 56)])
    with pytest.raises(ValueError, match="without their class tokens"):
        image_tokens((50, 50), IMAGE, PATCH, PINPOINTS, has_class_token=True)


# Frames


def assert_pixel_for_pixel(processor, size, **changes):
    """Where nothing is resized: every pixel of every tile is the one of the picture that the frame says, or padding."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    picture = np.stack([1 + x % 250, 1 + y % 250, np.full_like(x, 255)], axis=2).astype(np.uint8)
    shown = frames(processor, size, changes)
    for tile, frame in zip(tiles_of(processor, picture, **changes), shown, strict=True):
        if (frame.x.scale, frame.y.scale) != (1, 1):
            assert len(shown) > 1
            continue
        columns, rows = (np.arange(axis.length) for axis in (frame.x, frame.y))
        inside = np.outer(
            *((axis.start <= at) & (at < axis.stop) for axis, at in ((frame.y, rows), (frame.x, columns)))
        )
        assert ((tile[..., 2] == 255) == inside).all()
        row, column = np.nonzero(inside)
        assert (tile[inside][:, 0] == 1 + (column + int(frame.x.offset)) % 250).all()
        assert (tile[inside][:, 1] == 1 + (row + int(frame.y.offset)) % 250).all()


crops = st.integers(1, 90)


@settings(max_examples=60)
@given(crops, crops, st.tuples(crops, crops))
def test_crops_are_hfs_to_the_pixel(height, width, crop):
    crop_size = {"height": crop[0], "width": crop[1]}
    changes = {"do_resize": False, "crop_size": crop_size}
    for name in ("clip", "llava", "llava, padded"):
        assert_pixel_for_pixel(PROCESSORS[name], (height, width), **changes)
    padded = {"do_pad": True, "pad_size": {"height": crop[0] + 3, "width": crop[1]}}
    assert_pixel_for_pixel(PROCESSORS["clip"], (height, width), **changes, **padded)


@settings(max_examples=40)
@given(st.integers(57, 112), st.booleans(), st.sampled_from([(112, 112), (56, 112)]))
def test_tiles_are_hfs_to_the_pixel(side, wide, pinpoint):
    size = (pinpoint[0], side) if wide else (min(side, pinpoint[0]), pinpoint[1])
    assert_pixel_for_pixel(PROCESSORS["llava next"], size, image_grid_pinpoints=[list(pinpoint)])
    # Tiles at the right and below that are smaller than the others.
    assert_pixel_for_pixel(PROCESSORS["llava next"], (side, 70), image_grid_pinpoints=[[112, 70]], do_resize=False)


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300))
def test_sizes_after_resizing_are_hfs(height, width):
    picture = np.zeros((height, width, 3), np.uint8)
    for name in ("clip", "llava, padded", "llava next"):
        changes = {"do_center_crop": False}
        shown = frames(PROCESSORS[name], (height, width), changes)
        assert {frame.size for frame in shown} == {tiles_of(PROCESSORS[name], picture, **changes).shape[1:3]}


def test_torchvision_puts_the_odd_pixel_of_padding_behind():
    crop = {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 9, "width": 9}}
    for backend, padding in (("pil", 2), ("torchvision", 1)):
        processor = type("CLIPImageProcessor", (), {**crop, "backend": backend})()
        (frame,) = frames(processor, (6, 12))
        assert (frame.y.start, frame.y.stop, frame.x.offset) == (padding, padding + 6, 1)


def test_a_processor_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="SiglipImageProcessorPil puts .* known: BlipImageProcessor, CLIPImageProc"):
        frames(SiglipImageProcessorPil(), (5, 5))
    with pytest.raises(ValueError, match="'longest_edge': 9.* is not known"):
        frames(PROCESSORS["clip"], (5, 5), {"size": {"shortest_edge": 5, "longest_edge": 9}})


@every_size
@every_processor
def test_a_patch_shows_the_part_of_the_picture_that_its_box_says(name, size):
    """On ramps along x and y: a patch's mean is its box's middle, to a twentieth of a patch and the rounding of pixels;
    more beside an edge, where a filter finds no more pixels. How white it is says how much of it is picture, which a
    filter blurs where padding comes before resizing."""
    extent, steps = np.array(size[::-1]), np.array([255 // size[1], 255 // size[0]])
    y, x = np.mgrid[: size[0], : size[1]]
    ramps = np.stack([x * steps[0], y * steps[1], np.full_like(x, 255)], axis=2).astype(np.uint8)
    grid = grid_of(name, size)
    black = {"image_mean": None} if name == "llava, padded" else {}
    shown = patches_of(tiles_of(PROCESSORS[name], ramps, **black))
    seen = 0
    for place, box in zip(grid.places, grid.boxes, strict=True):
        if place.tile == NEWLINE:
            assert np.isnan(box).all()
            continue
        scales = np.array([float(axis.scale) for axis in grid.views[place.tile][::-1]])
        share = np.nan_to_num(((box[2:] - box[:2]) / (scales * PATCH)).prod())
        *ramp, white = shown[place].mean((0, 1))
        assert white / 255 == pytest.approx(share, abs=0.15 if max(scales) < 0.1 else 0.04), place
        if share > 1 - 1e-9:
            seen += 1
            reach = 3 * np.maximum(scales, 1)
            at_edge = (box[:2] < reach) | (box[2:] > extent - reach)
            wrong = np.abs(ramp / steps + 0.5 - (box[:2] + box[2:]) / 2)
            assert (wrong <= 0.05 * PATCH * scales + 0.3 / steps + 0.5 * at_edge).all(), (place, wrong)
    assert seen or min(size) < 10


@every_size
@every_processor
def test_neighbours_meet(name, size):
    """Exactly, in each tile; and the picture's edges are the outermost boxes' wherever nothing is cut off."""
    grid = grid_of(name, size)
    boxes = dict(zip(grid.places, grid.boxes, strict=True))
    for place, box in boxes.items():
        for step, mine, its in (((0, 0, 1), 2, 0), ((0, 1, 0), 3, 1)):
            other = boxes.get(Place(*np.add(place, step).tolist()), np.nan * box)
            if place.tile != NEWLINE and not np.isnan([*box, *other]).any():
                assert box[mine] == other[its]
    assert np.nanmin(grid.boxes) >= 0
    if not name.startswith("clip") and name != "llava":
        whole = np.stack([box for place, box in boxes.items() if place.tile == 0])
        assert np.nanmin(whole, 0)[:2].tolist() == [0, 0]
        assert np.nanmax(whole, 0)[2:].tolist() == [size[1], size[0]]


# From pixels to positions


@pytest.mark.parametrize("size", [(133, 199), (20, 31), (150, 40)])
@every_processor
def test_a_change_of_pixels_changes_the_patches_that_are_found(name, size):
    """Those wholly inside always; none beyond what bicubic resampling reads (two pixels of the coarser grid), but for
    patches of padding alone."""
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    grid, processor = grid_of(name, size), PROCESSORS[name]
    before = patches_of(tiles_of(processor, picture))
    margin = 1 + 2 * max(1, *(float(axis.scale) for frame in grid.views for axis in frame))
    sees = np.flatnonzero(~np.isnan(grid.boxes[:, 0]))
    for _ in range(10):
        corners = grid.boxes[random.choice(sees, 2)]
        box = np.array([*np.floor(corners.min(0)[:2]), *np.ceil(corners.max(0)[2:])], dtype=int)
        left, top, right, bottom = box
        changed = picture.copy()
        changed[top:bottom, left:right] = 255 - changed[top:bottom, left:right]
        after = patches_of(tiles_of(processor, changed))
        differ = {grid.positions[k] for k in sees if (before[grid.places[k]] != after[grid.places[k]]).any()}
        grown = np.clip(np.add(box, [-margin, -margin, margin, margin]), 0, [size[1], size[0]] * 2)
        inside = {grid.positions[k] for k in np.flatnonzero(grid.overlaps(box) >= 1)}
        assert differ <= set(grid.positions_in(grown))
        assert inside
        assert inside <= differ & set(grid.positions_in(box))


names_and_sizes = st.tuples(st.sampled_from(list(PROCESSORS)), st.integers(1, 90), st.integers(1, 90))


@st.composite
def boxes_in(draw, size):
    ends = [sorted(draw(st.tuples(*[st.floats(0, side)] * 2))) for side in (size[1], size[0])]
    assume(all(end - begin > 1e-3 for begin, end in ends))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


@settings(max_examples=80)
@given(names_and_sizes, st.data())
def test_the_whole_pictures_patches_cover_each_region_once(case, data):
    """As far as the processor shows it: what they have of a region adds up to its area."""
    name, *size = case
    grid = grid_of(name, tuple(size))
    begin, end = ([float(axis.offset + axis.scale * axis[k]) for axis in grid.views[0]] for k in (3, 4))
    rows, columns = (
        np.clip(np.minimum(np.arange(side) + 1, end[axis]) - np.maximum(np.arange(side), begin[axis]), 0, None)
        for axis, side in enumerate(size)
    )
    left, top, right, bottom = region = data.draw(boxes_in(size))
    area = max(min(bottom, end[0]) - max(top, begin[0]), 0) * max(min(right, end[1]) - max(left, begin[1]), 0)
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(size) < 0.3
    mask[0, 0] = True

    base = np.array([place.tile == 0 for place in grid.places]) & ~np.isnan(grid.boxes[:, 0])
    own = ((grid.boxes[:, 2] - grid.boxes[:, 0]) * (grid.boxes[:, 3] - grid.boxes[:, 1]))[base]
    assert (grid.overlaps(region)[base] * own).sum() == pytest.approx(area, rel=1e-6, abs=1e-9)
    assert (grid.overlaps(mask)[base] * own).sum() == pytest.approx(rows @ mask @ columns, rel=1e-9)


@settings(max_examples=80)
@given(names_and_sizes, st.data())
def test_positions_in_a_region(case, data):
    name, *size = case
    grid = grid_of(name, tuple(size))
    positions, boxes = np.asarray(grid.positions), grid.boxes
    left, top, right, bottom = region = data.draw(boxes_in(size))
    low, high = sorted(data.draw(st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2)))
    found = grid.positions_in(region)
    touched = (boxes[:, 0] < right) & (boxes[:, 2] > left) & (boxes[:, 1] < bottom) & (boxes[:, 3] > top)
    assert found == tuple(positions[touched].tolist())
    at_low, at_high = (set(grid.positions_in(region, min_overlap=share)) for share in (low, high))
    assert at_high <= at_low <= set(found)
    sees = tuple(positions[~np.isnan(boxes[:, 0])].tolist())
    assert grid.positions_in((0, 0, size[1], size[0]), min_overlap=0.999) == sees

    pixels = [int(left), int(top), min(int(right) + 1, size[1]), min(int(bottom) + 1, size[0])]
    mask = np.zeros(size, bool)
    mask[pixels[1] : pixels[3], pixels[0] : pixels[2]] = True
    np.testing.assert_allclose(grid.overlaps(mask), grid.overlaps(pixels), atol=1e-9)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((0, 0, 33, 20), r"\(0.0, 0.0, 33.0, 20.0\) reaches out of the picture of 32x24 pixels"),
        ((-0.5, 0, 3, 20), "reaches out"),
        ((40, 40, 50, 50), "reaches out"),
        ((3, 0, 3, 20), "is empty; give .*left < right"),
        ((0, 9, 3, 2), "is empty"),
        ((0, 0, float("nan"), 2), "is empty"),
        ((0, 0, 5), "is a box .* or a mask of bool .* not int64 of shape"),
        (np.ones((24, 32)), "not float64 of shape"),
        (np.ones((32, 24), bool), r"shape \(32, 24\); this picture's is \(24, 32\)"),
        (np.zeros((24, 32), bool), "mask is empty"),
    ],
)
def test_regions_that_do_not_fit_are_errors(region, message):
    with pytest.raises(ValueError, match=message):
        grid_of(None, (24, 32), image_size=(24, 32)).positions_in(region)


def test_min_overlap_is_a_share():
    grid = grid_of(None, (24, 32), image_size=(24, 32))
    assert grid.positions_in((0, 0, 12, 8)) == (5, 6)
    assert grid.positions_in((0, 0, 12, 8), min_overlap=0.5) == (5,)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="from 0 to below 1"):
            grid.positions_in((0, 0, 5, 5), min_overlap=share)


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        *(((1, 2, 3, 4.5), True), (np.ones((3, 4), bool), True), (np.arange(4), True), (list(np.arange(4)), True)),
        *(([(1, 2, 3, 4)] * 4, False), (np.ones((4, 4)), False), ([np.ones((3, 4), bool)], False)),
    ],
)
def test_one_region_is_told_from_several(value, is_one):
    assert is_region(value) is is_one


# The grid


def test_a_picture_at_its_own_size():
    """What is left at the right and below is in no patch."""
    grid = grid_of(None, (27, 20), image_size=(27, 20))
    assert grid.shape == (3, 2)
    assert grid.boxes[[0, 1, -1]].tolist() == [[0, 0, 8, 8], [8, 0, 16, 8], [8, 16, 16, 24]]
    assert grid.tile(0).tolist() == [[5, 6], [7, 8], [9, 10]]
    painted = grid.paint(np.arange(6.0))
    assert np.isnan(painted[24:]).all()
    assert np.isnan(painted[:, 16:]).all()
    assert (painted[:24, :16] == np.kron(np.arange(6).reshape(3, 2), np.ones((8, 8)))).all()
    larger = PatchGrid.of(PROCESSORS["blip"], (100, 73), range(49), image_size=IMAGE, patch_size=PATCH, tower="t")
    painted = larger.paint(np.arange(49.0))
    assert (painted[0] == (np.arange(73) + 0.5) * 7 // 73).all()
    assert (painted[:, 0] == 7 * ((np.arange(100) + 0.5) * 7 // 100)).all()
    with pytest.raises(ValueError, match=r"no tile 1 .* there are \[0\]"):
        grid.tile(1)
    with pytest.raises(ValueError, match="5 values for 6 positions"):
        grid.paint(np.arange(5.0))


def test_tiles_of_a_picture():
    grid = grid_of("llava next", (150, 100))
    values = np.array([place.tile for place in grid.places], float)
    middle = grid.paint(values)
    assert len(grid.views) == 5
    assert middle[10, 30] == 1
    assert middle[-10, -30] == 4
    assert (grid.paint(values, tile=0) == 0).all()
    assert np.isnan(grid.paint(values, tile=1)[-1]).all()
    kept = [grid.tile(tile) for tile in range(5)]
    assert sorted(np.concatenate([tile[tile >= 0] for tile in kept]).tolist()) == [
        position for position, place in zip(grid.positions, grid.places, strict=True) if place.tile != NEWLINE
    ]
    alone = grid.of_tile(1, 1)
    assert not alone.has_class_token
    assert alone.positions == tuple(range(1, 50))
    boxes = dict(zip(alone.places, alone.boxes.tolist(), strict=True))
    for place, box in zip(grid.places, grid.boxes.tolist(), strict=True):
        assert place.tile != 1 or box == boxes[place]


def test_a_class_token_sees_nothing():
    arguments = {"image_size": IMAGE, "patch_size": PATCH, "has_class_token": True, "tower": "t"}
    grid = PatchGrid.of(PROCESSORS["clip"], (99, 66), range(50), **arguments)
    assert grid.has_class_token
    assert np.isnan(grid.boxes[0]).all()
    assert 0 not in grid.positions_in((0, 0, 66, 99))
    assert grid.tile(0)[0, 0] == 1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("blip", {"image_size": 64}, r"makes tiles of \[\(56, 56\)\], and the model sees \[\(64, 64\)\]"),
        ("clip", {"pinpoints": PINPOINTS}, "the model sees .*56.*56.*56"),
        ("llava next", {"pinpoints": [[112, 56], [56, 112]]}, "the model tiles .* and the processor at"),
        ("vit", {"patch_size": 7}, "50x40 pixels has 64 tokens, not 49"),
    ],
)
def test_another_models_processor_is_an_error(name, changes, message):
    with pytest.raises(ValueError, match=message):
        grid_of(name, (40, 50), **changes)


def test_settings_come_before_attributes():
    size = {"height": 64, "width": 64}
    assert grid_of("blip", (40, 50), image_size=64, settings={"size": size}).shape == (8, 8)

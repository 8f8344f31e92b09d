"""Pictures blurred and masked: nothing else changes, and where nothing is done, nothing does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hooked_vlm.corruptions import Blur, Corruption, RegionMask, SwappedPatches, describe
from hooked_vlm.data import shapes
from hooked_vlm.inputs import Span, SpanError, VLMInputs
from tests.corruptions.spoilt import (
    BOX,
    SIZES,
    clean,
    corrupted,
    differs,
    family,
    model,
    patches,
    picture,
    pixels,
    prepared,
)
from tests.tiny_llava import IMAGE

# The checker of the signatures looks at a random item of a list, also while hypothesis draws.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@family
@pytest.mark.parametrize(
    "corruption",
    [Blur(0), RegionMask([None, None]), SwappedPatches(BOX, BOX)],
    ids=lambda corruption: type(corruption).__name__,
)
def test_where_nothing_is_done_the_inputs_are_the_clean_ones(corruption: Corruption, name: str) -> None:
    assert torch.equal(corrupted(name, corruption), pixels(clean(name)))


@family
@pytest.mark.parametrize(
    "corruption",
    [Blur(2), RegionMask([BOX, None]), RegionMask("image"), SwappedPatches(), SwappedPatches("image", seed=3)],
    ids=lambda corruption: type(corruption).__name__,
)
def test_what_is_done_to_a_row_depends_on_no_other(corruption: Corruption, name: str) -> None:
    together = corrupted(name, corruption)
    alone = RegionMask(BOX) if corruption == RegionMask([BOX, None]) else corruption
    if isinstance(corruption, RegionMask) and isinstance(corruption.region, list):
        alone = RegionMask(corruption.region[:1])
    assert torch.equal(corrupted(name, alone, clean(name).rows([0])), together[:1])
    assert bool((together[0] != pixels(clean(name))[0]).any())


# Blur -----------------------------------------------------------------------------------------------------------------


@family
def test_a_blur_leaves_a_picture_of_one_colour(name: str) -> None:
    inputs = prepared(name, [np.full((*size, 3), 77, dtype=np.uint8) for size in SIZES])
    assert torch.equal(corrupted(name, Blur(3.7), inputs), pixels(inputs))


@pytest.mark.parametrize("radius", [0.4, 1.0, 2.5])
def test_a_blur_is_a_gaussian_of_its_radius_with_mirrored_edges(radius: float) -> None:
    values, reach = torch.randn(2, 3, 40, 56), round(4 * radius + 0.49)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / radius) ** 2)
    kernel = (weights[:, None] * weights / weights.sum() ** 2).expand(3, 1, -1, -1)
    expected = F.conv2d(F.pad(values, (reach,) * 4, mode="reflect"), kernel, groups=3)
    run = Blur(radius)(model("BLIP"), VLMInputs(pixel_values=values))
    torch.testing.assert_close(pixels(run), expected, atol=1e-5, rtol=1e-5)


def test_a_blur_may_reach_further_than_the_picture() -> None:
    values = torch.randn(1, 3, 5, 7)
    flat = pixels(Blur(500.0)(model("BLIP"), VLMInputs(pixel_values=values)))
    assert flat.flatten(2).std(-1).max() < 1e-3
    assert values.amin() < flat.amin() <= flat.amax() < values.amax()


def padding(inputs: VLMInputs, image: int) -> Tensor:
    """Of a picture's tiles, the pixels outside of the picture: the processor makes them black."""
    black = prepared("LLaVA-NeXT", [np.zeros((IMAGE, IMAGE, 3), dtype=np.uint8)])
    own = pixels(inputs)[image][: len(inputs.patch_grid[image].views)]
    outside = (own == pixels(black)[0, 0, :, :1, :1]).all(1)
    assert 0.05 < outside.float().mean() < 0.5
    return outside


def test_a_blur_leaves_the_padding_of_tiles() -> None:
    """And it takes nothing from there: the edge of the picture is mirrored."""
    inputs = prepared("LLaVA-NeXT", [np.full((30, 70, 3), 250, dtype=np.uint8), picture(60, 60)])
    assert torch.equal(corrupted("LLaVA-NeXT", Blur(3), inputs)[0], pixels(inputs)[0])
    noisy = prepared("LLaVA-NeXT", [picture(30, 70), picture(60, 60)])
    outside = padding(inputs, 0)
    changed = differs(corrupted("LLaVA-NeXT", Blur(3), noisy), pixels(noisy))[0, : len(outside)]
    assert not changed[outside].any()
    assert changed[~outside].float().mean() > 0.99


@pytest.mark.parametrize("radius", [-1.0, float("inf"), float("nan")])
def test_a_radius_that_is_none(radius: float) -> None:
    for corruption in (Blur(radius), RegionMask(BOX, "blur", radius=radius)):
        with pytest.raises(ValueError, match="a blur's radius is 0 or more pixels"):
            corruption(model("BLIP"), clean("BLIP"))


# Mask -----------------------------------------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("fill", ["zero", "mean", 0.5, (0.1, 0.2, 0.3)])
def test_two_pictures_masked_whole_are_the_same(fill: Any, name: str) -> None:
    whole: list[Any] = [(0, 0, width, height) for height, width in SIZES]
    other = prepared(name, [picture(*size, seed=7 + seed) for seed, size in enumerate(SIZES)])
    assert not torch.equal(pixels(other), pixels(clean(name)))
    masked = corrupted(name, RegionMask(whole, fill))
    assert torch.equal(masked, corrupted(name, RegionMask(whole, fill), other))
    masks: list[Any] = [np.ones(size, dtype=bool) for size in SIZES]
    assert torch.equal(masked, corrupted(name, RegionMask(masks, fill)))


@family
@settings(max_examples=6)
@given(data=st.data())
def test_a_masked_region_leaves_nothing_of_itself(name: str, data: st.DataObject) -> None:
    """Two pictures that differ in a region alone give the same inputs, if the mask grows by what the filter reads."""
    height, width = SIZES[0]
    left, right = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True)))
    one, other = picture(height, width), picture(height, width, seed=1)
    other_inside = one.copy()
    other_inside[top:bottom, left:right] = other[top:bottom, left:right]
    inputs, changed = prepared(name, [one]), prepared(name, [other_inside])
    mask = RegionMask((left, top, right, bottom), "zero", grow=2)
    if any(inputs.positions_in((left, top, right, bottom)).rows):
        assert torch.equal(corrupted(name, mask, inputs), corrupted(name, mask, changed))
    else:
        with pytest.raises(ValueError, match="no pixel that the model sees shows the region"):
            corrupted(name, mask, inputs)


def test_a_mask_grows_from_one_tile_into_the_next() -> None:
    """LLaVA-NeXT: a region ends in the last row of one tile; the next one's first row is interpolated from it too."""
    one = picture(*SIZES[0])
    other = one.copy()
    other[0:57, 0:1] = 255
    first, second = (prepared("LLaVA-NeXT", [image]) for image in (one, other))
    assert differs(pixels(first), pixels(second)).reshape(5, -1).any(1).tolist() == [True, True, False, True, False]
    mask = RegionMask((0, 0, 1, 57), "zero", grow=1)
    assert torch.equal(corrupted("LLaVA-NeXT", mask, first), corrupted("LLaVA-NeXT", mask, second))


def test_without_growing_a_pixel_beside_a_region_still_has_some_of_it() -> None:
    one = picture(*SIZES[0])
    other = one.copy()
    other[30:60, 30:60] = 0
    first, second = (
        corrupted("BLIP", RegionMask((30, 30, 60, 60), "zero"), prepared("BLIP", [image])) for image in (one, other)
    )
    around = differs(first, second)[0].nonzero()
    rows, columns = (around[:, axis] for axis in (0, 1))
    assert 0 < len(around) < 200
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (22, 49, 13, 30)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_is_exact_to_the_pixel(scale: int) -> None:
    """An object of the shapes, at the size that the model sees and at twice that."""
    (one,) = shapes(1, seed=7, kinds=("color",))
    mask = np.asarray(one.regions["object"])
    large = mask.repeat(scale, 0).repeat(scale, 1)
    inputs = model("BLIP").prepare(one.picture().resize((96 * scale, 96 * scale)), one.question)
    changed = differs(corrupted("BLIP", RegionMask(large, -9.0), inputs), pixels(inputs))
    assert np.array_equal(changed[0].numpy(), mask)


@pytest.mark.parametrize(("min_overlap", "columns"), [(0.0, [10, 11]), (0.4, [10, 11]), (0.6, [10])])
def test_a_pixel_may_be_covered_in_part(min_overlap: float, columns: list[int]) -> None:
    inputs = prepared("BLIP", [picture(192, 192)])
    mask = RegionMask((20, 0, 23, 192), -9.0, min_overlap=min_overlap)
    changed = differs(corrupted("BLIP", mask, inputs), pixels(inputs))[0]
    assert changed.all(0).nonzero()[:, 0].tolist() == changed.any(0).nonzero()[:, 0].tolist() == columns


def test_the_mean_is_of_what_is_left() -> None:
    halves = np.zeros((96, 96, 3), dtype=np.uint8)
    halves[:, :48], halves[:, 48:] = (255, 0, 0), (0, 0, 255)
    inputs = prepared("BLIP", [halves])
    masked = corrupted("BLIP", RegionMask((0, 0, 48, 96)), inputs)
    blue = pixels(inputs)[:, :, :1, 95:]
    torch.testing.assert_close(masked, blue.expand_as(masked))


def test_padding_is_no_part_of_the_mean_and_is_not_masked() -> None:
    inputs = prepared("LLaVA-NeXT", [np.full((30, 70, 3), 250, dtype=np.uint8)])
    masked = corrupted("LLaVA-NeXT", RegionMask((0, 0, 35, 30)), inputs)
    torch.testing.assert_close(masked, pixels(inputs), atol=1e-6, rtol=0)
    changed = differs(corrupted("LLaVA-NeXT", RegionMask((0, 0, 70, 30), -9.0), inputs), pixels(inputs))
    assert torch.equal(changed[0], ~padding(inputs, 0))


@family
def test_a_region_can_be_blurred(name: str) -> None:
    part = differs(corrupted(name, RegionMask(BOX, -9.0)), pixels(clean(name)))
    expected = torch.where(part.unsqueeze(-3), corrupted(name, Blur(2.0)), pixels(clean(name)))
    assert torch.equal(corrupted(name, RegionMask(BOX, "blur", radius=2.0)), expected)


@family
def test_positions_are_masked_patch_by_patch(name: str) -> None:
    span = clean(name).positions_in(BOX)
    changed = patches(name, corrupted(name, RegionMask(span, -9.0)) != pixels(clean(name)))
    assert torch.equal(changed.all(-1), changed.any(-1))
    covered = patches(name, corrupted(name, RegionMask(BOX, -9.0)) != pixels(clean(name))).any(-1)
    kept = [set(grid.places) for grid in clean(name).patch_grid]
    columns = clean(name).patch_grid[0].shape[1]
    for image, tile, patch in covered.nonzero().tolist():
        # What LLaVA-NeXT leaves out as padding has no position.
        place = (tile, *divmod(patch, columns))
        assert bool(changed[image, tile, patch].all()) == (place in kept[image])
    named = VLMInputs(**{**vars(clean(name)), "spans": {**clean(name).spans, "image.object": span}})
    assert torch.equal(
        corrupted(name, RegionMask("image.object", -9.0), named), corrupted(name, RegionMask(span, -9.0))
    )


def test_one_of_a_rows_pictures_is_masked() -> None:
    llava, pictures = model("LLaVA-1.5"), [picture(60, 60, seed) for seed in range(3)]
    inputs = llava.prepare([pictures[:2], pictures[2:]], ["<image> <image> is it red ?", "<image> is it red ?"])
    for image in (0, 1):
        changed = differs(pixels(RegionMask([(0, 0, 30, 30), None], image=image)(llava, inputs)), pixels(inputs))
        assert changed.flatten(1).any(1).tolist() == [image == 0, image == 1, False]
    with pytest.raises(SpanError, match="row 1 has 1 pictures, so there is no picture 1"):
        RegionMask((0, 0, 30, 30), image=1)(llava, inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"region": (0, 0, 300, 60)}, r"the box \(0.0, 0.0, 300.0, 60.0\) reaches out of the picture of 200x120"),
        ({"region": (9, 9, 9, 20)}, "is empty"),
        ({"region": np.zeros((120, 200), dtype=bool)}, "the mask is empty"),
        ({"region": np.ones((9, 9), dtype=bool)}, "the mask has shape"),
        ({"region": [BOX]}, "1 regions for 2 rows"),
        ({"fill": "black"}, "fill is 'mean', 'zero', 'blur', a number or three, not 'black'"),
        ({"fill": (0.0, 1.0)}, "fill has 2 numbers"),
        ({"grow": -1}, "a mask grows by 0 pixels or more, not -1"),
        ({"region": "image.dog"}, "named spans: "),
        ({"region": Span("vision_encoder", ((1, 2), (0,)))}, r"none of the positions \(0,\) in row 1 is a patch's"),
        ({"region": Span("vision_encoder", ((1, 2),))}, "positions in 1 rows, and there are pictures in 2"),
        ({"region": "question"}, "a picture's patches are in vision_encoder; these positions are question_encoder's"),
    ],
    ids=lambda value: "",
)
@pytest.mark.usefixtures("unchecked")
def test_masks_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegionMask(**{"region": BOX, **arguments})(model("BLIP"), clean("BLIP"))


def test_a_region_that_the_processor_cuts_off() -> None:
    inputs = prepared("LLaVA-1.5", [picture(40, 200)])
    for corruption in (RegionMask((0, 0, 60, 40)), SwappedPatches((0, 0, 60, 40), (0, 0, 50, 40))):
        with pytest.raises(ValueError, match=r"image 0 \(row 0\): no p\w+ .*sees"):
            corruption(model("LLaVA-1.5"), inputs)


@pytest.mark.parametrize("corruption", [RegionMask(BOX), SwappedPatches(BOX)])
def test_inputs_that_prepare_did_not_make(corruption: Corruption) -> None:
    with pytest.raises(SpanError, match=r"make them with model.prepare"):
        corruption(model("BLIP"), VLMInputs(pixel_values=torch.zeros(1, 3, 96, 96)))
    with pytest.raises(ValueError, match="no pixel_values to corrupt"):
        corruption(model("BLIP"), VLMInputs(input_ids=torch.ones(1, 4, dtype=torch.long)))


@pytest.mark.parametrize(
    ("corruption", "described"),
    [
        (Blur(2), {"radius": 2}),
        (
            RegionMask((0, 0, 5, 5.5), "zero"),
            {"region": [0, 0, 5, 5.5], "fill": "zero", "image": 0, "grow": 0, "min_overlap": 0.0, "radius": 8.0},
        ),
        (
            SwappedPatches([np.ones((2, 2), dtype=bool), None], Span("vision_encoder", ((1,), ())), 4),
            {
                **{"region": ["given", None], "other": {"tower": "vision_encoder", "rows": [[1], []]}, "seed": 4},
                **{"image": 0, "min_overlap": 0.0},
            },
        ),
        (
            SwappedPatches(np.array([0, 0, 5, 5])),
            {"region": [0, 0, 5, 5], "other": None, "seed": 0, "image": 0, "min_overlap": 0.0},
        ),
    ],
    ids=lambda value: "",
)
def test_a_description_is_json(corruption: Corruption, described: dict[str, Any]) -> None:
    assert json.loads(json.dumps(describe(corruption))) == {"corruption": type(corruption).__name__, **described}

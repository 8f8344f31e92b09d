"""Patches that have changed places: none is made or lost, and back again is where they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange

from hooked_vlm.corruptions import SwappedPatches
from hooked_vlm.inputs import Span
from tests.corruptions.spoilt import BOX, SIZES, clean, corrupted, family, model, patches, picture, pixels, prepared


@family
@pytest.mark.parametrize("region", ["image", BOX])
def test_shuffled_patches_all_move_and_stay_among_themselves(region: Any, name: str) -> None:
    """Those of the whole picture, and those of its details."""
    before = patches(name, pixels(clean(name)))
    after = patches(name, corrupted(name, SwappedPatches(region, seed=1)))
    span = clean(name).positions(region) if region == "image" else clean(name).positions_in(region)
    for grid, own, moved in zip(clean(name).patch_grid, before, after, strict=True):
        for tiles in (slice(0, 1), slice(1, None)):
            was, now = own[tiles].flatten(0, 1), moved[tiles].flatten(0, 1)
            assert sorted(map(tuple, was.tolist())) == sorted(map(tuple, now.tolist())), "patches are made or lost"
        places = [
            place for place, position in zip(grid.places, grid.positions, strict=True) if position in span[grid.row]
        ]
        chosen = torch.zeros(own.shape[:2], dtype=torch.bool)
        for place in places:
            if place.column >= 0:
                chosen[place.tile, place.row * grid.shape[1] + place.column] = True
        changed = (own != moved).any(-1)
        assert torch.equal(changed[:1], chosen[:1])
        # What LLaVA-NeXT leaves out at the picture's edge has no position, and may be a part of the region.
        assert bool(changed[1:][chosen[1:]].all())
        assert int(changed[1:].sum()) <= 1.5 * int(chosen[1:].sum())


def test_details_change_places_across_tiles() -> None:
    """Of four tiles the first and the last, as LLaVA-NeXT sees them."""
    inputs = prepared("LLaVA-NeXT", [picture(112, 112)])
    swap = SwappedPatches((0, 0, 56, 56), (56, 56, 112, 112))
    before, after = (
        patches("LLaVA-NeXT", pixels(inputs))[0],
        patches("LLaVA-NeXT", corrupted("LLaVA-NeXT", swap, inputs))[0],
    )
    assert torch.equal(after[1:], before[[4, 2, 3, 1]])
    assert torch.equal(after[0, [0, 1, 4, 5]], before[0, [10, 11, 14, 15]])


@pytest.mark.parametrize(
    ("region", "other"), [((42, 0, 70, 28), (14, 84, 42, 112)), ((0, 42, 28, 70), (84, 14, 112, 42))]
)
def test_details_that_lie_across_tiles_stay_together(region: tuple[int, ...], other: tuple[int, ...]) -> None:
    """Put together, the tiles show what a swap in the whole picture shows."""
    inputs = prepared("LLaVA-NeXT", [picture(112, 112)])
    after = corrupted("LLaVA-NeXT", SwappedPatches(region, other, min_overlap=0.6), inputs)
    before, found = (
        rearrange(tiles[0, 1:], "(down across) c y x -> c (down y) (across x)", down=2)
        for tiles in (pixels(inputs), after)
    )
    here, there = (
        (slice(None), slice(y // 2, y // 2 + 14), slice(x // 2, x // 2 + 14)) for x, y, *_ in (region, other)
    )
    expected = before.clone()
    expected[here], expected[there] = before[there], before[here]
    assert torch.equal(found, expected)


def test_a_shuffle_is_drawn_from_its_seed() -> None:
    once, again, other = (corrupted("BLIP", SwappedPatches(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    twins = prepared("BLIP", [picture(*SIZES[0])] * 2)
    first, second = corrupted("BLIP", SwappedPatches(seed=1), twins)
    assert not torch.equal(first, second), "every row is shuffled alike"


@family
def test_swapping_two_regions_twice_gives_the_clean_picture(name: str) -> None:
    inputs = prepared(name, [picture(112, 112)])
    swap = SwappedPatches((0, 0, 56, 28), (56, 84, 112, 112), min_overlap=0.5)
    once = swap(model(name), inputs)
    assert not torch.equal(pixels(once), pixels(inputs))
    assert torch.equal(corrupted(name, swap, once.inputs), pixels(inputs))


def test_two_patches_change_places() -> None:
    inputs = prepared("BLIP", [picture(96, 96)])
    swap = SwappedPatches((0, 0, 16, 16), (32, 16, 48, 32))
    before, after = patches("BLIP", pixels(inputs))[0, 0], patches("BLIP", corrupted("BLIP", swap, inputs))[0, 0]
    order = list(range(36))
    order[0], order[8] = 8, 0
    assert torch.equal(after, before[order])
    spans = SwappedPatches(Span("vision_encoder", ((1,),)), Span("vision_encoder", ((9,),)))
    assert torch.equal(patches("BLIP", corrupted("BLIP", spans, inputs))[0, 0], after)


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        (SwappedPatches((0, 0, 10, 10)), r"image 0 \(row 0\): the region has no two patches that could change places"),
        (SwappedPatches((0, 0, 10, 10), BOX), r"image 0 \(row 0\): the regions have 1 and \d+ patches"),
        (SwappedPatches((0, 0, 60, 30), (40, 0, 100, 30), min_overlap=0.5), "the regions share patches"),
        (SwappedPatches([BOX, None], [None, BOX]), "the two regions are not of the same pictures"),
        (SwappedPatches((0, 0, 300, 60)), "reaches out of the picture"),
    ],
    ids=lambda value: "",
)
def test_swaps_that_do_not_fit(swap: SwappedPatches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swap(model("BLIP"), clean("BLIP"))

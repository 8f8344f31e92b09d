"""Packed tokens against whole activations, in which every token says which it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy import ndarray
from torch import Tensor

from hooked_vlm.sweep.tokens import Layout, Packed, nothing

CPU = torch.device("cpu")
WIDTH = 2


@st.composite
def masks(draw: Any, n_sets: int | None = None, size: int | None = None) -> ndarray:
    """Which positions each set holds: none, some or all."""
    n_sets = draw(st.integers(1, 4)) if n_sets is None else n_sets
    size = draw(st.integers(1, 6)) if size is None else size
    rows = st.one_of(
        st.just([False] * size), st.just([True] * size), st.lists(st.booleans(), min_size=size, max_size=size)
    )
    return np.array([draw(rows) for _ in range(n_sets)], dtype=bool)


@st.composite
def two_masks(draw: Any) -> tuple[ndarray, ndarray]:
    first = draw(masks())
    return first, draw(masks(*first.shape))


rows = st.integers(1, 3)


def numbered(n_sets: int, n_rows: int, size: int) -> Tensor:
    """``[set row p d]``, no two alike, none 0."""
    return torch.arange(1.0, n_sets * n_rows * size * WIDTH + 1).view(n_sets, n_rows, size, WIDTH)


def clean(n_rows: int, size: int) -> Tensor:
    return -numbered(1, n_rows, size)[0]


def packed(whole: Tensor, mask: ndarray) -> Packed:
    """Token after token, by hand."""
    values = [
        whole[one, row, position]
        for one in range(len(mask))
        for row in range(whole.shape[1])
        for position in np.flatnonzero(mask[one])
    ]
    stacked = torch.stack(values) if values else torch.zeros(0, WIDTH)
    return Packed(stacked[None], Layout(mask, whole.shape[1], CPU))


def whole_of(base: Tensor, whole: Tensor, mask: ndarray) -> Tensor:
    """All sets' activations: their own where they hold something, and else the base run's."""
    held = torch.from_numpy(mask)[:, None, :, None]
    return torch.where(held, whole, base)


@given(masks(), rows)
def test_a_layout_counts_its_tokens_set_by_set_and_row_by_row(mask: ndarray, n_rows: int) -> None:
    layout, whole = Layout(mask, n_rows, CPU), numbered(len(mask), n_rows, mask.shape[1])
    own = packed(whole, mask)
    assert len(layout) == own.values.shape[1] == n_rows * mask.sum()
    assert layout.counts.tolist() == mask.sum(1).tolist()
    sets = torch.tensor([one for one in range(len(mask)) for _ in range(n_rows * int(layout.counts[one]))])
    assert torch.equal(whole[sets.long(), layout.rows, layout.positions], own.values[0])
    assert torch.equal(layout.of(whole[0]), whole[0][layout.rows, layout.positions])
    for one in range(len(mask)):
        tokens = own.values[0, layout.tokens_of(one)]
        assert torch.equal(tokens, whole[one][:, torch.from_numpy(mask[one])].flatten(0, 1))
        assert layout.positions_of(one).tolist() == np.flatnonzero(mask[one]).tolist()


@given(two_masks())
def test_a_layout_knows_which_tokens_it_holds(both: tuple[ndarray, ndarray]) -> None:
    mask, other = both
    layout = Layout(mask, 2, CPU)
    assert layout.holds(mask)
    assert layout.holds(mask.copy())
    assert layout.holds(other) == bool((mask == other).all())


@given(two_masks(), rows)
def test_carrying_keeps_what_is_held_and_fetches_the_rest(both: tuple[ndarray, ndarray], n_rows: int) -> None:
    mask, other = both
    whole, base = numbered(len(mask), n_rows, mask.shape[1]), clean(n_rows, mask.shape[1])
    own = packed(whole, mask)
    before = own.values.clone()
    carried = own.carry(other, base)
    assert carried.layout.holds(other)
    assert torch.equal(carried.values, packed(whole_of(base, whole, mask), other).values)
    assert torch.equal(own.values, before), "what is carried on is not written to"
    assert torch.equal(base, clean(n_rows, mask.shape[1]))
    if carried.layout.holds(mask):
        assert torch.equal(carried.values, own.values)


@given(two_masks(), rows)
def test_carrying_to_more_and_back_changes_nothing(both: tuple[ndarray, ndarray], n_rows: int) -> None:
    mask, other = both
    own = packed(numbered(len(mask), n_rows, mask.shape[1]), mask)
    base = clean(n_rows, mask.shape[1])
    there = own.carry(mask | other, base)
    assert torch.equal(there.carry(mask, base).values, own.values)


@given(masks(), rows)
def test_one_set_is_put_into_the_base_runs_activation(mask: ndarray, n_rows: int) -> None:
    whole, base = numbered(len(mask), n_rows, mask.shape[1]), clean(n_rows, mask.shape[1])
    own, expected = packed(whole, mask), whole_of(base, whole, mask)
    for one in range(len(mask)):
        assert torch.equal(own.of_set(one, base), expected[one])
    assert torch.equal(base, clean(n_rows, mask.shape[1]))


@given(st.data(), rows)
def test_padded_tokens_stand_side_by_side_and_go_back_where_they_were(data: st.DataObject, n_rows: int) -> None:
    mask = data.draw(masks())
    holding = np.flatnonzero(mask.any(1)).tolist()
    assume(holding)
    members = data.draw(st.lists(st.sampled_from(holding), min_size=1, max_size=4, unique=True))
    whole = numbered(len(mask), n_rows, mask.shape[1])
    own = packed(whole, mask)
    length = int(mask[members].sum(1).max())
    block = own.layout.padded(members)
    assert block.tokens.shape == (len(members), n_rows, length)
    assert block.is_full == (mask[members].sum(1) == length).all()
    side_by_side = block.of(own.values)
    for place, one in enumerate(members):
        count = int(mask[one].sum())
        assert block.held[place].tolist() == [True] * count + [False] * (length - count)
        assert block.positions[place, :count].tolist() == np.flatnonzero(mask[one]).tolist()
        assert len(set(block.positions[place].tolist())) == length, "those that are not held stand for others"
        assert torch.equal(side_by_side[place, :, :count], whole[one][:, torch.from_numpy(mask[one])])
        assert (side_by_side[place, :, count:] == side_by_side[place, :, :1]).all(), "what stands for none is its own"
    written = torch.zeros_like(own.values[0])
    block.put(side_by_side, written)
    for one in range(len(mask)):
        tokens = own.layout.tokens_of(one)
        assert torch.equal(written[tokens], own.values[0, tokens] if one in members else written[tokens] * 0)


def test_no_tokens_yet() -> None:
    base = clean(3, 4)
    none = nothing(2, base)
    assert len(none.layout) == 0
    assert none.values.shape == (1, 0, WIDTH)
    assert torch.equal(none.of_set(1, base), base)
    everything = np.ones((2, 4), dtype=bool)
    assert torch.equal(none.carry(everything, base).values[0], base.flatten(0, 1).repeat(2, 1))


@given(two_masks(), rows)
@settings(max_examples=20)
def test_dtypes_stay(both: tuple[ndarray, ndarray], n_rows: int) -> None:
    mask, other = both
    whole = numbered(len(mask), n_rows, mask.shape[1]).bfloat16()
    own = Packed(packed(whole.float(), mask).values.bfloat16(), Layout(mask, n_rows, CPU))
    carried = own.carry(other, clean(n_rows, mask.shape[1]).bfloat16())
    assert carried.values.dtype == torch.bfloat16

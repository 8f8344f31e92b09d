"""Which part of an activation is meant, where all of its positions are at hand and where only some are."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm.edits import EditError
from hooked_vlm.inputs import Span
from hooked_vlm.selection import (
    Part,
    index_mask,
    position_axis,
    position_mask,
    positions_of,
    spread,
    whole_shape,
)
from tests.tiny_runs import batch, point

SIZE, ROWS, N_KEYS = 5, 3, 10
STREAM = point("b p d_model", "question_encoder.blocks.0.hook_resid_pre")
HEADS = point("b p h d_head", "question_encoder.blocks.0.attn.hook_q")
PATTERN = point("b h q k", "question_encoder.blocks.0.cross_attn.hook_pattern")
POOLED = point("b d_model", "text_encoder.hook_pooled")
SHAPES = {
    "stream": (STREAM, [ROWS, SIZE, 8]),
    "heads": (HEADS, [ROWS, SIZE, 2, 4]),
    "pattern": (PATTERN, [ROWS, 2, SIZE, N_KEYS]),
}


def part(*held: int, size: int = SIZE, grows: bool = False) -> Part:
    return Part(torch.tensor(held, dtype=torch.long), size, grows)


@st.composite
def parts(draw: Any, size: int = SIZE) -> Part:
    """Some positions, in any order, none or all."""
    return part(*draw(st.permutations(range(size)))[: draw(st.integers(0, size))], size=size)


class Rows(NamedTuple):
    """Of a span that is yet to be made: where signatures are checked, making one draws random numbers."""

    rows: tuple[tuple[int, ...], ...]


@st.composite
def selections(draw: Any, size: int = SIZE) -> Any:
    """Positions in every way in which they may be said."""
    index = st.integers(-size, size - 1)
    way = draw(st.sampled_from(["one", "some", "tensor", "mask", "list mask", "rows", "span"]))
    if way == "one":
        return draw(index)
    if way in ("some", "tensor"):
        chosen = draw(st.lists(index, max_size=size))
        return chosen if way == "some" else torch.tensor(chosen, dtype=torch.long)
    if way == "rows":
        rows = draw(st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=ROWS, max_size=ROWS))
        return torch.tensor(rows)
    if way == "span":
        return Rows(tuple(tuple(sorted(draw(st.sets(st.integers(0, size - 1))))) for _ in range(ROWS)))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return torch.tensor(mask) if way == "mask" else mask


# Parts ----------------------------------------------------------------------------------------------------------------


@given(parts(), st.sampled_from([0, 1, 2]))
def test_a_part_of_a_tensor_is_its_held_positions(held: Part, axis: int) -> None:
    whole = torch.randn([4] * axis + [SIZE] + [3] * (2 - axis))
    found = held.of(whole, axis)
    assert torch.equal(found, whole[(slice(None),) * axis + (held.held,)])
    assert found.shape[axis] == len(held.held)


def test_what_a_generation_reads_stands_behind_what_it_knows() -> None:
    read = Part.after(4, 2)
    assert read.held.tolist() == [4, 5]
    assert read.size == 6
    assert read.grows
    assert not part(0).grows


@pytest.mark.parametrize("kind", SHAPES)
def test_the_whole_shape(kind: str) -> None:
    hook, shape = SHAPES[kind]
    axis = position_axis(hook)
    assert axis == {"stream": 1, "heads": 1, "pattern": 2}[kind]
    held = [2 if place == axis else size for place, size in enumerate(shape)]
    assert whole_shape(held, hook, part(1, 3)) == tuple(shape)
    assert whole_shape(torch.Size(held), hook, part(1, 3)) == tuple(shape)
    assert whole_shape(shape, hook, None) == tuple(shape)


def test_where_no_axis_counts_positions_the_shape_is_whole() -> None:
    assert position_axis(POOLED) is None
    assert whole_shape([3, 8], POOLED, part(1)) == (3, 8)


# Masks of positions ---------------------------------------------------------------------------------------------------


def mask_of(positions: Any, kind: str, axis: str, held: Part | None = None) -> Tensor:
    hook, shape = SHAPES[kind]
    positions = Span("question_encoder", positions.rows) if isinstance(positions, Rows) else positions
    counted = position_axis(hook)
    given_shape = [len(held.held) if held and place == counted else size for place, size in enumerate(shape)]
    return position_mask(positions, given_shape, hook, axis, batch(), held)


@given(selections(), parts(), st.sampled_from(sorted(SHAPES)))
def test_of_a_part_the_mask_is_that_of_all_positions_there(positions: Any, held: Part, kind: str) -> None:
    axis = "q" if kind == "pattern" else "p"
    whole = mask_of(positions, kind, axis)
    assert torch.equal(mask_of(positions, kind, axis, held), whole[:, held.held])


@given(selections(N_KEYS), parts())
def test_keys_are_all_there(positions: Any, held: Part) -> None:
    assert torch.equal(mask_of(positions, "pattern", "k", held), mask_of(positions, "pattern", "k"))


@given(selections())
def test_a_mask_holds_just_what_is_said(positions: Any) -> None:
    mask = mask_of(positions, "stream", "p")
    assert mask.dtype == torch.bool
    for row in range(len(mask)):
        if isinstance(positions, Rows):
            said = set(positions.rows[row])
        elif isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.ndim == 2:
            said = set(positions[row].nonzero()[:, 0].tolist())
        else:
            values = torch.as_tensor(positions)
            is_mask = values.dtype == torch.bool and values.ndim
            said = {int(value) % SIZE for value in (values.nonzero().flatten() if is_mask else values.flatten())}
        assert set(mask[row].nonzero()[:, 0].tolist()) == said


def test_a_span_by_its_name_and_words_of_the_text() -> None:
    assert mask_of("question", "stream", "p").tolist() == [[False, True, True, True, False]] * 3
    dogs = mask_of("dog", "stream", "p")
    assert dogs.nonzero().tolist() == [[0, 3], [1, 3], [2, 1]]
    assert torch.equal(mask_of("dog", "stream", "p", part(3, 1)), dogs[:, [3, 1]])
    assert mask_of("image", "pattern", "k").tolist() == [[False] + [True] * 9] * 3


@given(selections(), parts())
def test_positions_that_are_not_held_are_still_in_range(positions: Any, held: Part) -> None:
    """That a position is not at hand is no mistake; that there is none such is, whatever is held."""
    assume(len(held.held))
    mask_of(positions, "stream", "p", held)
    for wrong in (SIZE, -SIZE - 1):
        with pytest.raises(EditError, match=rf"positions \[{wrong}\] are out of range .* which has {SIZE}"):
            mask_of([0, wrong], "stream", "p", held)


def test_rows_that_do_not_fit() -> None:
    for held in (None, part(0, 4)):
        with pytest.raises(EditError, match="positions of 2 rows .* whose batch has 3"):
            mask_of(torch.ones(2, SIZE, dtype=torch.bool), "stream", "p", held)
    one = mask_of(torch.tensor([[True, False, False, True, False]]), "stream", "p", part(0, 1))
    assert one.tolist() == [[True, False]]


def test_a_hook_point_without_such_an_axis() -> None:
    with pytest.raises(EditError, match="hook_pooled has no positions: its axes are b d_model"):
        position_mask([0], [3, 8], POOLED, "p", batch())


# Generation -----------------------------------------------------------------------------------------------------------


def growing(positions: Any, n_known: int, n_new: int, rows: int = ROWS) -> Tensor:
    return position_mask(positions, [rows, n_new, 8], STREAM, "p", batch(), Part.after(n_known, n_new))


def test_in_a_generation_masks_of_the_prompt_say_nothing_of_what_follows() -> None:
    prompt = torch.tensor([True, False, False, False, True])
    assert growing(prompt, 0, SIZE).tolist() == [prompt.tolist()] * ROWS
    assert growing(prompt, SIZE, 1).tolist() == [[False]] * ROWS
    assert growing(prompt, SIZE - 1, 3).tolist() == [[True, False, False]] * ROWS
    each = torch.stack([prompt, ~prompt, prompt])
    assert growing(each, SIZE - 1, 2).tolist() == [[True, False], [False, False], [True, False]]
    assert growing("question", SIZE, 2).tolist() == [[False, False]] * 3


def test_positions_count_from_the_prompts_first() -> None:
    assert growing([6, 1], SIZE, 2).tolist() == [[False, True]] * ROWS
    assert growing([-1], SIZE, 2).tolist() == [[False, True]] * ROWS, "and from the end from the newest"


def test_beams_of_a_row_stand_together() -> None:
    each = torch.tensor([[True] * SIZE, [False] * SIZE, [True] * SIZE])
    assert growing(each, SIZE - 1, 1, rows=6).tolist() == [[True], [True], [False], [False], [True], [True]]
    assert growing([SIZE - 1], SIZE - 1, 1, rows=6).tolist() == [[True]] * 6


# Whose positions, and masks of indices --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "axes", "axis", "tower"),
    [
        ("question_encoder.blocks.0.hook_resid_pre", "b p d_model", "p", "question_encoder"),
        ("question_encoder.blocks.0.attn.hook_pattern", "b h q k", "k", "question_encoder"),
        ("question_encoder.blocks.0.cross_attn.hook_pattern", "b h q k", "q", "question_encoder"),
        ("question_encoder.blocks.0.cross_attn.hook_pattern", "b h q k", "k", "vision_encoder"),
        ("question_encoder.blocks.0.cross_attn.hook_k", "b p h d_head", "p", "vision_encoder"),
        ("question_encoder.blocks.0.cross_attn.hook_q", "b p h d_head", "p", "question_encoder"),
        ("answer_decoder.blocks.0.cross_attn.hook_v", "b p h d_head", "p", "question_encoder"),
        ("vision_encoder.hook_patch_embed", "b p d_model", "p", None),
        ("vision_encoder.hook_cls_embed", "b p d_model", "p", None),
        ("vision_encoder.hook_pos_embed", "b p d_model", "p", "vision_encoder"),
        ("hook_itm_logits", "b match", "p", None),
    ],
)
def test_whose_positions_an_axis_counts(name: str, axes: str, axis: str, tower: str | None) -> None:
    towers = ("vision_encoder", "question_encoder", "answer_decoder")
    assert positions_of(point(axes, name), axis, towers) == tower


@given(st.lists(st.integers(-SIZE, SIZE - 1)))
def test_a_mask_of_indices(indices: list[int]) -> None:
    mask = index_mask(indices, SIZE, "heads", "a.hook")
    assert {int(index) for index in mask.nonzero()[:, 0]} == {index % SIZE for index in indices}
    assert torch.equal(index_mask(mask, SIZE, "heads", "a.hook"), mask)
    assert torch.equal(index_mask(torch.tensor(indices, dtype=torch.long), SIZE, "heads", "a.hook"), mask)


def test_a_mask_is_spread_over_the_other_axes() -> None:
    rows = torch.rand(ROWS, SIZE) > 0.5
    assert torch.equal(spread(rows, ("b", "h", "q", "k"), "q"), rows[:, None, :, None])
    assert torch.equal(spread(rows[:1], ("b", "p", "d_model"), "p"), rows[:1, :, None])
    assert torch.equal(spread(rows, ("b", "h", "q", "k"), "k"), rows[:, None, None, :])

"""What every sample of the shapes generator promises, checked from its objects alone."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.data import COLORS, KINDS, SHAPES, Question, ShapeObject, ShapesSample, generate, render, sample
from hooked_vlm.data.scene import CELL, GRID, IMAGE_SIZE

# The checker of the signatures looks at a random item of a list, also while hypothesis draws.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

samples = st.builds(
    sample,
    seed=st.integers(0, 2**40),
    index=st.integers(0, 10**9),
    kinds=st.sampled_from(KINDS).map(lambda kind: (kind,)),
)


def answer_by_reading(question: str, objects: tuple[ShapeObject, ...]) -> str | None:
    """Answer from the question's words, independently of the generator; None where the question is ambiguous."""
    words = question.replace(" ?", "").split()
    colors = [word for word in words if word in COLORS]
    shapes = [word.removesuffix("s") for word in words if word.removesuffix("s") in SHAPES]
    named = [item for item in objects if item.color in (colors or COLORS) and item.shape in (shapes or SHAPES)]
    match words[:2]:
        case ["how", "many"]:
            return str(len(named))
        case ["is", "there"]:
            return "yes" if named else "no"
        case ["what", attribute]:
            return getattr(named[0], attribute) if len(named) == 1 else None


@given(samples)
def test_the_answer_is_what_the_picture_shows(one: ShapesSample):
    assert one.answer == answer_by_reading(one.question, one.objects)
    assert len(one.answer.split()) == 1


@given(samples)
def test_objects_are_few_and_each_has_a_cell_of_its_own(one: ShapesSample):
    assert 2 <= len(one.objects) <= 4
    assert len({item.cell for item in one.objects}) == len(one.objects)
    assert all(0 <= index < GRID for item in one.objects for index in item.cell)


@given(samples)
def test_about_names_the_objects_that_decide(one: ShapesSample):
    named = [one.objects[index] for index in one.about]
    if one.kind in ("color", "shape"):
        assert [getattr(item, one.kind) for item in named] == [one.answer]
    elif one.kind == "count":
        assert str(len(named)) == one.answer
    else:
        assert bool(named) == (one.answer == "yes")


@given(samples)
def test_sip_changes_one_attribute_of_one_object_and_the_answer(one: ShapesSample):
    sip = one.sip
    changed = [index for index, (old, new) in enumerate(zip(one.objects, sip.scene.objects, strict=True)) if old != new]
    assert changed == [sip.changed]
    old, new = one.objects[sip.changed], sip.scene.objects[sip.changed]
    assert new == replace(old, **{sip.attribute: getattr(new, sip.attribute)})
    assert sip.scene.background == one.scene.background
    assert sip.answer == answer_by_reading(one.question, sip.scene.objects) != one.answer


@given(samples)
def test_str_changes_one_word_and_the_answer(one: ShapesSample):
    old, new = one.question.split(), one.str_.question.split()
    differing = [index for index, (before, after) in enumerate(zip(old, new, strict=True)) if before != after]
    assert differing == [one.str_.position]
    assert (old[one.str_.position], new[one.str_.position]) == (one.str_.old, one.str_.new)
    assert one.str_.answer == answer_by_reading(one.str_.question, one.objects) != one.answer


@given(samples)
def test_sip_picture_differs_inside_the_changed_cell_only(one: ShapesSample):
    differs = (one.pixels != one.sip.scene.pixels).any(-1)
    row, column = one.objects[one.sip.changed].cell
    inside = differs[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    assert inside.any()
    assert differs.sum() == inside.sum()


@given(samples, st.sampled_from((1, 3)))
def test_masks_lie_in_their_cells_and_boxes_fit_them(one: ShapesSample, scale: int):
    for item in one.objects:
        mask = item.mask(scale)
        rows, columns = np.nonzero(mask)
        assert mask.shape == (IMAGE_SIZE * scale, IMAGE_SIZE * scale)
        assert set(rows // (CELL * scale)) == {item.cell[0]}
        assert set(columns // (CELL * scale)) == {item.cell[1]}
        if scale == 1:
            assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.stack([item.mask() for item in one.objects]).sum(0).max() == 1
    assert (one.masks == np.stack([item.mask() for item in one.objects])).all()


@given(samples)
def test_masked_pixels_have_the_object_color_where_fully_covered(one: ShapesSample):
    for item, mask in zip(one.objects, one.masks, strict=True):
        middle = np.abs(one.pixels[mask].astype(int) - COLORS[item.color]).max(-1)
        assert (middle == 0).sum() > 20
    background = ~one.masks.any(0) & (np.abs(one.pixels.astype(int) - one.scene.background).max(-1) == 0)
    assert background.sum() > 0.8 * IMAGE_SIZE**2


@given(st.integers(0, 2**40), st.integers(0, 50))
@settings(max_examples=20)
def test_a_sample_depends_on_seed_and_index_alone(seed: int, index: int):
    *_, by_sequence = generate(index + 1, seed)
    alone = sample(seed, index)
    assert alone == by_sequence
    assert (alone.pixels == by_sequence.pixels).all()
    assert alone != sample(seed + 1, index)


@given(samples)
def test_the_picture_is_an_rgb_image_of_the_size_of_the_grid(one: ShapesSample):
    assert (one.image.mode, one.image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    assert (np.asarray(one.image) == one.pixels).all()
    assert one.scene.enlarged(3).size == (3 * IMAGE_SIZE, 3 * IMAGE_SIZE)


def test_answers_are_balanced_within_each_kind():
    answers = {kind: Counter(one.answer for one in generate(300, seed=1, kinds=[kind])) for kind in KINDS}
    assert {kind: len(found) for kind, found in answers.items()} == {"color": 6, "shape": 4, "count": 4, "exists": 2}
    for kind, found in answers.items():
        expected = 300 / len(found)
        assert all(abs(count - expected) < 4 * expected**0.5 for count in found.values()), (kind, found)


def test_kinds_are_balanced():
    found = Counter(one.kind for one in generate(600, seed=2))
    assert all(abs(found[kind] - 150) < 50 for kind in KINDS)


def test_words_alone_do_not_tell_whether_a_thing_exists():
    unbound = 0
    negatives = [one for one in generate(400, seed=3, kinds=["exists"]) if one.answer == "no"]
    for one in negatives:
        colors, shapes = {item.color for item in one.objects}, {item.shape for item in one.objects}
        unbound += one.asked.color in colors and one.asked.shape in shapes
    assert unbound > 0.7 * len(negatives)


def test_kinds_and_object_counts_are_obeyed():
    chosen = list(generate(50, seed=4, kinds=["shape", "count"], object_counts=[3]))
    assert {one.kind for one in chosen} == {"shape", "count"}
    assert {len(one.objects) for one in chosen} == {3}


def test_generate_is_lazy():
    assert len(list(islice(generate(10**12, seed=0), 3))) == 3


def test_every_shape_looks_different():
    pictures = [render([ShapeObject(shape, "red", (2, 3))]) for shape in SHAPES]
    for index, picture in enumerate(pictures):
        for other in pictures[:index]:
            assert (picture != other).any(-1).sum() > 15


@pytest.mark.parametrize("kinds", [(), ("color", "size")])
def test_unknown_kinds_are_refused(kinds):
    with pytest.raises(ValueError, match="kinds must be"):
        generate(3, seed=0, kinds=kinds)


@pytest.mark.parametrize("object_counts", [(), (1,), (5,)])
def test_impossible_object_counts_are_refused(object_counts):
    with pytest.raises(ValueError, match="object_counts must be"):
        sample(0, 0, object_counts=object_counts)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed"):
        sample(-1, 0)


def test_a_scale_below_one_is_refused():
    with pytest.raises(ValueError, match="scale"):
        render([], scale=0)


def test_an_ambiguous_question_has_no_answer():
    two_circles = [ShapeObject("circle", "red", (0, 0)), ShapeObject("circle", "blue", (1, 1))]
    assert Question("color", shape="circle").answer(two_circles) is None
    assert Question("color", shape="star").answer(two_circles) is None
    assert Question("count", shape="circle").answer(two_circles) == "2"

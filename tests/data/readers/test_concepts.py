"""Concepts, the worlds that they are about, and the balanced sets of pictures of which they are true or not."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_vlm.data import Dropped, Sample, SampleError, Samples
from hooked_vlm.data.readers import (
    And,
    Atom,
    Concept,
    ConceptError,
    Not,
    Or,
    Thing,
    World,
    Worlds,
    binding_contrast,
    clevr_worlds,
    concept_sets,
    parse_concept,
    read_shapeworld,
    shape_worlds,
    shapeworld_worlds,
    single_atom_accuracy,
)
from hooked_vlm.data.readers.concepts import atoms_of, holds, true_atoms

# The checker of the signatures looks at a random item of a list, also while hypothesis draws.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

RED, CONE, BIG = Atom("red"), Atom("cone"), Atom("large", "size")
atoms = st.sampled_from([RED, CONE, BIG, Atom("blue", "color")])
concepts = st.recursive(
    atoms,
    lambda inner: st.one_of(
        inner.map(Not),
        st.lists(inner, min_size=2, max_size=3).map(lambda terms: And(tuple(terms))),
        st.lists(inner, min_size=2, max_size=3).map(lambda terms: Or(tuple(terms))),
    ),
    max_leaves=6,
)


@given(concepts)
def test_a_concept_in_words_is_read_as_the_same(concept: Concept) -> None:
    assert parse_concept(str(concept)) == concept


@given(concepts, st.frozensets(atoms))
def test_a_concept_holds_where_python_says_so(concept: Concept, true: frozenset[Atom]) -> None:
    values = {str(atom).replace("=", "_"): atom in true for atom in atoms_of(concept)}
    assert holds(concept, true) == eval(str(concept).replace("=", "_"), values)


@pytest.mark.parametrize(
    ("text", "concept"),
    [
        ("red", RED),
        ("not red and cone", And((Not(RED), CONE))),
        ("red or cone and size=large", Or((RED, And((CONE, BIG))))),
        ("(red or cone)and not(not size=large)", And((Or((RED, CONE)), Not(Not(BIG))))),
    ],
)
def test_what_binds_first(text: str, concept: Concept) -> None:
    assert parse_concept(text) == concept


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "after 'its beginning' it ends, and an attribute was expected"),
        ("red and", "after 'red and' it ends"),
        ("red cone", "after 'red' there is 'cone', and 'and', 'or' or the end was expected"),
        ("(red or cone", r"it ends, and '\)' was expected"),
        ("red or and cone", "there is 'and', and an attribute"),
        ("color= and red", "ATTRIBUTE=VALUE was expected"),
    ],
)
def test_what_is_no_concept(text: str, said: str) -> None:
    with pytest.raises(ConceptError, match=f"is no concept: .*{said}"):
        parse_concept(text)


def world(*things: tuple[str, str], id: str = "w") -> World:
    return World(id, None, tuple(Thing({"color": color, "shape": shape}) for color, shape in things))


def test_atoms_on_the_same_object_or_anywhere_in_the_picture() -> None:
    both, apart, none = world(("red", "cone"), ("blue", "cube")), world(("red", "cube"), ("blue", "cone")), world()
    found = {
        level: [true_atoms((RED, CONE), one.things, level) for one in (both, apart, none)]
        for level in ("object", "image")
    }
    assert found["object"] == [{RED, CONE}, None, set()]
    assert found["image"] == [{RED, CONE}, {RED, CONE}, set()]
    assert true_atoms((RED, CONE), world(("red", "cube"), ("red", "ball")).things) is None
    with pytest.raises(ValueError, match="level is one of object, image, not 'pixel'"):
        true_atoms((RED,), both.things, "pixel")


def test_other_words_for_clevr_s_values() -> None:
    thing = Thing({"material": "metal", "shape": "sphere"})
    assert thing.has("metallic")
    assert thing.has("ball", "shape")
    assert not thing.has("metal", "shape")
    assert not thing.has("matte")


@cache
def many_shapes() -> Worlds:
    return shape_worlds(400, seed=1)


@pytest.mark.parametrize(
    ("concept", "inside", "outside"),
    [
        ("red and circle", {"red, circle"}, {"red, not circle", "not red, circle", "not red, not circle"}),
        ("blue or star", {"blue, star", "blue, not star", "not blue, star"}, {"not blue, not star"}),
        (
            "(red and not star) or (star and not red)",
            {"red, not star", "not red, star"},
            {"red, star", "not red, not star"},
        ),
        ("not green", {"not green"}, {"green"}),
    ],
)
def test_sets_are_equal_and_balanced_over_cells(concept: str, inside: set[str], outside: set[str]) -> None:
    samples = concept_sets(many_shapes(), concept, per_cell=4, seed=0)
    cells = {name: Counter(one.group for one in samples if one.meta["set"] == name) for name in ("B_s", "B_d")}
    assert (set(cells["B_s"]), set(cells["B_d"])) == (inside, outside)
    assert all(len(set(counts.values())) == 1 for counts in cells.values())
    assert sum(cells["B_s"].values()) == sum(cells["B_d"].values()) == 4 * max(len(inside), len(outside))
    assert all((one.answer == "yes") == (one.meta["set"] == "B_s") for one in samples)
    assert all({one.answer, one.foil} == {"yes", "no"} for one in samples)
    assert all(
        holds(parse_concept(concept), {Atom(name) for name, true in one.meta["atoms"].items() if true})
        == (one.answer == "yes")
        for one in samples
    )


def test_the_best_single_atom_predicts_what_the_concept_implies() -> None:
    """5/6 for AND and OR, nothing for XOR (methods of the concept probes)."""
    best = {
        concept: max(single_atom_accuracy(concept_sets(many_shapes(), concept, per_cell=3)).values())
        for concept in ("red and circle", "red or circle", "(red and not circle) or (circle and not red)", "not red")
    }
    assert list(best.values()) == pytest.approx([5 / 6, 5 / 6, 1 / 2, 1])
    with pytest.raises(ConceptError, match="no samples"):
        single_atom_accuracy(Samples([]))


def test_the_partner_is_of_the_other_set_and_differs_in_one_object_alone() -> None:
    samples = concept_sets(many_shapes(), "red and circle", per_cell=6, seed=0)
    by_id = {one.id: one for one in many_shapes()}
    cells = Counter(one.meta["cell_cf"] for one in samples if one.answer == "yes")
    assert set(cells) == {"red, not circle", "not red, circle"}
    for one in samples:
        if one.group == "not red, not circle":
            assert one.image_cf is None, "one attribute more does not make a red circle of it"
            continue
        differs = (np.asarray(one.picture()) != np.asarray(one.picture_cf())).any(-1)
        inside = [thing for thing in by_id[one.id].things if differs[_slices(thing.region)].any()]
        assert len(inside) == 1
        assert one.regions["object"] == inside[0].region
        assert (one.meta["cell_cf"] == "red, circle") == (one.answer == "no")


def _red(sample: Sample) -> np.ndarray:
    pixels = np.asarray(sample.picture()).astype(int)
    return pixels[..., 0] > pixels[..., 2] + 60


def _slices(region: tuple) -> tuple[slice, slice]:
    left, top, right, bottom = region
    return slice(top, bottom), slice(left, right)


def test_sets_are_drawn_from_their_seed() -> None:
    first, again, other = (
        [one.id for one in concept_sets(many_shapes(), "red and circle", per_cell=3, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_worlds_with_atoms_on_several_objects_are_dropped() -> None:
    samples = concept_sets(many_shapes(), "red and circle", per_cell=1)
    unclear = {one.id for one in many_shapes() if true_atoms((RED, Atom("circle")), one.things) is None}
    assert {one.id for one in samples.dropped} == unclear
    assert 0 < len(unclear) < len(many_shapes())
    assert not concept_sets(many_shapes(), "red and circle", per_cell=1, level="image").dropped


def test_two_values_of_one_attribute_are_never_on_one_object() -> None:
    samples = concept_sets(many_shapes(), "red or blue", per_cell=3)
    assert Counter(one.group for one in samples) == {"red, not blue": 3, "not red, blue": 3, "not red, not blue": 6}
    image = concept_sets(many_shapes(), "red or blue", per_cell=3, level="image")
    assert Counter(one.group for one in image)["red, blue"] == 3


@pytest.mark.parametrize(
    ("concept", "per_cell", "said"),
    [
        (
            "red and circle",
            10**4,
            r"30000 pictures of 'red, circle' are needed, and there are \d+ among 400; give more",
        ),
        ("red and circel", 1, r"nothing in 400 pictures is 'circel'; there are black, .*; did you mean 'circle'\?"),
        ("color=circle", 1, "is 'color=circle'"),
        ("red or not red", 1, "'red or not red' is always true"),
        ("red and not red", 1, "is never true"),
    ],
)
def test_sets_that_cannot_be_made(concept: str, per_cell: int, said: str) -> None:
    with pytest.raises(ConceptError, match=said):
        concept_sets(many_shapes(), concept, per_cell=per_cell)


def test_binding_contrast() -> None:
    samples = binding_contrast(3, seed=0)
    assert len(samples) == 6
    assert single_atom_accuracy(samples) == {"red": 0.5, "circle": 0.5}
    for yes, no in zip(samples[::2], samples[1::2], strict=True):
        assert (yes.question, yes.answer, no.answer) == ("is there a red circle ?", "yes", "no")
        assert yes.text_of("subject") == "red circle"
        assert yes.picture().tobytes() == no.picture_cf().tobytes() != no.picture().tobytes()
        assert yes.picture_cf().tobytes() == no.picture().tobytes()
        red = {one.answer: _red(one)[_slices(one.regions["object"])].mean() for one in (yes, no)}
        assert red["yes"] < 0.9 < red["no"], "a circle leaves the corners of its box free, and a square does not"
        assert _red(yes).sum() == _red(yes)[_slices(yes.regions["object"])].sum(), "nothing else is red"
    with pytest.raises(ValueError, match="have something in common"):
        binding_contrast(1, 0, ("red", "circle"), ("red", "star"))
    with pytest.raises(ValueError, match="is not .color, shape."):
        binding_contrast(1, 0, ("circle", "red"))


OBJECT = {
    "color": "red",
    "shape": "cube",
    "size": "large",
    "material": "metal",
    "3d_coords": [0, 0, 0],
    "rotation": 1.0,
}


def test_clevr_scenes(tmp_path: Path) -> None:
    scenes = [
        {"image_index": 0, "image_filename": "CLEVR_val_000000.png", "split": "val", "objects": [OBJECT]},
        {
            "image_index": 1,
            "image_filename": "CLEVR_val_000001.png",
            "split": "val",
            "objects": [OBJECT, {"color": "red"}],
        },
    ]
    path = tmp_path / "scenes.json"
    path.write_text(json.dumps({"info": {}, "scenes": scenes}))
    worlds = clevr_worlds(path, images="images/{split}/{file}", on_bad_row="skip")
    assert [(one.id, one.image) for one in worlds] == [("CLEVR_val_000000", "images/val/CLEVR_val_000000.png")]
    assert dict(worlds[0].things[0].attributes) == {key: OBJECT[key] for key in ("color", "shape", "size", "material")}
    assert [one.reason for one in worlds.dropped] == [
        f"{path}, scenes[1], column 'objects': number 1 has no shape, size, material"
    ]
    with pytest.raises(SampleError, match="has no shape, size, material"):
        clevr_worlds(path)


def test_what_a_file_of_worlds_dropped_is_not_forgotten() -> None:
    worlds = [
        world(("red", "cone"), id="a"),
        world(("blue", "cube"), id="b"),
        world(("red", "a"), ("red", "b"), id="c"),
    ]
    samples = concept_sets(Worlds(worlds, [Dropped("file:7", "malformed", "malformed")]), "color=red", per_cell=1)
    assert [(one.id, one.group) for one in samples] == [("a", "color=red"), ("b", "not color=red")]
    assert [one.id for one in samples.dropped] == ["file:7", "c"]


ENTITY = {
    "id": 0,
    "color": {"name": "red", "rgb": [1.0, 0.0, 0.0], "shade": 0.1},
    "shape": {"name": "circle", "size": {"x": 0.1, "y": 0.1}},
    "texture": {"name": "solid"},
    "center": {"x": 0.9, "y": 0.3},
    "rotation": 0.5,
    "bounding_box": {"topleft": {"x": 0.8, "y": 0.2}, "bottomright": {"x": 1.02, "y": 0.4}},
}


@pytest.fixture
def shapeworld(tmp_path: Path) -> Path:
    folder = tmp_path / "existential"
    folder.mkdir()
    (folder / "caption.txt").write_text(
        "there is a red circle .\na shape is blue .\n\nthere is a star .\nall are red .\n\n"
    )
    (folder / "agreement.txt").write_text("1.0;0.0\n0.0;0.5\n")
    (folder / "world-0.png").write_bytes(b"")
    worlds = [{"size": 50, "entities": [ENTITY], "color": {"name": "black"}}, {"size": 50, "entities": [{"id": 1}]}]
    (folder / "world_model.json").write_text(json.dumps(worlds))
    return folder


def test_shapeworld_captions(shapeworld: Path) -> None:
    samples = read_shapeworld(shapeworld, on_bad_row="skip", question="is it true that {caption}")
    assert [(one.id, one.question, one.answer, one.foil) for one in samples] == [
        ("existential:0:0", "is it true that there is a red circle .", "yes", "no"),
        ("existential:0:1", "is it true that a shape is blue .", "no", "yes"),
        ("existential:1:0", "is it true that there is a star .", "no", "yes"),
    ]
    assert [one.image for one in samples] == [str(shapeworld / f"world-{index}.png") for index in (0, 0, 1)]
    assert [one.id for one in samples.dropped] == ["caption.txt:5"]
    (shapeworld / "agreement.txt").write_text("1.0;0.0\n0.0\n")
    with pytest.raises(SampleError, match="caption.txt has 4 captions, and agreement.txt 3 entries"):
        read_shapeworld(shapeworld)
    (shapeworld / "agreement.txt").unlink()
    with pytest.raises(SampleError, match="there is no .*agreement.txt"):
        read_shapeworld(shapeworld / "world_model.json")


def test_shapeworld_with_one_caption_a_picture(shapeworld: Path) -> None:
    (shapeworld / "caption.txt").write_text("there is a red circle .\nall are red .\n")
    (shapeworld / "agreement.txt").write_text("1.0\n0.0\n")
    assert [(one.id, one.answer) for one in read_shapeworld(shapeworld)] == [
        ("existential:0:0", "yes"),
        ("existential:1:0", "no"),
    ]


def test_shapeworld_worlds(shapeworld: Path) -> None:
    worlds = shapeworld_worlds(shapeworld, on_bad_row="skip", images="pictures")
    (one,) = worlds
    assert (one.id, one.image) == ("existential:0", str(Path("pictures/world-0.png")))
    assert dict(one.things[0].attributes) == {"color": "red", "shape": "circle", "texture": "solid"}
    assert one.things[0].region == pytest.approx((40, 10, 50, 20)), "cut off at the picture's edge"
    assert "number 1 is no entity" in worlds.dropped[0].reason or "number 0 is no entity" in worlds.dropped[0].reason

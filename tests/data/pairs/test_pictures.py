"""Pairs of pictures: partners from a dataset, edits of the picture itself, and what a model says of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from hooked_vlm import HookedVLM
from hooked_vlm.data import Sample, Samples, generate, shapes
from hooked_vlm.data.pairs import FillRegion, ImageEditor, make_sip, verify_pairs
from hooked_vlm.processing import ImageError

STATES = {"dog": ["wet", "dry", "wet", "moist"], "street": ["wet", "dry"], "sky": ["dark"]}


def animal(id: str, noun: str, state: str, **entries: Any) -> Sample:
    picture = np.full((6, 8, 3), sum(map(ord, id)) % 256, dtype=np.uint8)
    question = f"is this {noun} {state} or not ?"
    return Sample(id, picture, question, answer=state, meta={"noun": noun, "attribute": state}, **entries)


def states() -> list[Sample]:
    return [animal(f"{noun}-{n}", noun, state) for noun, own in STATES.items() for n, state in enumerate(own)]


def partners(samples: Iterable[Sample]) -> dict[str, str]:
    return {one.id: one.meta["partner"] for one in samples}


# From a dataset -------------------------------------------------------------------------------------------------------


def test_a_partner_is_the_same_thing_in_another_state() -> None:
    samples = {one.id: one for one in states()}
    found: dict[str, set[str]] = {}
    for seed in range(12):
        made = make_sip(samples.values(), seed=seed)
        assert made.report() == "1 dropped (no partner: 1)"
        assert made.dropped[0].id == "sky-0"
        assert "no other 'sky' is another attribute, as 'dark' is not" in made.dropped[0].reason
        for one in made:
            partner = samples[one.meta["partner"]]
            assert partner.meta["noun"] == one.meta["noun"]
            assert partner.meta["attribute"] == one.foil != one.answer
            assert one.image_cf is partner.image
            found.setdefault(one.id, set()).add(partner.id)
    assert found["dog-1"] == {"dog-0", "dog-2", "dog-3"}
    assert found["street-0"] == {"street-1"}


def test_attributes_are_drawn_evenly() -> None:
    """Nine of one and one of another: either half the time."""
    samples = [animal("a", "dog", "wet"), animal("b", "dog", "old"), *(animal(f"c{n}", "dog", "dry") for n in range(9))]
    foils = [make_sip(samples, seed=seed)[0].foil for seed in range(40)]
    assert 10 < foils.count("old") < 30


def test_the_foil_says_which_partner() -> None:
    samples = [replace(one, foil="Moist") if one.id == "dog-1" else one for one in states()]
    for seed in range(5):
        (one,) = (one for one in make_sip(samples, seed=seed) if one.id == "dog-1")
        assert (one.meta["partner"], one.foil) == ("dog-3", "Moist")
    (dropped,) = make_sip([replace(one, foil="dusty") for one in states() if one.id == "dog-1"]).dropped
    assert dropped.reason == "dog-1: no other 'dog' is 'dusty', as 'dry' is not"


def test_a_state_that_is_like_its_own_is_none() -> None:
    for seed in range(8):
        made = partners(make_sip(states(), avoid={"moist": ["wet"]}, seed=seed))
        assert made["dog-0"] == "dog-1"
        assert made["dog-3"] == "dog-1"
    one_way = [
        partners(make_sip(states(), avoid={"moist": ["wet"]}, symmetric=False, seed=n))["dog-0"] for n in range(8)
    ]
    assert set(one_way) == {"dog-1", "dog-3"}


def test_a_partner_depends_on_the_seed_and_the_sample_alone() -> None:
    made = [partners(make_sip(states(), seed=seed)) for seed in range(6)]
    assert made == [partners(make_sip(states()[::-1], seed=seed)) for seed in range(6)]
    assert made[0] != made[1]
    dogs = [animal(f"{state}-{n}", "dog", state) for state in ("wet", "dry") for n in range(6)]
    assert len({partner for id, partner in partners(make_sip(dogs)).items() if id.startswith("wet")}) > 1


def test_duplicates_and_pictures_of_two_states() -> None:
    dog, again = animal("dog-9", "dog", "old"), animal("dog-9", "dog", "old")
    both = replace(animal("dog-8", "dog", "new"), image=dog.image)
    made = make_sip([dog, replace(again, id="again", image=dog.image), both])
    assert made.report() == "3 dropped (no partner: 2, a duplicate: 1)"
    assert [one.id for one in made.dropped if one.kind == "a duplicate"] == ["again"]
    paths = [
        replace(animal(id, "dog", state), image=name)
        for id, state, name in (("a", "old", "x.png"), ("b", "new", Path("x.png")))
    ]
    assert make_sip(paths).report() == "2 dropped (no partner: 2)"


def test_where_attribute_and_noun_are_said() -> None:
    samples = [
        Sample(f"{n}", np.zeros((2, 2, 3), np.uint8), "is it ?", answer=state, group="dog")
        for n, state in enumerate(["wet", "dry"])
    ]
    assert partners(make_sip(samples, by=("answer", "group"))) == {"0": "1", "1": "0"}
    assert make_sip(samples).report() == "2 dropped (no 'attribute': 2)"
    assert make_sip(states(), by=("attribute", "kind")).report() == "7 dropped (no 'kind': 7)"


def test_partners_of_one_size() -> None:
    samples = [animal("a", "dog", "wet"), replace(animal("b", "dog", "dry"), image=np.full((30, 20, 3), 9, np.uint8))]
    assert [one.picture_cf().size for one in make_sip(samples)] == [(20, 30), (8, 6)]
    assert [one.picture_cf().size for one in make_sip(samples, same_size=True)] == [(8, 6), (20, 30)]


def test_the_shapes_bring_their_own_pairs() -> None:
    given = list(generate(3, seed=7, kinds=("color",)))
    made = make_sip(given)
    assert [one.question for one in made] == [one.question for one in given]
    for one, own in zip(made, given, strict=True):
        assert np.array_equal(np.asarray(one.picture_cf()), own.sip.scene.pixels)
        assert one.foil == own.sip.answer


# By an editor ---------------------------------------------------------------------------------------------------------


class Recorder:
    """An editor that inverts the whole picture, and notes what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[np.ndarray, str, int]] = []

    def __repr__(self) -> str:
        return f"Recorder at {hex(id(self))}"

    def __call__(self, image: PIL.Image.Image, mask: np.ndarray, prompt: str, seed: int) -> PIL.Image.Image:
        self.told.append((mask, prompt, seed))
        return PIL.Image.fromarray(255 - np.asarray(image))


def photograph(id: str = "one", **entries: Any) -> Sample:
    image = np.random.default_rng(sum(map(ord, id))).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    standard = {"answer": "red", "foil": "blue", "regions": {"object": (4, 5, 10, 9)}, "meta": {"noun": "cup"}}
    return Sample(id, image, "what color is the cup ?", **{**standard, **entries})


BOX = np.zeros((20, 30), dtype=bool)
BOX[5:9, 4:10] = True


def changed(sample: Sample) -> np.ndarray:
    return (np.asarray(sample.picture_cf()) != np.asarray(sample.picture())).any(-1)


def test_outside_of_the_region_a_picture_stays_as_it_is() -> None:
    editor = Recorder()
    (made,) = make_sip([photograph()], editor=editor)
    ((mask, prompt, seed),) = editor.told
    assert np.array_equal(mask, BOX)
    assert np.array_equal(changed(made), BOX)
    assert prompt == "a blue cup"
    how = {"editor": "Recorder", "region": "object", "prompt": prompt, "dilate": 0, "seed": seed}
    assert made.meta == {"noun": "cup", "edit": how}
    assert (made.image, made.question, made.foil) == (made.image, "what color is the cup ?", "blue")


@pytest.mark.parametrize("region", [BOX, (4.2, 5.9, 9.1, 8.5)], ids=["mask", "fractions of pixels"])
def test_regions_and_how_much_larger_they_are_made(region: Any) -> None:
    (made,) = make_sip([photograph(regions={"thing": region})], editor=Recorder(), region="thing", dilate=3)
    expected = np.zeros((20, 30), dtype=bool)
    expected[2:12, 1:13] = True
    assert np.array_equal(changed(made), expected)
    whole = photograph(regions={"object": np.ones((20, 30), dtype=bool)})
    assert changed(make_sip([whole], editor=Recorder(), dilate=1)[0]).all()


def test_an_editor_gets_a_seed_of_the_samples_own() -> None:
    def seeds(samples: list[Sample], seed: int = 0) -> list[int]:
        editor = Recorder()
        make_sip(samples, editor=editor, seed=seed)
        return [told for _, _, told in editor.told]

    one, two = seeds([photograph("a"), photograph("b")])
    assert one != two
    assert seeds([photograph("b")]) == [two]
    assert seeds([photograph("a")], seed=1) != [one]


def test_prompts() -> None:
    editor = Recorder()
    make_sip([photograph()], editor=editor, prompt="{question} {answer}, not {foil}: {noun!r}")
    make_sip([photograph()], editor=editor, prompt=lambda sample: sample.id.upper())
    assert [prompt for _, prompt, _ in editor.told] == ["what color is the cup ? red, not blue: 'cup'", "ONE"]


def test_samples_that_cannot_be_edited_are_dropped_by_name() -> None:
    samples = [
        photograph("fine"),
        photograph("no-region", regions={"cup": (0, 0, 1, 1)}),
        photograph("outside", regions={"object": (4, 5, 40, 9)}),
        photograph("empty", regions={"object": np.zeros((20, 30), dtype=bool)}),
        photograph("no-foil", foil=None),
        photograph("no-noun", meta={}),
        replace(photograph("unreadable"), image="nowhere.png"),
        replace(photograph("text-alone"), image=None),
        replace(photograph("grey"), image=np.full((20, 30, 3), 7, np.uint8)),
    ]
    made = make_sip(samples, editor=FillRegion())
    assert [one.id for one in made] == ["fine"]
    assert {one.id: one.kind for one in made.dropped} == {
        "no-region": "no region 'object'",
        "outside": "a region that does not fit",
        "empty": "a region that does not fit",
        "no-foil": "no 'foil'",
        "no-noun": "no 'noun'",
        "unreadable": "a picture that cannot be read",
        "text-alone": "no picture",
        "grey": "an edit that changes nothing",
    }
    reasons = {one.id: one.reason for one in made.dropped}
    assert reasons["no-region"] == "no-region has no region 'object'; it has cup"
    assert (
        "outside: the region 'object': the box (4.0, 5.0, 40.0, 9.0) reaches out of the picture" in reasons["outside"]
    )
    assert make_sip(Samples([], made.dropped), editor=FillRegion()).dropped == made.dropped


@pytest.mark.parametrize(
    ("editor", "message"),
    [
        (lambda image, mask, prompt, seed: image.resize((8, 8)), r"of \(30, 20\), as it was given, not \(8, 8\)"),
        (lambda image, mask, prompt, seed: np.asarray(image), "not ndarray"),
    ],
)
def test_an_editor_that_gives_something_else(editor: ImageEditor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sip([photograph()], editor=editor)


def test_edited_pictures_are_found_again(tmp_path: Path) -> None:
    editor, folder = Recorder(), tmp_path / "pairs"
    samples = [photograph("a/1"), photograph("b")]

    def paths(**options: Any) -> list[Path]:
        made = make_sip(samples, **{"editor": editor, "folder": folder, **options})
        assert all(np.array_equal(changed(one), BOX) == ("dilate" not in options) for one in made)
        return [Path(one.image_cf) for one in made]

    first = paths()
    assert [path.parent for path in first] == [folder, folder]
    assert [path.name.rpartition("-")[0] for path in first] == ["a_1", "b"]
    assert len(editor.told) == 2
    assert paths() == first
    assert len(editor.told) == 2, "a picture was edited twice"
    others = [
        paths(**options) for options in ({"prompt": "a cup"}, {"seed": 1}, {"dilate": 1}, {"editor": FillRegion()})
    ]
    samples = [replace(one, image=np.asarray(one.image) // 2) for one in samples]
    others.append(paths())
    samples = [replace(one, regions={"object": (0, 0, 3, 3)}) for one in samples]
    others.append(paths(dilate=0))
    assert len({path for own in (first, *others) for path in own}) == 14
    assert len(list(folder.iterdir())) == 14


def test_an_edit_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fails(image: PIL.Image.Image, mask: np.ndarray, prompt: str, seed: int) -> PIL.Image.Image:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        make_sip([photograph()], editor=fails, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_region_is_made_larger_and_not_smaller() -> None:
    with pytest.raises(ValueError, match="a region is made larger by 0 pixels or more, not -1"):
        make_sip([photograph()], editor=FillRegion(), dilate=-1)


# What the model says of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy-blip-vqa", "toy-llava"])
def test_pairs_on_which_the_model_says_the_foil(name: str) -> None:
    model = HookedVLM.from_pretrained(name)
    pairs = shapes(5, seed=7, kinds=("color",))
    samples = [
        *pairs[:2],
        replace(pairs[2], image_cf=pairs[2].image),
        replace(pairs[3], foil=None),
        replace(pairs[4], image_cf=None),
        replace(pairs[0], id="unreadable", image_cf="nowhere.png"),
    ]
    kept = verify_pairs(model, samples, batch_size=2)
    assert [one.id for one in kept] == [one.id for one in pairs[:2]]
    assert [one.meta["generated_cf"] for one in kept] == [one.foil for one in kept]
    assert {one.id: one.kind for one in kept.dropped} == {
        pairs[2].id: "a foil that the model does not give",
        pairs[3].id: "no foil",
        pairs[4].id: "no counterfactual picture",
        "unreadable": "a picture that cannot be read",
    }
    answer, foil = pairs[2].answer, pairs[2].foil
    assert (
        kept.dropped[0].reason
        == f"{pairs[2].id}: the model says {answer!r} of the other picture, and the foil is {foil!r}"
    )
    assert verify_pairs(model, kept).dropped == kept.dropped
    with pytest.raises(ImageError):
        samples[-1].picture_cf()

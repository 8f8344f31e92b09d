"""The loop over samples: drops by name, and results put together in which nothing that is missing reads as a zero."""

import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm import HookedVLM, results
from hooked_vlm.data import Dropped, Sample, SampleError, Samples
from hooked_vlm.experiments.parts.found import combine
from hooked_vlm.experiments.parts.over_samples import over_samples


@pytest.fixture(scope="module")
def model():
    return HookedVLM.from_pretrained("toy-blip-vqa")


def sample(id="a", **facts) -> Sample:
    return Sample(id, None, "what ?", **facts)


def of_positions(id: str, positions, *, site="attn", floor=0.1) -> xr.Dataset:
    """A result of one sample, in which every number is 1 plus its position."""
    positions = list(positions)
    values = 1.0 + np.array(positions, dtype=float)
    dims = ("sample", "site", "position")
    return xr.Dataset(
        {
            "patched": (dims, values[None, None]),
            "count": (dims, np.full(values.shape, 3)[None, None]),
            "identity": (dims, np.ones(values.shape, bool)[None, None]),
            "clean": ("sample", [0.5]),
            "noise_floor": ("metric", [floor]),
            "answer": ("sample", ["red"]),
        },
        {
            "sample": [id],
            "site": [site],
            "metric": ["probability"],
            "position": positions,
            "token": (("sample", "position"), np.array([[f"t{position}" for position in positions]])),
        },
        {"kind": id},
    )


# Putting results together ---------------------------------------------------------------------------------------------

position_sets = st.sets(st.integers(-2, 9), min_size=1, max_size=6)


@settings(max_examples=25)
@given(st.lists(position_sets, min_size=1, max_size=4))
def test_what_a_sample_has_stays_and_what_it_lacks_is_missing(sets):
    order = [sorted(own, key=lambda position: (position < 0, position)) for own in sets]
    found = combine([of_positions(str(place), own) for place, own in enumerate(order)])
    every = set().union(*sets)
    assert found.position.values.tolist() == sorted(p for p in every if p >= 0) + sorted(p for p in every if p < 0)
    for place, own in enumerate(sets):
        for position in every:
            cell = found.isel(sample=place, site=0).sel(position=position)
            there = position in own
            assert np.array_equal(float(cell.patched), 1.0 + position if there else np.nan, equal_nan=True)
            assert int(cell["count"]) == (3 if there else -1)
            assert bool(cell.identity) == there
            assert str(cell.token.values) == (f"t{position}" if there else "")
    assert (found.clean == 0.5).all()


def test_groups_of_positions_stand_last():
    found = combine([of_positions("a", [0, 1, -2, -1]), of_positions("b", [0, 1, 2, -1]), of_positions("c", [5])])
    assert found.position.values.tolist() == [0, 1, 2, 5, -2, -1]
    assert found.token.values.tolist() == [
        ["t0", "t1", "", "", "t-2", "t-1"],
        ["t0", "t1", "t2", "", "", "t-1"],
        ["", "", "", "t5", "", ""],
    ]


def test_names_stand_in_the_order_in_which_they_appear():
    found = combine([of_positions("a", [0], site="mlp"), of_positions("b", [0], site="attn")])
    assert found.site.values.tolist() == ["mlp", "attn"]
    assert np.isnan(found.patched.sel(sample="a", site="attn")).all()
    assert found.patched.sel(sample="b", site="attn").item() == 1.0


def test_the_noise_floor_is_the_highest():
    found = combine([of_positions("a", [0], floor=0.1), of_positions("b", [1], floor=0.3)])
    assert found.noise_floor.values.tolist() == [0.3]


def test_what_only_some_have_is_missing_in_the_others():
    """Whichever comes first: variables, coordinates and the labels of an axis."""
    with_box = of_positions("a", [0, 1]).assign_coords(
        side=["left", "top"], box=(("sample", "position", "side"), np.ones((1, 2, 2)))
    )
    with_box["right"] = ("sample", [1.0])
    for order in ([with_box, of_positions("b", [1, 2])], [of_positions("b", [1, 2]), with_box]):
        found = combine(order)
        assert found.side.values.tolist() == ["left", "top"]
        assert (found.box.sel(sample="a", position=[0, 1]) == 1).all()
        assert found.box.sel(sample="a", position=2).isnull().all()
        assert found.box.sel(sample="b").isnull().all()
        assert np.array_equal(found.right.sel(sample=["a", "b"]), [1.0, np.nan], equal_nan=True)
        assert "box" in found.coords
        assert "right" in found.data_vars


def test_no_attribute_of_one_sample_is_said_of_all():
    assert combine([of_positions("a", [0]), of_positions("b", [0])]).attrs == {}


# The loop -------------------------------------------------------------------------------------------------------------


def numbered(one: Sample) -> xr.Dataset:
    if one.group == "bad":
        raise SampleError(f"{one.id} is bad", "badness")
    return of_positions(one.id, range(len(one.id)))


def test_what_cannot_be_used_is_dropped_and_said(model):
    listed = Samples(
        [sample("a", group="x", answer="red"), sample("bbb", group="bad"), sample("cc")],
        [Dropped("z", "z was bad before", "earlier")],
    )
    found = over_samples(model, listed, "numbers", numbered, note="n", settings=[1, 2])
    assert found.sample.values.tolist() == ["a", "cc"]
    assert found.group.values.tolist() == ["x", ""]
    assert found.gold.values.tolist() == ["red", ""]
    assert found.question.values.tolist() == ["what ?"] * 2
    assert (found.attrs["samples_used"], found.attrs["samples_dropped"]) == (2, 2)
    assert json.loads(found.attrs["dropped"]) == [
        ["z", "earlier", "z was bad before"],
        ["bbb", "badness", "bbb is bad"],
    ]
    assert (found.attrs["method"], found.attrs["note"], found.attrs["settings"]) == ("numbers", "n", "[1, 2]")
    assert found.attrs["model"] == "toy-blip-vqa"
    assert "kind" not in found.attrs


def test_order_matters_for_nothing_but_the_order(model):
    listed = [sample("a"), sample("cc"), sample("bbb"), sample("dddd", group="bad")]
    found = over_samples(model, listed, "numbers", numbered)
    other = over_samples(model, listed[::-1], "numbers", numbered)
    assert found.identical(other.isel(sample=slice(None, None, -1)))


def test_one_sample_is_a_list_of_one(model):
    alone = over_samples(model, sample("a", group="x"), "numbers", numbered)
    assert alone.identical(over_samples(model, [sample("a", group="x")], "numbers", numbered))
    with pytest.raises(SampleError, match="a is bad"):
        over_samples(model, sample("a", group="bad"), "numbers", numbered)


def test_nothing_that_can_be_used_is_an_error(model):
    with pytest.raises(ValueError, match="numbers was given no samples: none dropped"):
        over_samples(model, [], "numbers", numbered)
    gone = Samples([], [Dropped("z", "z was bad", "badness")])
    with pytest.raises(ValueError, match=r"was given no samples: 1 dropped \(badness: 1\)"):
        over_samples(model, gone, "numbers", numbered)
    with pytest.raises(ValueError, match="can use none of 2 samples; the first: a is bad"):
        over_samples(model, [sample("a", group="bad"), sample("b", group="bad")], "numbers", numbered)


def test_samples_of_one_name_cannot_be_told_apart(model):
    with pytest.raises(ValueError, match="given twice: \\['a'\\]"):
        over_samples(model, [sample("a"), sample("b"), sample("a")], "numbers", numbered)


def test_an_error_that_is_no_samples_fault_is_raised(model):
    def fails(one):
        raise ValueError("wrong setting")

    with pytest.raises(ValueError, match="^wrong setting$"):
        over_samples(model, [sample("a"), sample("b")], "numbers", fails)


def test_thousands_of_drops_are_saved_with_the_result(model, tmp_path):
    """More than an attribute of the file's format holds in its compact form."""
    listed = [sample("a"), *(sample(f"dropped-{place}", group="bad") for place in range(2500))]
    found = over_samples(model, listed, "numbers", numbered)
    assert len(found.attrs["dropped"]) > 1 << 16
    results.save(found, tmp_path / "found.nc")
    assert results.load(tmp_path / "found.nc").identical(found)


def test_names_and_questions_of_any_length_and_letter(model, tmp_path):
    odd = [sample("é/ü \n", group="ß"), replace(sample("a"), question="¿qué? " * 100, answer="🟥")]
    found = over_samples(model, odd, "numbers", lambda one: of_positions(one.id, [0]))
    assert found.question.values.tolist() == [one.question for one in odd]
    assert found.gold.values.tolist() == ["", "🟥"]
    results.save(found, tmp_path / "found.nc")
    assert results.load(tmp_path / "found.nc").identical(found)

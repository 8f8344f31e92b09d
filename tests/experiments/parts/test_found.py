"""Results put together: a sample's own cells stay what they are, and what it has not reads as missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.experiments.parts.found import Found, combine

MISSING: dict[str, Any] = {"b": False, "i": -1, "U": "", "f": np.nan}
LABELS = {"position": [-2, -1, 0, 1, 2, 7], "site": ["attn", "mlp", "a longer name"], "width": [0.5, 1.0, 2.5]}
KINDS = ("float64", "float32", "bool", "int64", "U")
Plan = dict[str, tuple[tuple[str, ...], str, bool]]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Variables, their dims, their kinds, and which are labels."""
    dims = st.lists(st.sampled_from([*LABELS, "free"]), unique=True, max_size=3)
    return {
        name: (("sample", *draw(dims)), draw(st.sampled_from(KINDS)), draw(st.booleans()))
        for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
    }


@st.composite
def results(draw: st.DrawFn) -> list[xr.Dataset]:
    """Of samples that have other labels, and lack some variables; many have the same."""
    plan = draw(plans())
    kinds = [_one(draw, plan, number) for number in range(draw(st.integers(1, 3)))]
    return [kinds[draw(st.integers(0, len(kinds) - 1))](str(place)) for place in range(draw(st.integers(1, 5)))]


def _one(draw: st.DrawFn, plan: Plan, number: int) -> Any:
    own = {dim: draw(st.permutations(labels))[: draw(st.integers(1, 3))] for dim, labels in LABELS.items()}
    names = [name for name in plan if name == next(iter(plan)) or draw(st.booleans())]
    sizes = {"sample": 1, "free": 2, **{dim: len(labels) for dim, labels in own.items()}}
    order = draw(st.sampled_from([1, -1]))  # of dims, which need not be the same in all

    def of(name: str) -> xr.Dataset:
        drawn = np.random.default_rng([number, int(name)])
        variables = {
            one: (plan[one][0][::order], _values(drawn, [sizes[dim] for dim in plan[one][0][::order]], plan[one][1]))
            for one in names
        }
        used = {dim for dims, _ in variables.values() for dim in dims}
        labels = {dim: labels for dim, labels in own.items() if dim in used}
        found = xr.Dataset(variables, {"sample": [name], **labels}).set_coords([one for one in names if plan[one][2]])
        return found.assign(noise_floor=("metric", drawn.random(2)), metric=["probability", "loss"])

    return of


def _values(drawn: np.random.Generator, shape: list[int], kind: str) -> np.ndarray:
    values = drawn.normal(size=shape)
    if kind == "U":
        return np.array([f"{value:.2g} é"[: 1 + place] for place, value in enumerate(values.flat)]).reshape(shape)
    return values > 0 if kind == "bool" else (9 * values).astype(kind)


@settings(max_examples=60)
@given(results())
def test_what_each_has_stays_and_all_else_is_missing(given: list[xr.Dataset]) -> None:
    """Cell by cell, for results alike and not, in their order."""
    found = combine(given)
    assert found.sample.values.tolist() == [one.sample.item() for one in given]
    for name in {name for one in given for name in one.variables if "sample" in one[name].dims and name != "sample"}:
        assert (name in found.coords) == any(name in one.coords for one in given)
        for row, one in enumerate(given):
            whole = found[name].isel(sample=row)
            has = _cells(one[name].isel(sample=0).transpose(*whole.dims)) if name in one.variables else {}
            for cell, value in _cells(whole).items():
                expected = has.pop(cell, MISSING[found[name].dtype.kind])
                assert value == expected or (value != value and expected != expected)
            assert not has
    floors = np.max([one.noise_floor.values for one in given], axis=0)
    assert found.noise_floor.values.tolist() == floors.tolist()


def _cells(values: xr.DataArray) -> dict[tuple[Any, ...], Any]:
    axes = [values[dim].values.tolist() if dim in LABELS else range(values.sizes[dim]) for dim in values.dims]
    return {
        tuple(axis[place] for axis, place in zip(axes, places, strict=True)): value.item()
        for places, value in np.ndenumerate(values.values.astype(object) if values.dtype.kind == "O" else values.values)
        for value in [np.asarray(value)]
    }


@settings(max_examples=30)
@given(results(), st.randoms())
def test_the_order_moves_rows_alone_and_plain_arrays_give_the_same(given: list[xr.Dataset], drawn: Any) -> None:
    found = combine(given)
    assert combine([Found.of(one) for one in given]).identical(found)
    order = list(range(len(given)))
    drawn.shuffle(order)
    other = combine([given[place] for place in order])
    back = other.isel(sample=np.argsort(order))
    cells = {dim: found[dim].values for dim in found.dims if dim in LABELS}
    assert back.sel(cells).transpose(*found.dims).broadcast_equals(found)


def test_what_has_no_samples_is_taken_from_the_first_that_has_it() -> None:
    rows = [xr.Dataset({"value": ("sample", [1.0])}, {"sample": [name]}) for name in "abc"]
    rows[1] = rows[1].assign(scale=2.0, unit="cm").assign_coords(side=["left"])
    found = combine(rows)
    assert (float(found.scale), str(found.unit.values), found.side.values.tolist()) == (2.0, "cm", ["left"])


def test_sizes_without_labels_must_agree() -> None:
    rows = [
        xr.Dataset({"value": (("sample", "free"), np.zeros((1, size)))}, {"sample": [str(size)]}) for size in (2, 3)
    ]
    with pytest.raises(ValueError, match="results along free are 2 and 3 long, and have no labels"):
        combine(rows)


def test_numbers_of_other_kinds_are_refused_at_once() -> None:
    """While a sample is done, and not when thousands are put together."""
    result = xr.Dataset({"value": ("sample", [1j])}, {"sample": ["a"]})
    with pytest.raises(ValueError, match="'value' is complex128; results are truth values, whole numbers "):
        Found.of(result)

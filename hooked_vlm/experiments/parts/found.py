"""What a method finds of one sample, as plain arrays; and how that of many samples is put together."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_vlm.data.samples import Sample, SampleError

if TYPE_CHECKING:
    import xarray as xr

_MISSING: dict[str, Any] = {"b": False, "i": -1, "U": "", "f": np.nan}
"""What stands where a sample has no such cell, by the kind of a variable's numbers."""

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""What no text of a netCDF file has."""


@dataclass(frozen=True, eq=False)
class Found:
    """A labelled result without its attributes: light, so that thousands are read and put together in seconds."""

    variables: Mapping[str, tuple[tuple[str, ...], np.ndarray]]
    """By name: dims and values. Labels of a dim have its name."""
    coords: frozenset[str]
    """Which of these are labels."""

    @classmethod
    def of(cls, result: xr.Dataset) -> Found:
        """A result's arrays.

        Raises:
            ValueError: one of another kind than truth values, whole numbers with a sign, numbers and texts.
        """
        arrays = {}
        for name, one in result.variables.items():
            values = _plain(one.values)
            if values.dtype.kind not in _MISSING:
                known = "truth values, whole numbers with a sign, numbers and texts"
                raise ValueError(f"{name!r} is {values.dtype}; results are {known}")
            arrays[str(name)] = tuple(map(str, one.dims)), values
        return cls(arrays, frozenset(map(str, result.coords)))

    def labelled(self, sample: Sample) -> Found:
        """With the sample's name, question, group and answer.

        Raises:
            SampleError: one of them is a text that no result can be saved with.
        """
        facts = {
            "sample": sample.id,
            "question": sample.question,
            "group": sample.group or "",
            "gold": sample.answer or "",
        }
        if any(map(_UNWRITABLE.search, facts.values())):
            raise SampleError(f"{sample.id!r} has a NUL or half a surrogate pair in its texts", "letters that are none")
        own = {name: (("sample",), np.array([text], dtype=str)) for name, text in facts.items()}
        return replace(self, variables={**self.variables, **own}, coords=frozenset({*self.coords, *own}))


def combine(results: Sequence[xr.Dataset | Found], along: str = "sample") -> xr.Dataset:
    """Results along one dimension; cells that one of them does not have are NaN, -1, False or empty.

    What has no such dimension is the same in all, and taken from the first that has it; of noise floors, the highest.

    Raises:
        ValueError: sizes along a dimension without labels that differ.
    """
    import xarray as xr

    found = [one if isinstance(one, Found) else Found.of(one) for one in results]
    # Most have the same axes as others: these are put together at once, which is much faster.
    alike: dict[Hashable, list[int]] = {}
    for number, one in enumerate(found):
        alike.setdefault(_layout(one, along), []).append(number)
    whole = _Whole([_stacked([found[number] for number in own], along) for own in alike.values()], along)
    order = _order(found, list(alike.values()), along)
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in dict.fromkeys(name for one in whole.found for name in one.variables):
        dims, values = whole.variable(name)
        if along in dims and order is not None:
            values = values.take(order, axis=dims.index(along))
        variables[name] = dims, values
    coords: frozenset[str] = frozenset().union(*(one.coords for one in found))
    return xr.Dataset(
        {name: own for name, own in variables.items() if name not in coords},
        coords={name: own for name, own in variables.items() if name in coords},
    )


def _layout(one: Found, along: str) -> Hashable:
    """What results have in common whose values need only be put side by side."""
    axes = ((name, values.tobytes()) for name, (dims, values) in one.variables.items() if dims == (name,) != (along,))
    shapes = ((name, dims, values.shape, values.dtype.kind) for name, (dims, values) in one.variables.items())
    return one.coords, tuple(axes), tuple(shapes)


def _stacked(found: Sequence[Found], along: str) -> Found:
    variables = {}
    for name, (dims, first) in found[0].variables.items():
        every = (one.variables[name][1] for one in found)
        if along in dims:
            first = np.concatenate(list(every), axis=dims.index(along))
        elif name == "noise_floor":
            first = np.max(list(every), axis=0)
        variables[name] = dims, first
    return Found(variables, found[0].coords)


def _order(found: Sequence[Found], groups: Sequence[Sequence[int]], along: str) -> np.ndarray | None:
    """The rows of all groups, in the order of the results; None where they are in it."""
    if len(groups) == 1:
        return None
    ends = np.cumsum([0, *(_sizes(one).get(along, 1) for one in found)])
    rows = np.concatenate([np.arange(ends[number], ends[number + 1]) for own in groups for number in own])
    return np.argsort(rows)


class _Whole:
    """The axes of all results together, and each result's place in them."""

    def __init__(self, found: Sequence[Found], along: str) -> None:
        self.found, self.along = found, along
        self.labels: dict[str, np.ndarray] = {}
        self.sizes: dict[str, int] = {}
        self._known: dict[tuple[str, bytes], np.ndarray | None] = {}
        for one in found:
            for dim, size in _sizes(one).items():
                if dim == along:
                    continue
                if dim in one.variables:
                    self.labels[dim] = _union(self.labels.get(dim), one.variables[dim][1])
                    self.sizes[dim] = len(self.labels[dim])
                elif self.sizes.setdefault(dim, size) != size:
                    raise ValueError(f"results along {dim} are {self.sizes[dim]} and {size} long, and have no labels")
        lengths = [_sizes(one).get(along, 1) for one in found]
        self.ends = np.cumsum([0, *lengths])

    def variable(self, name: str) -> tuple[tuple[str, ...], np.ndarray]:
        """One variable of all results."""
        own = [one.variables.get(name) for one in self.found]
        dims, first = next(one for one in own if one is not None)
        if dims == (name,) and name in self.labels:
            return dims, self.labels[name]
        dtype = np.result_type(*{one[1].dtype for one in own if one is not None})
        if name == "noise_floor" and self.along not in dims:
            return dims, np.max([one[1] for one in own if one is not None], axis=0)
        if self.along not in dims:
            source = next(one for one in self.found if name in one.variables)
            values = np.full([self.sizes[dim] for dim in dims], _MISSING[dtype.kind], dtype)
            values[self._place(source, dims, slice(None))] = first
            return dims, values
        sizes = {**self.sizes, self.along: int(self.ends[-1])}
        values = np.full([sizes[dim] for dim in dims], _MISSING[dtype.kind], dtype)
        for one, given, start, end in zip(self.found, own, self.ends, self.ends[1:], strict=False):
            if given is not None:
                value = given[1] if given[0] == dims else given[1].transpose([given[0].index(dim) for dim in dims])
                values[self._place(one, dims, slice(int(start), int(end)))] = value
        return dims, values

    def _place(self, one: Found, dims: Sequence[str], rows: slice) -> tuple[Any, ...]:
        places = [rows if dim == self.along else self._of(one, dim) for dim in dims]
        if all(isinstance(place, slice) for place in places):
            return tuple(places)
        sizes = {**self.sizes, self.along: int(self.ends[-1])}
        return np.ix_(
            *(
                np.arange(sizes[dim])[place] if isinstance(place, slice) else place
                for dim, place in zip(dims, places, strict=True)
            )
        )

    def _of(self, one: Found, dim: str) -> np.ndarray | slice:
        """Where a result's labels are among all."""
        if dim not in one.variables:
            return slice(None)
        labels = one.variables[dim][1]
        key = (dim, labels.dtype.str.encode() + labels.tobytes())
        if key not in self._known:
            whole = self.labels[dim].tolist()
            same = np.array_equal(labels, self.labels[dim])
            self._known[key] = None if same else np.array([whole.index(label) for label in labels.tolist()], dtype=int)
        place = self._known[key]
        return slice(None) if place is None else place


def _sizes(one: Found) -> dict[str, int]:
    return {dim: size for dims, values in one.variables.values() for dim, size in zip(dims, values.shape, strict=True)}


def _plain(values: np.ndarray) -> np.ndarray:
    # Text is only as wide as it must be.
    return np.array(values.tolist(), dtype=str).reshape(values.shape) if values.dtype.kind in "UO" else values


def _union(known: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    """Labels of both: numbers in ascending order with negative ones last, anything else in order of appearance."""
    if known is None or np.array_equal(known, new):
        return new
    labels = np.array(list(dict.fromkeys([*known.tolist(), *new.tolist()])))
    if labels.dtype.kind in "if":
        labels = np.sort(labels)
        labels = np.concatenate([labels[labels >= 0], labels[labels < 0]])
    return labels

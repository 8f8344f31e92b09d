"""The loop over samples that every method shares: what a sample lacks drops it, by name and with the reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_vlm.data.samples import Dropped, Sample, SampleError, Samples
from hooked_vlm.models import HookedVLM
from hooked_vlm.progress import track
from hooked_vlm.results import provenance

if TYPE_CHECKING:
    import xarray as xr

_MISSING: dict[str, Any] = {"b": False, "i": -1, "U": "", "O": "", "f": np.nan}
"""What stands where a sample has no such cell, by the kind of a variable's numbers."""


def over_samples(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    method: str,
    one: Callable[[Sample], xr.Dataset],
    *,
    progress: bool = False,
    **parameters: Any,
) -> xr.Dataset:
    """A method's results of all samples, along ``sample``, whose coordinate is the samples' ids.

    Samples for which ``one`` raises :class:`~hooked_vlm.data.SampleError` are dropped; the attributes say which, and
    why. A single sample that cannot be used is an error.

    Args:
        one: what the method finds of one sample; its ``sample`` axis has length 1.
        parameters: of the method, for the attributes.

    Raises:
        ValueError: no samples, or none that can be used.
    """
    if isinstance(samples, Sample):
        return combine([labelled(samples, one(samples))]).assign_attrs(
            provenance(model, method, **parameters, **_account(samples=1, dropped=[]))
        )
    listed = samples if isinstance(samples, Samples) else Samples(samples)
    if not len(listed):
        raise ValueError(f"{method} was given no samples: {listed.report()}")
    repeated = [name for name, count in Counter(sample.id for sample in listed).items() if count > 1]
    if repeated:
        raise ValueError(f"samples need ids of their own, by which they are reported; given twice: {repeated[:5]}")
    found, dropped = [], []
    for sample in track(listed.samples, method, shown=progress):
        try:
            found.append(labelled(sample, one(sample)))
        except SampleError as error:
            dropped.append(Dropped.of(sample.id, error))
    if not found:
        raise ValueError(f"{method} can use none of {len(listed)} samples; the first: {dropped[0].reason}")
    return combine(found).assign_attrs(
        provenance(model, method, **parameters, **_account(len(found), [*listed.dropped, *dropped]))
    )


def labelled(sample: Sample, result: xr.Dataset) -> xr.Dataset:
    """A result of one sample, with its name, question, group and answer."""
    facts = {"question": sample.question, "group": sample.group or "", "gold": sample.answer or ""}
    coords: dict[str, Any] = {name: ("sample", np.array([text], dtype=str)) for name, text in facts.items()}
    return result.assign_coords(sample=[sample.id], **coords)


def combine(results: Sequence[xr.Dataset], along: str = "sample") -> xr.Dataset:
    """Results along one dimension; cells that one of them does not have are NaN, -1, False or empty."""
    import xarray as xr

    indexes: dict[str, np.ndarray] = {}
    for result in results:
        for dim, index in result.indexes.items():
            if dim != along:
                indexes[str(dim)] = _union(indexes.get(str(dim)), index.to_numpy())
    filled = []
    for result in results:
        missing = {name: _missing(result[name]) for name in (*result.data_vars, *result.coords)}
        own = {dim: index for dim, index in indexes.items() if dim in result.dims}
        filled.append(result.reindex(own, fill_value=missing))
    together = [_with_all(result, filled) for result in filled]
    combined = xr.concat(
        together, along, data_vars="minimal", coords="minimal", compat="override", join="exact", combine_attrs="drop"
    )
    if "noise_floor" in combined:
        floors = [result.noise_floor for result in results]
        combined["noise_floor"] = xr.concat(floors, along, coords="minimal", compat="override").max(along)
    return combined


def _with_all(result: xr.Dataset, others: Sequence[xr.Dataset]) -> xr.Dataset:
    """A result with every variable that another one has: missing throughout, but for labels."""
    for other in others:
        for name, values in other.variables.items():
            if name not in result.variables:
                # Labels are the same for all.
                own = values if name in values.dims else values.copy(data=np.full_like(values, _missing(values)))
                result = result.assign_coords({name: own}) if name in other.coords else result.assign({name: own})
    return result


def _missing(values: xr.DataArray | xr.Variable) -> Any:
    return _MISSING[values.dtype.kind]


def _union(known: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    """Labels of both: numbers in ascending order with negative ones last, anything else in order of appearance."""
    if known is None or np.array_equal(known, new):
        return new
    labels = np.array(list(dict.fromkeys([*known.tolist(), *new.tolist()])))
    if labels.dtype.kind in "if":
        labels = np.sort(labels)
        labels = np.concatenate([labels[labels >= 0], labels[labels < 0]])
    return labels


def _account(samples: int, dropped: Sequence[Dropped]) -> dict[str, Any]:
    return {
        "samples_used": samples,
        "samples_dropped": len(dropped),
        "dropped": json.dumps([[one.id, one.kind, one.reason] for one in dropped]),
    }

"""The statistics of a labelled result: of any method, over its samples, for each of its cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_vlm.statistics.estimates import Estimates, estimate
from hooked_vlm.statistics.permutation import Tested

if TYPE_CHECKING:
    import xarray as xr


def summarize(
    result: xr.Dataset,
    quantity: str,
    *,
    metric: str | None = None,
    against: float | str | xr.DataArray | xr.Dataset | None = 0.0,
    tested: Tested = "mean",
    level: float = 0.95,
    resamples: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """What a result's samples say of each cell: mean and median with intervals, and how often chance gives as much.

    Args:
        result: with the dim ``sample``; the quantity's other dims are its cells, all of them one family.
        metric: one of the result's. Of several, which have units of their own, each is a family of its own.
        against: what the quantity is held against. A number: what it would be if nothing happened. Or another quantity
            of the result, an array, or another result with the same quantity: then samples are paired by their names,
            and all that is said is of differences. Samples that either lacks are left out; a dim that the other lacks
            has one counterpart for all its cells. None: nothing is tested.
        tested, level, resamples, permutations, seed: as of :func:`estimate`.

    Returns:
        The fields of :class:`Estimates` over the cells, with their coordinates: ``n``, ``mean``, ``low``, ``high``,
        ``median``, ``median_low``, ``median_high``, ``p`` of the cell alone and ``p_corrected`` for all of them; no p
        without a test. The attributes are the result's, and say what was held against what, and how.

    Raises:
        ValueError: a result without samples, or without that quantity or metric; a quantity that is no number; nothing
            in common with what it is held against; and as of :func:`estimate`.
    """
    values = _values(result, quantity, metric)
    null: float | None = 0.0
    if against is None:
        null, held = None, "nothing"
    elif isinstance(against, int | float | np.number):
        null, held = float(against), f"{against:g}"
    else:
        other, held = _other(result, quantity, metric, against)
        values = _differences(values, other)
    options = {"tested": tested, "level": level, "resamples": resamples, "permutations": permutations, "seed": seed}
    found = _estimated(values, null, options)
    if null is None:
        found = found.drop_vars(["p", "p_corrected"])
    facts = {"quantity": quantity, **({} if metric is None else {"metric": metric}), "against": held}
    asked = {"level": level, "resamples": resamples, "permutations": permutations, "statistics_seed": seed}
    test = {} if null is None else {"test": f"sign flips of the {tested}, corrected by the maximum over cells"}
    return found.assign_attrs({**result.attrs, **facts, **test, **asked})


def _estimated(values: xr.DataArray, null: float | None, options: dict[str, Any]) -> xr.Dataset:
    """Of each metric by itself, where the values have that dim."""
    import xarray as xr

    families = ["metric"] if "metric" in values.dims else []
    values = values.transpose(*families, "sample", ...)
    numbers = values.values.astype(np.float64)
    if families:
        each = [estimate(own, null=null, **options) for own in numbers]
        found = Estimates(*(np.stack(field) for field in zip(*each, strict=True)))
    else:
        found = estimate(numbers, null=null, **options)
    cells = [dim for dim in values.dims if dim != "sample"]
    labels = {name: own for name, own in values.coords.items() if "sample" not in own.dims}
    return xr.Dataset({name: (cells, field) for name, field in found._asdict().items()}, labels)


def _values(result: xr.Dataset, quantity: str, metric: str | None) -> xr.DataArray:
    """A quantity over samples, of one metric if one is given."""
    there = [str(name) for name, own in result.data_vars.items() if "sample" in own.dims and own.dtype.kind in "biuf"]
    if "sample" not in result.dims:
        raise ValueError(f"the result has no samples; its dims are {', '.join(map(str, result.dims)) or 'none'}")
    if quantity not in there:
        raise ValueError(f"the result has no numbers {quantity!r} over samples; it has {', '.join(there) or 'none'}")
    return _of_metric(result[quantity], metric)


def _of_metric(values: xr.DataArray, metric: str | None) -> xr.DataArray:
    if metric is None:
        return values
    if "metric" not in values.dims:
        raise ValueError(f"{values.name} is not of any metric, so that there is none called {metric!r}")
    if metric not in values.metric.values:
        raise ValueError(f"{values.name} has no metric {metric!r}; it has {', '.join(map(str, values.metric.values))}")
    return values.sel(metric=metric)


def _other(
    result: xr.Dataset, quantity: str, metric: str | None, against: str | xr.DataArray | xr.Dataset
) -> tuple[xr.DataArray, str]:
    """What the quantity is paired with, and what that is called."""
    import xarray as xr

    if isinstance(against, xr.Dataset):
        method = against.attrs.get("method", "another result")
        return _values(against, quantity, metric), f"{quantity} of {method}"
    other = _values(result, against, None) if isinstance(against, str) else against
    other = _of_metric(other, metric) if "metric" in other.dims else other
    return other, str(other.name or "an array")


def _differences(values: xr.DataArray, other: xr.DataArray) -> xr.DataArray:
    """Of samples that both have, in the order of the first."""
    extra = [str(dim) for dim in other.dims if dim not in values.dims]
    if "sample" not in other.dims or extra:
        raise ValueError(
            f"{values.name}, over {', '.join(map(str, values.dims))}, cannot be paired with what is over "
            f"{', '.join(map(str, other.dims)) or 'nothing'}: that needs samples, and no dims of its own"
        )
    for one in (values, other):
        if not one.indexes["sample"].is_unique:
            raise ValueError("samples are paired by their names, and some name is there twice")
    shared = [name for name in values.sample.values if name in other.indexes["sample"]]
    if not shared:
        firsts = [str(one.sample.values[0]) for one in (values, other)]
        raise ValueError(f"no sample is in both; the first of each: {firsts[0]} and {firsts[1]}")
    for dim in other.dims:
        if dim != "sample" and set(other[dim].values.tolist()) != set(values[dim].values.tolist()):
            raise ValueError(f"they have other cells: {dim} is {values[dim].values} and {other[dim].values}")
    chosen = other.sel({dim: values[dim].values for dim in other.dims if dim != "sample"} | {"sample": shared})
    # Labels that differ would be lost.
    chosen = chosen.drop_vars([name for name in chosen.coords if name not in chosen.dims])
    return (values.sel(sample=shared) - chosen.astype(np.float64)).rename(values.name)

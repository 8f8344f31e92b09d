"""One method under several corruptions, or in several models, on the same samples (Zhang & Nanda 2024, section 3).

Do Gaussian noise and a semantic image pair point at the same cells? Every run is of the same samples; what agrees is
told by the rank correlation of cells, with an interval over samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from hooked_vlm.data.samples import Sample
from hooked_vlm.experiments.causal_trace import causal_trace
from hooked_vlm.experiments.parts.cases import CorruptionOf
from hooked_vlm.experiments.parts.found import combine
from hooked_vlm.experiments.parts.roles import by_role
from hooked_vlm.models import HookedVLM
from hooked_vlm.statistics import rank_correlation
from hooked_vlm.statistics.intervals import draws, percentiles, weighted_mean

if TYPE_CHECKING:
    import xarray as xr

ROUNDING = 1e-6
"""Of the metric, in the larger of the clean and the corrupted run."""

TEXT = "text"
"""What the tower that reads the question is called where several models are compared."""


def compare(
    models: HookedVLM | Mapping[str, HookedVLM],
    samples: Sequence[Sample],
    corruptions: CorruptionOf | Mapping[str, CorruptionOf],
    *,
    method: Callable[..., xr.Dataset] = causal_trace,
    metric: str = "logit_difference",
    quantity: str = "normalized",
    resamples: int = 200,
    seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """A method's results, one beside the other, and how far they agree.

    Several models are compared by roles and relative depth, in the tower that reads the question: :func:`at_depths`.

    Args:
        models: one, or several by name.
        corruptions: one, or several by name: ``{"noise": AdditiveGaussian(), "SIP": "sip", "STR": "str"}``.
        method: called as ``method(model, samples, corruption, **options)``.
        options: of the method.

    Returns:
        As :func:`compare_results`; runs are called as the corruptions, the models, or both.

    Raises:
        ValueError: nothing to compare; no sample that every run can use.
    """
    named_models = dict(models) if isinstance(models, Mapping) else {"": models}
    named_ways = dict(corruptions) if isinstance(corruptions, Mapping) else {"": corruptions}
    results = {}
    for model_name, model in named_models.items():
        for way_name, way in named_ways.items():
            found = method(model, samples, way, **options)
            if len(named_models) > 1:
                found = at_depths(found, model.text_towers[0])
            results[", ".join(part for part in (model_name, way_name) if part)] = found
    return compare_results(results, metric=metric, quantity=quantity, resamples=resamples, seed=seed)


def compare_results(
    results: Mapping[str, xr.Dataset],
    *,
    metric: str = "logit_difference",
    quantity: str = "normalized",
    resamples: int = 200,
    seed: int = 0,
) -> xr.Dataset:
    """Results of one method over ``run``, for the samples that all of them hold; by role, where positions have roles.

    Cells that give the source run by construction in any of them are left out of the correlations, and so are cells
    that not all of them have.

    Returns:
        The results' variables over ``run`` besides; ``rank_correlation`` (Spearman's) over ``(run, other)``, of cells'
        means over samples; ``low`` and ``high``, its 95 % bootstrap interval over samples. The attributes say how many
        cells were ranked, and of how many samples.

    Raises:
        ValueError: fewer than two results; no sample or no cell in common; results without the metric or quantity.
    """
    if len(results) < 2:
        raise ValueError(f"a comparison needs at least two runs, not {len(results)}")
    for name, result in results.items():
        if quantity not in result or metric not in result.metric.values:
            raise ValueError(f"the run {name!r} has no {quantity} of {metric}; metrics: {list(result.metric.values)}")
    shared = set.intersection(*(set(result.sample.values.tolist()) for result in results.values()))
    common = [sample for sample in next(iter(results.values())).sample.values.tolist() if sample in shared]
    if not common:
        raise ValueError("no sample could be used in every run")
    chosen = [_over_roles(result.sel(sample=common)).expand_dims(run=[name]) for name, result in results.items()]
    together = combine(chosen, along="run")
    cells = _ranked(together, together[quantity].sel(metric=metric, drop=True))
    correlation, low, high = _correlations(cells, resamples, seed)
    square = ("run", "other")
    dropped = [
        [name, *one] for name, result in results.items() for one in json.loads(result.attrs.get("dropped", "[]"))
    ]
    together = together.assign(rank_correlation=(square, correlation), low=(square, low), high=(square, high))
    return together.assign_coords(other=list(results)).assign_attrs(
        next(iter(results.values())).attrs,
        corruption=_each(results, "corruption"),
        model=_each(results, "model"),
        compared=f"{quantity} of {metric}",
        cells_compared=cells.shape[-1],
        samples_used=len(common),
        samples_dropped=len({one[1] for one in dropped}),
        dropped=json.dumps(dropped),
    )


def at_depths(result: xr.Dataset, tower: str, n_depths: int = 11) -> xr.Dataset:
    """One tower of a result by role, over relative ``depth`` from 0 to 1 in place of layers; the tower is ``text``.

    A depth is the layer nearest to it, so that towers of different depth can be compared.
    """
    own = _over_roles(result).sel(tower=[tower]).dropna("layer", how="all", subset=["patched"])
    depths = np.linspace(0, 1, n_depths)
    layers = (depths * (own.sizes["layer"] - 1)).round().astype(int)
    return own.isel(layer=layers).assign_coords(tower=[TEXT], layer=depths).rename(layer="depth")


def _over_roles(result: xr.Dataset) -> xr.Dataset:
    """A result by role, if it has positions; effects that are no more than rounding are none, and rank as equal."""
    scale = np.maximum(abs(result.clean), abs(result.corrupted))
    rounding = np.maximum(result.get("noise_floor", 0.0), ROUNDING * scale)
    unpatched = {"effect": 0.0, "normalized": float(result.attrs.get("direction") == "noising")}
    is_effect = ~(abs(result.effect) <= rounding)
    result = result.assign({name: result[name].where(is_effect, value) for name, value in unpatched.items()})
    return by_role(result) if "role" in result.coords and "position" in result.dims else result


def _each(results: Mapping[str, xr.Dataset], attribute: str) -> str:
    return " | ".join(dict.fromkeys(str(result.attrs.get(attribute, "")) for result in results.values()))


def _ranked(together: xr.Dataset, values: xr.DataArray) -> Float[np.ndarray, "run sample cell"]:
    """The cells that every run has of some sample, and that none gives by construction."""
    order = ("run", "sample", *(dim for dim in values.dims if dim not in ("run", "sample")))
    cells = values.transpose(*order).values.reshape(*(values.sizes[dim] for dim in order[:2]), -1)
    kept = ~np.isnan(cells).all(1).any(0)
    if "identity" in together:
        by_construction = together.identity.fillna(0).astype(bool).broadcast_like(values).transpose(*order).values
        kept &= ~by_construction.reshape(cells.shape).any((0, 1))
    if kept.sum() < 2:
        raise ValueError("the runs have no cells in common to rank")
    return cells[:, :, kept]


def _correlations(
    cells: Float[np.ndarray, "run sample cell"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, "run run"], Float[np.ndarray, "run run"], Float[np.ndarray, "run run"]]:
    """Rank correlations of the cells' means over samples, and the ends of their bootstrap intervals."""
    n_runs, n_samples = cells.shape[:2]
    drawn = draws(n_samples, resamples, seed) if resamples else np.empty((0, n_samples))
    found = np.ones((1 + resamples, n_runs, n_runs))
    for draw, counts in enumerate([np.ones(n_samples), *drawn]):
        means = [weighted_mean(own, counts) for own in cells]
        for one, other in combinations(range(n_runs), 2):
            both = ~np.isnan(means[one]) & ~np.isnan(means[other])
            correlation = rank_correlation(means[one][both], means[other][both])
            found[draw, one, other] = found[draw, other, one] = correlation
    low, high = percentiles(found[1:], 0.95) if resamples else (found[0], found[0])
    return found[0], low, high

"""Bootstrap intervals over samples."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hooked_vlm.statistics.cells import as_matrix, blocks

Statistic = Literal["mean", "median"]


class Interval(NamedTuple):
    """An estimate over samples and its bootstrap interval."""

    estimate: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]


def bootstrap(
    values: Float[np.ndarray, "sample ..."],
    *,
    statistic: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The mean or median over samples, with the percentile interval of samples drawn anew with replacement.

    All cells share the draws: of samples for a mean; for a median of ranks among the samples that a cell has, so that
    its interval does not depend on the order of samples. NaN is left out, cell by cell; a cell without a number is NaN.

    Raises:
        ValueError: no samples; a level outside (0, 1); no resamples; infinite values.
    """
    if statistic not in ("mean", "median"):
        raise ValueError(f"the statistic is 'mean' or 'median', not {statistic!r}")
    check_level(level)
    matrix = as_matrix(values)
    found = np.full((3, matrix.shape[1]), np.nan)
    drawn = draws(len(matrix), resamples, seed)
    for own in blocks(matrix.shape[1], max(resamples, len(matrix))):
        if statistic == "mean":
            found[:, own] = _means(matrix[:, own], drawn, level)
        else:
            found[:, own] = _medians(matrix[:, own], level, resamples, seed)
    return Interval(*found.reshape(3, *values.shape[1:]))


def draws(n: int, resamples: int, seed: int) -> Float[np.ndarray, "resample n"]:
    """How often each of ``n`` samples is drawn, so that sums over what is drawn are a matrix product.

    Raises:
        ValueError: no resamples.
    """
    if resamples < 1:
        raise ValueError(f"an interval takes at least one resample, not {resamples}")
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def percentiles(found: Float[np.ndarray, "resample ..."], level: float) -> Float[np.ndarray, "2 ..."]:
    """The ends of the interval that holds ``level`` of what resamples gave; those that are NaN are left out."""
    check_level(level)
    tails = [(1 - level) / 2, (1 + level) / 2]
    ends = np.quantile(found, tails, axis=0)
    # nanquantile goes cell by cell, in Python.
    unclear = np.isnan(ends[0]) & ~np.isnan(found).all(0)
    if unclear.any():
        ends[:, unclear] = np.nanquantile(found[:, unclear], tails, axis=0)
    return ends


def check_level(level: float) -> None:
    """Raises:
    ValueError: a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not {level}")


def weighted_mean(
    values: Float[np.ndarray, "sample cell"], weights: Float[np.ndarray, " sample"]
) -> Float[np.ndarray, " cell"]:
    """Over samples, each counted as often as its weight says; NaN where no sample with a weight has a number."""
    weighted, total = weights[:, None] * values, weights[:, None] * ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        # Sums, no matrix product, whose last bit depends on the column: equal cells have equal means, and rank equal.
        return np.nansum(weighted, 0) / total.sum(0)


def _means(
    values: Float[np.ndarray, "sample cell"], drawn: Float[np.ndarray, "resample sample"], level: float
) -> Float[np.ndarray, "3 cell"]:
    there = ~np.isnan(values)
    totals = drawn.sum(1, keepdims=True) if there.all() else drawn @ there.astype(np.float64)
    with np.errstate(invalid="ignore"):
        means = (drawn @ np.where(there, values, 0.0)) / totals
    return np.stack([weighted_mean(values, np.ones(len(values))), *percentiles(means, level)])


def _medians(
    values: Float[np.ndarray, "sample cell"], level: float, resamples: int, seed: int
) -> Float[np.ndarray, "3 cell"]:
    ordered, counts = np.sort(values, axis=0), (~np.isnan(values)).sum(0)  # NaN is sorted last
    found = np.full((3, values.shape[1]), np.nan)
    for n in np.unique(counts[counts > 0]).tolist():
        own = ordered[:n, counts == n]
        random = np.random.default_rng([seed, n])
        found[0, counts == n] = _middle(own, np.arange(n)[None])[0]
        found[1:, counts == n] = percentiles(_middle(own, random.integers(n, size=(resamples, n))), level)
    return found


def _middle(ordered: Float[np.ndarray, "n cell"], ranks: Int[np.ndarray, "row n"]) -> Float[np.ndarray, "row cell"]:
    """Medians of rows of ranks."""
    n = ranks.shape[1]
    middle = [(n - 1) // 2, n // 2]
    lower, upper = np.partition(ranks, middle, axis=1)[:, middle].T
    return (ordered[lower] + ordered[upper]) / 2

"""All that is said of cells: mean and median with their intervals, and how often chance gives as much."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hooked_vlm.statistics.intervals import bootstrap
from hooked_vlm.statistics.permutation import Tested, sign_flip_test


class Estimates(NamedTuple):
    """Of each cell; NaN where it has no number."""

    n: Int[np.ndarray, "..."]
    """Samples, or pairs of them, that have a number."""
    mean: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]
    median: Float[np.ndarray, "..."]
    median_low: Float[np.ndarray, "..."]
    median_high: Float[np.ndarray, "..."]
    p: Float[np.ndarray, "..."]
    p_corrected: Float[np.ndarray, "..."]


def estimate(
    values: Float[np.ndarray, "sample ..."],
    *,
    null: float | None = 0.0,
    tested: Tested = "mean",
    level: float = 0.95,
    resamples: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
) -> Estimates:
    """Mean and median over samples, their bootstrap intervals, and p by sign flips about ``null``, two-sided.

    Args:
        null: what the values would be if nothing happened; None for no test, and NaN for p.
        tested, permutations: as of :func:`sign_flip_test`; ``p_corrected`` is of the largest statistic of all cells.
        level, resamples: as of :func:`bootstrap`.
        seed: of all that is drawn.

    Raises:
        ValueError: as those two.
    """
    mean = bootstrap(values, level=level, resamples=resamples, seed=seed)
    median = bootstrap(values, statistic="median", level=level, resamples=resamples, seed=seed)
    n = np.asarray((~np.isnan(values)).sum(0))
    p, p_corrected = np.full((2, *n.shape), np.nan)
    if null is not None:
        found = sign_flip_test(values - null, tested=tested, permutations=permutations, seed=seed)
        p, p_corrected = found.p, found.p_corrected
    return Estimates(n, *mean, *median, p, p_corrected)


def paired(
    one: Float[np.ndarray, "sample ..."],
    other: Float[np.ndarray, "sample ..."],
    *,
    tested: Tested = "mean",
    level: float = 0.95,
    resamples: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
) -> Estimates:
    """How far two conditions differ, of the same samples in the same order: :func:`estimate` of ``one - other``.

    A pair of which either is NaN is left out. The mean difference is the difference of means of the pairs; the median
    difference is not that of the medians.

    Raises:
        ValueError: as :func:`estimate`; arrays of different shape.
    """
    if one.shape != other.shape:
        raise ValueError(f"pairs are of the same samples and cells, not of shapes {one.shape} and {other.shape}")
    return estimate(one - other, tested=tested, level=level, resamples=resamples, permutations=permutations, seed=seed)

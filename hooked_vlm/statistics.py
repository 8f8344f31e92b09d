"""What may be said of a mean over samples. Samples are the unit, never cells."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Interval(NamedTuple):
    """A mean over samples and its bootstrap interval."""

    mean: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]


def bootstrap(
    values: Float[np.ndarray, "sample ..."], *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """The mean over samples, with the percentile interval of means over samples drawn anew with replacement.

    All cells share the draws, so that differences between them are paired. NaN is left out, cell by cell; a cell
    without a number is NaN.

    Raises:
        ValueError: no samples; a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not {level}")
    if not len(values):
        raise ValueError("a mean needs at least one sample")
    there = ~np.isnan(values)
    filled = np.where(there, values, 0.0).reshape(len(values), -1)
    counted = there.reshape(len(values), -1).astype(float)
    random = np.random.default_rng(seed)
    # How often each sample is drawn: the means are then two matrix products.
    drawn = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (drawn @ filled) / (drawn @ counted)
        mean = filled.sum(0) / counted.sum(0)
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    known = ~np.isnan(mean)
    low[known], high[known] = np.nanquantile(means[:, known], tails, axis=0)
    shape = values.shape[1:]
    return Interval(mean.reshape(shape), low.reshape(shape), high.reshape(shape))


def rank_correlation(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Spearman's: Pearson's, of ranks; equal values have their ranks' mean. NaN where either does not vary."""
    ranks = np.stack([_ranks(one), _ranks(other)])
    return float("nan") if (ranks.std(1) == 0).any() else float(np.corrcoef(ranks)[0, 1])


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse].astype(np.float64)


def auroc(scores: Float[np.ndarray, "*rows n"], is_positive: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "*rows"]:
    """The chance that a positive scores above a negative, ties counted half; NaN where there are none of either."""
    if not is_positive.any() or is_positive.all():
        return np.full(scores.shape[:-1], np.nan)
    ours, theirs = scores[..., is_positive], np.sort(scores[..., ~is_positive], axis=-1)
    rows = zip(ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1]), strict=True)
    below = [
        (np.searchsorted(other, own, "left") + np.searchsorted(other, own, "right")).mean() / (2 * len(other))
        for own, other in rows
    ]
    return np.array(below, dtype=float).reshape(scores.shape[:-1])


def auroc_interval(
    scores: Float[np.ndarray, " n"],
    is_positive: Bool[np.ndarray, " n"],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """:func:`auroc` over samples, with its bootstrap interval; NaN where there are none of either."""
    found = auroc(scores, is_positive)
    if np.isnan(found):
        return Interval(found, found, found)
    drawn = np.random.default_rng(seed).multinomial(len(scores), np.full(len(scores), 1 / len(scores)), size=resamples)
    ours, theirs = scores[is_positive][:, None], scores[~is_positive][None]
    above = (ours > theirs) + 0.5 * (ours == theirs)
    n_ours, n_theirs = drawn[:, is_positive].astype(float), drawn[:, ~is_positive].astype(float)
    with np.errstate(invalid="ignore"):
        means = ((n_ours @ above) * n_theirs).sum(1) / (n_ours.sum(1) * n_theirs.sum(1))
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(found, np.asarray(low), np.asarray(high))

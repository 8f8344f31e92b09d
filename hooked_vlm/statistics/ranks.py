"""Correlations of values and of ranks, and what ranks say of two groups."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from hooked_vlm.statistics.intervals import Interval, draws, percentiles


def correlation(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Pearson's; NaN where either does not vary."""
    both = np.stack([one, other])
    return float("nan") if not both.size or (np.ptp(both, axis=1) == 0).any() else float(np.corrcoef(both)[0, 1])


def rank_correlation(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Spearman's: Pearson's, of ranks; equal values have their ranks' mean. NaN where either does not vary."""
    return correlation(_ranks(one), _ranks(other))


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
    drawn = draws(len(scores), resamples, seed)
    ours, theirs = scores[is_positive][:, None], scores[~is_positive][None]
    above = (ours > theirs) + 0.5 * (ours == theirs)
    n_ours, n_theirs = drawn[:, is_positive], drawn[:, ~is_positive]
    with np.errstate(invalid="ignore"):
        means = ((n_ours @ above) * n_theirs).sum(1) / (n_ours.sum(1) * n_theirs.sum(1))
    low, high = percentiles(means, level)
    return Interval(found, np.asarray(low), np.asarray(high))

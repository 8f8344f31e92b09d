"""Whether one half of the samples says what the other does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int

from hooked_vlm.statistics.cells import as_matrix
from hooked_vlm.statistics.intervals import weighted_mean
from hooked_vlm.statistics.ranks import correlation, rank_correlation

T = TypeVar("T")


class MapAgreement(NamedTuple):
    """How far the maps of two halves agree."""

    r: Float[np.ndarray, " split"]
    """Correlation over cells between the mean maps of the halves."""
    r_full: Float[np.ndarray, " split"]
    """What it would be between two sets of as many samples as both halves have (:func:`spearman_brown`)."""


def split_half(
    n: int,
    agree: Callable[[Int[np.ndarray, " one"], Int[np.ndarray, " other"]], T],
    *,
    splits: int = 20,
    seed: int = 0,
) -> list[T]:
    """What ``agree`` says of the two halves of ``n`` samples, for each of some random splits.

    Args:
        agree: of the numbers of the samples in each half; of an odd number of samples the second has one more.
        splits: how often the samples are split, from ``seed``.

    Raises:
        ValueError: fewer than two samples; no splits.
    """
    if n < 2:
        raise ValueError(f"{n} sample has no halves")
    if splits < 1:
        raise ValueError(f"samples are split at least once, not {splits} times")
    random = np.random.default_rng(seed)
    orders = [random.permutation(n) for _ in range(splits)]
    return [agree(order[: n // 2], order[n // 2 :]) for order in orders]


def map_agreement(
    values: Float[np.ndarray, "sample ..."],
    *,
    by: Literal["value", "rank"] = "value",
    splits: int = 20,
    seed: int = 0,
) -> MapAgreement:
    """How far the mean map of cells over one half of the samples agrees with that over the other.

    Args:
        by: correlation of the cells' values (Pearson's) or ranks (Spearman's). Cells that one of the halves does not
            have are left out; NaN where a map does not vary.
        splits, seed: as of :func:`split_half`.

    Raises:
        ValueError: as :func:`split_half`; infinite values.
    """
    if by not in ("value", "rank"):
        raise ValueError(f"maps agree by 'value' or by 'rank', not {by!r}")
    matrix = as_matrix(values)
    measure = correlation if by == "value" else rank_correlation

    def agree(one: Int[np.ndarray, " one"], other: Int[np.ndarray, " other"]) -> float:
        maps = [weighted_mean(matrix[half], np.ones(len(half))) for half in (one, other)]
        both = ~np.isnan(maps[0]) & ~np.isnan(maps[1])
        return measure(maps[0][both], maps[1][both])

    r = np.array(split_half(len(matrix), agree, splits=splits, seed=seed))
    return MapAgreement(r, spearman_brown(r))


def spearman_brown(r: Float[np.ndarray, "*splits"], factor: float = 2.0) -> Float[np.ndarray, "*splits"]:
    """The reliability of ``factor`` times as many samples, from that of some: k r / (1 + (k - 1) r).

    It is of use for r above 0; at and below -1 / (k - 1) it is NaN.
    """
    below = 1 + (factor - 1) * r
    return np.divide(factor * r, below, out=np.full_like(r, np.nan), where=below > 0)

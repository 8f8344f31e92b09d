"""Correlations, on data whose answer is known; what is said of AUROC is tested where it is used."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_vlm.statistics import auroc, auroc_interval, rank_correlation


def test_rank_correlation():
    one = np.array([1.0, 2.0, 5.0, 9.0])
    assert rank_correlation(one, one**3) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, np.array([1.0, 1.0, 1.0, 5.0])) == pytest.approx(np.sqrt(0.6))
    assert np.isnan(rank_correlation(one, np.zeros(4)))
    assert np.isnan(rank_correlation(np.zeros(0), np.zeros(0)))


def test_the_interval_of_an_auroc_is_the_textbooks():
    """Of equal groups without a difference its variance is (2 n + 1) / (12 n^2) (Mann & Whitney 1947)."""
    n = 300
    scores, is_positive = np.random.default_rng(0).normal(size=2 * n), np.arange(2 * n) < n
    found, low, high = auroc_interval(scores, is_positive, resamples=2000)
    assert found == auroc(scores, is_positive)
    half = 1.96 * np.sqrt((2 * n + 1) / 12) / n
    assert [found - low, high - found] == pytest.approx([half, half], rel=0.1)

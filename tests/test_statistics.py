"""Means over samples and their intervals, on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_vlm.statistics import bootstrap, rank_correlation


def test_rank_correlation():
    one = np.array([1.0, 2.0, 5.0, 9.0])
    assert rank_correlation(one, one**3) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, np.array([1.0, 1.0, 1.0, 5.0])) == pytest.approx(np.sqrt(0.6))
    assert np.isnan(rank_correlation(one, np.zeros(4)))


def test_the_interval_of_many_normal_numbers_is_the_textbooks():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 5))
    mean, low, high = bootstrap(values, resamples=4000)
    np.testing.assert_allclose(mean, values.mean(0))
    half = 1.96 * values.std(0) / np.sqrt(400)
    np.testing.assert_allclose(high - mean, half, rtol=0.1)
    np.testing.assert_allclose(mean - low, half, rtol=0.1)


def test_samples_are_the_unit_and_cells_share_their_draws():
    values = np.random.default_rng(1).normal(size=(50, 1))
    both = bootstrap(np.concatenate([values, values + 10], axis=1))
    np.testing.assert_allclose(both.low[1] - both.low[0], 10)
    np.testing.assert_allclose(both.high[1] - both.high[0], 10)


def test_equal_samples_have_no_width_and_missing_cells_are_left_out():
    values = np.full((6, 3), 2.0)
    values[:3, 1] = np.nan
    values[:, 2] = np.nan
    mean, low, high = bootstrap(values)
    for bound in (mean, low, high):
        np.testing.assert_array_equal(bound, [2.0, 2.0, np.nan])


@pytest.mark.parametrize(("values", "level"), [(np.zeros((0, 2)), 0.95), (np.zeros((3, 2)), 1.0)])
def test_bad_input(values, level):
    with pytest.raises(ValueError, match=r"sample|level"):
        bootstrap(values, level=level)

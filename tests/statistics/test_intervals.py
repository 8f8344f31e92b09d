"""Means and medians over samples and their intervals, on data whose answer is known."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest

from hooked_vlm.statistics import bootstrap, cells


def test_the_interval_of_many_normal_numbers_is_the_textbooks():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 5))
    mean, low, high = bootstrap(values, resamples=4000)
    np.testing.assert_allclose(mean, values.mean(0))
    half = 1.96 * values.std(0) / np.sqrt(400)
    np.testing.assert_allclose(high - mean, half, rtol=0.1)
    np.testing.assert_allclose(mean - low, half, rtol=0.1)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_cells_share_their_draws(statistic):
    values = np.random.default_rng(1).normal(size=(50, 1))
    both = bootstrap(np.concatenate([values, values + 10], axis=1), statistic=statistic)
    np.testing.assert_allclose(both.low[1] - both.low[0], 10)
    np.testing.assert_allclose(both.high[1] - both.high[0], 10)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_samples_are_the_unit(statistic):
    """Cells said twice leave the interval as it is; four times as many samples make it half as wide."""
    values = np.linspace(-1, 1, 61)[:, None]
    one = bootstrap(values, statistic=statistic, resamples=2000)
    cells_twice = bootstrap(np.repeat(values, 5, axis=1), statistic=statistic, resamples=2000)
    np.testing.assert_allclose(cells_twice.high - cells_twice.low, np.repeat(one.high - one.low, 5))
    more = bootstrap(np.repeat(values, 4, axis=0), statistic=statistic, resamples=2000)
    assert (more.high - more.low)[0] == pytest.approx((one.high - one.low)[0] / 2, rel=0.15)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_equal_samples_have_no_width_and_missing_cells_are_left_out(statistic):
    values = np.full((6, 3), 2.0)
    values[:3, 1] = np.nan
    values[:, 2] = np.nan
    for bound in bootstrap(values, statistic=statistic):
        np.testing.assert_array_equal(bound, [2.0, 2.0, np.nan])


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_a_number_of_a_few_samples_is_their_own(statistic):
    """A cell that two of six samples have is between them: draws without either are left out."""
    values = np.full((6, 1), np.nan)
    values[[1, 4], 0] = [3.0, 5.0]
    estimate, low, high = bootstrap(values, statistic=statistic)
    assert (estimate[0], low[0], high[0]) == (4.0, 3.0, 5.0)


def test_the_interval_of_a_median_is_that_of_its_order_statistics():
    """Of 15 samples at most the k-th is drawn's median if 8 or more of 15 draws are among the first k: binomial."""
    n = 15

    def at_most(k: int) -> float:
        return sum(comb(n, i) * k**i * (n - k) ** (n - i) for i in range(n // 2 + 1, n + 1)) / n**n

    low, high = (next(k for k in range(n) if at_most(k + 1) > tail) for tail in (0.05, 0.95))
    values = np.random.default_rng(3).permutation(n).astype(float)
    found = bootstrap(np.stack([values, -values], axis=1), statistic="median", level=0.9, resamples=20000)
    np.testing.assert_array_equal(found.estimate, [7, -7])
    np.testing.assert_array_equal(found.low, [low, -high])
    np.testing.assert_array_equal(found.high, [high, -low])


def test_the_median_of_an_even_number_lies_between_two():
    """All 4^4 draws of four samples, whose quantiles those of many random ones are."""
    values = np.array([0.0, 1.0, 10.0, 100.0])
    every = [np.median(drawn) for drawn in product(values, repeat=4)]
    estimate, low, high = bootstrap(values[:, None], statistic="median", level=0.5, resamples=20000)
    assert estimate[0] == np.median(values)
    assert [low[0], high[0]] == np.quantile(every, [0.25, 0.75]).tolist()


def test_the_order_of_samples_does_not_move_a_medians_interval():
    values = np.random.default_rng(4).normal(size=(9, 3))
    values[2, 1] = np.nan
    one, other = (bootstrap(own, statistic="median") for own in (values, values[::-1]))
    for bound, same in zip(one, other, strict=True):
        np.testing.assert_array_equal(bound, same)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_a_seed_is_a_draw(statistic):
    values = np.random.default_rng(6).normal(size=(31, 40))
    one, same, other = (bootstrap(values, statistic=statistic, resamples=50, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.low, same.low)
    assert (one.low != other.low).any()


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_blocks_of_cells_give_what_all_give_at_once(statistic, monkeypatch):
    values = np.random.default_rng(5).normal(size=(8, 2, 7))
    values[3, 1, 2] = np.nan
    whole = bootstrap(values, statistic=statistic)
    monkeypatch.setattr(cells, "ROOM", 3000)
    for bound, same in zip(whole, bootstrap(values, statistic=statistic), strict=True):
        assert bound.shape == (2, 7)
        np.testing.assert_allclose(bound, same, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        (np.zeros((0, 2)), {}, "at least one sample"),
        (np.zeros((3, 2)), {"level": 1.0}, "level"),
        (np.zeros((3, 2)), {"resamples": 0}, "at least one resample"),
        (np.array([[1.0], [np.inf], [np.nan]]), {}, "1 values of 1 samples are infinite"),
    ],
)
def test_bad_input(values, options, said):
    for statistic in ("mean", "median"):
        with pytest.raises(ValueError, match=said):
            bootstrap(values, statistic=statistic, **options)


def test_an_unknown_statistic(unchecked):
    with pytest.raises(ValueError, match="'mean' or 'median', not 'mode'"):
        bootstrap(np.zeros((3, 2)), statistic="mode")

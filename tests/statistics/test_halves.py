"""Agreement of halves, where signal and noise are known."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_vlm.statistics import map_agreement, spearman_brown, split_half


def test_halves_are_all_samples_once_and_differ():
    halves = split_half(7, lambda one, other: (one.tolist(), other.tolist()), splits=30, seed=1)
    assert len(halves) == 30
    assert all((len(one), len(other)) == (3, 4) and sorted(one + other) == list(range(7)) for one, other in halves)
    assert len({tuple(sorted(one)) for one, _ in halves}) > 15
    assert halves == split_half(7, lambda one, other: (one.tolist(), other.tolist()), splits=30, seed=1)
    # Each sample is in the first half 3 times of 7.
    firsts = split_half(7, lambda one, other: np.isin(np.arange(7), one), splits=2000)
    np.testing.assert_allclose(np.mean(firsts, axis=0), 3 / 7, atol=0.04)


@pytest.mark.parametrize("by", ["value", "rank"])
def test_maps_agree_as_signal_and_noise_say(by):
    """A signal of variance 1, noise of 10, 20 samples: halves have a reliability of 1 / (1 + 10 / 10), all of them of
    1 / (1 + 10 / 20).

    Spearman's of two normal variables is 6 / pi asin(r / 2).
    """
    random = np.random.default_rng(0)
    values = random.normal(size=6000) + np.sqrt(10) * random.normal(size=(20, 6000))
    found = map_agreement(values, by=by, splits=5)
    expected = 0.5 if by == "value" else 6 / np.pi * np.arcsin(0.25)
    assert found.r.shape == (5,)
    np.testing.assert_allclose(found.r, expected, atol=0.03)
    np.testing.assert_allclose(found.r_full, 2 * expected / (1 + expected), atol=0.03)


def test_spearman_brown_says_what_more_samples_give():
    reliability = lambda n: 1 / (1 + 4 / n)  # noqa: E731  of a mean of n, noise having 4 times the signal's variance
    found = spearman_brown(np.array([reliability(5), reliability(50), 0.0, 1.0]))
    np.testing.assert_allclose(found, [reliability(10), reliability(100), 0, 1])
    np.testing.assert_allclose(spearman_brown(np.array([reliability(5)]), 20), [reliability(100)])
    np.testing.assert_allclose(spearman_brown(spearman_brown(np.array([0.3])), 0.5), [0.3])
    np.testing.assert_array_equal(spearman_brown(np.array([-0.5, -1.0])), [-2, np.nan])


@pytest.mark.filterwarnings("error")
def test_cells_that_a_half_lacks_are_left_out():
    values = np.tile(np.arange(5.0), (6, 1))
    values[1:, 3] = np.nan
    found = map_agreement(values)
    np.testing.assert_allclose(found.r, 1)
    assert np.isnan(map_agreement(np.full((6, 7), 0.1)).r).all()
    only = np.full((6, 3), np.nan)
    only[0] = 1
    assert np.isnan(map_agreement(only).r_full).all()


def test_bad_input(unchecked):
    with pytest.raises(ValueError, match="1 sample has no halves"):
        map_agreement(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="at least once, not 0 times"):
        split_half(4, lambda one, other: 0, splits=0)
    with pytest.raises(ValueError, match="by 'value' or by 'rank', not 'sign'"):
        map_agreement(np.zeros((4, 4)), by="sign")

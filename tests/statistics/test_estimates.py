"""Estimates of cells and of differences of pairs."""

from __future__ import annotations

import numpy as np
import pytest

from hooked_vlm.statistics import Estimates, bootstrap, estimate, label_test, paired, sign_flip_test


def test_an_estimate_is_what_its_parts_give():
    values = np.random.default_rng(0).normal(1, 1, size=(12, 2, 3))
    values[4, 1, 1] = np.nan
    found = estimate(values, null=0.8, tested="t", level=0.9, resamples=200, permutations=300, seed=4)
    mean = bootstrap(values, level=0.9, resamples=200, seed=4)
    median = bootstrap(values, statistic="median", level=0.9, resamples=200, seed=4)
    flips = sign_flip_test(values - 0.8, tested="t", permutations=300, seed=4)
    parts = Estimates((~np.isnan(values)).sum(0), *mean, *median, flips.p, flips.p_corrected)
    for field, part in zip(found, parts, strict=True):
        np.testing.assert_array_equal(field, part)
    np.testing.assert_array_equal(found.median, np.nanmedian(values, axis=0))
    assert found.n[1, 1] == 11


def test_what_lies_about_the_null_has_no_small_p():
    values = 7 + np.random.default_rng(1).normal(size=(40, 1))
    assert estimate(values).p[0] == 1 / 1001
    assert estimate(values, null=float(values.mean())).p[0] > 0.9
    untested = estimate(values, null=None)
    assert np.isnan([untested.p[0], untested.p_corrected[0]]).all()
    assert untested.mean == estimate(values).mean


def test_a_cell_without_numbers_is_nan_and_zeros_are_nothing():
    found = estimate(np.stack([np.full(5, np.nan), np.zeros(5)], axis=1))
    assert found.n.tolist() == [0, 5]
    assert all(np.isnan(field[0]) for field in found[1:])
    assert [field[1] for field in found[1:]] == [0, 0, 0, 0, 0, 0, 1, 1]


def test_pairs_are_their_differences_and_tell_more_than_their_groups():
    """Samples differ by 10, a pair's two by 0.5 with a spread of 1: its interval is that of the differences alone."""
    random = np.random.default_rng(2)
    sample = random.normal(0, 10, size=(100, 1))
    one, other = sample + 0.5 + random.normal(size=(100, 1)), sample + random.normal(size=(100, 1))
    pairs = paired(one, other)
    for field, same in zip(pairs, estimate(one - other), strict=True):
        np.testing.assert_array_equal(field, same)
    half = 1.96 * np.sqrt(2 / 100)
    assert pairs.high - pairs.low == pytest.approx(2 * half, rel=0.15)
    apart = bootstrap(one), bootstrap(other)
    assert all(group.high - group.low > 6 * (pairs.high - pairs.low) for group in apart)
    groups = label_test(np.concatenate([one, other]), np.arange(200) < 100)
    assert groups.statistic == pytest.approx(pairs.mean)
    assert pairs.p[0] < 0.01 < 0.5 < groups.p[0]


def test_a_pair_that_lacks_either_is_left_out():
    random = np.random.default_rng(3)
    one, other = random.normal(size=(2, 9, 1))
    one[2], other[[2, 5]] = np.nan, np.nan
    kept = np.delete(one - other, [2, 5], axis=0)
    pairs = paired(one, other)
    assert pairs.n[0] == 7
    assert pairs.mean[0] == pytest.approx(kept.mean())
    assert pairs.median[0] == np.median(kept)
    assert pairs.p[0] == sign_flip_test(kept).p[0]


def test_pairs_of_other_shape(unchecked):
    with pytest.raises(ValueError, match=r"same samples and cells, not of shapes \(3, 2\) and \(4, 2\)"):
        paired(np.zeros((3, 2)), np.zeros((4, 2)))

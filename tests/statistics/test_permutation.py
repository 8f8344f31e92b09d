"""Permutation tests, on data of which all permutations can be listed by hand, and under the null."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.statistics import cells, label_test, sign_flip_test

FIRST_THREE = np.arange(6) < 3


@pytest.mark.parametrize("n", [1, 5, 9])
@pytest.mark.parametrize("tested", ["mean", "t"])
def test_of_samples_of_one_sign_only_the_data_and_their_mirror_image_are_as_large(n, tested):
    values = np.random.default_rng(n).uniform(1, 2, size=(n, 1))
    found = sign_flip_test(values, tested=tested)
    if tested == "t" and n == 1:
        assert np.isnan(found.p[0])
        return
    assert found.p[0] == 2 / 2**n
    assert sign_flip_test(values, tested=tested, alternative="greater").p[0] == 1 / 2**n
    assert sign_flip_test(values, tested=tested, alternative="less").p[0] == 1
    assert (found.permutations, found.is_exact) == (2**n, True)


@pytest.mark.parametrize("tested", ["mean", "t"])
def test_symmetric_samples_and_zeros_say_nothing(tested):
    values = np.array([[1.0, 0.0], [-1.0, 0.0], [0.3, 0.0], [-0.3, 0.0]])
    found = sign_flip_test(values, tested=tested)
    np.testing.assert_array_equal(found.statistic, [0, 0])
    np.testing.assert_array_equal(found.p, [1, 1])
    np.testing.assert_array_equal(found.p_corrected, [1, 1])


def test_students_t_is_students():
    assert sign_flip_test(np.array([[1.0], [2.0], [3.0], [4.0]]), tested="t").statistic[0] == pytest.approx(15**0.5)
    assert label_test(np.arange(6.0)[:, None], FIRST_THREE, tested="t").statistic[0] == pytest.approx(-(13.5**0.5))


def flips_by_hand(values: np.ndarray, tested: str) -> list[tuple[Fraction, Fraction]]:
    """(p, p corrected) of each cell, in whole numbers. Of t its square, which grows as sum^2 / sum of squares."""

    def sizes(signs: tuple[int, ...]) -> list[Fraction]:
        sums = [sum(sign * value for sign, value in zip(signs, cell, strict=True)) for cell in values.T.tolist()]
        squares = [sum(value**2 for value in cell) or 1 for cell in values.T.tolist()]
        return [Fraction(one**2, 1 if tested == "mean" else square) for one, square in zip(sums, squares, strict=True)]

    own, every = sizes((1,) * len(values)), [sizes(signs) for signs in product([1, -1], repeat=len(values))]
    return [
        (
            Fraction(sum(sizes[cell] >= own[cell] for sizes in every), len(every)),
            Fraction(sum(max(sizes) >= own[cell] for sizes in every), len(every)),
        )
        for cell in range(values.shape[1])
    ]


WHOLE = st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=2, max_size=6).map(np.array)


@given(WHOLE, st.sampled_from(["mean", "t"]), st.sampled_from([1.0, 0.1, 1e-9]))
@settings(max_examples=60)
def test_exact_flips_count_ties_as_whole_numbers_do(values, tested, unit):
    """Also where sums of decimal fractions, added in another order, differ in their last bit."""
    found = sign_flip_test(values * unit, tested=tested)
    assert found.is_exact
    by_hand = flips_by_hand(values, tested)
    assert found.p.tolist() == [float(p) for p, _ in by_hand]
    assert found.p_corrected.tolist() == [float(p) for _, p in by_hand]


@given(WHOLE.filter(lambda values: len(values) > 2), st.integers(1, 5), st.sampled_from([1.0, 0.1]))
@settings(max_examples=40)
def test_exact_labels_count_ties_as_whole_numbers_do(values, n_first, unit):
    n = len(values)
    n_first = min(n_first, n - 1)

    def sizes(chosen: tuple[int, ...]) -> list[int]:
        """Differences of means, times both groups' sizes."""
        firsts = values[list(chosen)].sum(0)
        return np.abs((n - n_first) * firsts - n_first * (values.sum(0) - firsts)).tolist()

    own, every = sizes(tuple(range(n_first))), [sizes(chosen) for chosen in combinations(range(n), n_first)]
    found = label_test(5 + values * unit, np.arange(n) < n_first)
    assert found.permutations == len(every)
    assert found.p.tolist() == [sum(one[cell] >= own[cell] for one in every) / len(every) for cell in range(3)]
    assert found.p_corrected.tolist() == [sum(max(one) >= own[cell] for one in every) / len(every) for cell in range(3)]


def test_one_of_twenty_ways_to_choose_three_of_six():
    values = np.array([4.0, 5.0, 6.0, 1.0, 2.0, 3.0])[:, None]
    for tested in ("mean", "t"):
        test = partial(label_test, values, FIRST_THREE, tested=tested)
        assert test(alternative="greater").p[0] == 1 / 20
        assert test().p[0] == 2 / 20
        assert test(alternative="less").p[0] == 1
        assert test().permutations == 20
    assert label_test(values, FIRST_THREE).statistic[0] == pytest.approx(3)


def test_labels_by_t_as_by_its_formula():
    values = np.random.default_rng(0).normal(size=(6, 4)) * [1, 10, 1, 1]

    def sizes(chosen: tuple[int, ...]) -> np.ndarray:
        one, other = values[list(chosen)], np.delete(values, list(chosen), axis=0)
        pooled = (((one - one.mean(0)) ** 2).sum(0) + ((other - other.mean(0)) ** 2).sum(0)) / 4
        return np.abs(one.mean(0) - other.mean(0)) / np.sqrt(pooled * 2 / 3)

    every = np.array([sizes(chosen) for chosen in combinations(range(6), 3)])
    found = label_test(values, FIRST_THREE, tested="t")
    np.testing.assert_allclose(np.abs(found.statistic), every[0])
    tie = every[0] * (1 - 1e-9)
    np.testing.assert_array_equal(found.p, (every >= tie).mean(0))
    np.testing.assert_array_equal(found.p_corrected, (every.max(1, keepdims=True) >= tie).mean(0))


@pytest.mark.parametrize("tested", ["mean", "t"])
def test_under_the_null_a_family_is_wrong_as_often_as_its_level_says(tested):
    """All flips of one data set are equally likely: of 64 exactly 6 have a cell with p <= 6/64; of 20 labellings 4."""
    values = np.random.default_rng(1).normal(size=(6, 7)) * np.geomspace(0.1, 10, 7)
    flipped = [sign_flip_test(values * np.array(signs)[:, None], tested=tested) for signs in product([1, -1], repeat=6)]
    assert sum(found.p_corrected.min() <= 6 / 64 for found in flipped) == 6
    assert sum(found.p.min() <= 6 / 64 for found in flipped) > 12
    labels = [np.isin(np.arange(6), chosen) for chosen in combinations(range(6), 3)]
    labelled = [label_test(values, is_first, tested=tested) for is_first in labels]
    assert sum(found.p_corrected.min() <= 4 / 20 for found in labelled) == 4
    assert sum(found.p.min() <= 4 / 20 for found in labelled) > 6


def test_random_permutations_are_wrong_as_often_as_their_level_says(unchecked):
    """Of 150 families under the null, 25 % at a level of 25 %, to three standard errors."""
    random = np.random.default_rng(2)
    values = random.normal(size=(150, 14, 10))
    flips = [sign_flip_test(one, permutations=39, seed=seed) for seed, one in enumerate(values)]
    labels = [label_test(one, np.arange(14) < 6, permutations=39, seed=seed) for seed, one in enumerate(values)]
    for found in (flips, labels):
        assert not any(one.is_exact for one in found)
        assert np.mean([one.p_corrected.min() <= 0.25 for one in found]) == pytest.approx(0.25, abs=0.1)
        assert np.mean([one.p[0] <= 0.25 for one in found]) == pytest.approx(0.25, abs=0.1)


TESTS = {"flips": sign_flip_test, "labels": partial(label_test, is_first=np.arange(12) < 5)}


@pytest.mark.parametrize("test", TESTS.values(), ids=TESTS)
@pytest.mark.parametrize("permutations", [199, 5000], ids=["random", "exact"])
@pytest.mark.parametrize("tested", ["mean", "t"])
def test_what_a_family_of_cells_must_hold(test, permutations, tested):
    values = np.random.default_rng(3).normal(0.4, 1, size=(12, 5)) + 2 * (np.arange(12) < 5)[:, None]
    values[[2, 7], 1] = np.nan
    run = partial(test, permutations=permutations, tested=tested)
    found = run(values)
    assert found.is_exact == (permutations == 5000)
    assert (found.p_corrected >= found.p).all()
    assert (found.p > 0).all()
    # Of a cell with gaps alone, samples without a number are in neither group.
    for cell in range(5) if test is sign_flip_test else (0, 2, 3, 4):
        alone = run(values[:, [cell]])
        assert alone.p_corrected[0] == alone.p[0] == found.p[cell]
    order = [3, 0, 4, 2, 1]
    np.testing.assert_array_equal(run(values[:, order]).p_corrected, found.p_corrected[order])
    twice = run(np.concatenate([values, values, values[:, ::-1]], axis=1))
    np.testing.assert_array_equal(twice.p_corrected[:5], found.p_corrected)
    np.testing.assert_array_equal(run(1e-7 * values).p_corrected, found.p_corrected)


@pytest.mark.parametrize("tested", ["mean", "t"])
def test_the_order_of_samples_does_not_matter_to_an_exact_test(tested):
    values = np.random.default_rng(4).normal(size=(9, 4))
    values[5, 1] = np.nan
    order = np.random.default_rng(5).permutation(9)
    is_first = np.arange(9) < 4
    for one, other in (
        (sign_flip_test(values, tested=tested), sign_flip_test(values[order], tested=tested)),
        (label_test(values, is_first, tested=tested), label_test(values[order], is_first[order], tested=tested)),
    ):
        np.testing.assert_array_equal(one.p, other.p)
        np.testing.assert_array_equal(one.p_corrected, other.p_corrected)


def test_a_cell_that_varies_more_hides_the_others_from_a_maximum_of_means_not_of_t():
    random = np.random.default_rng(6)
    values = np.stack([random.normal(1, 0.5, size=30), random.normal(0, 100, size=30)], axis=1)
    by_mean, by_t = (sign_flip_test(values, tested=tested) for tested in ("mean", "t"))
    assert by_mean.p[0] == by_t.p[0] == 1 / 1001
    assert by_mean.p_corrected[0] > 0.9
    assert by_t.p_corrected[0] < 0.01


def test_samples_without_a_number_are_left_out_of_a_cell():
    values = np.random.default_rng(7).normal(1, 1, size=(7, 2))
    gaps = np.concatenate([values, np.full((3, 2), np.nan)])
    gaps[:, 1] = np.nan
    for tested in ("mean", "t"):
        found = sign_flip_test(gaps, tested=tested)
        assert found.permutations == 2**7, "a sample without any number is none"
        alone = sign_flip_test(values[:, :1], tested=tested)
        assert found.p[0] == found.p_corrected[0] == alone.p[0]
        labelled = label_test(gaps, np.arange(10) < 4, tested=tested)
        assert labelled.permutations == 35
        alone = label_test(values[:, :1], np.arange(7) < 4, tested=tested)
        assert labelled.p[0] == labelled.p_corrected[0] == alone.p[0]
        assert np.isnan([found.statistic[1], found.p[1], found.p_corrected[1]]).all()


def test_labels_of_cells_with_gaps_by_their_formula():
    """Differences of means of those that have a number; 0 where a group has none."""
    values = 5 + np.random.default_rng(10).normal(size=(6, 3))
    values[[0, 1], 1], values[[4, 5], 2] = np.nan, np.nan

    def difference(chosen: tuple[int, ...]) -> list[float]:
        one, other = values[list(chosen)], np.delete(values, list(chosen), axis=0)
        pairs = [(one[~np.isnan(one[:, cell]), cell], other[~np.isnan(other[:, cell]), cell]) for cell in range(3)]
        return [first.mean() - second.mean() if first.size and second.size else 0.0 for first, second in pairs]

    every = np.array([difference(chosen) for chosen in combinations(range(6), 3)])
    found = label_test(values, FIRST_THREE)
    np.testing.assert_allclose(found.statistic, every[0])
    sizes, tie = np.abs(every), np.abs(every[0]) * (1 - 1e-9)
    np.testing.assert_array_equal(found.p, (sizes >= tie).mean(0))
    np.testing.assert_array_equal(found.p_corrected, (sizes.max(1, keepdims=True) >= tie).mean(0))


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_random_permutations_come_near_all_of_them(alternative):
    """To three standard errors, of 3000 of 4096 flips and of 1700 of 1770 choices of two in sixty."""
    values = np.random.default_rng(11).normal(0.1, 1, size=(60, 3))
    is_first = np.isin(np.arange(60), [7, 30])
    flips = partial(sign_flip_test, values[:12], alternative=alternative)
    labels = partial(label_test, values, is_first, alternative=alternative)
    for test, few, error in ((flips, 3000, 0.0275), (labels, 1700, 0.037)):
        random, exact = test(permutations=few), test(permutations=5000)
        assert exact.is_exact > random.is_exact
        np.testing.assert_allclose(random.p, exact.p, atol=error)
        np.testing.assert_allclose(random.p_corrected, exact.p_corrected, atol=error)
        other = test(permutations=few, seed=1)
        assert (other.p != random.p).any(), "the seed has no say"


def test_one_number_in_each_group_has_no_t():
    values = np.random.default_rng(12).normal(size=(4, 50))
    values[1:3] = np.nan
    assert np.isnan(label_test(values, np.arange(4) < 2, tested="t").p).all()
    assert (label_test(values, np.arange(4) < 2).p == 1).all()


def test_a_cell_without_numbers_in_one_group_says_nothing():
    values = np.random.default_rng(8).normal(size=(6, 2))
    values[:3, 1] = np.nan
    for tested in ("mean", "t"):
        found = label_test(values, FIRST_THREE, tested=tested)
        assert np.isnan([found.statistic[1], found.p[1], found.p_corrected[1]]).all()
        assert found.p[0] == label_test(values[:, :1], FIRST_THREE, tested=tested).p[0]


def test_equal_values_in_both_groups_are_no_difference():
    """Whatever is left by rounding when their mean is taken away."""
    values = np.stack([np.full(6, 0.1), np.arange(6.0)], axis=1)
    for tested in ("mean", "t"):
        found = label_test(values, FIRST_THREE, tested=tested)
        np.testing.assert_array_equal(found.p, [1, 2 / 20])
        np.testing.assert_array_equal(found.p_corrected, [1, 2 / 20])


@pytest.mark.parametrize("permutations", [300, 5000], ids=["random", "exact"])
def test_blocks_of_permutations_give_what_all_give_at_once(permutations, monkeypatch):
    values = np.random.default_rng(9).normal(0.3, 1, size=(11, 2, 3))
    is_first = np.arange(11) < 4

    def both() -> list[np.ndarray]:
        tests = (
            sign_flip_test(values, permutations=permutations),
            label_test(values, is_first, permutations=permutations),
        )
        return [p for found in tests for p in (found.p, found.p_corrected)]

    whole = both()
    monkeypatch.setattr(cells, "ROOM", 400)
    for one, other in zip(whole, both(), strict=True):
        assert one.shape == (2, 3)
        np.testing.assert_array_equal(one, other)


def test_bad_input(unchecked):
    values = np.zeros((4, 2))
    for wrong, said in (
        ({"tested": "median"}, "'mean' or 't', not 'median'"),
        ({"alternative": "more"}, "'two-sided', 'greater' or 'less', not 'more'"),
        ({"permutations": 0}, "at least one permutation, not 0"),
    ):
        for test in (sign_flip_test, partial(label_test, is_first=np.arange(4) < 2)):
            with pytest.raises(ValueError, match=said):
                test(values, **wrong)
    with pytest.raises(ValueError, match="at least one sample"):
        sign_flip_test(values[:0])
    for is_first in (np.zeros(4, bool), np.ones(4, bool)):
        with pytest.raises(ValueError, match="both groups need samples with numbers, and [04] of 4"):
            label_test(values, is_first)

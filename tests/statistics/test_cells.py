"""What is held in memory of many cells."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from hooked_vlm.statistics import bootstrap, cells, label_test, sign_flip_test

OF_MANY_CELLS = {
    "mean": lambda values: bootstrap(values, resamples=400),
    "median": lambda values: bootstrap(values, statistic="median", resamples=400),
    "flips": lambda values: sign_flip_test(values, permutations=400),
    "labels": lambda values: label_test(values, np.arange(len(values)) < 5, permutations=400),
}


@pytest.mark.parametrize("statistic", OF_MANY_CELLS.values(), ids=OF_MANY_CELLS)
def test_memory_is_that_of_the_values_not_of_all_draws_of_all_cells(statistic, monkeypatch, unchecked):
    """All 400 draws of 2000 cells would be 6.4 MB, and as much again for every step; not a third of one is held."""
    monkeypatch.setattr(cells, "ROOM", 2**13)
    values = np.random.default_rng(0).normal(size=(12, 2000))
    tracemalloc.start()
    statistic(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400 * 2000 * 8 / 3


def test_blocks_cover_all_rows_once():
    for n, width in ((0, 5), (1, 5), (7, 2**22), (7, 2**21), (10**7, 1)):
        found = list(cells.blocks(n, width))
        assert [row.start for row in found[1:]] == [row.stop for row in found[:-1]]
        assert sum(row.stop - row.start for row in found) == n
        assert all(row.stop - row.start == 1 or (row.stop - row.start) * width <= cells.ROOM for row in found)

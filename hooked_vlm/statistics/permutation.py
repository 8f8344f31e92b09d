"""Permutation tests, corrected for many cells by the maximum over them (Nichols & Holmes 2002; Westfall & Young 1993).

Where nothing is there, a sample's sign, or its group, could as well be the other one. What the data give is held
against what they would give with signs or groups changed, all cells of a sample together; and each cell, besides,
against the largest statistic of all cells. Then the chance that any cell where nothing is passes for something is at
most the level, however the cells depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, islice
from math import comb
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_vlm.statistics.cells import as_matrix, blocks

Tested = Literal["mean", "t"]
Alternative = Literal["two-sided", "greater", "less"]

TIE = 1e-12
"""Of the sizes that are added: sums that differ by less are one sum, added in another order."""


class Permuted(NamedTuple):
    """Of each cell its statistic, and how often chance gives as much; NaN where a cell has nothing to test."""

    statistic: Float[np.ndarray, "..."]
    p: Float[np.ndarray, "..."]
    """Of the cell alone."""
    p_corrected: Float[np.ndarray, "..."]
    """That the largest statistic of all cells is as large as this one's."""
    permutations: int
    """How many there were."""
    is_exact: bool
    """Whether they were all that there are."""


def sign_flip_test(
    values: Float[np.ndarray, "sample ..."],
    *,
    tested: Tested = "mean",
    alternative: Alternative = "two-sided",
    permutations: int = 1000,
    seed: int = 0,
) -> Permuted:
    """Whether values, such as differences of pairs, lie about 0: by flips of the signs of whole samples.

    Args:
        values: whose distribution over samples is symmetric about 0 where nothing is there. NaN is left out, cell by
            cell.
        tested: the ``"mean"``, in the values' own units, or Student's ``"t"``. The largest mean is that of the cells
            that vary most; the largest t may be any cell's, but of few samples it is large by accident. One sample has
            no t.
        alternative: what is looked for; ``"greater"``: values above 0.
        permutations: all 2^n patterns of signs, where they are no more than this. Otherwise so many random ones, and
            the data's own counts as one more: p = (1 + b) / (1 + m).
        seed: of the random ones.

    Raises:
        ValueError: no samples; infinite values; no permutations; an unknown statistic or alternative.
    """
    _check(tested, alternative, permutations)
    matrix = as_matrix(values)
    has_any = ~np.isnan(matrix).all(1)
    is_exact = 2 ** int(has_any.sum()) <= permutations
    # Random signs are drawn for all samples, so that a cell's own p does not depend on what the others lack.
    matrix = matrix[has_any] if is_exact else matrix
    n, n_cells = matrix.shape
    counts, filled = (~np.isnan(matrix)).sum(0), np.nan_to_num(matrix)
    dof = None if tested == "mean" else counts - 1
    scale, can_tell = (counts, counts > 0) if dof is None else (np.sqrt(counts * (filled**2).sum(0)), dof > 0)
    scale = np.where(can_tell, np.where(scale > 0, scale, 1.0), np.nan)

    def statistic(signs: Float[np.ndarray, "row sample"]) -> Float[np.ndarray, "row cell"]:
        return (signs @ filled) / scale

    signs = _all_signs(n, n_cells) if is_exact else _random_signs(n, n_cells, permutations, seed)
    slack = TIE * np.abs(filled).sum(0) / scale
    found = _against_maximum(statistic, np.ones((1, n)), signs, slack, dof, alternative, is_exact=is_exact)
    return _shaped(found, values.shape[1:])


def label_test(
    values: Float[np.ndarray, "sample ..."],
    is_first: Bool[np.ndarray, " sample"],
    *,
    tested: Tested = "mean",
    alternative: Alternative = "two-sided",
    permutations: int = 1000,
    seed: int = 0,
) -> Permuted:
    """Whether two groups of samples, such as right and wrong answers, differ: by shuffling who is in which.

    Args:
        values: whose distribution is the same in both groups where nothing is there.
        is_first: the samples of the first group, whose mean less the other's is the statistic.
        tested: the difference of means (``"mean"``), or Student's ``"t"`` of it, with the variance of both groups
            pooled.
        alternative: ``"greater"``: values of the first group are.
        permutations: all choices of a first group, where they are no more than this; otherwise as of
            :func:`sign_flip_test`.
        seed: of the random ones.

    Raises:
        ValueError: as :func:`sign_flip_test`; a group without samples.
    """
    _check(tested, alternative, permutations)
    matrix = as_matrix(values)
    has_any = ~np.isnan(matrix).all(1)
    matrix, is_first = matrix[has_any], is_first[has_any]
    n, n_first = len(is_first), int(is_first.sum())
    if not 0 < n_first < n:
        raise ValueError(f"both groups need samples with numbers, and {n_first} of {n} are in the first")
    there, centred = (~np.isnan(matrix)).astype(np.float64), _centred(matrix)
    counts, squares, has_gaps = there.sum(0), (centred**2).sum(0), not there.all()
    dof = None if tested == "mean" else counts - 2
    # NaN where there are no degrees of freedom, and so no t.
    scale = np.ones_like(counts)
    if dof is not None:
        scale = np.where(dof > 0, np.where(squares > 0, np.sqrt(squares), 1.0), np.nan)

    def factor(labels: Float[np.ndarray, "row sample"]) -> Float[np.ndarray, "row cell"]:
        """From the sum over the first group, centred, to the statistic; NaN where a group has no number."""
        firsts = labels @ there if has_gaps else labels.sum(1, keepdims=True)
        with np.errstate(divide="ignore"):
            both = 1 / firsts + 1 / (counts - firsts)
        both = np.where(np.isfinite(both), both, np.nan)
        return (both if dof is None else np.sqrt(both)) / scale

    def statistic(labels: Float[np.ndarray, "row sample"]) -> Float[np.ndarray, "row cell"]:
        return (labels @ centred) * factor(labels)

    is_exact = comb(n, n_first) <= permutations
    width = matrix.shape[1]
    labels = _all_labels(n, n_first, width) if is_exact else _random_labels(n, n_first, width, permutations, seed)
    own = is_first[None].astype(np.float64)
    slack = TIE * np.abs(centred).sum(0) * factor(own)[0]
    found = _against_maximum(statistic, own, labels, slack, dof, alternative, is_exact=is_exact)
    return _shaped(found, values.shape[1:])


def _against_maximum(
    statistic: Callable[[Float[np.ndarray, "row sample"]], Float[np.ndarray, "row cell"]],
    own: Float[np.ndarray, "1 sample"],
    others: Iterator[Float[np.ndarray, "..."]],
    slack: Float[np.ndarray, " cell"],
    dof: Float[np.ndarray, " cell"] | Int[np.ndarray, " cell"] | None,
    alternative: Alternative,
    *,
    is_exact: bool,
) -> Permuted:
    """A statistic of the signs or labels that samples have, against others: each cell's, and the largest of all.

    Args:
        slack: how far a statistic may fall short of another and be equal to it.
        dof: degrees of freedom with which the statistic, then a correlation, is made a t; None where it stays as it is.
    """

    def towards(found: Float[np.ndarray, "*row cell"]) -> Float[np.ndarray, "*row cell"]:
        return {"two-sided": np.abs, "greater": np.positive, "less": np.negative}[alternative](found)

    observed = statistic(own)[0]
    threshold = _as_t(towards(observed) - slack, dof)
    reached, largest = np.zeros(len(observed)), []
    for rows in others:
        found = _as_t(towards(statistic(rows)), dof)
        found[np.isnan(found)] = -np.inf
        reached += (found >= threshold).sum(0)
        largest.append(found.max(1, initial=-np.inf))
    maxima = np.sort(np.concatenate(largest))
    reached_by_largest = len(maxima) - np.searchsorted(maxima, threshold)
    itself = 0 if is_exact else 1  # an exact test has it among the others
    p, p_corrected = (
        np.where(np.isnan(threshold), np.nan, (often + itself) / (len(maxima) + itself))
        for often in (reached, reached_by_largest)
    )
    return Permuted(_as_t(observed, dof), p, p_corrected, len(maxima), is_exact)


def _as_t(
    found: Float[np.ndarray, "*row cell"], dof: Float[np.ndarray, " cell"] | Int[np.ndarray, " cell"] | None
) -> Float[np.ndarray, "*row cell"]:
    """Student's t from what is to it as a correlation: r sqrt(dof / (1 - r^2)), which grows with r."""
    if dof is None:
        return found
    with np.errstate(divide="ignore", invalid="ignore"):
        return found * np.sqrt(dof / np.maximum(1 - found**2, 0))


def _centred(matrix: Float[np.ndarray, "sample cell"]) -> Float[np.ndarray, "sample cell"]:
    """Values less their cell's mean, 0 for NaN and for what is no more than rounding."""
    filled, counts = np.nan_to_num(matrix), (~np.isnan(matrix)).sum(0)
    centred = np.where(np.isnan(matrix), 0.0, filled - filled.sum(0) / np.maximum(counts, 1))
    return np.where(np.abs(centred) > TIE * np.abs(filled).max(0), centred, 0.0)


def _all_signs(n: int, n_cells: int) -> Iterator[Float[np.ndarray, "row n"]]:
    for rows in blocks(2**n, max(n, n_cells)):
        yield 1.0 - 2.0 * (np.arange(rows.start, rows.stop)[:, None] >> np.arange(n) & 1)


def _random_signs(n: int, n_cells: int, permutations: int, seed: int) -> Iterator[Float[np.ndarray, "row n"]]:
    # Uniform numbers, of which a block takes as many as it has signs: so the signs do not depend on the blocks.
    random = np.random.default_rng(seed)
    for rows in blocks(permutations, max(n, n_cells)):
        yield np.where(random.random((rows.stop - rows.start, n)) < 0.5, -1.0, 1.0)


def _all_labels(n: int, n_first: int, n_cells: int) -> Iterator[Float[np.ndarray, "row n"]]:
    choices = combinations(range(n), n_first)
    for rows in blocks(comb(n, n_first), max(n, n_cells)):
        chosen = np.array(list(islice(choices, rows.stop - rows.start)))
        labels = np.zeros((len(chosen), n))
        np.put_along_axis(labels, chosen, 1.0, axis=1)
        yield labels


def _random_labels(
    n: int, n_first: int, n_cells: int, permutations: int, seed: int
) -> Iterator[Float[np.ndarray, "row n"]]:
    random = np.random.default_rng(seed)
    for rows in blocks(permutations, max(n, n_cells)):
        yield (random.random((rows.stop - rows.start, n)).argsort(1) < n_first).astype(np.float64)


def _shaped(found: Permuted, shape: tuple[int, ...]) -> Permuted:
    return found._replace(**{name: getattr(found, name).reshape(shape) for name in ("statistic", "p", "p_corrected")})


def _check(tested: str, alternative: str, permutations: int) -> None:
    if tested not in ("mean", "t"):
        raise ValueError(f"what is tested is 'mean' or 't', not {tested!r}")
    if alternative not in ("two-sided", "greater", "less"):
        raise ValueError(f"the alternative is 'two-sided', 'greater' or 'less', not {alternative!r}")
    if permutations < 1:
        raise ValueError(f"a test takes at least one permutation, not {permutations}")

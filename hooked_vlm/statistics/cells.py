"""Values over samples as a matrix, and work on many cells cut to what memory holds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

ROOM = 2**22
"""Numbers that are held at once: 32 MB."""


def as_matrix(values: Float[np.ndarray, "sample ..."]) -> Float[np.ndarray, "sample cell"]:
    """In double precision, cells along one axis.

    Raises:
        ValueError: no samples; infinite values, which have no mean.
    """
    if not len(values):
        raise ValueError("a statistic over samples needs at least one sample")
    matrix = values.reshape(len(values), -1).astype(np.float64)
    infinite = np.isinf(matrix)
    if infinite.any():
        raise ValueError(
            f"{int(infinite.sum())} values of {int(infinite.any(1).sum())} samples are infinite: they have no mean; "
            "make them NaN, and they are left out"
        )
    return matrix


def blocks(n: int, width: int) -> Iterator[slice]:
    """Cuts ``n`` rows of ``width`` numbers into blocks for which there is room."""
    step = max(1, ROOM // max(1, width))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))

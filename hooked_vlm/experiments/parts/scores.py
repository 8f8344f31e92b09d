"""What methods measure of a run, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.metrics import KLDivergence, LogitDifference, LogProbability, Metric, Probability, Together, normalized

if TYPE_CHECKING:
    import xarray as xr


class Target(NamedTuple):
    """What is scored, for each row of a run."""

    answer: Int[Tensor, " rows"]
    foil: Int[Tensor, " rows"]
    clean_logits: Float[Tensor, "rows p d_vocab"]


METRICS: dict[str, Callable[[Target], Metric]] = {
    "probability": lambda target: Probability(target.answer),
    "log_probability": lambda target: LogProbability(target.answer),
    "logit_difference": lambda target: LogitDifference(target.answer, target.foil),
    "kl_divergence": lambda target: KLDivergence(target.clean_logits),
}
"""Of the answer's first token, where the answer begins. The divergence is from the clean run."""

DEFAULT_METRICS = ("probability", "logit_difference")


def metrics_of(
    names: Sequence[str],
    answer: Int[Tensor, " b"],
    foil: Int[Tensor, " b"],
    clean_logits: Float[Tensor, "b p d_vocab"],
    draws: int = 1,
) -> Together:
    """Some metrics of a run, in which each row stands ``draws`` times.

    Raises:
        ValueError: no names, or an unknown one.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names or isinstance(names, str):
        raise ValueError(f"metrics are a list of {', '.join(METRICS)}; not {unknown or names!r}")
    rows = [tensor.repeat_interleave(draws, dim=0) for tensor in (answer, foil, clean_logits[:, -1:])]
    return Together(tuple(METRICS[name](Target(*rows)) for name in names))


def normalized_effect(result: xr.Dataset) -> xr.DataArray:
    """``patched`` of a result, 0 as ``corrupted`` and 1 as ``clean``; NaN where these do not differ."""
    import xarray as xr

    def of(patched: np.ndarray, clean: np.ndarray, corrupted: np.ndarray) -> np.ndarray:
        return normalized(*(torch.as_tensor(values) for values in (patched, clean, corrupted))).numpy()

    return xr.apply_ufunc(of, result.patched, result.clean, result.corrupted)

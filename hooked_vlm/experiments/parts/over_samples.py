"""The loop over samples that every method shares: what a sample lacks drops it, by name and with the reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hooked_vlm.data.samples import Dropped, Sample, Samples
from hooked_vlm.experiments.parts.found import Found, combine
from hooked_vlm.experiments.parts.loop import Failed, current_loop
from hooked_vlm.models import HookedVLM
from hooked_vlm.results import provenance

if TYPE_CHECKING:
    import xarray as xr


class NoneUsedError(ValueError):
    """Of many samples, a method could use none."""

    def __init__(self, message: str, outcomes: Sequence[Dropped]) -> None:
        super().__init__(message)
        self.outcomes = tuple(outcomes)


def over_samples(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    method: str,
    one: Callable[[Sample], xr.Dataset],
    *,
    progress: bool = False,
    **parameters: Any,
) -> xr.Dataset:
    """A method's results of all samples, along ``sample``, whose coordinate is the samples' ids.

    Samples for which ``one`` raises :class:`~hooked_vlm.data.SampleError` are dropped; the attributes say which, and
    why. A single sample that cannot be used is an error.

    Args:
        one: what the method finds of one sample; its ``sample`` axis has length 1.
        parameters: of the method, for the attributes.

    Raises:
        ValueError: no samples, or none that can be used.
    """
    if isinstance(samples, Sample):
        return combine([Found.of(one(samples)).labelled(samples)]).assign_attrs(
            provenance(model, method, **parameters, **_account(samples=1, dropped=[]))
        )
    listed = samples if isinstance(samples, Samples) else Samples(samples)
    if not len(listed):
        raise ValueError(f"{method} was given no samples: {listed.report()}")
    repeated = [name for name, count in Counter(sample.id for sample in listed).items() if count > 1]
    if repeated:
        raise ValueError(f"samples need ids of their own, by which they are reported; given twice: {repeated[:5]}")
    outcomes = current_loop().outcomes(method, listed.samples, lambda sample: Found.of(one(sample)), progress=progress)
    found = [one for one in outcomes if isinstance(one, Found)]
    dropped = [one for one in outcomes if isinstance(one, Dropped)]
    if not found:
        raise NoneUsedError(f"{method} can use none of {len(listed)} samples; the first: {dropped[0].reason}", dropped)
    return combine(found).assign_attrs(
        provenance(model, method, **parameters, **_account(len(found), [*listed.dropped, *dropped]))
    )


def _account(samples: int, dropped: Sequence[Dropped]) -> dict[str, Any]:
    failed = [one for one in dropped if isinstance(one, Failed)]
    left_out = [one for one in dropped if not isinstance(one, Failed)]
    facts = {"samples_used": samples, "samples_dropped": len(left_out), "dropped": _listed(left_out)}
    return {**facts, "samples_failed": len(failed), "failed": _listed(failed)} if failed else facts


def _listed(left_out: Sequence[Dropped]) -> str:
    return json.dumps([[one.id, one.kind, one.reason] for one in left_out])

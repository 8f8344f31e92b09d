"""A method that costs nothing, and kills who carries it out so many times; a module that actors can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence

import torch
import xarray as xr

from hooked_vlm import HookedVLM
from hooked_vlm.data import Sample, SampleError
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.runs import Method
from tests.runs.disturbed import note, numbers_of, turns


def deadly(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    *,
    log: str,
    deaths: Mapping[str, int] | None = None,
    odd: Mapping[str, str] | None = None,
    seconds: float = 0.0,
    progress: bool = False,
) -> xr.Dataset:
    """Numbers, of a sample's name alone.

    Args:
        log: a file that gets a line when a turn begins and when it ends.
        deaths: how many processes die at a sample, by its name.
        odd: samples that are ``"dropped"`` or ``"failed"``.
        seconds: what a turn takes.
    """

    def one(sample: Sample) -> xr.Dataset:
        note(log, "begins", sample.id)
        begun = sum(turn.sample == sample.id for turn in turns(log, "begins"))
        if begun <= (deaths or {}).get(sample.id, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        how = (odd or {}).get(sample.id)
        if how is not None:
            raise {"dropped": SampleError, "failed": RuntimeError}[how](f"{sample.id} is odd")
        assert torch.is_inference_mode_enabled(), "what is set up around the samples holds for each"
        note(log, "ends", sample.id)
        return numbers_of(sample.id)

    with torch.inference_mode():
        return over_samples(model, samples, "deadly", one, progress=progress)


DEADLY = Method(deadly, quantity="value")


def impatient(settings: Mapping[str, str], attempts: int) -> None:
    """A driver with these settings of its environment, which gives a sample up at which so many workers died."""
    from hooked_vlm.runs import cluster_team

    os.environ.update(settings)
    cluster_team.ATTEMPTS = attempts

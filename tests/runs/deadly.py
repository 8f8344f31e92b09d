"""An experiment of which one method kills who carries it out, so many times; in a module that actors can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    threads: int | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Numbers, of a sample's name alone.

    Args:
        log: a file that gets a line when a turn begins and when it ends.
        deaths: how many processes die at a sample, by its name.
        odd: samples that are ``"dropped"`` or ``"failed"``.
        seconds: what a turn takes.
        threads: of torch, that there must be.
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
        assert threads in (None, torch.get_num_threads())
        note(log, "ends", sample.id)
        return numbers_of(sample.id)

    with torch.inference_mode():
        return over_samples(model, samples, "deadly", one, progress=progress)


DEADLY = Method(deadly, quantity="value")

N_SAMPLES = 12
ONCE, ALWAYS, DROPPED, FAILED = (f"shapes-7-{number}-color" for number in (8, 11, 1, 2))
"""Samples at which one worker dies; or every one (the last, so that no other waits for a new one); odd ones."""


def tables(log: Path, once: int = 0, always: int = 0) -> dict[str, Any]:
    """Four steps: two that cost nothing, at which so many workers die; and two real ones, one with means of samples."""
    odd = {DROPPED: "dropped", FAILED: "failed"}
    deadly = {"use": f"{__name__}:DEADLY"}
    edges = [["question", "last"], ["image", "last"]]
    tokens = {"evaluate": {"vqa": {"kind": "NextToken"}}, "conditions": {"object": {"kind": "ObjectTokens"}}}
    return {
        "model": "toy-llava",
        "samples": {"shapes": N_SAMPLES, "seed": 7, "kinds": ["color"]},
        "keep_correct": True,
        "methods": {
            "numbers": {**deadly, "log": f"{log}.numbers", "deaths": {ONCE: once}, "odd": odd, "seconds": 0.05},
            "flow": {"use": "information_flow", "width": 1, "edges": edges},
            "visual_tokens": {"replace_by": "mean", **tokens},
            "hopeless": {**deadly, "log": f"{log}.hopeless", "deaths": {ALWAYS: always}},
        },
        "statistics": {"resamples": 20, "permutations": 20},
    }


def impatient(settings: Mapping[str, str], attempts: int) -> None:
    """A driver with these settings of its environment, which gives a sample up at which so many workers died."""
    from hooked_vlm.runs import cluster_team

    os.environ.update(settings)
    cluster_team.ATTEMPTS = attempts

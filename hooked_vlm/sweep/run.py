"""Run n edit sets, each as if alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.edits import Edit
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import Metric
from hooked_vlm.models import HookedVLM
from hooked_vlm.progress import track


@torch.no_grad()
def sweep(
    model: HookedVLM,
    inputs: VLMInputs | Mapping[str, Any],
    edit_sets: Sequence[Sequence[Edit]],
    metric: Metric,
    *,
    base: Sequence[Edit] = (),
    progress: bool = False,
) -> Float[Tensor, "n_sets b ..."]:
    """The metric of each edit set, as if each had been run alone by ``model.patch(inputs, base + set)``.

    Args:
        base: edits of every run, those that make it a corrupted one.
        progress: show a progress bar.

    Raises:
        ValueError: no edit sets.
    """
    if not edit_sets:
        raise ValueError("sweep needs at least one edit set")
    # Closed also by an error: the bar must not outlive it.
    with closing(track(edit_sets, "patching", shown=progress)) as runs:
        return torch.stack([metric(model.patch(inputs, [*base, *edits])) for edits in runs])

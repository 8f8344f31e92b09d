"""Direct ablations: parts of a model are put out of use, and what that does to the answer says what they did for it.

Zero, mean (Wang et al. 2023), resample (Chan et al. 2022) and noise ablation of any set of components, of every head
and MLP alone, and of random sets of equal size as controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import rearrange

from hooked_vlm.data.samples import Sample
from hooked_vlm.experiments.parts.cases import QUESTION, Scored, ready
from hooked_vlm.experiments.parts.components import (
    Component,
    Components,
    all_heads,
    all_mlps,
    check_spans,
    components_of,
    over_nodes,
)
from hooked_vlm.experiments.parts.controls import random_control
from hooked_vlm.experiments.parts.dataset_means import By, Means, dataset_means, samples_of
from hooked_vlm.experiments.parts.fillings import Donors, Filling, OfMeans, OfNoise, OfSamples, Zeros
from hooked_vlm.experiments.parts.loop import current_loop
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.roles import Roles
from hooked_vlm.experiments.parts.scores import DEFAULT_METRICS, metrics_of
from hooked_vlm.models import HookedVLM
from hooked_vlm.selection import Positions
from hooked_vlm.sweep import Effects, sweep

if TYPE_CHECKING:
    import xarray as xr

How = Literal["zero", "mean", "resample", "noise"]


@torch.no_grad()
def ablate(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    components: Components | Mapping[str, Components],
    how: How = "mean",
    *,
    positions: Positions = None,
    reference: Sample | Sequence[Sample] | Means | None = None,
    by: By = "position",
    donors: Donors = "any",
    std: float = 1.0,
    draws: int = 5,
    controls: int = 0,
    seed: int = 0,
    metrics: Sequence[str] = DEFAULT_METRICS,
    roles: Roles = "template",
    prompt: str = QUESTION,
    scored: Scored = "given",
    progress: bool = False,
) -> xr.Dataset:
    """Put sets of components out of use, each set in a run of its own, and score the answer.

    Args:
        components: one set, or several by name, of heads, MLPs, neurons, positions or whole hook points
            (:mod:`~hooked_vlm.experiments.parts.components`). Those of a set are ablated together; a head is its z.
        how: what takes their place. ``"zero"``: zeros. ``"mean"``: the mean over the reference. ``"resample"``: what
            another sample of the reference has there, for each of ``draws``. ``"noise"``: what is there, and Gaussian
            noise of ``std`` times the hook point's own standard deviation on the sample, for each of ``draws``.
        positions: where components are ablated that do not say so themselves; by default everywhere.
        reference: samples, by default those that are ablated; for means, also :func:`dataset_means` of them.
        by: means and donors by ``"position"``, of samples of one length, or by ``"role"``; means also ``"global"``,
            over all positions. By role, the i-th position of a role takes the donor's i-th, from the first again where
            the donor has fewer.
        donors: ``"any"`` sample but itself; or only of the ``"same_answer"``, so that what does not matter changes; or
            of an ``"other_answer"``.
        controls: for each set, so many random ones of equal size beside it (:func:`random_control`).
        seed: of controls, donors and noise.
        metrics: of :data:`~hooked_vlm.experiments.parts.scores.METRICS`.
        roles: how roles are named.
        prompt, scored: as of :func:`~hooked_vlm.experiments.parts.cases.ready`.

    Returns:
        Over ``(metric, sample, set)``: ``ablated``, the metric; ``effect``, that less the clean run's: negative where
        the set helped; ``sign`` of the effect, 0 where it is within ``noise_floor``. Of several draws their mean, and
        ``deviation``, their standard deviation; ``draws`` over ``sample`` counts them. ``clean`` over
        ``(metric, sample)``. ``control_of`` names the set that a random one stands beside.

    Raises:
        ValueError: a set without components; no sample that can be used; the mean over the one sample that is ablated.
        SampleError: a single sample that cannot be used; of several, such are dropped and counted.
    """
    sets = _sets(model, components, positions)
    control_of = dict.fromkeys(sets, "")
    for name in list(sets) if controls else ():
        for place, control in enumerate(random_control(model, sets[name], controls, seed)):
            sets[f"{name} (random {place})"], control_of[f"{name} (random {place})"] = control, name
    sites = list(dict.fromkeys(part.site for own in sets.values() for part in own))
    filling: Filling
    if how == "zero":
        filling = Zeros()
    elif how == "noise":
        filling = OfNoise(std, _checked(draws), seed)
    elif how == "mean":
        options: dict[str, Any] = {"by": by, "roles": roles, "prompt": prompt, "progress": progress}
        filling = _of_means(model, samples, reference, sites, options)
    elif how == "resample":
        filling = _donating(samples, reference, by, donors, _checked(draws), seed, roles, prompt)
    else:
        raise ValueError(f"how is 'zero', 'mean', 'resample' or 'noise', not {how!r}")

    def one(sample: Sample) -> xr.Dataset:
        case = ready(model, sample, prompt=prompt, scored=scored, keep=sites if filling.keeps else ())
        check_spans(sample, case.clean, [part.positions for own in sets.values() for part in own])
        fills = filling.fills(model, case, sites)
        runs = [[fill(part) for part in own] for own in sets.values() for fill in fills]
        metric = metrics_of(metrics, case.answer, case.foil, case.clean_logits[:, None])
        scores = sweep(model, case.clean, runs, metric, progress=False)
        found = _scored(scores, list(sets), list(metrics), len(fills))
        found["correct"] = ("sample", [case.is_correct])
        found["answer"], found["foil"] = (("sample", model.token_strings(token)) for token in (case.answer, case.foil))
        return found.assign_coords(control_of=("set", list(control_of.values())))

    parts = {name: [str(part) for part in own] for name, own in sets.items()}
    settings = {"how": how, **filling.facts, "controls": controls, "seed": seed, "sets": parts}
    asked = {"metrics": list(metrics), "prompt": prompt, "scored": scored}
    return over_samples(model, samples, "ablate", one, progress=progress, **settings, **asked)


def ablation_sweep(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    how: How = "mean",
    *,
    nodes: Sequence[str] = ("heads", "mlps"),
    towers: Sequence[str] | None = None,
    **options: Any,
) -> xr.Dataset:
    """:func:`ablate` of every head and every MLP, each alone.

    Args:
        nodes: ``"heads"``, of self-attention and of cross-attention; ``"mlps"``; or both.
        towers: by default all.
        options: as of :func:`ablate`.

    Returns:
        As :func:`ablate`, over ``(metric, sample, tower, kind, layer, head)``. ``kind`` is ``attn``, ``cross_attn`` or
        ``mlp``; the ``head`` of an MLP is -1. NaN where there is no such node.
    """
    every = {"heads": all_heads, "mlps": all_mlps}
    unknown = [name for name in nodes if name not in every]
    if unknown or not nodes or isinstance(nodes, str):
        raise ValueError(f"nodes are a list of {', '.join(every)}; not {unknown or nodes!r}")
    if options.get("controls"):
        raise ValueError("a sweep over single nodes has no random controls: every node is there; see ablate for sets")
    names = [name for kind in nodes for name in every[kind](model, towers)]
    found = ablate(model, samples, {name: [name] for name in names}, how, **options)
    found.attrs = {**found.attrs, "method": "ablation_sweep"}
    del found.attrs["sets"]  # each is one node, whose place says which
    return over_nodes(found, "set")


def _sets(
    model: HookedVLM, components: Components | Mapping[str, Components], positions: Positions
) -> dict[str, list[Component]]:
    named = components if isinstance(components, Mapping) else {"set": components}
    if not named:
        raise ValueError("no sets of components are given: choose at least one")
    return {
        name: [
            part if part.positions is not None else replace(part, positions=positions)
            for part in components_of(model, own, f"the set {name!r}")
        ]
        for name, own in named.items()
    }


def _of_means(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    reference: Sample | Sequence[Sample] | Means | None,
    sites: Sequence[str],
    options: Mapping[str, Any],
) -> OfMeans:
    if isinstance(reference, Means):
        return OfMeans(reference)
    means = current_loop().once(
        "means",
        lambda: dataset_means(model, samples if reference is None else reference, list(sites), **options),
        Means.save,
        lambda path: Means.load(path, model.device),
    )
    if reference is not None:
        return OfMeans(means)
    if means.attributes["samples_used"] == 1:
        raise ValueError("the mean over one sample is what it has: give other samples, as reference=")
    return OfMeans(means, at_least=2)


def _donating(
    samples: Sample | Sequence[Sample],
    reference: Sample | Sequence[Sample] | Means | None,
    by: By,
    donors: Donors,
    draws: int,
    seed: int,
    roles: Roles,
    prompt: str,
) -> OfSamples:
    if isinstance(reference, Means) or by not in ("position", "role"):
        raise ValueError("what is resampled are activations of samples, by='position' or by='role'; not means")
    if donors not in ("any", "same_answer", "other_answer"):
        raise ValueError(f"donors are 'any', 'same_answer' or 'other_answer', not {donors!r}")
    pool = samples_of(samples if reference is None else reference)
    return OfSamples(pool.samples, by, donors, draws, seed, roles, prompt)


def _checked(draws: int) -> int:
    if draws < 1:
        raise ValueError(f"there must be at least one draw, not {draws}")
    return draws


def _scored(scores: Effects, sets: Sequence[str], metrics: Sequence[str], draws: int) -> xr.Dataset:
    import xarray as xr

    dims = ("metric", "sample", "set")
    drawn = rearrange(scores.double().cpu(), "(set draw) b metric -> metric b set draw", draw=draws)
    floor = scores.noise_floor.double().cpu().numpy()
    ablated, base = drawn.mean(-1).numpy(), scores.base.double().cpu().numpy().T
    effect = ablated - base[..., None]
    found = {
        "ablated": (dims, ablated),
        "effect": (dims, effect),
        "sign": (dims, np.sign(effect) * (np.abs(effect) > floor[:, None, None])),
        "deviation": (dims, drawn.std(-1, correction=0).numpy()),
        "clean": (dims[:2], base),
        "noise_floor": ("metric", floor),
        "draws": ("sample", [draws]),
    }
    return xr.Dataset(found, coords={"metric": list(metrics), "set": list(sets)})

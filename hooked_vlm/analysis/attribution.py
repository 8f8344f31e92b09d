"""Attribution patching, AtP: what patching each node would do, to first order, for all nodes at once.

Nanda 2023; with the two fixes of AtP* (Kramár et al. 2024, section 3.1). Two forwards and one backward, however many
nodes there are; GradDrop takes one more backward a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.attention_fix import for_each_key_head, key_effect, query_effect, scores_of
from hooked_vlm.analysis.nodes import Site, as_dataset, find_sites
from hooked_vlm.analysis.runs import Direction, Runs, Tape, towers_of
from hooked_vlm.components import Attention
from hooked_vlm.corruptions import Corruption, describe
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import Metric
from hooked_vlm.models import HookedVLM
from hooked_vlm.results import provenance

if TYPE_CHECKING:
    import xarray as xr

Layer = tuple[str, int]
"""A tower and the number of a block."""

WRITES = ("hook_attn_out", "hook_cross_attn_out", "hook_mlp_out")


@torch.no_grad()
def atp(
    model: HookedVLM,
    clean: VLMInputs,
    corruption: Corruption,
    metric: Metric,
    *,
    nodes: Sequence[str] | str = ("resid", "sublayers", "heads"),
    towers: Sequence[str] | None = None,
    direction: Direction = "noising",
    qk_fix: bool = False,
    grad_drop: bool = False,
) -> xr.Dataset:
    """The effect on ``metric`` of patching each node alone, to first order in the node's change.

    ``(other run's activation - this run's) . d metric / d activation``, which approximates the metric of the patched
    run less that of the run that is patched: the clean one when ``"noising"``, the corrupted one when ``"denoising"``.

    Args:
        metric: one number a row. A corruption of several draws is measured a draw at a time, and averaged.
        nodes: kinds of nodes (:mod:`hooked_vlm.analysis.nodes`), or groups of them: ``resid``, ``sublayers`` (what
            attention, cross-attention and the MLP add), ``heads`` (z), ``qkv``, ``neurons``, ``patterns``, ``embeds``.
        towers: by default all, the vision encoder among them.
        qk_fix: queries and keys through the softmax itself (AtP*), which matters where attention is saturated.
        grad_drop: absolute effects, averaged over backwards each of which leaves out what one layer adds to the
            stream (AtP*), so that a direct and an indirect effect of opposite signs do not cancel. A node is not
            judged by the backward that leaves out its own layer.

    Returns:
        A variable for each kind, named as in :class:`ActivationCache`, over ``(sample, tower, layer, position)`` and
        ``head``, ``neuron``, or ``head, query, key``; NaN where there is no such node. ``clean`` and ``corrupted`` are
        the metric of the two runs.

    Raises:
        ValueError: unknown nodes, tower or direction; a metric that is not one number a row or not differentiable;
            a vision encoder whose rows are not the batch's.
    """
    sites = find_sites(model, nodes, towers_of(model, clean, towers))
    runs = Runs.of(model, clean, corruption, metric)
    start, source = runs.directed(direction)
    names = [name for site in sites for name in _needed(model, site, qk_fix)]
    other_measured, other = runs.activations(source, list(dict.fromkeys(names)))

    dropped: list[Layer] = []

    def drop(gradient: Tensor, hook: HookPoint) -> Tensor | None:
        return torch.zeros_like(gradient) if (hook.tower, hook.layer()) in dropped else None

    writes = [name for name in model.hook_names if name.endswith(WRITES)] if grad_drop else []
    patterns = [f"{site.attention}.hook_pattern" for site in sites if qk_fix and _is_fixed(site)]
    scores = [pattern.replace("hook_pattern", "hook_attn_scores") for pattern in patterns]
    recorded = dict.fromkeys([*names, *scores])
    differentiated = dict.fromkeys([*(site.name for site in sites), *patterns])
    with runs.tape(start, [*recorded], [*differentiated], bwd_hooks=[(writes, drop)] if writes else []) as tape:
        if grad_drop:
            effects = _over_dropped_layers(model, sites, tape, other, dropped, qk_fix)
        else:
            gradients = tape.backward()
            effects = {site: _effect(model, site, tape, other, gradients, qk_fix) for site in sites}
    result = as_dataset(model, clean, {site: runs.mean_of_draws(effect) for site, effect in effects.items()})
    measured = {"clean": tape.measured, "corrupted": other_measured}
    if direction == "denoising":
        measured = {"clean": other_measured, "corrupted": tape.measured}
    for name, values in measured.items():
        result[name] = ("sample", runs.mean_of_draws(values).float().cpu().numpy())
    return result.assign_attrs(
        provenance(
            model,
            "atp_star" if qk_fix or grad_drop else "atp",
            **describe(corruption),
            metric=type(metric).__name__,
            direction=direction,
            qk_fix=qk_fix,
            grad_drop=grad_drop,
            samples_used=len(clean),
        )
    )


def _over_dropped_layers(
    model: HookedVLM,
    sites: Sequence[Site],
    tape: Tape,
    other: Mapping[str, Tensor],
    dropped: list[Layer],
    qk_fix: bool,
) -> dict[Site, Tensor]:
    """GradDrop: the mean of absolute effects over all layers but the node's own."""
    layers = _read_layers(model)
    totals: dict[Site, Tensor] = {}
    for layer in layers:
        dropped[:] = [layer]
        gradients = tape.backward()
        for site in sites:
            if site.sublayer != layer:
                effect = _effect(model, site, tape, other, gradients, qk_fix).abs()
                totals[site] = totals[site] + effect if site in totals else effect
    return {site: total / (len(layers) - (site.sublayer in layers)) for site, total in totals.items()}


def _read_layers(model: HookedVLM) -> list[Layer]:
    """Every block that something reads."""
    unread = {point.name for tower in model.towers for point in getattr(model.get_submodule(tower), "unread", ())}
    names = [name for name in model.hook_names if name.endswith("hook_mlp_out") and name not in unread]
    return [(model.hook_dict[name].tower, model.hook_dict[name].layer()) for name in names]


def _is_fixed(site: Site) -> bool:
    return site.kind.removeprefix("cross_") in ("q", "k")


def _needed(model: HookedVLM, site: Site, qk_fix: bool) -> list[str]:
    """What must be known of both runs to tell a site's effects."""
    if not (qk_fix and _is_fixed(site)):
        return [site.name]
    return [site.name, *_read_by_scores(model, site.attention)]


def _read_by_scores(model: HookedVLM, attention: str) -> tuple[str, str]:
    """The queries and keys that scores are made of, rotated where the model rotates them."""
    kind = "rot_" if f"{attention}.hook_rot_q" in model.hook_dict else ""
    return f"{attention}.hook_{kind}q", f"{attention}.hook_{kind}k"


def _effect(
    model: HookedVLM,
    site: Site,
    tape: Tape,
    other: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    qk_fix: bool,
) -> Float[Tensor, "rows ..."]:
    here = tape.activations[site.name]
    change = other[site.name].float() - here.float()
    if qk_fix and _is_fixed(site):
        return _fixed_effect(model, site, tape, other, gradients)
    if site.name not in gradients:
        return torch.zeros_like(change.sum(-1) if site.sums else change)
    product = change * gradients[site.name].float()
    return product.sum(-1) if site.sums else product


def _fixed_effect(
    model: HookedVLM, site: Site, tape: Tape, other: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> Float[Tensor, "rows p heads"]:
    attention: Any = model.get_submodule(site.attention)
    assert isinstance(attention, Attention)
    query, key = _read_by_scores(model, site.attention)
    q, k = tape.activations[query].float(), tape.activations[key].float()
    scores = tape.activations[f"{site.attention}.hook_attn_scores"].float()
    gradient = gradients.get(f"{site.attention}.hook_pattern")
    gradient = torch.zeros_like(scores) if gradient is None else gradient.float()
    if site.kind.endswith("q"):
        return query_effect(gradient, scores, scores_of(attention, other[query].float() - q, k))
    effect = key_effect(gradient, scores, scores_of(attention, q, other[key].float() - k))
    return for_each_key_head(attention, effect)

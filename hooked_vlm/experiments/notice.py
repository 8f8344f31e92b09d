"""NOTICE (Golovanevsky, Rudman et al. 2025): modules and heads patched between runs that differ in one modality.

The other run has another picture, on which another answer is right (a semantic image pair, SIP), or other words, one
for one (symmetric token replacement, STR). Modules are what sub-layers add; heads are slices of what they add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.corruptions import Corrupted
from hooked_vlm.data.samples import Sample
from hooked_vlm.edits import Positions, Replace, edit_hooks
from hooked_vlm.experiments.causal_trace import Direction, causal_trace
from hooked_vlm.experiments.parts.cases import QUESTION, Case, CorruptionOf, Scored, described, ready
from hooked_vlm.experiments.parts.cells import Which, image_positions
from hooked_vlm.experiments.parts.heads import HEAD_DIMS, Head, attention_kinds, where_heads_read
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.roles import Roles, with_roles
from hooked_vlm.experiments.parts.scores import DEFAULT_METRICS, metrics_of, normalized_effect
from hooked_vlm.experiments.parts.sites import WindowConvention, site_kinds
from hooked_vlm.models import HookedVLM
from hooked_vlm.sweep import Effects, sweep

if TYPE_CHECKING:
    import xarray as xr

TOGETHER, APART = "all", "each"
"""Positions of heads that are no span: all of a tower's together, or each on its own."""


def notice(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    corruption: CorruptionOf = "sip",
    *,
    towers: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    width: int = 1,
    convention: WindowConvention = "centered",
    direction: Direction = "denoising",
    which: Which = "text",
    all_positions: bool = True,
    metrics: Sequence[str] = DEFAULT_METRICS,
    roles: Roles = "template",
    prompt: str = QUESTION,
    scored: Scored = "given",
    progress: bool = False,
) -> xr.Dataset:
    """Patch every module at every position of the words: a :func:`causal_trace` of what sub-layers add.

    Args:
        towers: by default the one that reads the words: BLIP's question encoder, LLaVA's language model.
        sites: by default ``mlp``, ``attn`` and, where there is one, ``cross_attn``. The paper's code for BLIP patches,
            under the name of MLP, the whole output of the layer: that is ``resid``.

    The others, what is returned, and what raises are :func:`causal_trace`'s. Rows of the paper's heatmaps are
    :func:`~hooked_vlm.experiments.parts.roles.by_role` of the result.
    """
    towers = model.text_towers[:1] if towers is None else towers
    if sites is None:
        kinds = [site_kinds(model, tower) for tower in towers]
        sites = [kind for kind in ("mlp", "attn", "cross_attn") if all(kind in own for own in kinds)]
    options: dict[str, Any] = {"towers": towers, "sites": sites, "width": width, "convention": convention}
    asked: dict[str, Any] = {"roles": roles, "prompt": prompt, "scored": scored, "progress": progress}
    options |= {"direction": direction, "which": which, "all_positions": all_positions, "metrics": metrics}
    return causal_trace(model, samples, corruption, **options, **asked).assign_attrs(method="notice")


@torch.no_grad()
def patch_heads(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    corruption: CorruptionOf = "sip",
    *,
    positions: str | None = None,
    towers: Sequence[str] | None = None,
    attention: Sequence[str] | None = None,
    direction: Direction = "denoising",
    which: Which = "text",
    metrics: Sequence[str] = DEFAULT_METRICS,
    roles: Roles = "template",
    prompt: str = QUESTION,
    scored: Scored = "given",
    progress: bool = False,
) -> xr.Dataset:
    """Patch one head's output (``hook_z``) at a time, before the layer mixes the heads.

    Args:
        corruption: ``"sip"``, ``"str"``, a :class:`~hooked_vlm.corruptions.Corruption`, or a function of a sample.
        positions: where. A span, or an expression of spans, whose positions are patched together; ``"all"`` of a
            tower's together; ``"each"`` on its own. By default the words of the correct answer (the span ``answer``),
            in LLaVA the last position: the paper's code and its slides differ, and there the answer's own words matter
            little.
        towers: by default the one that reads the words.
        attention: ``"attn"``, ``"cross_attn"``; by default all that a tower has.
        direction: ``"denoising"`` or ``"noising"``.
        which: with ``"each"``, of a tower that reads an image among its tokens: ``"all"`` positions, the ``"text"``'s
            or the ``"image"``'s.
        metrics, roles, prompt, scored: as of :func:`causal_trace`.

    Returns:
        ``patched``, ``effect`` and ``normalized`` over ``(metric, sample, tower, attention, layer, head)``, and
        ``position`` with ``"each"``; else ``token`` says what was patched. The rest is as of :func:`causal_trace`.
        Heads are query heads, also where several share keys and values.

    Raises:
        SampleError: a single sample that cannot be used; of several, such are dropped and counted.
        ValueError: an unknown tower, direction or kind of attention; a span of another tower; no positions that are
            wanted.
    """
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction must be 'denoising' or 'noising', not {direction!r}")
    if which not in ("all", "text", "image"):
        raise ValueError(f"which is 'all', 'text' or 'image', not {which!r}")
    heads = list_heads(model, model.text_towers[:1] if towers is None else towers, attention)
    kept = _sites(heads)

    def one(sample: Sample) -> xr.Dataset:
        case = ready(model, sample, corruption, prompt=prompt, scored=scored, keep=kept)
        places = {tower: _places(model, case, tower, positions, which) for tower in {head.tower for head in heads}}
        patches = [_Patch(head, place, at) for head in heads for place, at in places[head.tower]]
        if not patches:
            raise ValueError(f"there are no positions to patch (positions={positions!r}, which={which!r})")
        found = _patched(model, case, patches, metrics, direction)
        return with_roles(model, case.clean, found, roles) if positions == APART else found.isel(position=0, drop=True)

    settings = {"direction": direction, "positions": positions or "default", "metrics": list(metrics)}
    asked = {"which": which, "prompt": prompt, "scored": scored}
    found = over_samples(
        model, samples, "patch_heads", one, progress=progress, **described(corruption), **settings, **asked
    )
    undefined = found.normalized.isnull() & found.patched.notnull()
    return found.assign_attrs(n_undefined=int(undefined.sum()))


def list_heads(model: HookedVLM, towers: Sequence[str], attention: Sequence[str] | None = None) -> list[Head]:
    """Every head of some towers.

    Raises:
        ValueError: an unknown tower, or one without such attention.
    """
    heads = []
    for tower in towers:
        known = attention_kinds(model, tower) if tower in model.towers else ()
        if not known:
            able = [name for name in model.towers if attention_kinds(model, name)]
            raise ValueError(f"{tower!r} is no tower with attention; this model has {', '.join(able)}")
        for kind in known if attention is None else attention:
            if kind not in known:
                raise ValueError(f"{tower} has no {kind!r}; it has {', '.join(known)}")
            config: Any = model.get_submodule(tower).config
            heads += [
                Head(tower, kind, layer, number) for layer in range(config.n_layers) for number in range(config.n_heads)
            ]
    return heads


@dataclass(frozen=True)
class _Patch:
    """A head, patched at one place: the label of some positions, and the positions."""

    head: Head
    place: int
    positions: Any


def _places(
    model: HookedVLM, case: Case, tower: str, positions: str | None, which: Which
) -> list[tuple[int, Positions]]:
    labels = model.position_labels(case.clean, tower)[0]
    if positions == TOGETHER:
        return [(-1, None)]
    if positions == APART:
        holds_image = image_positions(case.clean, tower, len(labels))[0]
        wanted = {"all": holds_image | True, "text": ~holds_image, "image": holds_image}[which]
        return [(position, position) for position in np.flatnonzero(wanted).tolist()]
    span = where_heads_read(case.sample, case.clean, positions)
    if span.tower != tower:
        raise ValueError(
            f"{positions or 'the default'!r} is in {span.tower}, and heads of {tower} are patched: give positions in "
            f"{tower}, or 'all'"
        )
    return [(-1, list(span[0]))]


def _patched(
    model: HookedVLM, case: Case, patches: Sequence[_Patch], metrics: Sequence[str], direction: Direction
) -> xr.Dataset:
    assert case.corrupted is not None
    draws = case.corrupted.draws
    metric = metrics_of(metrics, case.answer, case.foil, case.clean_logits[:, None], draws)
    run, source = case.corrupted, case.clean_cache
    if direction == "noising":
        with model.hooks(edit_hooks(model, run.inputs, run.edits)):
            corrupted_logits, source = model.run_with_cache(
                run.inputs, names_filter=_sites([patch.head for patch in patches])
            )
        run = Corrupted(case.clean.repeat(draws), draws=draws)
    sets = [
        [Replace(f"{patch.head.site}.hook_z", source, positions=patch.positions, heads=patch.head.number)]
        for patch in patches
    ]
    scores = sweep(model, run.inputs, sets, metric, base=run.edits, progress=False)
    clean = metric(case.clean_logits[:, None].expand(draws, -1, -1))
    corrupted = scores.base if direction == "denoising" else metric(corrupted_logits)
    result = _grid(model, case, patches, scores, metrics)
    for name, own in (("clean", clean), ("corrupted", corrupted)):
        result[name] = (("metric", "sample"), _numbers(own[None]).T)
    result["effect"] = result.patched - result["corrupted" if direction == "denoising" else "clean"]
    result["normalized"] = normalized_effect(result)
    result["noise_floor"] = ("metric", scores.noise_floor.double().cpu().numpy())
    result["answer"] = ("sample", model.token_strings(case.answer))
    result["foil"] = ("sample", model.token_strings(case.foil))
    result["correct"] = ("sample", [case.is_correct])
    return result.transpose("metric", "sample", *HEAD_DIMS, ...)


def _sites(heads: Sequence[Head]) -> list[str]:
    return list(dict.fromkeys(f"{head.site}.hook_z" for head in heads))


def _grid(
    model: HookedVLM, case: Case, patches: Sequence[_Patch], scores: Effects, metrics: Sequence[str]
) -> xr.Dataset:
    """Scores by name; NaN where a tower has no such head or position."""
    import xarray as xr

    towers = list(dict.fromkeys(patch.head.tower for patch in patches))
    kinds = list(dict.fromkeys(patch.head.attention for patch in patches))
    places = sorted({patch.place for patch in patches})
    layers = 1 + max(patch.head.layer for patch in patches)
    heads = 1 + max(patch.head.number for patch in patches)
    grid = np.full((len(metrics), 1, len(towers), len(kinds), layers, heads, len(places)), np.nan)
    tokens = np.full((1, len(towers), len(places)), "", dtype="<U64")
    column_of = {place: column for column, place in enumerate(places)}
    labels = {tower: model.position_labels(case.clean, tower)[0] for tower in towers}
    for patch, values in zip(patches, _numbers(scores), strict=True):
        head, column = patch.head, column_of[patch.place]
        tower = towers.index(head.tower)
        grid[:, 0, tower, kinds.index(head.attention), head.layer, head.number, column] = values
        tokens[0, tower, column] = _words(labels[head.tower], patch.positions)
    coords = {
        "metric": list(metrics),
        "sample": [0],
        "tower": towers,
        "attention": kinds,
        "layer": np.arange(layers),
        "head": np.arange(heads),
        "position": places,
        "token": (("sample", "tower", "position"), tokens),
    }
    return xr.Dataset({"patched": (("metric", "sample", *HEAD_DIMS, "position"), grid)}, coords)


def _words(labels: Sequence[str], positions: Any) -> str:
    if positions is None:
        return "(all)"
    chosen = [positions] if isinstance(positions, int) else positions
    return " ".join(labels[position] for position in chosen)[:64]


def _numbers(scores: Float[Tensor, "sets rows metric"]) -> Float[np.ndarray, "sets metric"]:
    """The mean over a corruption's draws, which are all the rows of a sample."""
    return scores.mean(1).double().cpu().numpy()

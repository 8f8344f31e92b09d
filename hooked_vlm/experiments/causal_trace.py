"""Causal tracing (Meng et al. 2022, section 2; for BLIP, Palit et al. 2023, section 3).

One state at a time, at a layer and a token position, is put back to its clean value in a corrupted run (denoising), or
to its corrupted value in a clean run (noising). What that does to the answer says what the state carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.cache import ActivationCache
from hooked_vlm.corruptions import Corrupted, Corruption, describe
from hooked_vlm.edits import Replace, edit_hooks
from hooked_vlm.experiments.sites import WindowConvention, site_kinds, site_name, window
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import LogitDifference, Probability, Together, at, normalized
from hooked_vlm.models import HookedVLM
from hooked_vlm.results import provenance
from hooked_vlm.sweep import sweep

if TYPE_CHECKING:
    import xarray as xr

Direction = Literal["denoising", "noising"]
METRICS = ("probability", "logit_difference")
ALL = -1
"""The position of a cell that patches all positions of its tower together."""


@dataclass(frozen=True)
class Cell:
    """One patch: a kind of state of a tower, at a position, over a window of layers around one."""

    tower: str
    site: str
    layer: int
    position: int


@torch.no_grad()
def causal_trace(
    model: HookedVLM,
    clean: VLMInputs,
    corruption: Corruption,
    *,
    towers: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    width: int = 1,
    convention: WindowConvention = "centered",
    direction: Direction = "denoising",
    all_positions: bool = False,
    answer: Int[Tensor, " b"] | None = None,
    foil: Int[Tensor, " b"] | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Trace every state of the text towers, for each row of ``clean``.

    Args:
        towers: by default every tower but the vision encoder.
        sites: by default all that a tower has: ``resid``, ``attn``, ``cross_attn``, ``mlp``.
        width: how many layers are patched together around each; ``convention`` as in :func:`window`.
        direction: ``"denoising"`` or ``"noising"``.
        all_positions: patch all positions of a tower together, too: position -1, labelled ``(all)``.
        answer: the token scored; by default what the clean run finds likeliest.
        foil: the token it is held against; by default the likeliest other one in the corrupted run.

    Returns:
        Variables over ``(metric, sample, tower, site, layer, position)``, the metrics being ``probability`` and
        ``logit_difference``: ``patched``; ``effect``, patched less the run that was patched; ``normalized``, 0 as the
        corrupted run and 1 as the clean one (NaN where those two do not differ: counted in ``n_undefined``). Cells
        that a tower or a row does not have are NaN. ``clean`` and ``corrupted`` over ``(metric, sample)``. ``token``
        labels positions. ``identity`` marks cells that give the source run by construction.

    Raises:
        ValueError: a model that predicts no tokens; rows whose last positions differ; an unknown tower or site.
    """
    _check(model, clean)
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction must be 'denoising' or 'noising', not {direction!r}")
    clean = clean.to(model.device)
    corrupted = corruption(model, clean)
    cells = _cells(model, clean, towers or model.text_towers, sites, all_positions)

    clean_logits, clean_cache = _run(model, Corrupted(clean), cells)
    corrupted_logits, corrupted_cache = _run(model, corrupted, cells)
    answer = at(clean_logits, -1).argmax(-1) if answer is None else answer.to(model.device)
    foil = _likeliest_other(corrupted_logits, answer, corrupted.draws) if foil is None else foil.to(model.device)
    metric = Together(
        (
            Probability(_repeat(answer, corrupted.draws)),
            LogitDifference(_repeat(answer, corrupted.draws), _repeat(foil, corrupted.draws)),
        )
    )
    clean_repeated = Corrupted(clean.repeat(corrupted.draws), draws=corrupted.draws)
    if direction == "denoising":
        run, source = corrupted, _repeat_cache(clean_cache, corrupted.draws)
    else:
        run, source = clean_repeated, corrupted_cache
    patches = [
        [
            Replace(
                site_name(model, cell.tower, cell.site, layer),
                source,
                positions=None if cell.position == ALL else cell.position,
            )
            for layer in _layers(model, cell, width, convention)
        ]
        for cell in cells
    ]
    scores = _mean_draws(sweep(model, run.inputs, patches, metric, base=run.edits, progress=progress), run.draws)
    result = _dataset(
        model,
        clean,
        cells,
        scores,
        clean_scores=_mean_draws(metric(_repeat(clean_logits, corrupted.draws)), corrupted.draws),
        corrupted_scores=_mean_draws(metric(corrupted_logits), corrupted.draws),
        direction=direction,
    )
    result["identity"] = _identities(model, result, width, convention, image_is_clean=_same_image(clean, corrupted))
    result["answer"] = ("sample", model.token_strings(answer))
    result["foil"] = ("sample", model.token_strings(foil))
    return result.assign_attrs(
        provenance(
            model,
            "causal_trace",
            **describe(corruption),
            direction=direction,
            window=width,
            window_convention=convention,
            samples_used=len(clean),
            n_undefined=int((result.normalized.isnull() & result.patched.notnull()).sum()),
        )
    )


def _check(model: HookedVLM, clean: VLMInputs) -> None:
    tower = model.towers[-1]
    if f"{tower}.hook_logits" not in model.hook_dict:
        raise ValueError(f"a causal trace scores an answer token, and {type(model).__name__} predicts none")
    # Padding on the left is no matter: the last position is every row's last token then.
    if not all(labels[-1] for labels in model.position_labels(clean, tower)):
        raise ValueError(f"rows of {tower} differ in length, so their answers are not read at one position")


def _cells(
    model: HookedVLM,
    clean: VLMInputs,
    towers: Sequence[str],
    sites: Sequence[str] | None,
    all_positions: bool,
) -> list[Cell]:
    cells = []
    for tower in towers:
        for site in sites or site_kinds(model, tower):
            site_name(model, tower, site, 0)  # says what is wrong before anything runs
        n_positions = max(len(labels) for labels in model.position_labels(clean, tower))
        positions = [*range(n_positions), *([ALL] if all_positions and n_positions > 1 else [])]
        cells += [
            Cell(tower, site, layer, position)
            for site in sites or site_kinds(model, tower)
            for layer in range(_n_layers(model, tower))
            for position in positions
        ]
    return cells


def _run(model: HookedVLM, run: Corrupted, cells: Sequence[Cell]) -> tuple[Tensor, ActivationCache]:
    names = list(dict.fromkeys(site_name(model, cell.tower, cell.site, cell.layer) for cell in cells))
    with model.hooks(edit_hooks(model, run.inputs, run.edits)):
        return model.run_with_cache(run.inputs, names_filter=names)


def _layers(model: HookedVLM, cell: Cell, width: int, convention: WindowConvention) -> range:
    return window(cell.layer, width, _n_layers(model, cell.tower), convention)


def _n_layers(model: HookedVLM, tower: str) -> int:
    return model.get_submodule(tower).config.n_layers  # type: ignore[union-attr, return-value]


def _likeliest_other(
    logits: Float[Tensor, "rows p d_vocab"], answer: Int[Tensor, " b"], draws: int
) -> Int[Tensor, " b"]:
    probabilities = _mean_draws(at(logits, -1).softmax(-1), draws)
    return probabilities.scatter(1, answer[:, None], -1.0).argmax(-1)


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor.repeat_interleave(times, dim=0)


def _repeat_cache(cache: ActivationCache, times: int) -> ActivationCache:
    return ActivationCache({name: _repeat(tensor, times) for name, tensor in cache.items()}, cache.model)


def _mean_draws(scores: Float[Tensor, "*cells rows last"], draws: int) -> Float[Tensor, "*cells b last"]:
    return reduce(scores, "... (b draws) last -> ... b last", "mean", draws=draws)


def _dataset(
    model: HookedVLM,
    clean: VLMInputs,
    cells: Sequence[Cell],
    scores: Float[Tensor, "cells b metric"],
    *,
    clean_scores: Float[Tensor, "b metric"],
    corrupted_scores: Float[Tensor, "b metric"],
    direction: Direction,
) -> xr.Dataset:
    """Scores by name: cells in a grid, NaN where a row has no such position."""
    import xarray as xr

    towers, sites = (list(dict.fromkeys(getattr(cell, what) for cell in cells)) for what in ("tower", "site"))
    n_layers = 1 + max(cell.layer for cell in cells)
    # ALL, where it is, comes last.
    positions = sorted({cell.position for cell in cells}, key=lambda position: (position == ALL, position))
    tokens = np.full((len(clean), len(towers), len(positions)), "", dtype="<U64")
    for place, tower in enumerate(towers):
        for row, labels in enumerate(model.position_labels(clean, tower)):
            tokens[row, place, : len(labels)] = labels
            if ALL in positions and len(labels) > 1:
                tokens[row, place, ALL] = "(all)"
    grid = np.full((len(METRICS), len(clean), len(towers), len(sites), n_layers, len(positions)), np.nan)
    for cell, values in zip(cells, rearrange(scores, "cells b metric -> cells metric b").double().cpu(), strict=True):
        place = towers.index(cell.tower)
        has_position = tokens[:, place, cell.position] != ""
        grid[:, :, place, sites.index(cell.site), cell.layer, cell.position] = np.where(has_position, values, np.nan)

    dims = ("metric", "sample", "tower", "site", "layer", "position")
    ends = {
        name: (dims[:2], rearrange(ends, "b metric -> metric b").double().cpu().numpy())
        for name, ends in (("clean", clean_scores), ("corrupted", corrupted_scores))
    }
    result = xr.Dataset(
        {"patched": (dims, grid), **ends},
        coords={
            "metric": list(METRICS),
            "sample": np.arange(len(clean)),
            "tower": towers,
            "site": sites,
            "layer": np.arange(n_layers),
            "position": positions,
            "token": (("sample", "tower", "position"), tokens),
        },
    )
    start = result.corrupted if direction == "denoising" else result.clean
    result["effect"] = result.patched - start
    result["normalized"] = xr.apply_ufunc(_normalized, result.patched, result.clean, result.corrupted)
    return result.transpose(*dims)


def _normalized(patched: np.ndarray, clean: np.ndarray, corrupted: np.ndarray) -> np.ndarray:
    return normalized(*(torch.as_tensor(values) for values in (patched, clean, corrupted))).numpy()


def _same_image(clean: VLMInputs, corrupted: Corrupted) -> bool:
    """Whether the corruption lies in the text alone."""
    if corrupted.edits or clean.pixel_values is None or corrupted.inputs.pixel_values is None:
        return False
    return torch.equal(_repeat(clean.pixel_values, corrupted.draws), corrupted.inputs.pixel_values)


def _identities(
    model: HookedVLM, result: xr.Dataset, width: int, convention: WindowConvention, *, image_is_clean: bool
) -> xr.DataArray:
    """Cells that give the source run whatever the model.

    A tower's last stream is all that is read of it: whole, or where the answer is read. Under a clean image, so is
    any layer's whole stream in a tower that reads nothing but the image besides.
    """
    identity = result.patched.isel(metric=0, sample=0, drop=True).isnull() & False
    if "resid" not in result.site.values:
        return identity
    for tower in map(str, result.tower.values):
        n_layers = _n_layers(model, tower)
        last = [layer for layer in range(n_layers) if n_layers - 1 in window(layer, width, n_layers, convention)]
        tokens = result.token.sel(tower=tower).isel(sample=0).values
        if "(all)" in tokens:
            reads_image = model.towers[model.towers.index(tower) - 1] == "vision_encoder"
            whole = range(n_layers) if image_is_clean and reads_image else last
            identity.loc[{"tower": tower, "site": "resid", "layer": list(whole), "position": ALL}] = True
        if tower == model.towers[-1]:
            read = int((tokens != "").sum()) - 1 - ("(all)" in tokens)
            identity.loc[{"tower": tower, "site": "resid", "layer": last, "position": read}] = True
    return identity

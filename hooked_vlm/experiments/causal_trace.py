"""Causal tracing (Meng et al. 2022, section 2; for BLIP, Palit et al. 2023, section 3).

One state at a time, at a layer and a token position, is put back to its clean value in a corrupted run (denoising), or
to its corrupted value in a clean run (noising). What that does to the answer says what the state carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.cache import ActivationCache
from hooked_vlm.corruptions import Corrupted, Corruption
from hooked_vlm.data.samples import Sample
from hooked_vlm.edits import Edit, Replace, edit_hooks
from hooked_vlm.experiments.parts.cases import QUESTION, CorruptionOf, Scored, described, ready
from hooked_vlm.experiments.parts.cells import ALL, GROUPS, Cell, Which, as_grid, list_cells, n_layers
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.roles import Roles, with_roles
from hooked_vlm.experiments.parts.scores import DEFAULT_METRICS, metrics_of
from hooked_vlm.experiments.parts.sites import SiteKind, WindowConvention, site_kinds, site_name, window
from hooked_vlm.hooks import match_names
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import at
from hooked_vlm.models import HookedVLM
from hooked_vlm.results import provenance
from hooked_vlm.sweep import sweep

if TYPE_CHECKING:
    import xarray as xr

Direction = Literal["denoising", "noising"]


@torch.no_grad()
def causal_trace(
    model: HookedVLM,
    clean: VLMInputs | Sample | Sequence[Sample],
    corruption: CorruptionOf,
    *,
    towers: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    width: int = 1,
    convention: WindowConvention = "centered",
    direction: Direction = "denoising",
    which: Which = "all",
    all_positions: bool = False,
    severed: SiteKind | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    answer: Int[Tensor, " b"] | None = None,
    foil: Int[Tensor, " b"] | None = None,
    roles: Roles = "template",
    prompt: str = QUESTION,
    scored: Scored = "given",
    progress: bool = False,
) -> xr.Dataset:
    """Trace every state of the text towers, for each row of ``clean``, or for each of many samples.

    Args:
        corruption: of inputs, a :class:`~hooked_vlm.corruptions.Corruption`; of samples also ``"sip"``, ``"str"``, or a
            function that makes one of each.
        towers: by default every tower but the vision encoder.
        sites: by default all that a tower has: ``resid``, ``attn``, ``cross_attn``, ``mlp``.
        width: how many layers are patched together around each; ``convention`` as in :func:`window`.
        direction: ``"denoising"`` or ``"noising"``.
        which: of a tower that reads an image among its tokens (LLaVA), all positions, or only the ``"text"``'s or only
            the ``"image"``'s.
        all_positions: patch all positions of a tower together, too: position -1, labelled ``(all)``; and all of the
            image among them: position -2, ``(image)``.
        severed: ``"mlp"``, ``"attn"`` or ``"cross_attn"``: sub-layers of that kind, in the layers after the patch and
            at its positions, keep what they write in the run that is patched, and so cannot answer to it (Meng et al.
            2022, figure 3).
        metrics: of :data:`~hooked_vlm.experiments.parts.scores.METRICS`.
        answer: the token scored; by default what the clean run finds likeliest.
        foil: the token it is held against; by default the likeliest other one in the corrupted run.
        roles: of samples: how positions are named, for :func:`~hooked_vlm.experiments.parts.roles.by_role`.
        prompt: of samples: what is asked, around the question.
        scored: of samples, in place of ``answer`` and ``foil``: as of
            :func:`~hooked_vlm.experiments.parts.cases.ready`.

    Returns:
        Variables over ``(metric, sample, tower, site, layer, position)``: ``patched``; ``effect``, patched less the
        run that was patched; ``normalized``, 0 as the corrupted run and 1 as the clean one (NaN where those two do not
        differ: counted in ``n_undefined``). Cells that a tower or a row does not have are NaN. ``clean`` and
        ``corrupted`` over ``(metric, sample)``. ``token`` labels positions; in LLaVA ``box`` says which part of its
        ``picture`` a position sees. ``identity`` marks cells that give the source run by construction. ``noise_floor``
        over ``metric``: rounding, which no effect below says more than
        (:attr:`~hooked_vlm.sweep.Effects.noise_floor`). Of samples, ``correct`` says whether the clean run gives the
        scored answer, and ``role`` what a position is to the question.

    Raises:
        SampleError: a single sample that cannot be used; of several, such are dropped and counted.
        ValueError: a model that predicts no tokens; rows whose last positions differ; an unknown tower or site; no
            positions of the kind that ``which`` says; a vision encoder's rows that are not the batch's.
    """
    how = _How(
        tuple(towers or model.text_towers), sites, width, convention, direction, which, all_positions, severed, metrics
    )
    if isinstance(clean, VLMInputs):
        if not isinstance(corruption, Corruption):
            raise ValueError(f"inputs are corrupted by a Corruption, not by {corruption!r}: give samples")
        found = _trace_inputs(model, clean, corruption, how, answer, foil, progress)
        return _count_undefined(
            found.assign_attrs(
                provenance(model, "causal_trace", **described(corruption), **how.settings, samples_used=len(clean))
            )
        )
    if answer is not None or foil is not None:
        raise ValueError("samples bring their own answers and foils; or say scored='own'")

    def one(sample: Sample) -> xr.Dataset:
        case = ready(model, sample, corruption, prompt=prompt, scored=scored, keep=how.names(model))
        assert case.corrupted is not None
        ends = _Ends(case.clean, case.corrupted, case.clean_logits[:, None], case.clean_cache, case.answer, case.foil)
        found = _trace(model, ends, how)
        found = found.assign(identity=found.identity.expand_dims("sample"), correct=("sample", [case.is_correct]))
        return with_roles(model, case.clean, found, roles)

    asked = {"prompt": prompt, "scored": scored}
    return _count_undefined(
        over_samples(
            model, clean, "causal_trace", one, progress=progress, **described(corruption), **how.settings, **asked
        )
    )


@dataclass(frozen=True)
class _How:
    """What is patched, and what is measured."""

    towers: tuple[str, ...]
    sites: Sequence[str] | None
    width: int
    convention: WindowConvention
    direction: Direction
    which: Which
    all_positions: bool
    severed: SiteKind | None
    metrics: Sequence[str]

    def __post_init__(self) -> None:
        if self.direction not in ("denoising", "noising"):
            raise ValueError(f"direction must be 'denoising' or 'noising', not {self.direction!r}")
        if self.severed == "resid":
            raise ValueError("severed is a kind of sub-layer, 'attn', 'cross_attn' or 'mlp', not 'resid'")

    @property
    def settings(self) -> dict[str, Any]:
        """For a result's provenance."""
        return {
            "direction": self.direction,
            "window": self.width,
            "window_convention": self.convention,
            "severed": self.severed or "nothing",
            "metrics": list(self.metrics),
        }

    def names(self, model: HookedVLM) -> list[str]:
        """The hook points that are patched."""
        names = []
        for tower in self.towers:
            for site in self.sites or site_kinds(model, tower):
                first = site_name(model, tower, site, 0)  # says what is wrong before anything runs
                names += [first, *(site_name(model, tower, site, layer) for layer in range(1, n_layers(model, tower)))]
        return names

    def window(self, model: HookedVLM, cell: Cell) -> range:
        """The layers that are patched together."""
        return window(cell.layer, self.width, n_layers(model, cell.tower), self.convention)


@dataclass(frozen=True, eq=False)
class _Ends:
    """The clean and the corrupted run, and what is scored."""

    clean: VLMInputs
    corrupted: Corrupted
    clean_logits: Float[Tensor, "b p d_vocab"]
    clean_cache: ActivationCache
    answer: Int[Tensor, " b"]
    foil: Int[Tensor, " b"]


def _trace_inputs(
    model: HookedVLM,
    clean: VLMInputs,
    corruption: Corruption,
    how: _How,
    answer: Int[Tensor, " b"] | None,
    foil: Int[Tensor, " b"] | None,
    progress: bool,
) -> xr.Dataset:
    _check(model, clean)
    clean = clean.to(model.device)
    corrupted = corruption(model, clean)
    logits, cache = _run(model, Corrupted(clean), how.names(model))
    answer = at(logits, -1).argmax(-1) if answer is None else answer.to(model.device)
    if foil is None:
        corrupted_logits, _ = _run(model, corrupted, [])
        foil = _likeliest_other(corrupted_logits, answer, corrupted.draws)
    return _trace(model, _Ends(clean, corrupted, logits, cache, answer, foil.to(model.device)), how, progress)


def _trace(model: HookedVLM, ends: _Ends, how: _How, progress: bool = False) -> xr.Dataset:
    clean, corrupted, draws = ends.clean, ends.corrupted, ends.corrupted.draws
    _check(model, clean)
    _check_pictures(clean, how.towers)
    cells = list_cells(model, clean, how.towers, how.sites, which=how.which, grouped=how.all_positions)
    metric = metrics_of(how.metrics, ends.answer, ends.foil, ends.clean_logits, draws)
    if how.direction == "denoising":
        run, source = corrupted, _repeat_cache(ends.clean_cache, draws)
    else:
        run, source = Corrupted(clean.repeat(draws), draws=draws), _run(model, corrupted, how.names(model))[1]
    patches = _patches(model, cells, how, source, _severed(model, run, how))
    patched = sweep(model, run.inputs, patches, metric, base=run.edits, progress=progress)
    clean_scores = metric(_repeat(ends.clean_logits, draws))
    # Of the corrupted run, the sweep has measured it where that is what it changes.
    corrupted_scores = patched.base if run is corrupted else metric(_run(model, corrupted, [])[0])
    result = as_grid(
        model,
        clean,
        cells,
        _mean_draws(patched, draws),
        metrics=how.metrics,
        clean_scores=_mean_draws(clean_scores, draws),
        corrupted_scores=_mean_draws(corrupted_scores, draws),
        start="corrupted" if run is corrupted else "clean",
        which=how.which,
    )
    result["identity"] = _identities(model, result, how, clean, corrupted)
    result["noise_floor"] = ("metric", patched.noise_floor.double().cpu().numpy())
    result["answer"] = ("sample", model.token_strings(ends.answer))
    result["foil"] = ("sample", model.token_strings(ends.foil))
    return result


def _patches(
    model: HookedVLM, cells: Sequence[Cell], how: _How, source: ActivationCache, held: ActivationCache
) -> list[list[Edit]]:
    """Each cell's: what is put in, and what is held behind it."""
    sets: list[list[Edit]] = []
    for cell in cells:
        layers = how.window(model, cell)
        put_in = [site_name(model, cell.tower, cell.site, layer) for layer in layers]
        behind = range(layers[-1] + 1, n_layers(model, cell.tower)) if how.severed else []
        severed = [site_name(model, cell.tower, str(how.severed), layer) for layer in behind]
        sets.append(
            [
                *(Replace(name, source, positions=cell.positions) for name in put_in),
                *(Replace(name, held, positions=cell.positions) for name in severed),
            ]
        )
    return sets


def _severed(model: HookedVLM, run: Corrupted, how: _How) -> ActivationCache:
    """What the sub-layers that are held write in a run."""
    if how.severed is None:
        return ActivationCache({}, model)
    return _run(model, run, replace(how, sites=[how.severed]).names(model))[1]


def _count_undefined(result: xr.Dataset) -> xr.Dataset:
    undefined = result.normalized.isnull() & result.patched.notnull()
    return result.assign_attrs(n_undefined=int(undefined.sum()))


def _check(model: HookedVLM, clean: VLMInputs) -> None:
    tower = model.towers[-1]
    if f"{tower}.hook_logits" not in model.hook_dict:
        raise ValueError(f"a causal trace scores an answer token, and {type(model).__name__} predicts none")
    # Padding on the left is no matter: the last position is every row's last token then.
    if not all(labels[-1] for labels in model.position_labels(clean, tower)):
        raise ValueError(f"rows of {tower} differ in length, so their answers are not read at one position")


def _check_pictures(clean: VLMInputs, towers: Sequence[str]) -> None:
    pixels, one_each = clean.pixel_values, (None, tuple(range(len(clean))))
    if "vision_encoder" in towers and pixels is not None and (pixels.ndim > 4 or clean.image_rows not in one_each):
        raise ValueError("the vision encoder's rows are pictures, or tiles: to trace it, give one picture a row")


def _run(model: HookedVLM, run: Corrupted, names: Sequence[str]) -> tuple[Tensor, ActivationCache]:
    with model.hooks(edit_hooks(model, run.inputs, run.edits)):
        return model.run_with_cache(run.inputs, names_filter=list(names))


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


def _same_image(clean: VLMInputs, corrupted: Corrupted) -> bool:
    """Whether the corruption lies in the text alone."""
    if corrupted.edits or clean.pixel_values is None or corrupted.inputs.pixel_values is None:
        return False
    repeated = clean.repeat(corrupted.draws).pixel_values
    assert repeated is not None
    return torch.equal(repeated, corrupted.inputs.pixel_values)


def _same_text(clean: VLMInputs, corrupted: Corrupted) -> bool:
    repeated, other = clean.repeat(corrupted.draws).input_ids, corrupted.inputs.input_ids
    return repeated is not None and other is not None and torch.equal(repeated, other)


def _identities(
    model: HookedVLM, result: xr.Dataset, how: _How, clean: VLMInputs, corrupted: Corrupted
) -> xr.DataArray:
    """Cells that give the source run whatever the model.

    A tower's last stream is all that is read of it: whole, or where the answer is read. Any layer's whole stream is all
    that later layers read, in a tower that reads no other; and in one that reads only a clean image besides. The vision
    encoder's is all that differs where the text does not, up to the layer that is read. What a corruption edits later
    than the patch is not brought back.
    """
    identity = result.patched.isel(metric=0, sample=0, drop=True).isnull() & False
    if "resid" not in result.site.values:
        return identity
    read_at = len(model.position_labels(clean, model.towers[-1])[0]) - 1
    edited = [name for edit in corrupted.edits for name in match_names(edit.site, model.hook_names)]
    last_edited = max(map(model.hook_names.index, edited), default=-1)
    same_image, same_text = _same_image(clean, corrupted), _same_text(clean, corrupted)

    def reads_image(tower: str) -> bool:
        return model.towers[model.towers.index(tower) - 1] == "vision_encoder"

    for tower in map(str, result.tower.values):
        config: Any = model.get_submodule(tower).config
        end = config.n_layers - 1
        windows = {layer: window(layer, how.width, config.n_layers, how.convention) for layer in range(config.n_layers)}
        sites = {layer: site_name(model, tower, "resid", own[-1]) for layer, own in windows.items()}
        late = [layer for layer in windows if model.hook_names.index(sites[layer]) >= last_edited]
        # Sub-layers that are held behind the patch do not read it.
        late = [layer for layer in late if how.severed is None or end in windows[layer]]
        last = [layer for layer in late if end in windows[layer]]
        tokens = result.token.sel(tower=tower).isel(sample=0)
        if GROUPS[ALL] in tokens.values:
            whole = last
            if tower == "vision_encoder":
                first_read = min(config.feature_layers or [config.n_layers])
                whole = [layer for layer in late if windows[layer][0] < first_read and same_text]
            elif config.d_cross is None or (reads_image(tower) and same_image):
                whole = late
            identity.loc[{"tower": tower, "site": "resid", "layer": whole, "position": ALL}] = True
        if tower == model.towers[-1] and read_at in tokens.position:
            identity.loc[{"tower": tower, "site": "resid", "layer": last, "position": read_at}] = True
    return identity

"""Causal tracing of a text's constraint (Basu et al. 2024, sections 3 and 4: MultiModalCausalTrace).

The words that say what is asked about ("this place") are replaced, the picture is kept, and what attention or the MLP
writes at a position, over a window of layers, is put back to its clean value. How wide the window must be, and where it
must lie, says how a fact is brought to the answer; questions with one constraint and with several are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hooked_vlm.corruptions import ReplaceTokens, describe
from hooked_vlm.data.samples import Sample
from hooked_vlm.experiments.causal_trace import Direction, causal_trace
from hooked_vlm.experiments.parts.cases import Case, Scored, ready
from hooked_vlm.experiments.parts.cells import Which, n_layers
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.roles import Roles, with_roles
from hooked_vlm.experiments.parts.scores import DEFAULT_METRICS
from hooked_vlm.experiments.parts.sites import WindowConvention, site_name, window
from hooked_vlm.inputs import Span, VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.statistics import bootstrap

if TYPE_CHECKING:
    import xarray as xr

PROMPT = "{question} Answer in a few words."
"""What the paper asks."""

Traced = Literal["text+last image", "text", "all"]
"""Of a tower that reads an image among its tokens: the text's positions and the image's last, the text's, or all."""

_OF_WINDOW = ("patched", "effect", "normalized", "identity", "no_op", "noise_floor")


def constraint_trace(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    *,
    span: str = "constraint",
    by: str = "Paris",
    towers: Sequence[str] | None = None,
    sites: Sequence[str] = ("attn", "mlp"),
    width: int = 1,
    convention: WindowConvention = "radius",
    positions: Traced = "text+last image",
    direction: Direction = "denoising",
    metrics: Sequence[str] = DEFAULT_METRICS,
    roles: Roles = "template",
    prompt: str = PROMPT,
    scored: Scored = "own",
    progress: bool = False,
) -> xr.Dataset:
    """Replace the constraint, and restore what attention or the MLP writes, at each position and layer.

    Args:
        span: the samples' span that is replaced: each of its tokens becomes the first piece of ``by``
            (:class:`~hooked_vlm.corruptions.ReplaceTokens`), so that the text keeps its length.
        width: of the window of layers that are restored together; ``convention`` as in
            :func:`~hooked_vlm.experiments.parts.sites.window`. The paper's width is a radius.
        positions: of a tower that reads an image among its tokens (LLaVA), which are traced.
        scored: ``"own"``: the answer that the clean run finds likeliest, as in the paper; ``"given"``: the sample's.
        towers, sites, direction, metrics, roles, prompt: as of :func:`~hooked_vlm.experiments.causal_trace`.

    Returns:
        What :func:`~hooked_vlm.experiments.causal_trace` returns over samples; ``effect`` is the paper's indirect
        effect. Besides, ``drop_fraction`` over ``sample``: which share of the clean probability is lost, (clean -
        corrupted) / clean; ``no_op`` over ``(sample, tower, site, layer, position)``: cells that change nothing
        whatever the model. In a causal tower those are the positions before the constraint, an image's that stands
        before the question among them, and in its last layer all that the answer is not read at. The coordinate
        ``constraint`` holds the words that were replaced.

    Raises:
        SampleError: a single sample that cannot be used, as one without the span; of several, such are dropped.
        ValueError: a window wider than a tower; and as for :func:`~hooked_vlm.experiments.causal_trace`.
    """
    how = _How(span, by, towers, sites, convention, positions, direction, metrics, roles, prompt, scored)
    result = how.over_samples(model, samples, "constraint_trace", [width], progress)
    return result.isel(window=0, drop=True).assign_attrs(window=width)


def window_study(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    widths: Sequence[int] = (1, 3, 6),
    convention: WindowConvention = "radius",
    *,
    span: str = "constraint",
    by: str = "Paris",
    towers: Sequence[str] | None = None,
    sites: Sequence[str] = ("attn", "mlp"),
    positions: Traced = "text+last image",
    direction: Direction = "denoising",
    metrics: Sequence[str] = DEFAULT_METRICS,
    roles: Roles = "template",
    prompt: str = PROMPT,
    scored: Scored = "own",
    progress: bool = False,
) -> xr.Dataset:
    """A constraint trace with windows of several widths (Basu et al. 2024, section 4).

    Wide windows restore several layers at once, and so more than any of them. Single layers are always among the
    results, first, to hold the others against. :func:`peak_by_layer` compares groups of questions.

    Args:
        widths: of the windows; the others as of :func:`constraint_trace`.

    Returns:
        What :func:`constraint_trace` returns, with the dim ``window`` where the width matters.

    Raises:
        ValueError: no widths; a width that does not fit a tower; and as for :func:`constraint_trace`.
    """
    if not len(widths):
        raise ValueError("a study of windows needs at least one width")
    how = _How(span, by, towers, sites, convention, positions, direction, metrics, roles, prompt, scored)
    return how.over_samples(model, samples, "window_study", sorted({1, *widths}), progress)


def peak_by_layer(
    result: xr.Dataset,
    *,
    metric: str = "probability",
    quantity: Literal["patched", "effect", "normalized"] = "effect",
    roles: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """The largest effect in each layer, over positions: means of groups of samples, with bootstrap intervals.

    Cells that change nothing by construction (``no_op``) are left out.

    Args:
        result: of :func:`window_study` or :func:`constraint_trace`.
        roles: positions of these roles alone, as ``("constraint",)``; by default all.
        level, resamples, seed: of the intervals, as of :func:`~hooked_vlm.statistics.bootstrap`.

    Returns:
        ``mean``, ``low`` and ``high`` over ``(window, group, tower, site, layer)``, and ``n``, the samples of a group.
        Samples without a group are the group ``""``.

    Raises:
        ValueError: roles, a metric or a quantity that the result does not have.
    """
    import xarray as xr

    if metric not in result.metric.values:
        raise ValueError(f"the result's metrics are {', '.join(result.metric.values)}, not {metric!r}")
    if "window" not in result.dims:
        result = result.expand_dims(window=[int(result.attrs["window"])])
    values = result[quantity].sel(metric=metric).where(~result.no_op)
    if roles is not None:
        unknown = sorted(set(roles) - set(np.unique(result.role)))
        if unknown:
            raise ValueError(f"no position has the role {', '.join(unknown)}; there are {', '.join(_names(result))}")
        values = values.where(result.role.isin(list(roles)))
    peaks = values.max("position").transpose("sample", "window", "tower", "site", "layer")
    groups = list(dict.fromkeys(result.group.values.tolist()))
    members = [result.group.values == group for group in groups]
    means = np.stack([bootstrap(peaks.values[own], level=level, resamples=resamples, seed=seed) for own in members], 1)
    dims = ("group", *peaks.dims[1:])
    return xr.Dataset(
        {
            **{name: (dims, found) for name, found in zip(("mean", "low", "high"), means, strict=True)},
            "n": ("group", [int(own.sum()) for own in members]),
        },
        {"group": groups, **{name: peaks[name] for name in peaks.dims[1:]}},
        {**result.attrs, "metric": metric, "quantity": quantity, "level": level, "roles": ", ".join(roles or ["all"])},
    ).transpose("window", "group", ...)


@dataclass(frozen=True)
class _How:
    """How samples are traced, at whatever widths."""

    span: str
    by: str
    towers: Sequence[str] | None
    sites: Sequence[str]
    convention: WindowConvention
    positions: Traced
    direction: Direction
    metrics: Sequence[str]
    roles: Roles
    prompt: str
    scored: Scored

    def over_samples(
        self,
        model: HookedVLM,
        samples: Sample | Sequence[Sample],
        method: str,
        widths: Sequence[int],
        progress: bool,
    ) -> xr.Dataset:
        if self.positions not in ("text+last image", "text", "all"):
            raise ValueError(f"positions are 'text+last image', 'text' or 'all', not {self.positions!r}")
        for tower in self.towers or model.text_towers:
            for site in self.sites:
                site_name(model, tower, site, 0)
            for width in widths:
                window(0, width, n_layers(model, tower), self.convention)

        def one(sample: Sample) -> xr.Dataset:
            # A name that the sample lacks must not be looked for among the question's words.
            words = sample.text_of(self.span)
            case = ready(model, sample, ReplaceTokens(self.span, self.by), prompt=self.prompt, scored=self.scored)
            found = _joined([self._trace(model, case, width) for width in widths], widths)
            found["correct"] = ("sample", [case.is_correct])
            found = found.assign_coords(constraint=("sample", np.array([words], dtype=str)))
            return with_roles(model, case.clean, found, self.roles)

        result = over_samples(
            model, samples, method, one, progress=progress, **self._settings(), window=[int(width) for width in widths]
        )
        undefined = result.normalized.isnull() & result.patched.notnull()
        return result.assign_attrs(n_undefined=int(undefined.sum()))

    def _trace(self, model: HookedVLM, case: Case, width: int) -> xr.Dataset:
        assert case.corruption is not None
        clean, which = _traced_inputs(case.clean, self.positions)
        found = causal_trace(
            model,
            clean,
            case.corruption,
            towers=self.towers,
            sites=self.sites,
            width=width,
            convention=self.convention,
            direction=self.direction,
            which=which,
            metrics=self.metrics,
            answer=case.answer,
            foil=case.foil,
        )
        no_op = _no_ops(model, case, found, width, self.convention)
        found = found.assign(
            {name: flags.expand_dims("sample") for name, flags in (("no_op", no_op), ("identity", found.identity))}
        )
        if "probability" in found.metric.values:
            before, after = (found[name].sel(metric="probability", drop=True) for name in ("clean", "corrupted"))
            found["drop_fraction"] = (before - after) / before
        return found

    def _settings(self) -> dict[str, Any]:
        return {
            **describe(ReplaceTokens(self.span, self.by)),
            "window_convention": self.convention,
            "positions": self.positions,
            "direction": self.direction,
            "metrics": list(self.metrics),
            "prompt": self.prompt,
            "scored": self.scored,
        }


def _traced_inputs(clean: VLMInputs, positions: Traced) -> tuple[VLMInputs, Which]:
    """Inputs in which what is to be traced counts as text."""
    if positions == "all" or "image" not in clean.spans:
        return clean, "all"
    image = clean.spans["image"]
    if positions == "text+last image":
        image = Span(image.tower, tuple(row[:-1] for row in image.rows))
    return replace(clean, spans={**clean.spans, "image": image}), "text"


def _no_ops(model: HookedVLM, case: Case, found: xr.Dataset, width: int, convention: WindowConvention) -> xr.DataArray:
    """Cells that hold what both runs share, or that nothing reads."""
    there = found.patched.isel(metric=0, sample=0, drop=True).notnull()
    no_op = there & False
    positions = found.position.where(found.position >= 0, drop=True).astype(int)
    for tower in map(str, found.tower.values):
        config: Any = model.get_submodule(tower).config
        if tower == case.clean.text_tower and config.is_causal:
            no_op.loc[{"tower": tower, "position": positions[positions < _first_changed(case)]}] = True
        if tower == model.towers[-1]:
            read_at = len(model.position_labels(case.clean, tower)[0]) - 1
            firsts = {layer: window(layer, width, config.n_layers, convention)[0] for layer in range(config.n_layers)}
            last = [layer for layer, first in firsts.items() if first == config.n_layers - 1]
            no_op.loc[{"tower": tower, "layer": last, "position": positions[positions != read_at]}] = True
    return no_op & there


def _first_changed(case: Case) -> int:
    """The first position at which the two runs read different tokens; one past the last where none does."""
    assert case.corrupted is not None
    clean, corrupted = case.clean.input_ids, case.corrupted.inputs.input_ids
    assert clean is not None
    assert corrupted is not None
    changed = (clean != corrupted)[0].nonzero()[:, 0].tolist()
    return changed[0] if changed else clean.shape[1]


def _joined(found: Sequence[xr.Dataset], widths: Sequence[int]) -> xr.Dataset:
    """Traces of one sample along ``window``."""
    import xarray as xr

    index = xr.DataArray(list(widths), dims="window", name="window")
    parts = {name: xr.concat([one[name] for one in found], index) for name in _OF_WINDOW}
    return found[0].drop_vars(_OF_WINDOW).assign(parts).transpose("metric", "sample", "window", ...)


def _names(result: xr.Dataset) -> list[str]:
    return [str(name) for name in np.unique(result.role) if name]

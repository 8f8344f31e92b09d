"""What hook points hold in the mean over samples: what a mean ablation puts in.

Axes: b rows, p positions, r roles.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.data.samples import Dropped, Sample, SampleError, Samples
from hooked_vlm.experiments.parts.cases import QUESTION, prepared
from hooked_vlm.experiments.parts.roles import Roles, token_roles
from hooked_vlm.files import whole_file
from hooked_vlm.hooks import Names, match_names
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.progress import track
from hooked_vlm.results import provenance
from hooked_vlm.selection import position_axis, positions_of

By = Literal["position", "role", "global"]
"""What a mean keeps apart: positions, what they are to the question, or nothing."""


@dataclass(frozen=True, eq=False)
class Means:
    """Means of activations over samples."""

    by: By
    values: Mapping[str, Float[Tensor, "1 ..."]]
    """By hook point, with the activation's own axes: along positions ``p``, one for each of ``roles``, or 1."""
    roles: Mapping[str, Mapping[str, int]]
    """Of means by role, by hook point: the roles along the position axis, and how many samples have each."""
    attributes: Mapping[str, Any]
    """How they were made."""
    how_roles: Roles = "template"

    def __repr__(self) -> str:
        return f"Means({len(self.values)} hook points, by {self.by}, of {self.attributes.get('samples_used')} samples)"

    def of(self, model: HookedVLM, inputs: VLMInputs, site: str, at_least: int = 1) -> Float[Tensor, "1 ..."]:
        """The mean to put in at a hook point, for inputs of one row: broadcasts against the activation.

        Args:
            at_least: in so many samples a role must be. The mean over one sample is what that sample has.

        Raises:
            ValueError: a hook point without a mean.
            SampleError: inputs of another length than the means by position; a role that too few samples had.
        """
        if site not in self.values:
            raise ValueError(f"there is no mean of {site}; there are means of {', '.join(self.values)}")
        mean, axis = self.values[site], position_axis(model.hook_dict[site])
        if self.by == "global" or axis is None:
            return mean
        tower = position_tower(model, site)
        if self.by == "position":
            n_positions = len(model.position_labels(inputs, tower)[0])
            if n_positions != mean.shape[axis]:
                raise SampleError(
                    f"{tower} has {n_positions} positions, and the samples of the mean have {mean.shape[axis]}: take "
                    "samples of one length, or by='role' or 'global'",
                    "as many positions as no sample of the mean",
                )
            return mean
        counts = self.roles[site]
        roles = token_roles(model, inputs, tower, self.how_roles)
        rare = [role for role in roles if counts.get(role, 0) < at_least]
        if rare:
            n = counts.get(rare[0], 0)
            raise SampleError(
                f"{n or 'no'} sample of the mean has {rare[0]!r} in {tower}, and it takes {at_least} or more: take "
                "other samples, or by='global'",
                "a role that too few samples of the mean have",
            )
        known = list(counts)
        return mean.index_select(axis, torch.tensor([known.index(role) for role in roles], device=mean.device))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        if callable(self.how_roles):
            raise ValueError("means by roles of your own cannot be saved: the function would be lost")
        facts = {"by": self.by, "roles": dict(self.roles), "how_roles": self.how_roles, **dict(self.attributes)}
        metadata = {name: json.dumps(value) for name, value in facts.items()}
        with whole_file(path) as temporary:
            save_file({name: mean.contiguous() for name, mean in self.values.items()}, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Means:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: a file of another kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(facts.pop("by"), values, facts.pop("roles"), how_roles=facts.pop("how_roles"), attributes=facts)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no means: {error}") from error


@torch.no_grad()
def dataset_means(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    sites: Names,
    *,
    by: By = "position",
    roles: Roles = "template",
    prompt: str = QUESTION,
    progress: bool = False,
) -> Means:
    """The mean over samples of some activations. One sample's are held at a time, and the sums.

    Args:
        sites: hook points, or patterns of them.
        by: ``"position"``: of each position, over samples of one length; ``"role"``: over all positions of a role
            (:func:`~hooked_vlm.experiments.parts.roles.token_roles`); ``"global"``: over all positions. A mean over
            positions counts positions, not samples: longer samples weigh more.
        roles: how roles are named.
        prompt: what is asked, around the question.

    Raises:
        HookError: no such hook point.
        ValueError: no samples, or none that can be used; by position, samples of several lengths; positions that
            belong to no tower.
    """
    if by not in ("position", "role", "global"):
        raise ValueError(f"a mean is by 'position', 'role' or 'global', not {by!r}")
    names = match_names(sites, model.hook_names)
    patterns = [name for name in names if "k" in model.hook_dict[name].axes]
    if patterns and by != "position":
        raise ValueError(f"the keys of {patterns[0]} are positions, too: take its mean by='position'")
    listed = samples_of(samples)
    sums: dict[str, dict[Hashable, Tensor]] = {name: {} for name in names}
    counts: dict[str, Counter[Hashable]] = defaultdict(Counter)
    seen: dict[str, Counter[str]] = {name: Counter() for name in names}
    dropped = list(listed.dropped)
    n_used = 0
    for sample in track(listed.samples, "means", shown=progress):
        try:
            inputs = prepared(model, sample, prompt=prompt)
        except SampleError as error:
            dropped.append(Dropped.of(sample.id, error))
            continue
        n_used += 1
        _, cache = model.run_with_cache(inputs, names_filter=names)
        for name, activation in cache.items():
            for key, total, count in _summed(model, inputs, name, activation, by, roles):
                sums[name][key] = sums[name][key] + total if key in sums[name] else total
                counts[name][key] += count
                seen[name][str(key)] += 1
    if not n_used:
        raise ValueError(f"there is no sample to take a mean of: {dropped[-1].reason if dropped else 'none is given'}")
    values = {}
    for name, own in sums.items():
        axis = position_axis(model.hook_dict[name])
        if by == "position":
            _check_one_length(name, counts[name])
        means = [total / counts[name][key] for key, total in own.items()]
        whole = torch.cat(means, dim=axis) if by == "role" and axis is not None else means[0]
        values[name] = whole.to(model.device, model.dtype)
    attributes = provenance(
        model,
        "dataset_means",
        by=by,
        prompt=prompt,
        samples=[sample.id for sample in listed],
        samples_used=n_used,
        samples_dropped=len(dropped),
        dropped=[[one.id, one.kind, one.reason] for one in dropped],
    )
    return Means(by, values, {name: dict(own) if by == "role" else {} for name, own in seen.items()}, attributes, roles)


def samples_of(samples: Sample | Sequence[Sample]) -> Samples:
    """One sample, or several, as a list that remembers what was left out."""
    return samples if isinstance(samples, Samples) else Samples([samples] if isinstance(samples, Sample) else samples)


def _summed(
    model: HookedVLM, inputs: VLMInputs, name: str, activation: Tensor, by: By, how: Roles
) -> Iterator[tuple[Hashable, Tensor, int]]:
    """Sums over a sample's rows, and over positions where ``by`` does not tell them apart: (key, sum, how many)."""
    axis = position_axis(model.hook_dict[name])
    # Of float32 numbers, sums in float64 are exact: the mean of what never changes is what it is.
    summed = activation.cpu().double().sum(0, keepdim=True)
    rows = len(activation)
    if axis is None:
        yield None, summed, rows
    elif by == "position":
        yield tuple(summed.shape[1:]), summed, rows
    elif by == "global":
        yield None, summed.sum(axis, keepdim=True), rows * activation.shape[axis]
    else:
        roles = token_roles(model, inputs, position_tower(model, name), how)
        for role in dict.fromkeys(roles):
            places = torch.tensor([place for place, own in enumerate(roles) if own == role])
            yield role, summed.index_select(axis, places).sum(axis, keepdim=True), rows * len(places)


def _check_one_length(name: str, shapes: Mapping[Hashable, int]) -> None:
    if len(shapes) > 1:
        found = ", ".join(f"{count} of {shape}" for shape, count in shapes.items())
        raise ValueError(
            f"a mean by position is of samples of one length, and {name} is of several shapes: {found}. Give samples "
            "of one length, or by='role' or 'global'"
        )


def position_tower(model: HookedVLM, name: str) -> str:
    """The tower whose positions a hook point's are.

    Raises:
        ValueError: they are no tower's.
    """
    hook = model.hook_dict[name]
    axis = position_axis(hook)
    tower = None if axis is None else positions_of(hook, hook.axes[axis], model.towers)
    if tower is None:
        raise ValueError(f"{name} has no positions of a tower's stream: take its mean by='global'")
    return tower

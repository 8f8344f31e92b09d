"""What takes a component's place when it is ablated: nothing, a mean, another sample's activation, or noise.

A filling is a frozen value. Of a sample's case it makes one fill a draw: a function of a component that is the edit.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.edits import Add, Edit, Mean, Replace, Zero, gaussian
from hooked_vlm.experiments.parts.cases import QUESTION, Case, prepared
from hooked_vlm.experiments.parts.components import Component
from hooked_vlm.experiments.parts.dataset_means import Means, position_tower
from hooked_vlm.experiments.parts.roles import Roles, token_roles
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.selection import position_axis

Fill = Callable[[Component], Edit]
Donors = Literal["any", "same_answer", "other_answer"]


class Filling(ABC):
    """A way of ablating."""

    keeps: ClassVar[bool] = False
    """Whether it must know what the clean run holds at the ablated hook points."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a result says of it."""

    @abstractmethod
    def fills(self, model: HookedVLM, case: Case, sites: Sequence[str]) -> list[Fill]:
        """For each draw, what takes the place of components at ``sites`` in the clean run.

        Raises:
            SampleError: there is nothing to put into this sample's run.
        """


@dataclass(frozen=True)
class Zeros(Filling):
    """Zeros."""

    @property
    def facts(self) -> dict[str, Any]:
        return {}

    def fills(self, model: HookedVLM, case: Case, sites: Sequence[str]) -> list[Fill]:
        return [lambda part: part.edited(Zero)]


@dataclass(frozen=True, eq=False)
class OfMeans(Filling):
    """Means over samples."""

    means: Means
    at_least: int = 1
    """In how many samples of the mean a role must be."""

    @property
    def facts(self) -> dict[str, Any]:
        said = ("samples", "samples_used", "samples_dropped")
        known = {f"reference_{name}": self.means.attributes[name] for name in said if name in self.means.attributes}
        return {"by": self.means.by, **known}

    def fills(self, model: HookedVLM, case: Case, sites: Sequence[str]) -> list[Fill]:
        try:
            own = {site: self.means.of(model, case.clean, site, self.at_least) for site in sites}
        except SampleError as error:
            raise SampleError(f"{case.sample.id}: {error}", error.kind) from error
        return [lambda part: part.edited(Mean, own[part.site])]


@dataclass(frozen=True)
class OfNoise(Filling):
    """What is there, and Gaussian noise in units of the hook point's own standard deviation on the sample.

    The numbers of the edit :class:`~hooked_vlm.edits.Noise`, but drawn beforehand, so that a sweep need not compute all
    positions for them.
    """

    keeps: ClassVar[bool] = True
    std: float
    draws: int
    seed: int

    @property
    def facts(self) -> dict[str, Any]:
        return {"std": self.std, "draws": self.draws, "seed": self.seed}

    def fills(self, model: HookedVLM, case: Case, sites: Sequence[str]) -> list[Fill]:
        def fill(seed: int) -> Fill:
            noise = {site: self._noise(site, activation, seed) for site, activation in case.clean_cache.items()}
            return lambda part: part.edited(Add, noise[part.site])

        return [fill(self.seed + draw) for draw in range(self.draws)]

    def _noise(self, site: str, activation: Float[Tensor, "b ..."], seed: int) -> Float[Tensor, "b ..."]:
        rows = [gaussian(activation.shape[1:], seed, site, row) for row in range(len(activation))]
        own = activation.flatten(1).float().std(dim=1).view(-1, *[1] * (activation.ndim - 1))
        return self.std * own * torch.stack(rows).to(own.device)


@dataclass(frozen=True, eq=False)
class OfSamples(Filling):
    """Activations of other samples, drawn from a pool."""

    pool: Sequence[Sample]
    by: Literal["position", "role"]
    donors: Donors
    draws: int
    seed: int
    roles: Roles = "template"
    prompt: str = QUESTION

    @property
    def facts(self) -> dict[str, Any]:
        drawing = {"by": self.by, "donors": self.donors, "draws": self.draws, "seed": self.seed}
        return {**drawing, "reference_samples": [one.id for one in self.pool]}

    def fills(self, model: HookedVLM, case: Case, sites: Sequence[str]) -> list[Fill]:
        sample = case.sample
        if self.donors != "any" and sample.answer is None:
            raise SampleError(f"{sample.id} has no answer that donors could share", "no answer")
        # By the sample's name, so that what it is given does not depend on the samples beside it.
        random = np.random.default_rng([self.seed, zlib.crc32(sample.id.encode())])
        found: list[Fill] = []
        for index in random.permutation(len(self.pool)).tolist():
            if len(found) < self.draws and self._may_give(self.pool[index], sample):
                found += self._fill(model, case.clean, self.pool[index], sites)
        if not found:
            raise SampleError(
                f"{sample.id}: none of {len(self.pool)} samples can stand in for it (donors={self.donors!r}, "
                f"by={self.by!r})",
                "no donor",
            )
        return found

    def _may_give(self, donor: Sample, sample: Sample) -> bool:
        if donor.id == sample.id or (self.donors != "any" and donor.answer is None):
            return False
        return self.donors == "any" or (donor.answer == sample.answer) == (self.donors == "same_answer")

    def _fill(self, model: HookedVLM, inputs: VLMInputs, donor: Sample, sites: Sequence[str]) -> list[Fill]:
        """What a donor gives; nothing, where its positions do not align."""
        try:
            other = prepared(model, donor, prompt=self.prompt)
        except SampleError:
            return []
        places = {site: self._places(model, inputs, other, site) for site in sites}
        if any(own is None for own in places.values()):
            return []
        _, cache = model.run_with_cache(other, names_filter=list(sites))
        given = {site: _taken(model, site, cache[site], own or ()) for site, own in places.items()}
        return [lambda part: part.edited(Replace, given)]

    def _places(self, model: HookedVLM, inputs: VLMInputs, other: VLMInputs, site: str) -> list[int] | None:
        """For each position of a sample, the donor's that stands in for it; None where there is none."""
        if position_axis(model.hook_dict[site]) is None:
            return []
        tower = position_tower(model, site)
        if self.by == "position":
            own, its = (len(model.position_labels(run, tower)[0]) for run in (inputs, other))
            return list(range(own)) if own == its else None
        roles, its_roles = (token_roles(model, run, tower, self.roles) for run in (inputs, other))
        having: dict[str, list[int]] = {}
        for place, role in enumerate(its_roles):
            having.setdefault(role, []).append(place)
        if not set(roles) <= set(having):
            return None
        seen: dict[str, int] = dict.fromkeys(having, -1)
        found = []
        for role in roles:
            seen[role] += 1
            found.append(having[role][seen[role] % len(having[role])])
        return found


def _taken(
    model: HookedVLM, site: str, activation: Float[Tensor, "b ..."], places: Sequence[int]
) -> Float[Tensor, "b ..."]:
    axis = position_axis(model.hook_dict[site])
    if axis is None:
        return activation
    return activation.index_select(axis, torch.tensor(places, device=activation.device))

"""Edits drawn at random, of every kind, for any hook point: fit for its site, and never so strong that rounding grows.

Two things are not left to chance. A scale stays positive. And where rows are padded, nothing makes a word read padding:
what attention puts out for a query that may read nothing is nobody's, see :mod:`tests.sweep.one_at_a_time`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from hooked_vlm import HookedVLM, HookPoint
from hooked_vlm.edits import Add, BlockAttention, Edit, Function, Mean, Noise, Replace, Scale, Zero
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.selection import positions_of

SCORES, PATTERN = "hook_attn_scores", "hook_pattern"
HAS_A_LENGTH = ("ln_final.hook_normalized", "ln_post.hook_normalized", "hook_out", "hook_pooled")
"""What CLIP divides by its length, which must not be 0."""


@dataclass(frozen=True, eq=False)
class Sites:
    """Where a model's run may be edited: what the run has at each name, and what another run has there."""

    model: HookedVLM
    inputs: VLMInputs
    clean: Mapping[str, Tensor]
    other: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedVLM, inputs: VLMInputs | Mapping[str, Any]) -> Sites:
        """The other run is of the same texts, with other embeddings of words and of patches."""
        inputs = model._inputs(inputs)
        _, clean = model.run_with_cache(inputs)
        stirred = [Noise(name, 0.3, seed=3) for name in clean if name.endswith(("hook_embed", "hook_patch_embed"))]
        with model.hooks([hook for edit in stirred for hook in edit.hooks(model, inputs, set())]):
            _, other = model.run_with_cache(inputs)
        return cls(model, inputs, dict(clean), dict(other))

    @property
    def names(self) -> list[str]:
        return list(self.clean)

    @property
    def attentions(self) -> list[str]:
        return [name.removesuffix(f".{SCORES}") for name in self.clean if name.endswith(SCORES)]

    def axes(self, name: str) -> tuple[str, ...]:
        return self.model.hook_dict[name].axes

    def is_padded(self, name: str, *, on_the_left: bool = False) -> bool:
        """Whether a site's tower has rows of padding, or reads some."""
        if name.startswith(("vision_encoder.", "projector.")):
            return False
        masks = [mask for mask in (self.inputs.attention_mask, self.inputs.decoder_attention_mask) if mask is not None]
        return any(not bool((mask[:, 0] if on_the_left else mask).all()) for mask in masks)


class Draw:
    """Edits for some sites, by the numbers of one generator."""

    def __init__(self, sites: Sites, random: Random) -> None:
        self.sites, self.random = sites, random

    def edit(self, name: str | None = None, kind: str | None = None) -> Edit:
        """An edit of a kind at a site, or of any at any; sometimes of that layer and others."""
        if name is None and kind is None and self.random.random() < 0.15:
            return self.knockout()
        name = self.random.choice(self.sites.names) if name is None else name
        kind = self.random.choice(self.kinds(name)) if kind is None else kind
        return KINDS[kind](self, name, self.where(name))

    def knockout(self, attention: str | None = None) -> BlockAttention:
        """Of some edges; or of all that a query has, so that nothing is left to read."""
        attention = self.random.choice(self.sites.attentions) if attention is None else attention
        scores = f"{attention}.{SCORES}"
        _, n_heads, n_queries, n_keys = self.sites.clean[scores].shape
        keys = self.positions(scores, "k", n_keys) if self.random.random() < 0.7 else None
        heads = self.indices(n_heads) if self.random.random() < 0.5 else None
        return BlockAttention(attention, keys=keys, positions=self.positions(scores, "q", n_queries), heads=heads)

    def kinds(self, name: str) -> list[str]:
        """The kinds of edits that leave numbers finite at a site, and padding unread."""
        kinds = [*KINDS]
        is_padded, clean = self.sites.is_padded(name), self.sites.clean[name]
        if name.endswith("hook_scale"):
            kinds = [*POSITIVE]
        elif name.endswith(SCORES) and bool((clean < -1e30).any()):
            kinds = [*MASKED] if is_padded else [*MASKED, *UNMASKING]
        elif name.endswith(PATTERN) and is_padded:
            kinds = [kind for kind in MASKED if kind != "Add a number"]  # to a 0
        elif name.endswith(HAS_A_LENGTH) and not self.sites.model.pairs_rows:
            kinds.remove("Zero")
        if self.sites.is_padded(name, on_the_left=True):
            kinds = [kind for kind in kinds if kind not in MIXING]
        return kinds

    # Where ------------------------------------------------------------------------------------------------------

    def where(self, name: str) -> dict[str, Any]:
        axes, shape = self.sites.axes(name), self.sites.clean[name].shape
        where: dict[str, Any] = {}
        for axis in ("p", "q"):
            if axis in axes:
                where["positions"] = self.positions(name, axis, shape[axes.index(axis)])
        if "h" in axes and self.random.random() < 0.5:
            where["heads"] = self.indices(shape[axes.index("h")])
        if self.random.random() < 0.25:
            where["neurons"] = self.indices(shape[-1])
        return where

    def positions(self, name: str, axis: str, size: int) -> Any:
        """All, a span's name, a mask for each row, or the same for all rows."""
        rows, inputs = len(self.sites.clean[name]), self.sites.inputs
        whose = positions_of(self.sites.model.hook_dict[name], axis, self.sites.model.towers)
        spans = [span for span, found in inputs.spans.items() if found.tower == whose]
        if spans and self.random.random() < 0.25:
            return self.random.choice(spans)
        how = self.random.randrange(4)
        if how == 0:
            return None
        if how == 1:
            return torch.tensor([[self.random.random() < 0.3 for _ in range(size)] for _ in range(rows)])
        return self.indices(size)

    def indices(self, size: int) -> Any:
        """One from the start or from the end, a mask, which may be empty, or a list."""
        how = self.random.randrange(4)
        if how < 2:
            return self.random.randrange(size) - (size if how else 0)
        if how == 2:
            return torch.tensor([self.random.random() < 0.4 for _ in range(size)])
        return [self.random.randrange(-size, size) for _ in range(self.random.randint(1, 3))]

    # What -------------------------------------------------------------------------------------------------------

    def tensor(self, name: str, *, whole: bool) -> Tensor:
        """As large as the activation's numbers are: for all rows or one row that serves all, or for each neuron."""
        clean, generator = self.sites.clean[name], torch.Generator().manual_seed(self.random.randrange(2**31))
        shape = clean.shape if whole else clean.shape[-1:]
        if whole and self.random.random() < 0.5:
            shape = torch.Size((1, *shape[1:]))
        drawn, seen = torch.randn(shape, generator=generator), clean[clean > -1e30]
        if name.endswith("hook_scale"):
            return drawn.abs() * 0.1 + clean.mean()
        if name.endswith(PATTERN):
            return drawn.softmax(-1)
        return drawn * (seen.std() if seen.numel() > 1 else 1)

    def over(self, name: str) -> str:
        """Axes to take a mean over."""
        axes = self.sites.axes(name)
        named = [axis for axis in ("b", "p", "q") if axis in axes]
        return self.random.choice([*named, " ".join(named)]) if named else axes[0]


Kind = Callable[[Draw, str, dict[str, Any]], Edit]


def _from_a_cache(draw: Draw, name: str, where: dict[str, Any]) -> Edit:
    """Of as many rows; or of one that serves all, unless each row has padding of its own in its pattern."""
    is_own = draw.sites.is_padded(name) and name.endswith((SCORES, PATTERN))
    if is_own or draw.random.random() < 0.5:
        return Replace(name, draw.sites.other, **where)
    return Replace(name, {name: draw.sites.other[name][:1]}, **where)


def _noise(std: float, kind: Any) -> Kind:
    return lambda draw, name, where: Noise(name, std, kind, draw.random.randrange(9), **where)


def _function(fn: Callable[[Tensor], Tensor | None]) -> Kind:
    def run(activation: Tensor, hook: HookPoint) -> Tensor | None:
        return fn(activation)

    return lambda draw, name, where: Function(name, run, **where)


def _less(activation: Tensor) -> None:
    activation *= 0.7


def _half(activation: Tensor) -> Tensor:
    return activation * 0.5


def _turned(activation: Tensor) -> Tensor:
    """Rows and positions in another order; of scores and patterns, rows and queries."""
    is_by_head = activation.ndim == 4 and activation.shape[-1] == activation.shape[-2]
    return activation.flip([0, 2] if is_by_head else [*range(min(2, activation.ndim))])


def _centred(activation: Tensor) -> Tensor:
    return activation - activation.mean(tuple(range(1, activation.ndim - 1)), keepdim=True) * 0.5


MASKED: dict[str, Kind] = {
    "Replace from a cache": _from_a_cache,
    "Add a number": lambda draw, name, where: Add(name, draw.random.uniform(0.2, 1), **where),
    "Scale by a number": lambda draw, name, where: Scale(name, draw.random.uniform(0.6, 0.95), **where),
    "Noise, multiplicative": _noise(0.1, "multiplicative"),
    "Function in place": _function(_less),
    "Function": _function(_half),
}
"""Kinds that leave masked scores masked."""

MIXING: dict[str, Kind] = {
    "Mean of its own": lambda draw, name, where: Mean(name, over=draw.over(name), **where),
    "Noise, additive": _noise(0.3, "additive"),
    "Function of others": _function(_turned),
    "Function, centred": _function(_centred),
}
"""Kinds that make of a number something of others: of other positions, or of other rows."""

POSITIVE: dict[str, Kind] = {
    **MASKED,
    "Replace by a tensor": lambda draw, name, where: Replace(name, draw.tensor(name, whole=True), **where),
    "Replace by a vector": lambda draw, name, where: Replace(name, draw.tensor(name, whole=False), **where),
    "Mean that is given": lambda draw, name, where: Mean(name, draw.tensor(name, whole=False), **where),
    **{kind: MIXING[kind] for kind in ("Mean of its own", "Function of others")},
}
"""Kinds that leave positive numbers positive."""

KINDS: dict[str, Kind] = {
    **POSITIVE,
    **MIXING,
    "Add a tensor": lambda draw, name, where: Add(name, draw.tensor(name, whole=True), **where),
    "Add a vector": lambda draw, name, where: Add(name, draw.tensor(name, whole=False), **where),
    "Scale by a vector": lambda draw, name, where: Scale(name, 1 + draw.tensor(name, whole=False).tanh() / 5, **where),
    "Zero": lambda draw, name, where: Zero(name, **where),
}
"""Every kind of edit but knockout, whose site is a layer."""

UNMASKING = ("Replace by a tensor", "Replace by a vector", "Mean that is given", "Zero")
"""Kinds after which a query may read what it is masked from, and numbers are finite."""

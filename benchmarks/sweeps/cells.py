"""The cells of a grid, as data that every contender can carry out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.edits import BlockAttention, Edit, Replace
from hooked_vlm.experiments.parts.sites import site_name


@dataclass(frozen=True)
class Patch:
    """Activation patching: a state of a tower, at one layer and position, is put back to what it is in the clean run.

    ``site`` is ``"resid"``, ``"attn"``, ``"cross_attn"`` or ``"mlp"``; with ``heads``, what these heads of that
    attention give, before the output projection.
    """

    tower: str
    site: str
    layer: int
    position: int
    heads: tuple[int, ...] = ()

    def hook_name(self, model: HookedVLM) -> str:
        if self.heads:
            return f"{self.tower}.blocks.{self.layer}.{self.site}.hook_z"
        return site_name(model, self.tower, self.site, self.layer)

    def edits(self, model: HookedVLM, clean: Mapping[str, Tensor]) -> list[Edit]:
        """The cell in our words."""
        return [Replace(self.hook_name(model), clean, positions=[self.position], heads=self.heads or None)]


@dataclass(frozen=True)
class Knockout:
    """Attention knockout in some layers of LLaVA's language model: queries that cannot read keys."""

    layers: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def edits(self, model: HookedVLM, clean: Mapping[str, Tensor]) -> list[Edit]:
        """The cell in our words."""
        return [
            BlockAttention(f"language_model.blocks.{layer}.attn", positions=self.queries, keys=self.keys)
            for layer in self.layers
        ]


Cell = Patch | Knockout

"""The base run, written down: what each stage of each tower read, and the keys and values that it left.

Axes: b rows of a tower (LLaVA's vision tower: images), p its positions, k the positions that its attention reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.components import KeyValues, LayerKnown, Mask, Rotation
from hooked_vlm.edits import Edit, edit_hooks
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.models.tower import Tower
from hooked_vlm.sweep.places import Stage


class Kept(KeyValues):
    """Keys and values as the plain forward makes them, remembered."""

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


@dataclass
class TowerTrail:
    """What one tower did in the base run. Streams are as a stage was given them, before any hook in it."""

    n_rows: int = 0
    n_positions: int = 0
    n_other: int = 0
    """Positions of the other tower that cross-attention reads; 0 without."""
    streams: dict[tuple[int, Stage], Float[Tensor, "b p d_model"]] = field(default_factory=dict)
    known: dict[int, LayerKnown] = field(default_factory=dict)
    masks: dict[int, Mask | None] = field(default_factory=dict)
    other_mask: Mask | None = None
    rotation: Rotation | None = None
    out: Float[Tensor, "b p d"] | None = None

    def note(self, layer: int, stage: Stage, stream: Float[Tensor, "b p d_model"]) -> None:
        self.streams[layer, stage] = stream
        self.n_rows, self.n_positions = stream.shape[:2]


@dataclass
class Trail:
    """The base run of a model: its towers' trails, in forward order, those that ran; and the logits."""

    towers: dict[str, TowerTrail]
    logits: Float[Tensor, "b ..."]
    passed: set[str]
    """Of the hook points that were watched, those that the run passed."""


@torch.no_grad()
def record(
    model: HookedVLM, inputs: VLMInputs, base: Sequence[Edit], first: Mapping[str, int], watched: Sequence[str] = ()
) -> Trail:
    """Run the base run.

    Args:
        first: for each tower that is to be remembered, the first layer of it that is.
        watched: hook points of which it is not known whether the run passes them.
    """
    passed: set[str] = set()
    trails = {tower: TowerTrail() for tower in model.towers if hasattr(model.get_submodule(tower), "blocks")}

    def note_out(activation: Tensor, hook: HookPoint) -> None:
        trails[hook.tower].out = activation

    def note_passed(activation: Tensor, hook: HookPoint) -> None:
        passed.add(hook.name)

    with ExitStack() as recording:
        recording.enter_context(model.hooks(edit_hooks(model, inputs, base)))
        for tower, trail in trails.items():
            recording.enter_context(_recorded(model.get_submodule(tower), trail, first.get(tower)))  # type: ignore[arg-type]
        for handle in model.add_hook([f"{tower}.hook_out" for tower in trails], note_out, reads=True):
            recording.callback(handle.remove)
        for handle in model.add_hook(list(watched), note_passed, reads=True) if watched else []:
            recording.callback(handle.remove)
        logits = model(inputs)
    return Trail({tower: trail for tower, trail in trails.items() if trail.n_rows}, logits, passed)


@contextmanager
def _recorded(tower: Tower, trail: TowerTrail, first: int | None) -> Iterator[None]:
    """A tower that notes what its blocks read, from layer ``first`` on; with None, only its shape."""

    def run_blocks(
        resid: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        mask: Mask | Sequence[Mask | None] | None = None,
        other: Tensor | None = None,
        other_mask: Mask | None = None,
        rotation: Rotation | None = None,
        **_: Any,
    ) -> Tensor:
        stop = len(tower.blocks) if stop is None else stop
        trail.n_rows, trail.n_positions = resid.shape[:2]
        trail.other_mask, trail.rotation = other_mask, rotation
        trail.n_other = 0 if other is None else other.shape[1]
        for layer in range(start, stop):
            block: Any = tower.blocks[layer]
            layer_mask = mask[layer] if isinstance(mask, Sequence) else mask
            known = LayerKnown(Kept(), Kept())
            before = resid
            resid = block.attend(resid, mask=layer_mask, known=known.attn, rotation=rotation)
            mid = resid
            if block.has_cross_attention and other is not None:
                resid = block.cross_attend(resid, other, mask=other_mask, known=known.cross_attn)
            if first is not None and layer >= first:
                trail.note(layer, "attend", before)
                trail.note(layer, "cross_attend", mid)
                trail.note(layer, "feed_forward", resid)
                trail.known[layer], trail.masks[layer] = known, layer_mask
            resid = block.feed_forward(resid)
        if first is not None:
            trail.note(stop, "attend", resid)
        return resid

    tower.__dict__["run_blocks"] = run_blocks
    try:
        yield
    finally:
        del tower.__dict__["run_blocks"]

"""A tower: blocks that one residual stream runs through.

There is one forward behind everything: run these blocks from one layer on, for some new positions, over the keys and
values already known for the rest. Axes: b batch, p new positions, k the other tower's positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.components import LayerKnown, Mask, Rotation, build_block
from hooked_vlm.config import AttentionImplementation, TowerConfig
from hooked_vlm.hook_point import HookPoint


@dataclass
class Known:
    """Keys and values of every layer of a tower, for the positions it has seen."""

    layers: list[LayerKnown]

    def __len__(self) -> int:
        return len(self.layers[0].attn)

    def reorder(self, rows: Int[Tensor, " b"]) -> None:
        for layer in self.layers:
            layer.reorder(rows)


class Tower(nn.Module):
    """The blocks, and how a stream runs through them. Sub-classes embed before and read out after."""

    n_known: int = 0
    """How many positions came before the first that the tower is reading, in a generation: edits count from there."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config

    def _build_blocks(self, attention: AttentionImplementation) -> None:
        self.blocks = nn.ModuleList(build_block(self.config, attention) for _ in range(self.config.n_layers))

    def run_blocks(
        self,
        resid: Float[Tensor, "b p d_model"],
        *,
        start: int = 0,
        stop: int | None = None,
        mask: Mask | Sequence[Mask | None] | None = None,
        known: Known | None = None,
        other: Float[Tensor, "b k d_other"] | None = None,
        other_mask: Mask | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Tensor, "b p d_model"]:
        """What block ``stop`` would read (by default the stream after the last one), from what ``start`` reads.

        ``mask``: one for all layers, or one a layer.
        """
        for layer in range(start, len(self.blocks) if stop is None else stop):
            resid = self.blocks[layer](
                resid,
                mask=mask[layer] if isinstance(mask, Sequence) else mask,
                known=None if known is None else known.layers[layer],
                other=other,
                other_mask=other_mask,
                rotation=rotation,
            )
        return resid

    def new_known(self) -> Known:
        """An empty store of keys and values, to generate with."""
        return Known([LayerKnown() for _ in self.blocks])


def shown(point: HookPoint, activation: Float[Tensor, "_ p d_model"], batch: int) -> Tensor:
    """An activation that all rows share; each row gets its own when someone looks."""
    return point(activation.expand(batch, -1, -1).clone()) if point.is_hooked else activation

"""What senders change in what receivers read, along the residual stream alone: the second step of path patching.

Every head is frozen, so nothing passes from one position to another, and the run in which senders are patched need not
be made: their changes are taken along the stream, from stage to stage of the graph. In a pre-LN tower they add up; in a
post-LN tower the LayerNorms on the way are computed anew, as in :mod:`hooked_vlm.analysis.edge_patching`, which has the
same edges for one set of edges at a time; and MLPs that are free answer to what they read.

Axes: s sets of senders, b rows, p positions, n nodes of one place, m d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.analysis.edge_patching import image_mask
from hooked_vlm.analysis.graph import PROJECTOR, Graph, Receivers, Renorm, Senders, Stage
from hooked_vlm.components.block import PreNormBlock
from hooked_vlm.edits import Zero
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.selection import Positions


@dataclass(frozen=True, eq=False)
class Paths:
    """Two runs of the same rows, and the paths between nodes in the first."""

    model: HookedVLM
    graph: Graph
    inputs: VLMInputs
    """Of the run that is patched."""
    here: Mapping[str, Tensor]
    """Its activations: what senders write, what LayerNorms and MLPs read."""
    other: Mapping[str, Tensor]
    """What senders write in the other run."""
    positions: Positions = None
    """Where they send; None: everywhere."""
    free: bool = False
    """Whether MLPs answer to what they read, or write what they did."""

    def changes(
        self, sent: Bool[Tensor, "s sender"], read: Bool[Tensor, " receiver"]
    ) -> Iterator[tuple[Receivers, Float[Tensor, "s b p m"]]]:
        """What receivers read while sets of senders are patched, less what they read in the run as it is.

        For each place where some of those are that are ``read``; places that none of the sets reaches are left out.
        """
        seen: Tensor | None = None
        for stream in self.graph.streams:
            change: Tensor | None = None
            wanted = [self._is_wanted(stage, read) for stage in stream.stages]
            n_stages = 1 + max((place for place, is_wanted in enumerate(wanted) if is_wanted), default=-1)
            for stage, is_wanted in zip(stream.stages[:n_stages], wanted, strict=False):
                if isinstance(stage, Senders):
                    change = self._after(stage, change, sent[:, self.graph.columns(stage)], seen)
                elif change is not None and isinstance(stage, Renorm):
                    change = self._past(stage, change)
                elif change is not None and isinstance(stage, Receivers) and is_wanted:
                    yield stage, change if stage.norm is None else self._past(stage.norm, change)
                    seen = change if stage.inputs == (PROJECTOR,) else seen

    def _is_wanted(self, stage: Stage, read: Bool[Tensor, " receiver"]) -> bool:
        if not isinstance(stage, Receivers):
            return False
        goes_on = self.free and stage.inputs == (PROJECTOR,)
        return goes_on or bool(read[self.graph.columns(stage)].any())

    def _after(
        self, stage: Senders, change: Tensor | None, sent: Bool[Tensor, "s n"], seen: Tensor | None
    ) -> Tensor | None:
        """The change of the stream after what some senders add to it."""
        here = self.here[stage.site]
        sent = sent.to(here.device)
        added = [] if change is None else [change]
        if bool(sent.any()):
            added.append(self._sent(stage, sent))
        answer = self._answer(stage, change, seen) if self.free else None
        if answer is not None:
            # Where it is patched itself, it does not answer. (The projector is the first of what writes with it.)
            if bool(sent[:, 0].any()):
                patched = sent[:, 0, None, None] & self._where(stage)
                answer = answer.masked_fill(patched[..., None], 0)
            added.append(answer)
        return reduce(torch.add, [one.to(here) for one in added]) if added else None

    def _sent(self, stage: Senders, sent: Bool[Tensor, "s n"]) -> Float[Tensor, "s b p m"]:
        written = stage.write(self.other[stage.site] - self.here[stage.site], image_mask(self.model, self.inputs))
        written = written * self._where(stage)[..., None, None].to(written)
        return einsum(written, sent.to(written), "b p n m, s n -> s b p m")

    def _where(self, stage: Senders) -> Bool[Tensor, "#b #p"]:
        """The positions where senders are patched."""
        edit = Zero(stage.site, positions=self.positions)
        activation = self.here[stage.site]
        for name in edit.names(self.model, self.inputs):  # says so where the positions are another tower's
            selected = edit.selected(activation.shape, self.model.hook_dict[name], self.inputs)
        return selected.flatten(2)[..., 0].to(activation.device)

    def _past(self, renorm: Renorm, change: Float[Tensor, "s b p m"]) -> Float[Tensor, "s b p m"]:
        stream = self.here[renorm.site]
        change = change.to(stream)
        after = renorm.norm.normalize(stream + change) - renorm.norm.normalize(stream)
        return _where_changed(change, after)

    def _answer(self, stage: Senders, change: Tensor | None, seen: Tensor | None) -> Float[Tensor, "s b p m"] | None:
        """What an MLP, or LLaVA's projector, adds to a stream that has changed, less what it added."""
        if stage.parts and seen is not None:
            return self._projected(stage, seen)
        if change is None or not stage.site.endswith("hook_mlp_out"):
            return None
        place = stage.site.removesuffix(".hook_mlp_out")
        block: Any = self.model.get_submodule(place)
        stream = self.here[f"{place}.hook_mlp_in"]
        change = change.to(stream)
        read = rearrange(stream + change, "s b p m -> (s b) p m")
        answer = block.mlp(block.ln2(read) if isinstance(block, PreNormBlock) else read)
        return _where_changed(change, rearrange(answer, "(s b) p m -> s b p m", s=len(change)) - self.here[stage.site])

    def _projected(self, stage: Senders, seen: Float[Tensor, "s b p d"]) -> Float[Tensor, "s b p_all m"]:
        model: Any = self.model
        states = self.here["vision_encoder.hook_out"]
        seen = seen.to(states)
        embeds = model.embed(self.inputs.repeat(len(seen)), rearrange(states + seen, "s b p d -> (b s) p d"))
        after = rearrange(embeds, "(b s) p m -> s b p m", s=len(seen)) - self.here[stage.site]
        return after.masked_fill(~(seen != 0).flatten(2).any(-1)[..., None, None], 0)


def _where_changed(change: Float[Tensor, "s b p m"], after: Float[Tensor, "s b p m"]) -> Float[Tensor, "s b p m"]:
    """Nothing where nothing has changed, instead of rounding."""
    return after.masked_fill(~(change != 0).any(-1, keepdim=True), 0)

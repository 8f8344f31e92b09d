"""The graph whose edges are scored: nodes write into a residual stream, later nodes read it.

A tower's stream is a list of stages, in the order of the forward: :class:`Senders` add to it, :class:`Receivers` read
it, and in post-LN towers a :class:`Renorm` rescales what is in it. What one tower reads of another (cross-attention's
keys and values, LLaVA's projector) reads the end of that other tower's stream.

An edge u -> v is the path from what u writes to what v reads **along the stream alone**: past no other node, but
through the LayerNorms of a post-LN tower. In a pre-LN tower (BLIP's and CLIP's vision encoders, LLaMA) v reads the
plain sum of its senders. In a post-LN tower (BLIP's text towers) it reads a composition of LayerNorms of them, which is
a function of the senders all the same; only, several edges into v change what it reads by no sum of their changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.components import Attention
from hooked_vlm.components.norm import Norm
from hooked_vlm.models import HookedVLM

PROJECTOR = "projector"
MERGED = "hook_merged_embed"
"""LLaVA's token embeddings with the image's in place: what its projector puts out is in them."""


@dataclass(frozen=True, eq=False)
class Senders:
    """Nodes that write at one place: an attention's heads, an MLP, or what a stream starts from."""

    site: str
    nodes: tuple[str, ...]
    layer: int = -1
    attention: Attention | None = None
    """Of heads: the site is ``hook_z``, and a head writes ``z W_O``."""
    parts: tuple[Literal["image", "text"], ...] = ()
    """Of LLaVA's merged embeddings: the nodes write at the image's positions, and at the others."""

    def write(
        self, change: Float[Tensor, "b p *features"], is_image: Bool[Tensor, "b _"] | None
    ) -> Float[Tensor, "b p s m"]:
        """What a change at the site changes in the stream, node by node."""
        if self.attention is not None:
            return einsum(change, self.attention.W_O.to(change), "b p h d, h d m -> b p h m")
        if self.parts:
            assert is_image is not None
            is_image = is_image.to(change.device)
            masks = {"image": is_image, "text": ~is_image}
            return torch.stack([change * masks[part][..., None] for part in self.parts], dim=2)
        return change.unsqueeze(2)


@dataclass(frozen=True, eq=False)
class Renorm:
    """A LayerNorm, and the hook point of what it normalises."""

    site: str
    norm: Norm


@dataclass(frozen=True, eq=False)
class Receivers:
    """Inputs of nodes that read a stream at one place: q, k or v of an attention's heads, an MLP, or a tower's end."""

    site: str
    inputs: tuple[str, ...]
    layer: int = -1
    kind: Literal["q", "k", "v", "mlp", "out"] = "out"
    attention: Attention | None = None
    """Of q, k and v: the site is the projection's output, and an input is what the head projects."""
    norm: Renorm | None = None
    """Between the stream and the input, in pre-LN towers."""

    @property
    def weight(self) -> Float[Tensor, "n m d_head"]:
        assert self.attention is not None
        return {"q": self.attention.W_Q, "k": self.attention.W_K, "v": self.attention.W_V}[self.kind]


Stage = Senders | Renorm | Receivers


@dataclass(frozen=True, eq=False)
class Stream:
    """A tower's residual stream, or what another tower left, as stages in forward order."""

    tower: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """The nodes of some towers, and which edges there are between them."""

    streams: tuple[Stream, ...]
    towers: tuple[str, ...]
    senders: tuple[str, ...] = field(init=False)
    receivers: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "senders", tuple(node for one in self.stages(Senders) for node in one.nodes))
        object.__setattr__(self, "receivers", tuple(node for one in self.stages(Receivers) for node in one.inputs))

    def __repr__(self) -> str:
        return f"Graph({', '.join(self.towers)}: {len(self.senders)} senders, {int(self.edges.sum())} edges)"

    def stages(self, kind: type[Any]) -> list[Any]:
        """All stages of a kind, stream by stream."""
        return [stage for stream in self.streams for stage in stream.stages if isinstance(stage, kind)]

    def first_site(self, tower: str) -> str | None:
        """Where a tower's nodes begin; None for a tower that is not in the graph."""
        starts = [stream.stages[0] for stream in self.streams if stream.tower == tower and tower in self.towers]
        return next((start.site for start in starts if isinstance(start, Senders)), None)

    def below(self, receivers: Receivers) -> tuple[Senders | Renorm, ...]:
        """What comes before, in the stream that is read; in forward order."""
        for stream in self.streams:
            if receivers in stream.stages:
                before = stream.stages[: stream.stages.index(receivers)]
                return tuple(stage for stage in before if not isinstance(stage, Receivers))
        raise KeyError(receivers.site)

    def columns(self, stage: Senders | Receivers) -> slice:
        """Where a stage's nodes stand among all senders, or its inputs among all receivers."""
        return self._columns[id(stage)]

    @cached_property
    def _columns(self) -> dict[int, slice]:
        places = {}
        for kind in (Senders, Receivers):
            first = 0
            for stage in self.stages(kind):
                n = len(stage.nodes if isinstance(stage, Senders) else stage.inputs)
                places[id(stage)] = slice(first, first + n)
                first += n
        return places

    @cached_property
    def edges(self) -> Bool[Tensor, "sender receiver"]:
        """Which pairs are edges."""
        edges = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        for receivers in self.stages(Receivers):
            for senders in self.below(receivers):
                if isinstance(senders, Senders):
                    edges[self.columns(senders), self.columns(receivers)] = True
        return edges

    @cached_property
    def owned(self) -> Bool[Tensor, "sender receiver"]:
        """Which inputs are each sender's own: of a head its q, k and v. Heads that share a key share its inputs."""
        owned = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        writers = {id(one.attention): one for one in self.stages(Senders) if one.attention is not None}
        rows = {node: row for row, node in enumerate(self.senders)}
        for receivers in self.stages(Receivers):
            columns = self.columns(receivers)
            if receivers.attention is not None:
                own = self.columns(writers[id(receivers.attention)])
                n_heads, n_inputs = own.stop - own.start, columns.stop - columns.start
                for head in range(n_heads):
                    owned[own.start + head, columns.start + head * n_inputs // n_heads] = True
            elif receivers.inputs[0] in rows:
                owned[rows[receivers.inputs[0]], columns] = True
        return owned

    @cached_property
    def is_input(self) -> Bool[Tensor, " sender"]:
        """Senders that read nothing in the graph."""
        return ~self.owned.any(1)

    @cached_property
    def is_output(self) -> Bool[Tensor, " receiver"]:
        """Receivers of no sender in the graph: a tower's end, from which logits are made."""
        return ~self.owned.any(0)

    @property
    def sender_sites(self) -> list[str]:
        """Hook points of what is written."""
        return [stage.site for stage in self.stages(Senders)]

    @property
    def names(self) -> list[str]:
        """Hook points that must be known of a run."""
        return list(dict.fromkeys([*self.sender_sites, *self.norm_sites]))

    @property
    def norm_sites(self) -> list[str]:
        """Hook points of what LayerNorms on edges normalise."""
        own = [receivers.norm.site for receivers in self.stages(Receivers) if receivers.norm is not None]
        return list(dict.fromkeys([*own, *(stage.site for stage in self.stages(Renorm))]))


def build_graph(model: HookedVLM, towers: Sequence[str]) -> Graph:
    """The graph of some towers, in the model's order. What a tower reads of one that is left out is an input.

    Nodes are called ``{tower}.embed``, ``{tower}.L{layer}.attn.H{head}``, ``....cross_attn.H{head}``, ``....mlp``,
    ``projector``, and ``{tower}.out`` at the end; a head's inputs ``....H{head}.q``, ``.k``, ``.v`` (``KV{head}`` where
    several heads share one).

    Raises:
        ValueError: no tower with layers; towers with one between them left out; a vision encoder with several feature
            layers, whose streams are read together.
    """
    chosen = [tower for tower in towers if tower != PROJECTOR]
    if not chosen:
        raise ValueError("a graph needs a tower with layers")
    layered = [tower for tower in model.towers if tower != PROJECTOR]
    if chosen != layered[layered.index(chosen[0]) :][: len(chosen)]:
        raise ValueError(f"{' and '.join(chosen)} do not follow each other: what lies between belongs to the graph")
    streams: list[Stream] = []
    for tower in chosen:
        module: Any = model.get_submodule(tower)
        reads_other = module.config.d_cross is not None
        other = model.towers[model.towers.index(tower) - 1]
        if reads_other and other not in chosen:
            site = f"{other}.hook_out"
            streams.append(Stream(other, (Senders(site, (f"{other}.out",)),)))
        stages = [*_start(model, tower), *_blocks(model, tower)]
        streams.append(Stream(tower, (*stages, *_end(model, tower, chosen))))
        if reads_other:
            streams = [_with_readers(model, stream, tower) if stream.tower == other else stream for stream in streams]
    return Graph(tuple(streams), tuple(chosen))


def _start(model: HookedVLM, tower: str) -> Iterator[Stage]:
    if f"{tower}.{MERGED}" in model.hook_dict:
        nodes = (PROJECTOR, f"{tower}.embed")
        yield Senders(f"{tower}.{MERGED}", nodes, parts=("image", "text"))
    else:
        yield Senders(f"{tower}.hook_full_embed", (f"{tower}.embed",))


def _n_layers(model: HookedVLM, tower: str) -> int:
    """Layers that something reads."""
    config: Any = model.get_submodule(tower).config
    features = getattr(config, "feature_layers", None)
    if features is not None and len(features) > 1:
        raise ValueError(f"{tower} is read at layers {list(features)} together: leave it out with towers=[...]")
    return config.n_layers if features is None else features[0]


def _blocks(model: HookedVLM, tower: str) -> Iterator[Stage]:
    module: Any = model.get_submodule(tower)
    is_post = module.config.norm_order == "post"
    for layer in range(_n_layers(model, tower)):
        block: Any = module.blocks[layer]
        place = f"{tower}.blocks.{layer}"
        before = None if is_post else Renorm(f"{place}.hook_attn_in", block.ln1)
        yield from (_head_inputs(place, "attn", layer, block.attn, kind, before) for kind in ("q", "k", "v"))
        yield _heads(place, "attn", layer, block.attn)
        if is_post:
            yield Renorm(f"{place}.hook_resid_mid", block.ln1)
        if block.has_cross_attention:
            before = None if is_post else Renorm(f"{place}.hook_cross_attn_in", block.ln_cross)
            yield _head_inputs(place, "cross_attn", layer, block.cross_attn, "q", before)
            yield _heads(place, "cross_attn", layer, block.cross_attn)
            if is_post:
                yield Renorm(f"{place}.hook_resid_mid_cross", block.ln_cross)
        node = f"{tower}.L{layer}.mlp"
        yield Receivers(f"{place}.hook_mlp_in", (node,), layer, "mlp")
        yield Senders(f"{place}.hook_mlp_out", (node,), layer)
        if is_post:
            yield Renorm(f"{place}.hook_resid_post", block.ln2)


def _heads(place: str, name: str, layer: int, attention: Attention) -> Senders:
    tower = place.split(".")[0]
    nodes = tuple(f"{tower}.L{layer}.{name}.H{head}" for head in range(attention.n_heads))
    return Senders(f"{place}.{name}.hook_z", nodes, layer, attention)


def _head_inputs(
    place: str, name: str, layer: int, attention: Attention, kind: Literal["q", "k", "v"], norm: Renorm | None
) -> Receivers:
    tower = place.split(".")[0]
    is_shared = kind != "q" and attention.n_kv_heads < attention.n_heads
    n, letter = (attention.n_kv_heads if is_shared else attention.n_heads), "KV" if is_shared else "H"
    inputs = tuple(f"{tower}.L{layer}.{name}.{letter}{head}.{kind}" for head in range(n))
    return Receivers(f"{place}.{name}.hook_{kind}", inputs, layer, kind, attention, norm)


def _end(model: HookedVLM, tower: str, chosen: Sequence[str]) -> Iterator[Stage]:
    """Who reads a tower's end, but for cross-attention: logits, or LLaVA's projector."""
    following = model.towers[model.towers.index(tower) + 1 :][:1]
    if following and following[0] in chosen and _reads_across(model, following[0]):
        return
    node = PROJECTOR if following == (PROJECTOR,) and model.towers[-1] in chosen else f"{tower}.out"
    yield Receivers(f"{tower}.hook_out", (node,), norm=_last_norm(model, tower))


def _last_norm(model: HookedVLM, tower: str) -> Renorm | None:
    """The LayerNorm before ``hook_out``, where there is one."""
    module: Any = model.get_submodule(tower)
    if module.config.norm_order == "post" or getattr(module.config, "feature_layers", None) is not None:
        return None
    norm = module.ln_final if hasattr(module, "ln_final") else module.ln_post
    return Renorm(f"{tower}.blocks.{module.config.n_layers - 1}.hook_resid_post", norm)


def _reads_across(model: HookedVLM, tower: str) -> bool:
    return getattr(getattr(model.get_submodule(tower), "config", None), "d_cross", None) is not None


def _with_readers(model: HookedVLM, stream: Stream, tower: str) -> Stream:
    """The end of a stream, with the keys and values that ``tower``'s cross-attention makes of it."""
    module: Any = model.get_submodule(tower)
    # What is no tower of the graph is known at its `hook_out`, past its last LayerNorm.
    is_whole = len(stream.stages) > 1 or not str(stream.stages[0].site).endswith("hook_out")
    norm = _last_norm(model, stream.tower) if is_whole else None
    readers = [
        _head_inputs(f"{tower}.blocks.{layer}", "cross_attn", layer, block.cross_attn, kind, norm)
        for layer, block in enumerate(module.blocks)
        for kind in ("k", "v")
    ]
    return Stream(stream.tower, (*stream.stages, *readers))

"""Parts of a model by name: what is ablated, and what sends along a path.

Nodes are called as in :mod:`hooked_vlm.analysis.graph`: ``{tower}.L{layer}.attn.H{head}``, ``....cross_attn.H{head}``,
``....mlp``, ``{tower}.embed``, ``projector``, and ``{tower}.out`` for what a tower puts out.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.edits import Edit
from hooked_vlm.experiments.parts.heads import Head
from hooked_vlm.hooks import is_pattern, match_names
from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.selection import Indices, Positions

if TYPE_CHECKING:
    import xarray as xr

ATTENTIONS = ("attn", "cross_attn")


@dataclass(frozen=True, eq=False)
class Component:
    """A hook point, or those of a pattern; or some heads, neurons or positions of it."""

    site: str
    heads: Indices | None = field(default=None, kw_only=True)
    neurons: Indices | None = field(default=None, kw_only=True)
    positions: Positions = field(default=None, kw_only=True)

    def edited(self, kind: type[Edit], *values: Any) -> Edit:
        """An edit of this part alone: ``component.edited(Replace, cache)``."""
        return kind(self.site, *values, positions=self.positions, heads=self.heads, neurons=self.neurons)

    def __str__(self) -> str:
        parts = [f"{name} {listed(own)}" for name in ("heads", "neurons") if (own := getattr(self, name)) is not None]
        where = [] if self.positions is None else [f"at {listed(self.positions)}"]
        return " ".join([self.site, *parts, *where])


Components = Sequence[str | Component | Head]
"""Parts of a model: names of nodes or of hook points, or patterns of them; heads that were selected; or components."""


class Node(NamedTuple):
    """What a node's name says; -1 where it has no layer or head."""

    tower: str
    kind: str
    """``attn`` or ``cross_attn`` of a head; ``mlp``, ``embed``, ``out``, ``projector``."""
    layer: int = -1
    head: int = -1

    @classmethod
    def of(cls, name: str) -> Node:
        """The node of a name.

        Raises:
            ValueError: it is no node's name.
        """
        found = re.fullmatch(r"(\w+)\.L(\d+)\.(?:(mlp)|(attn|cross_attn)\.(?:H|KV)(\d+)(?:\.[qkv])?)", name)
        if found:
            tower, layer, mlp, attention, head = found.groups()
            return cls(tower, mlp or attention, int(layer), int(head or -1))
        if name == "projector":
            return cls(name, name)
        tower, _, kind = name.partition(".")
        if kind not in ("embed", "out"):
            raise ValueError(f"{name!r} is no node's name, as 'language_model.L3.attn.H1' or 'question_encoder.L0.mlp'")
        return cls(tower, kind)


def all_heads(model: HookedVLM, towers: Sequence[str] | None = None) -> list[str]:
    """Every head that anything reads, of self-attention and of cross-attention; by default of all towers."""
    return [name for name in nodes(model, towers) if Node.of(name).kind in ATTENTIONS]


def all_mlps(model: HookedVLM, towers: Sequence[str] | None = None) -> list[str]:
    """Every MLP that anything reads; by default of all towers."""
    return [name for name in nodes(model, towers) if Node.of(name).kind == "mlp"]


def nodes(model: HookedVLM, towers: Sequence[str] | None = None) -> dict[str, Component]:
    """Every node that anything reads, by name, in forward order: of a head its z, before ``W_O``.

    Raises:
        ValueError: an unknown tower.
    """
    for tower in towers or ():
        model._check_tower(tower)
    return dict(node for tower in model.towers if tower in (towers or model.towers) for node in _nodes(model, tower))


def _nodes(model: HookedVLM, tower: str) -> Iterator[tuple[str, Component]]:
    module: Any = model.get_submodule(tower)
    if not hasattr(module, "blocks"):
        yield tower, Component(f"{tower}.hook_out")
        return
    # In LLaVA the image's embeddings are the projector's.
    embed = "hook_embed" if f"{tower}.hook_merged_embed" in model.hook_dict else "hook_full_embed"
    yield f"{tower}.embed", Component(f"{tower}.{embed}")
    unread = {point.name for point in getattr(module, "unread", ())}
    for layer in range(module.config.n_layers):
        place = f"{tower}.blocks.{layer}"
        if f"{place}.hook_mlp_out" in unread:
            continue
        for attention in ATTENTIONS:
            if f"{place}.{attention}.hook_z" in model.hook_dict:
                for head in range(module.config.n_heads):
                    yield f"{tower}.L{layer}.{attention}.H{head}", Component(f"{place}.{attention}.hook_z", heads=head)
        yield f"{tower}.L{layer}.mlp", Component(f"{place}.hook_mlp_out")
    yield f"{tower}.out", Component(f"{tower}.hook_out")


def matching(wanted: str | Sequence[str | Head], known: Sequence[str], what: str) -> list[str]:
    """The known names that some names or patterns select, in their own order.

    Raises:
        ValueError: nothing is asked for, or something that there is not; says ``what`` it should be, and the nearest.
    """
    names = [wanted] if isinstance(wanted, str) else [str(one) for one in wanted]
    if not names:
        raise ValueError(f"no {what} is named; give at least one")
    selected: set[str] = set()
    for name in names:
        found = fnmatch.filter(known, name) if is_pattern(name) else [one for one in known if one == name]
        if not found:
            nearest = ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0.3))
            raise ValueError(f"{name!r} is no {what}{f'; nearest: {nearest}' if nearest else ''}")
        selected.update(found)
    return [name for name in known if name in selected]


def components_of(
    model: HookedVLM, chosen: str | Component | Head | Components, what: str = "the set"
) -> list[Component]:
    """Each part that is meant, once, at a hook point of its own.

    Raises:
        ValueError: nothing is meant; a name that is neither a node's nor a hook point's.
    """
    parts = [chosen] if isinstance(chosen, (str, Component, Head)) else list(chosen)
    if not parts:
        raise ValueError(f"{what} holds no components: choose at least one head, MLP or other part of the model")
    known = nodes(model)
    found: list[Component] = []
    for part in parts:
        if isinstance(part, Component):
            found += [replace(part, site=site) for site in match_names(part.site, model.hook_names)]
        elif "hook_" in str(part):
            found += [Component(site) for site in match_names(str(part), model.hook_names)]
        else:
            found += [known[name] for name in matching(str(part), list(known), "node or hook point of this model")]
    return list({str(part): part for part in found}.values())


def listed(value: Any) -> str:
    """Indices, or positions, in words that tell them apart."""
    if value is None:
        return "all"
    if isinstance(value, Span):
        return f"{value.tower} {value.rows}"
    if hasattr(value, "tolist"):
        value = value.tolist()
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return ",".join(map(str, value)) if is_list else str(value)


def over_nodes(result: xr.Dataset, dim: str) -> xr.Dataset:
    """A result over names of nodes, as one over ``tower``, ``kind``, ``layer`` and ``head`` in place of ``dim``.

    Nodes without layer or head are at -1, which stands last; NaN where there is no such node.
    """
    import pandas as pd
    import xarray as xr

    places = [Node.of(str(name)) for name in result[dim].values]
    labels = {name: [getattr(place, name) for place in places] for name in Node._fields}
    index = pd.MultiIndex.from_arrays(list(labels.values()), names=list(labels))
    bare = result.drop_vars([name for name, own in result.coords.items() if dim in own.dims])
    grid = bare.assign_coords(xr.Coordinates.from_pandas_multiindex(index, dim)).unstack(dim)
    order: dict[str, list[Any]] = {name: list(dict.fromkeys(own)) for name, own in labels.items()}
    for name in ("layer", "head"):
        order[name] = sorted(order[name], key=lambda number: (number < 0, number))
    return grid.reindex(order).assign_attrs(result.attrs)


def check_spans(sample: Sample, inputs: VLMInputs, positions: Iterable[Positions]) -> None:
    """That a sample has the parts of the question and the picture that are meant.

    Raises:
        SampleError: it lacks one.
    """
    for name in dict.fromkeys(one for one in positions if isinstance(one, str)):
        try:
            inputs.positions(name)
        except SpanError as error:
            raise SampleError(f"{sample.id}: {error}", f"no positions {name!r}") from error

"""Kinds of nodes: which hook points they are, and the axes that tell the nodes of one hook point apart.

A kind is called as in :class:`ActivationCache`: ``"z"`` is self-attention's ``hook_z``, ``"cross_z"`` is
cross-attention's; but for the MLP's ``hook_post``, which is ``"mlp_post"`` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM

if TYPE_CHECKING:
    import xarray as xr

_STREAM, _QUERY_HEAD, _KEY_HEAD = ("position",), ("position", "head"), ("position", "kv_head")
_CROSS_KEY, _PATTERN, _NEURON = ("key", "kv_head"), ("head", "query", "key"), ("position", "neuron")

_BLOCK: dict[str, tuple[str, tuple[str, ...]]] = {
    "resid_pre": ("hook_resid_pre", _STREAM),
    "resid_mid": ("hook_resid_mid", _STREAM),
    "normalized_resid_mid": ("hook_normalized_resid_mid", _STREAM),
    "resid_mid_cross": ("hook_resid_mid_cross", _STREAM),
    "normalized_resid_mid_cross": ("hook_normalized_resid_mid_cross", _STREAM),
    "resid_post": ("hook_resid_post", _STREAM),
    "normalized_resid_post": ("hook_normalized_resid_post", _STREAM),
    "attn_out": ("hook_attn_out", _STREAM),
    "cross_attn_out": ("hook_cross_attn_out", _STREAM),
    "mlp_out": ("hook_mlp_out", _STREAM),
    "z": ("attn.hook_z", _QUERY_HEAD),
    "cross_z": ("cross_attn.hook_z", _QUERY_HEAD),
    "q": ("attn.hook_q", _QUERY_HEAD),
    "k": ("attn.hook_k", _KEY_HEAD),
    "v": ("attn.hook_v", _KEY_HEAD),
    "cross_q": ("cross_attn.hook_q", _QUERY_HEAD),
    "cross_k": ("cross_attn.hook_k", _CROSS_KEY),
    "cross_v": ("cross_attn.hook_v", _CROSS_KEY),
    "mlp_post": ("mlp.hook_post", _NEURON),
    "pattern": ("attn.hook_pattern", _PATTERN),
    "cross_pattern": ("cross_attn.hook_pattern", _PATTERN),
}
_TOWER: dict[str, tuple[str, tuple[str, ...]]] = {
    "embed": ("hook_embed", _STREAM),
    "pos_embed": ("hook_pos_embed", _STREAM),
    "merged_embed": ("hook_merged_embed", _STREAM),
    "full_embed": ("hook_full_embed", _STREAM),
    "out": ("hook_out", _STREAM),
}

GROUPS: dict[str, tuple[str, ...]] = {
    "resid": tuple(kind for kind in _BLOCK if "resid" in kind),
    "sublayers": ("attn_out", "cross_attn_out", "mlp_out"),
    "heads": ("z", "cross_z"),
    "qkv": ("q", "k", "v", "cross_q", "cross_k", "cross_v"),
    "neurons": ("mlp_post",),
    "patterns": ("pattern", "cross_pattern"),
    "embeds": tuple(_TOWER),
}
"""Names for several kinds at once."""


@dataclass(frozen=True)
class Site:
    """One hook point of nodes; ``layer`` is None outside the blocks."""

    kind: str
    tower: str
    layer: int | None
    name: str
    axes: tuple[str, ...]
    """What tells its nodes apart, in the order of the activation's own axes."""

    @property
    def sums(self) -> bool:
        """Whether a node is a whole vector along the activation's last axis, and not one number."""
        return self.axes[-1] not in ("neuron", "key")

    @property
    def sublayer(self) -> tuple[str, int] | None:
        """The block whose writes to the stream pass on all that this node does; None for the stream itself."""
        is_stream = self.layer is None or "resid" in self.kind
        return None if is_stream or self.layer is None else (self.tower, self.layer)

    @property
    def attention(self) -> str:
        """The attention that a q, k, v, z or pattern is in."""
        return self.name.rpartition(".")[0]


def find_sites(model: HookedVLM, kinds: Sequence[str] | str, towers: Sequence[str]) -> list[Site]:
    """All hook points of some kinds, or groups of kinds, in forward order; those that nothing reads are left out.

    Raises:
        ValueError: an unknown kind; no such nodes.
    """
    wanted = [one for kind in ([kinds] if isinstance(kinds, str) else kinds) for one in GROUPS.get(kind, (kind,))]
    unknown = [kind for kind in wanted if kind not in _BLOCK and kind not in _TOWER]
    if unknown:
        known = f"{', '.join(GROUPS)}; {', '.join((*_BLOCK, *_TOWER))}"
        raise ValueError(f"no nodes are called {', '.join(unknown)}; there are {known}")
    sites = {site.name: site for kind in wanted for tower in towers for site in _sites(model, kind, tower)}
    if not sites:
        raise ValueError(f"{', '.join(towers)} have no {', '.join(wanted)}")
    return [sites[name] for name in model.hook_names if name in sites]


def _sites(model: HookedVLM, kind: str, tower: str) -> list[Site]:
    module: Any = model.get_submodule(tower)
    unread = {point.name for point in getattr(module, "unread", ())}
    if kind in _TOWER:
        ending, axes = _TOWER[kind]
        places: list[tuple[int | None, str]] = [(None, f"{tower}.{ending}")]
    else:
        ending, axes = _BLOCK[kind]
        n_layers = module.config.n_layers if hasattr(module, "blocks") else 0
        places = [(layer, f"{tower}.blocks.{layer}.{ending}") for layer in range(n_layers)]
    return [
        Site(kind, tower, layer, name, axes) for layer, name in places if name in model.hook_dict and name not in unread
    ]


def as_dataset(model: HookedVLM, inputs: VLMInputs, scores: Mapping[Site, Float[Tensor, "b ..."]]) -> xr.Dataset:
    """Scores by name: a variable for each kind, over ``(sample, tower, [layer,] ...)``; NaN where there is no node.

    ``token`` labels positions, which are empty where a row is shorter.
    """
    import xarray as xr

    towers = list(dict.fromkeys(site.tower for site in scores))
    sizes: dict[str, int] = {"layer": 1 + max((site.layer or 0 for site in scores), default=0)}
    for site, values in scores.items():
        for axis, size in zip(site.axes, values.shape[1:], strict=True):
            sizes[axis] = max(size, sizes.get(axis, 0))
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for site, values in scores.items():
        layered = ("layer",) if site.layer is not None else ()
        dims = ("sample", "tower", *layered, *site.axes)
        if site.kind not in arrays:
            shape = [len(values), len(towers), *(sizes[dim] for dim in dims[2:])]
            arrays[site.kind] = (dims, np.full(shape, np.nan, dtype=np.float32))
        place = (slice(None), towers.index(site.tower), *([site.layer] if layered else []))
        array = arrays[site.kind][1][place]
        array[(slice(None), *(slice(size) for size in values.shape[1:]))] = values.float().cpu().numpy()
    result = xr.Dataset(
        arrays,
        coords={
            "sample": np.arange(len(inputs)),
            "tower": towers,
            **{dim: np.arange(size) for dim, size in sizes.items() if any(dim in dims for dims, _ in arrays.values())},
        },
    )
    if "position" in result.dims:
        tokens = _tokens(model, inputs, towers, sizes["position"])
        result = result.assign_coords(token=(("sample", "tower", "position"), tokens))
        there = result.token != ""
        for kind in arrays:
            if "position" in result[kind].dims:
                result[kind] = result[kind].where(there)
    return result


def _tokens(model: HookedVLM, inputs: VLMInputs, towers: Sequence[str], n_positions: int) -> np.ndarray:
    tokens = np.full((len(inputs), len(towers), n_positions), "", dtype="<U64")
    for place, tower in enumerate(towers):
        for row, labels in enumerate(position_labels(model, inputs, tower, n_positions)):
            tokens[row, place, : len(labels)] = labels[:n_positions]
    return tokens


def position_labels(model: HookedVLM, inputs: VLMInputs, tower: str, n_positions: int) -> list[list[str]]:
    """What each position stands for; its number, where a model has no processor to say."""
    if model._processor is None and not model.config.name_or_path:
        return [[str(position) for position in range(n_positions)]] * len(inputs)
    return model.position_labels(inputs, tower)

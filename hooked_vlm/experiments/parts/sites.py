"""Where methods patch: kinds of activation, in which tower, over which layers."""

from __future__ import annotations

from typing import Literal

from hooked_vlm.models import HookedVLM

SiteKind = Literal["resid", "attn", "cross_attn", "mlp"]
SITE_KINDS: tuple[SiteKind, ...] = ("resid", "attn", "cross_attn", "mlp")
WindowConvention = Literal["centered", "radius"]


def site_name(model: HookedVLM, tower: str, kind: str, layer: int) -> str:
    """The hook point of a kind of site: the stream that the next layer reads, or what a sub-layer adds.

    Raises:
        ValueError: a tower or kind that the model lacks; says which it has.
    """
    if tower not in model.towers:
        raise ValueError(f"no tower {tower!r}; this model has {', '.join(model.towers)}")
    if kind not in SITE_KINDS:
        raise ValueError(f"no site {kind!r}; there are {', '.join(SITE_KINDS)}")
    config = getattr(model.get_submodule(tower), "config", None)
    if config is None:
        raise ValueError(f"{tower} has no layers to trace")
    post_norm = config.norm_order == "post"
    ending = {"resid": "normalized_resid_post" if post_norm else "resid_post"}.get(kind, f"{kind}_out")
    name = f"{tower}.blocks.{layer}.hook_{ending}"
    if name not in model.hook_dict:
        raise ValueError(f"{tower} has no site {kind!r}")
    return name


def site_kinds(model: HookedVLM, tower: str) -> tuple[SiteKind, ...]:
    """The kinds that a tower has."""
    return tuple(kind for kind in SITE_KINDS if kind != "cross_attn" or _has_cross_attention(model, tower))


def window(center: int, width: int, n_layers: int, convention: WindowConvention = "centered") -> range:
    """The layers of a window around ``center``, cut at the tower's ends (methods disagree on what a width is).

    ``"centered"``: ``width`` layers, ``center - width // 2`` onwards (ROME; Palit et al. 2023; Zhang et al. 2024).
    ``"radius"``: ``width`` layers on either side (Basu et al. 2024), where a width of 1 is the layer alone.

    Raises:
        ValueError: a window without layers, or wider than the tower; an unknown convention.
    """
    if width < 1:
        raise ValueError(f"a window needs at least one layer, got {width}")
    if convention == "centered":
        first, last = center - width // 2, center + (width + 1) // 2 - 1
    elif convention == "radius":
        first, last = (center - width, center + width) if width > 1 else (center, center)
    else:
        raise ValueError(f"convention must be 'centered' or 'radius', not {convention!r}")
    if last - first >= n_layers:
        raise ValueError(
            f"a window of {last - first + 1} layers (width {width}, {convention}) is wider than the tower, which has "
            f"{n_layers}"
        )
    return range(max(0, first), min(n_layers - 1, last) + 1)


def _has_cross_attention(model: HookedVLM, tower: str) -> bool:
    return f"{tower}.blocks.0.hook_cross_attn_out" in model.hook_dict

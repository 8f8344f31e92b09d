"""Random sets of components to hold a chosen set against: of equal size, and of the same kinds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from hooked_vlm.experiments.parts.components import Component, Components, components_of, listed
from hooked_vlm.models import HookedVLM
from hooked_vlm.selection import index_mask

Within = Literal["tower", "layer"]


def random_control(
    model: HookedVLM, components: Components, k: int = 10, seed: int = 0, *, within: Within = "tower"
) -> list[list[Component]]:
    """``k`` random sets to hold a set against: as many heads of the same attentions of the same towers, as many MLPs,
    as many neurons of the same kind, at the same positions.

    Each is disjoint from the set, where enough is left for that, and no two are equal; so there may be fewer than
    ``k``.

    Args:
        within: ``"layer"``: from the same layers, too.

    Raises:
        ValueError: a set without components, or with all that there are of a kind, so that there is nothing to draw.
    """
    if k < 1:
        raise ValueError(f"a control is at least one random set, not {k}")
    units = [unit for component in components_of(model, components) for unit in _units(model, component)]
    groups = _grouped(units, by_site=within == "layer")
    pools = [(len(own), _pool(model, own, within)) for own in groups]
    random = np.random.default_rng(seed)
    drawn: dict[frozenset[str], list[Component]] = {}
    for _ in range(100 * k):
        picked = [pool[index] for n, pool in pools for index in random.choice(len(pool), n, replace=False).tolist()]
        drawn.setdefault(frozenset(map(str, picked)), picked)
        if len(drawn) == k:
            break
    return [[_merged(own) for own in _grouped(picked, by_site=True)] for picked in drawn.values()]


def _grouped(units: Sequence[Component], *, by_site: bool) -> list[list[Component]]:
    """Units of one hook point each, or of its kind in any layer; at the same positions."""
    groups: dict[tuple[str, ...], list[Component]] = {}
    for unit in units:
        place = (unit.site,) if by_site else _kind(unit.site)
        groups.setdefault((*place, str(_divided(unit)), listed(unit.positions)), []).append(unit)
    return list(groups.values())


def _pool(model: HookedVLM, own: Sequence[Component], within: Within) -> list[Component]:
    """What stands in for some units of one kind: all others, or all there are where the others are too few."""
    like, taken = own[0], {str(unit) for unit in own}
    unread = {point.name for tower in model.towers for point in getattr(model.get_submodule(tower), "unread", ())}
    sites = [name for name in model.hook_names if _kind(name) == _kind(like.site) and name not in unread]
    if within == "layer":
        sites = [like.site]
    every = [unit for site in sites for unit in _units(model, replace(like, site=site), every=True)]
    others = [unit for unit in every if str(unit) not in taken]
    if not others:
        what = f"{_divided(like) or 'hook points'} of {like.site if within == 'layer' else ': '.join(_kind(like.site))}"
        raise ValueError(f"the set has all {len(every)} {what}: there are no others to draw a control from")
    return others if len(others) >= len(taken) else every


def _units(model: HookedVLM, component: Component, *, every: bool = False) -> list[Component]:
    """Single heads or neurons, those of a component or all that its hook point has; or the hook point as it is."""
    what = _divided(component)
    if what is None:
        return [component]
    size = _size(model, component.site, what)
    chosen = index_mask(getattr(component, what), size, what, component.site).nonzero()[:, 0].tolist()
    return [_with(component, [index]) for index in (range(size) if every else chosen)]


def _merged(units: Sequence[Component]) -> Component:
    """Units of one hook point as one component."""
    what = _divided(units[0])
    return units[0] if what is None else _with(units[0], sorted(getattr(unit, what)[0] for unit in units))


def _divided(component: Component) -> Literal["heads", "neurons"] | None:
    """What a component has some of."""
    return "heads" if component.heads is not None else "neurons" if component.neurons is not None else None


def _with(component: Component, indices: Sequence[int]) -> Component:
    is_heads = component.heads is not None
    return replace(component, heads=indices) if is_heads else replace(component, neurons=indices)


def _size(model: HookedVLM, site: str, what: str) -> int:
    hook = model.hook_dict[site]
    config: Any = getattr(model.get_submodule(hook.tower), "config", None)
    if what == "heads":
        shared = site.endswith(("hook_k", "hook_v", "hook_rot_k", "hook_k_input", "hook_v_input"))
        return (shared and config.n_kv_heads) or config.n_heads
    size = getattr(config, hook.axes[-1], None)
    if size is None:
        raise ValueError(f"how many neurons {site} has is not known, so that no others can be drawn")
    return int(size)


def _kind(site: str) -> tuple[str, str]:
    """A hook point's tower, and its name without tower and layer."""
    tower, _, local = site.partition(".")
    return tower, re.sub(r"^blocks\.\d+\.", "", local)

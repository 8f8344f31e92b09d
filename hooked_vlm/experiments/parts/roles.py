"""What positions are to a question, so that samples of different words can be averaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from hooked_vlm.experiments.parts.cases import BUILT_IN
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM

if TYPE_CHECKING:
    import xarray as xr

Roles = Literal["position", "template", "subject"] | Callable[[VLMInputs, str, Sequence[str]], Sequence[str]]
"""How positions are named: by their ``"position"``; by the ``"template"``, where words of a span take its name and all
others their own (NOTICE); by where they stand to the span ``"subject"`` (ROME); or by a function of the inputs, the
tower and its tokens."""


def token_roles(model: HookedVLM, inputs: VLMInputs, tower: str, how: Roles = "template") -> list[str]:
    """The role of each position of a tower, for inputs of one row; empty for padding.

    Image positions of a tower that reads them among its tokens are all ``image``.

    Raises:
        ValueError: an unknown way; roles by a subject, without such a span.
    """
    tokens = model.position_labels(inputs, tower)[0]
    if callable(how):
        return list(how(inputs, tower, tokens))
    if how not in ("position", "template", "subject"):
        raise ValueError(f"roles are by 'position', 'template' or 'subject', or a function, not {how!r}")
    own = {name: span[0] for name, span in inputs.spans.items() if span.tower == tower}
    image = set(own.get("image", ()))
    if how == "position":
        return [str(position) if token else "" for position, token in enumerate(tokens)]
    if how == "subject" and tower == inputs.text_tower:
        if "subject" not in own:
            raise ValueError("roles by a subject need a span of that name")
        return _to_subject(tokens, own["subject"], image)
    names = {name: positions for name, positions in own.items() if not _is_built_in(name)}
    return _in_template(tokens, names, image)


def by_role(result: xr.Dataset) -> xr.Dataset:
    """A result over roles instead of positions: the mean over a sample's positions of a role; NaN where it has none.

    What is true or false of a position (``identity``) is true of a role if it is of any.

    Raises:
        ValueError: a result without roles.
    """
    import xarray as xr

    if "role" not in result.coords:
        raise ValueError("this result has no roles: make it of samples")
    role = result.role
    places: dict[str, list[int]] = {}
    for names in role.values.reshape(-1, role.sizes["position"]):
        for position, name in enumerate(names):
            places.setdefault(str(name), []).append(position)
    known = sorted((name for name in places if name), key=lambda name: float(np.mean(places[name])))
    has_positions = [name for name, values in result.data_vars.items() if "position" in values.dims]
    over_positions = result[has_positions]
    labels = [name for name, values in over_positions.coords.items() if "position" in values.dims]
    over_positions = over_positions.drop_vars(labels)
    is_role = xr.DataArray(role.values, dims=role.dims)
    flags = [name for name, values in over_positions.data_vars.items() if values.dtype == bool]
    parts = []
    for name in known:
        part = over_positions.drop_vars(flags).where(is_role == name).mean("position", keep_attrs=True)
        of_any = {flag: (over_positions[flag] & (is_role == name)).any("position") for flag in flags}
        parts.append(part.assign(of_any))
    joined = xr.concat(parts, "role", coords="minimal", compat="override").assign_coords(role=known)
    return joined.merge(result.drop_dims("position"), compat="override").assign_attrs(result.attrs)


def _is_built_in(name: str) -> bool:
    return name in BUILT_IN or name.startswith("image.")


def _to_subject(tokens: Sequence[str], subject: Sequence[int], image: set[int]) -> list[str]:
    first, last, end = min(subject), max(subject), max(place for place, token in enumerate(tokens) if token)

    def role(position: int) -> str:
        if position in image:
            return "image"
        if position < first:
            return "before subject"
        if position <= last:
            # A subject of one token is its last, as for ROME.
            return "last subject" if position == last else "first subject" if position == first else "middle subject"
        return "last token" if position == end else "first after subject" if position == last + 1 else "further"

    return [role(position) if token else "" for position, token in enumerate(tokens)]


def _in_template(tokens: Sequence[str], names: Mapping[str, Sequence[int]], image: set[int]) -> list[str]:
    roles, seen = [], Counter[str]()
    for position, token in enumerate(tokens):
        spans = [name for name, positions in names.items() if position in positions]
        if position in image:
            roles.append("image")
        elif spans:
            roles.append(spans[0])
        else:
            seen[token] += bool(token)
            own = f"{token} (word)" if token in names else token
            roles.append(f"{own} ({seen[token]})" if seen[token] > 1 else own)
    return roles


def with_roles(model: HookedVLM, inputs: VLMInputs, result: xr.Dataset, how: Roles) -> xr.Dataset:
    """A result over ``tower`` and ``position`` of one row, with the coordinate ``role``; groups keep their names."""
    roles = np.full((result.sizes["tower"], result.sizes["position"]), "", dtype="<U64")
    tokens = result.token.isel(sample=0).transpose("tower", "position").values
    for place, tower in enumerate(result.tower.values):
        names = token_roles(model, inputs, str(tower), how)
        for column, position in enumerate(result.position.values.tolist()):
            own = names[position] if 0 <= position < len(names) else str(tokens[place, column])
            roles[place, column] = own if tokens[place, column] else ""
    return result.assign_coords(role=(("sample", "tower", "position"), roles[None]))

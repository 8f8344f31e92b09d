"""The cells of a trace: what is patched, where; and their results as a labelled grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.edits import Positions
from hooked_vlm.experiments.parts.scores import normalized_effect
from hooked_vlm.experiments.parts.sites import site_kinds, site_name
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM

if TYPE_CHECKING:
    import xarray as xr

ALL, IMAGE = -1, -2
"""Positions of cells that patch a tower's positions together: all of them, or all that hold an image."""

GROUPS = {IMAGE: "(image)", ALL: "(all)"}
"""What they are called, in the order in which they stand behind the single positions."""

Which = Literal["all", "text", "image"]


@dataclass(frozen=True)
class Cell:
    """One patch: a kind of state of a tower, at a position, over a window of layers around one."""

    tower: str
    site: str
    layer: int
    position: int

    @property
    def positions(self) -> Positions:
        """Which positions an edit patches."""
        return {ALL: None, IMAGE: "image"}.get(self.position, self.position)


def n_layers(model: HookedVLM, tower: str) -> int:
    """Blocks of a tower."""
    return model.get_submodule(tower).config.n_layers  # type: ignore[union-attr, return-value]


def list_cells(
    model: HookedVLM,
    clean: VLMInputs,
    towers: Sequence[str],
    sites: Sequence[str] | None,
    *,
    which: Which = "all",
    grouped: bool = False,
) -> list[Cell]:
    """Every site, layer and position of some towers.

    Args:
        which: of a tower that reads an image among its tokens, only the text's positions or only the image's.
        grouped: positions patched together, too: all, and all of the image.

    Raises:
        ValueError: an unknown tower or site; no positions of the kind that is wanted, or not known which they are.
    """
    if which != "all" and "image" not in clean.spans:
        raise ValueError(f"which positions are the {which}'s is not known: make the inputs with model.prepare")
    cells = []
    for tower in towers:
        for site in sites or site_kinds(model, tower):
            site_name(model, tower, site, 0)  # says what is wrong before anything runs
        n_positions = max(len(labels) for labels in model.position_labels(clean, tower))
        holds_image = image_positions(clean, tower, n_positions)
        positions = np.flatnonzero(_wanted(clean, tower, holds_image, which).any(0)).tolist()
        if grouped:
            positions += [*([IMAGE] if holds_image.any() else []), *([ALL] if n_positions > 1 else [])]
        cells += [
            Cell(tower, site, layer, position)
            for site in sites or site_kinds(model, tower)
            for layer in range(n_layers(model, tower))
            for position in positions
        ]
    if not cells:
        raise ValueError(f"these inputs have no positions to patch in {', '.join(towers)} (which={which!r})")
    return cells


def image_positions(inputs: VLMInputs, tower: str, n_positions: int) -> np.ndarray:
    """``[b p]``: which of a tower's positions hold a part of an image."""
    holds = np.zeros((len(inputs), n_positions), dtype=bool)
    span = inputs.spans.get("image")
    if span is not None and span.tower == tower:
        for row, positions in enumerate(span.rows):
            holds[row, list(positions)] = True
    return holds


def _wanted(inputs: VLMInputs, tower: str, holds_image: np.ndarray, which: Which) -> np.ndarray:
    """``[b p]``: which positions are traced, one at a time; all, in a tower that reads no image among its tokens."""
    if which == "all" or inputs.spans["image"].tower != tower:
        return np.ones_like(holds_image)
    return holds_image if which == "image" else ~holds_image


def as_grid(
    model: HookedVLM,
    clean: VLMInputs,
    cells: Sequence[Cell],
    scores: Float[Tensor, "cells b metric"],
    *,
    metrics: Sequence[str],
    clean_scores: Float[Tensor, "b metric"],
    corrupted_scores: Float[Tensor, "b metric"],
    start: Literal["clean", "corrupted"],
    which: Which = "all",
) -> xr.Dataset:
    """Scores by name: cells in a grid, NaN where a row has no such position, or none that is wanted.

    ``box`` says which part of its picture a position sees, ``picture`` which of its row's; -1 for text.
    """
    import xarray as xr

    towers, sites = (list(dict.fromkeys(getattr(cell, what) for cell in cells)) for what in ("tower", "site"))
    layers = 1 + max(cell.layer for cell in cells)
    single = sorted({cell.position for cell in cells if cell.position not in GROUPS})
    positions = [*single, *(group for group in GROUPS if any(cell.position == group for cell in cells))]
    tokens = _labels(model, clean, towers, positions, which)
    grid = np.full((len(metrics), len(clean), len(towers), len(sites), layers, len(positions)), np.nan)
    for cell, values in zip(cells, rearrange(scores, "cells b metric -> cells metric b").double().cpu(), strict=True):
        tower, position = towers.index(cell.tower), positions.index(cell.position)
        is_there = tokens[:, tower, position] != ""
        grid[:, :, tower, sites.index(cell.site), cell.layer, position] = np.where(is_there, values, np.nan)

    dims = ("metric", "sample", "tower", "site", "layer", "position")
    ends = {
        name: (dims[:2], rearrange(ends, "b metric -> metric b").double().cpu().numpy())
        for name, ends in (("clean", clean_scores), ("corrupted", corrupted_scores))
    }
    result = xr.Dataset(
        {"patched": (dims, grid), **ends},
        coords={
            "metric": list(metrics),
            "sample": np.arange(len(clean)),
            "tower": towers,
            "site": sites,
            "layer": np.arange(layers),
            "position": positions,
            "token": (("sample", "tower", "position"), tokens),
            **_places(clean, towers, positions, tokens),
        },
    )
    result["effect"] = result.patched - result[start]
    result["normalized"] = normalized_effect(result)
    return result.transpose(*dims, ...)


def _labels(
    model: HookedVLM, clean: VLMInputs, towers: Sequence[str], positions: Sequence[int], which: Which
) -> np.ndarray:
    """``[b tower position]``: tokens, patches, groups; empty where a row has no such position, or none wanted."""
    tokens = np.full((len(clean), len(towers), len(positions)), "", dtype="<U64")
    for place, tower in enumerate(towers):
        labels_of_rows = model.position_labels(clean, tower)
        holds_image = image_positions(clean, tower, max(map(len, labels_of_rows)))
        wanted = _wanted(clean, tower, holds_image, which)
        for row, labels in enumerate(labels_of_rows):
            groups = {ALL: len(labels) > 1, IMAGE: holds_image[row].any()}
            for column, position in enumerate(positions):
                if position in GROUPS:
                    tokens[row, place, column] = GROUPS[position] if groups[position] else ""
                elif position < len(labels) and wanted[row, position]:
                    tokens[row, place, column] = labels[position]
    return tokens


def _places(clean: VLMInputs, towers: Sequence[str], positions: Sequence[int], tokens: np.ndarray) -> dict[str, tuple]:
    """The coordinates ``box`` and ``picture``, where a tower's positions see parts of a picture."""
    shape = (len(clean), len(towers), len(positions))
    boxes, pictures = np.full((*shape, 4), np.nan), np.full(shape, -1)
    column_of = {position: column for column, position in enumerate(positions)}
    seen = [0] * len(clean)
    for grid in clean.patch_grid:
        number, seen[grid.row] = seen[grid.row], seen[grid.row] + 1
        for position, box in zip(grid.positions, grid.boxes, strict=True):
            if grid.tower in towers and position in column_of:
                place = (grid.row, towers.index(grid.tower), column_of[position])
                if tokens[place]:
                    boxes[place], pictures[place] = box, number
    if (pictures < 0).all():
        return {}
    dims = ("sample", "tower", "position")
    sides = np.array(["left", "top", "right", "bottom"])
    return {"side": ("side", sides), "box": ((*dims, "side"), boxes), "picture": (dims, pictures)}

"""The model's input pixels, tile by tile: which of them show a part of a picture, and which are padding.

Axes: ``tile`` counts a picture's tiles, the whole picture first (LLaVA-NeXT; elsewhere there is one). Pixels are
``[tile 3 height width]``, as the processor made them: normalised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.patches import Frame, PatchGrid, Region, is_region, region_cells, shared_lengths

Where: TypeAlias = Region | Sequence[Region | None] | Span | str
"""Parts of pictures: a region (one for all rows, or one a row, of which None is nothing), or positions of patches."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of one picture: of the original, or some of its patches' positions."""

    grid: PatchGrid
    region: Region | None
    positions: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"image {self.grid.image} (row {self.grid.row})"

    def pixels(self, min_overlap: float = 0.0) -> Bool[Tensor, "tile height width"]:
        """The pixels that show it: those of which it covers more than ``min_overlap``."""
        if self.region is not None:
            tiles = [_shows(view, self.region, self.grid, min_overlap) for view in self.grid.views]
            return torch.from_numpy(np.stack(tiles))
        mask, side = torch.zeros(len(self.grid.views), *self.grid.views[0].size, dtype=torch.bool), self.grid.patch_size
        for tile, row, column in map(self._place, chain(*self.patches())):
            mask[tile, row * side : (row + 1) * side, column * side : (column + 1) * side] = True
        return mask

    def patches(self, min_overlap: float = 0.0) -> list[list[int]]:
        """The patches that it covers more than ``min_overlap`` of, counted through all tiles.

        One list for each scale that the picture is seen in (LLaVA-NeXT: whole, and in detail), in reading order.
        """
        rows, columns = self.grid.shape
        if self.region is not None:
            grids = [self.grid.of_tile(tile, tile * rows * columns) for tile in range(len(self.grid.views))]
            found = [patch for grid in grids for patch in grid.positions_in(self.region, min_overlap=min_overlap)]
        else:
            chosen, places = set(self.positions), zip(self.grid.places, self.grid.positions, strict=True)
            # Newlines and class tokens are no patches.
            own = [place for place, position in places if position in chosen and place.column >= 0]
            found = [(place.tile * rows + place.row) * columns + place.column for place in own]
        whole = [patch for patch in found if patch < rows * columns]
        detail = [patch for patch in found if patch >= rows * columns]
        return [sorted(own, key=self._corner) for own in ([whole, detail] if len(self.grid.views) > 1 else [whole])]

    def _place(self, patch: int) -> tuple[int, int, int]:
        """Its tile, row and column."""
        (rows, columns) = self.grid.shape
        return patch // (rows * columns), patch // columns % rows, patch % columns

    def _corner(self, patch: int) -> tuple[Fraction, Fraction]:
        """Where on the original picture it begins."""
        tile, row, column = self._place(patch)
        y, x = self.grid.views[tile]
        side = self.grid.patch_size
        return y.offset + y.scale * row * side, x.offset + x.scale * column * side


def parts(inputs: VLMInputs, where: Where, image: int = 0) -> list[Part]:
    """The part of each picture that ``where`` says, but for pictures of which it says nothing.

    Args:
        image: which of its row's pictures a region is of; positions say it themselves.

    Raises:
        SpanError: inputs that :meth:`HookedVLM.prepare` did not make; a span that they do not have, of another tower,
            or without patches in a row; another number of regions than of rows; a row without such a picture.
    """
    if not inputs.patch_grid:
        raise SpanError("these inputs do not know their patches; make them with model.prepare")
    if isinstance(where, str):
        where = inputs.positions(where)
    return _of_span(inputs, where) if isinstance(where, Span) else list(_of_regions(inputs, where, image))


def _of_span(inputs: VLMInputs, span: Span) -> list[Part]:
    own = inputs.patch_grid[0].tower
    if span.tower != own:
        raise SpanError(f"a picture's patches are in {own}; these positions are {span.tower}'s")
    rows = [grid.row for grid in inputs.patch_grid]
    if len(span) <= max(rows):
        raise SpanError(f"positions in {len(span)} rows, and there are pictures in {1 + max(rows)}")
    found = [Part(grid, None, span[grid.row]) for grid in inputs.patch_grid]
    found = [part for part in found if any(part.patches())]
    for row in rows:
        if row not in [part.grid.row for part in found]:
            raise SpanError(f"none of the positions {span[row]} in row {row} is a patch's")
    return found


def _of_regions(inputs: VLMInputs, where: Region | Sequence[Region | None], image: int) -> Iterator[Part]:
    n_rows = 1 + max(grid.row for grid in inputs.patch_grid)
    if inputs.patch_grid[0].tower == inputs.text_tower:
        n_rows = len(inputs)
    regions: list[Any] = [where] * n_rows if is_region(where) else list(where)
    if len(regions) != n_rows:
        raise SpanError(f"{len(regions)} regions for {n_rows} rows")
    for row, region in enumerate(regions):
        if region is None:
            continue
        grids = [grid for grid in inputs.patch_grid if grid.row == row]
        if image not in range(len(grids)):
            raise SpanError(f"row {row} has {len(grids)} pictures, so there is no picture {image}")
        yield Part(grids[image], region)


def tiles_of(pixels: Tensor, grid: PatchGrid) -> Float[Tensor, "tile 3 height width"]:
    """A picture's own tiles, without those that fill it up: a view, to read and to write."""
    picture = pixels[grid.image]
    return picture[None] if picture.ndim == 3 else picture[: len(grid.views)]


def shown(view: Frame) -> tuple[slice, slice]:
    """The rows and columns of a tile that show any of the picture; the others are padding."""
    first, second = (slice(math.floor(axis.start), math.ceil(axis.stop)) for axis in view)
    return first, second


def _shows(view: Frame, region: Region, grid: PatchGrid, min_overlap: float) -> Bool[np.ndarray, "height width"]:
    xs, ys, inside = region_cells(region, grid.size)
    rows, columns = (np.array(axis.cells(1)) for axis in view)
    covered = shared_lengths(np.nan_to_num(rows), ys) @ inside @ shared_lengths(np.nan_to_num(columns), xs).T
    return covered > min_overlap * np.diff(rows) * np.diff(columns).T

"""Pictures spoilt as the model sees them: blurred, with a part masked, with patches that have changed places."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from hooked_vlm.corruptions.corrupted import Corrupted, DrawnOnce, pixels_of
from hooked_vlm.corruptions.views import Part, Where, parts, shown, tiles_of
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.patches import Frame, PatchGrid

Fill = Literal["mean", "zero", "blur"]


@dataclass(frozen=True)
class Blur(DrawnOnce):
    """Pictures out of focus: a Gaussian blur of the pixels.

    ``radius`` is the Gaussian's standard deviation, in pixels of the model's input. A picture's edge is mirrored, and
    padding stays as it is. LLaVA-NeXT's tiles are blurred one by one, each in its own pixels.
    """

    radius: float = 8.0

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        _check_radius(self.radius)
        pixels = pixels_of(clean)
        if self.radius == 0:
            return Corrupted(clean)
        if not clean.patch_grid:
            # Of inputs that `prepare` did not make, where the padding is, is not known.
            return Corrupted(clean.with_pixels(_blurred(pixels, None, self.radius)))
        pixels = pixels.clone()
        for grid in clean.patch_grid:
            tiles = tiles_of(pixels, grid)
            for tile, view in zip(tiles, grid.views, strict=True):
                tile.copy_(_blurred(tile, view, self.radius))
        return Corrupted(clean.with_pixels(pixels))


@dataclass(frozen=True, eq=False)
class RegionMask(DrawnOnce):
    """Pictures with a part painted over, in the pixels of the model's input.

    A region of the original picture is masked to the pixel, under the processor's resizing, cropping and tiling: every
    pixel of the model's input of which it covers more than ``min_overlap``. Positions, given as a span or by its name
    (``"image.object"``), are masked patch by patch.

    A mask along an object's outline takes away its colours and leaves its shape to be seen; a box leaves less.

    Attributes:
        region: a box or mask in the original picture's pixels, or a list of them, one a row, where None masks nothing;
            or the positions of patches.
        fill: ``"mean"``, the mean colour of what is left of the picture (nothing left: as ``"zero"``); ``"zero"``, the
            processor's mean colour, which it normalises to 0; ``"blur"``, the picture blurred by ``radius``; or a
            number, or three for red, green and blue, in the units of ``pixel_values``.
        image: which of its row's pictures a region is of.
        grow: by how many pixels of the model's input the mask reaches further on every side. A pixel beside a region is
            interpolated from it too: where a picture is made smaller, bicubic filters read 2 pixels far.
    """

    region: Where
    fill: Fill | float | tuple[float, float, float] = "mean"
    image: int = 0
    grow: int = 0
    min_overlap: float = 0.0
    radius: float = 8.0

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        _check_radius(self.radius)
        if self.grow < 0:
            raise ValueError(f"a mask grows by 0 pixels or more, not {self.grow}")
        pixels = pixels_of(clean).clone()
        for part in parts(clean, self.region, self.image):
            mask = _grown(part.pixels(self.min_overlap), part.grid, self.grow).to(pixels.device)
            if not bool(mask.any()):
                raise ValueError(f"{part.name}: no pixel that the model sees shows the region")
            tiles = tiles_of(pixels, part.grid)
            tiles.copy_(torch.where(mask[:, None], self._painted(tiles, mask, part.grid), tiles))
        return Corrupted(clean.with_pixels(pixels))

    def _painted(
        self, tiles: Float[Tensor, "tile 3 height width"], mask: Bool[Tensor, "tile height width"], grid: PatchGrid
    ) -> Float[Tensor, "..."]:
        """What is seen where the mask is; broadcasts against the tiles."""
        if self.fill == "blur":
            blurred = [_blurred(tile, view, self.radius) for tile, view in zip(tiles, grid.views, strict=True)]
            return torch.stack(blurred)
        if self.fill == "mean":
            left = ~mask & _shown(grid).to(mask.device)
            colour = rearrange(tiles, "tile c height width -> c tile height width")[:, left].mean(1)
            return colour.nan_to_num(0.0)[:, None, None]
        if isinstance(self.fill, str) and self.fill != "zero":
            raise ValueError(f"fill is 'mean', 'zero', 'blur', a number or three, not {self.fill!r}")
        colour = torch.as_tensor(0.0 if self.fill == "zero" else self.fill).to(tiles)
        if colour.numel() not in (1, 3):
            raise ValueError(f"fill has {colour.numel()} numbers; give one, or one each for red, green and blue")
        return colour.reshape(-1, 1, 1)


@dataclass(frozen=True, eq=False)
class SwappedPatches(DrawnOnce):
    """Pictures whose patches have changed places, as the model's tower cuts them.

    Alone, a region's patches go round in an order drawn from ``seed``, so that each of them moves; with ``other`` they
    change places with another region's, one by one in reading order. In LLaVA-NeXT the patches of the whole picture do
    so among themselves, and those of its details, across tiles, among themselves.

    Attributes:
        region: as for :class:`RegionMask`; by default the whole picture.
        other: a region of as many patches.
        image: which of its row's pictures a region is of.
        min_overlap: the share of a patch that a region must cover, or more than nothing.
    """

    region: Where = "image"
    other: Where | None = None
    seed: int = 0
    image: int = 0
    min_overlap: float = 0.0

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        pixels = pixels_of(clean).clone()
        ours = parts(clean, self.region, self.image)
        theirs = ours if self.other is None else parts(clean, self.other, self.image)
        if [part.grid.image for part in ours] != [part.grid.image for part in theirs]:
            raise ValueError("the two regions are not of the same pictures")
        for part, other in zip(ours, theirs, strict=True):
            moves = self._shuffled(clean, part) if self.other is None else self._exchanged(part, other)
            _move(tiles_of(pixels, part.grid), part.grid, *moves)
        return Corrupted(clean.with_pixels(pixels))

    def _shuffled(self, clean: VLMInputs, part: Part) -> tuple[list[int], list[int]]:
        """The patches in a random order, and the places that they go to: each to the next one's."""
        patches = part.patches(self.min_overlap)
        if all(len(own) < 2 for own in patches):
            raise ValueError(f"{part.name}: the region has no two patches that could change places")
        before = sum(grid.row == part.grid.row for grid in clean.patch_grid[: part.grid.image])
        orders = [_shuffle(own, self.seed, part.grid.row, before, scale) for scale, own in enumerate(patches)]
        return [*chain(*orders)], [*chain(*(order[1:] + order[:1] for order in orders))]

    def _exchanged(self, part: Part, other: Part) -> tuple[list[int], list[int]]:
        ours, theirs = (one.patches(self.min_overlap) for one in (part, other))
        for own, others in zip(ours, theirs, strict=True):
            if len(own) != len(others):
                raise ValueError(
                    f"{part.name}: the regions have {len(own)} and {len(others)} patches; give two of one size"
                )
            if own != others and set(own) & set(others):
                raise ValueError(f"{part.name}: the regions share patches, which cannot change places with themselves")
        first, second = [*chain(*ours)], [*chain(*theirs)]
        if not first:
            raise ValueError(f"{part.name}: no patch that the model sees shows the regions")
        return first + second, second + first


def _check_radius(radius: float) -> None:
    if not 0 <= radius < math.inf:
        raise ValueError(f"a blur's radius is 0 or more pixels, not {radius}")


def _shown(grid: PatchGrid) -> Bool[Tensor, "tile height width"]:
    """The pixels that are no padding."""
    mask = torch.zeros(len(grid.views), *grid.views[0].size, dtype=torch.bool)
    for tile, view in enumerate(grid.views):
        mask[(tile, *shown(view))] = True
    return mask


def _grown(mask: Bool[Tensor, "tile height width"], grid: PatchGrid, by: int) -> Bool[Tensor, "tile height width"]:
    height, width = mask.shape[1:]
    grown = torch.zeros_like(mask)
    # Tiles of one scale lie side by side: what is beyond the edge of one is in another.
    for scale in {tuple(axis.scale for axis in view) for view in grid.views}:
        own = [tile for tile, view in enumerate(grid.views) if tuple(axis.scale for axis in view) == scale]
        first = [min(grid.views[tile][axis].offset for tile in own) for axis in (0, 1)]
        corners = {
            tile: [round((grid.views[tile][axis].offset - first[axis]) / scale[axis]) for axis in (0, 1)]
            for tile in own
        }
        down, across = (max(corner[axis] for corner in corners.values()) for axis in (0, 1))
        whole = torch.zeros(1, 1, down + height, across + width)
        for tile, (top, left) in corners.items():
            whole[0, 0, top : top + height, left : left + width] = mask[tile]
        whole = F.max_pool2d(whole, 2 * by + 1, stride=1, padding=by)
        for tile, (top, left) in corners.items():
            grown[tile] = whole[0, 0, top : top + height, left : left + width] > 0
    return grown


def _blurred(pixels: Float[Tensor, "*pictures height width"], view: Frame | None, radius: float) -> Tensor:
    """Blurred inside what ``view`` shows of the picture; None for all of it."""
    height, width = pixels.shape[-2:]
    rows, columns = (slice(0, height), slice(0, width)) if view is None else shown(view)
    down, across = (_blur_matrix(side, part, radius) for side, part in ((height, rows), (width, columns)))
    # In double precision, so that what is the same everywhere stays the same.
    return (down @ pixels.cpu().double() @ across.T).to(pixels)


def _blur_matrix(length: int, part: slice, radius: float) -> Float[Tensor, "length length"]:
    """What each pixel along one axis is made of: of its neighbours within ``part``, mirrored at its ends."""
    matrix, n = torch.eye(length, dtype=torch.float64), part.stop - part.start
    if n < 2 or radius == 0:
        return matrix
    reach = math.ceil(4 * radius)
    offsets = torch.arange(-reach, reach + 1)
    weights = (-0.5 * (offsets / radius) ** 2).double().softmax(0)
    period = 2 * (n - 1)
    sources = (torch.arange(n)[:, None] + offsets) % period
    sources = torch.minimum(sources, period - sources)
    own = torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, sources, weights.expand(n, -1))
    matrix[part, part] = own
    return matrix


def _shuffle(items: list[int], *key: int) -> list[int]:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]


def _move(tiles: Float[Tensor, "tile 3 height width"], grid: PatchGrid, sources: list[int], targets: list[int]) -> None:
    """Put patches, counted through all tiles, in other places."""
    (rows, columns), side = grid.shape, grid.patch_size
    cut = tiles[..., : rows * side, : columns * side]
    patches = rearrange(cut, "tile c (row p) (column q) -> (tile row column) c p q", p=side, q=side).clone()
    patches[targets] = patches[sources]
    cut.copy_(rearrange(patches, "(tile row column) c p q -> tile c (row p) (column q)", tile=len(tiles), row=rows))

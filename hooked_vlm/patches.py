"""Where image tokens lie: the place of each in its tile, and of each tile's patches in the original picture; and back.

A size is (height, width), as in HF's ``image_sizes``. A box is (left, top, right, bottom) in pixels of the original
picture, of which pixel i reaches from i to i + 1. All that is known here comes from numbers and from the attributes of
HF's image processors; how far a resampling filter reads beyond a patch's edge is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

Size: TypeAlias = tuple[int, int]
Region: TypeAlias = Sequence[float] | np.ndarray
"""A box (left, top, right, bottom), whose sides may be fractions of pixels, or a boolean mask [height width]."""

NEWLINE = -1
"""The ``tile`` of LLaVA-NeXT's newline tokens."""


class Place(NamedTuple):
    """What one image token is: a patch of a tile, or with -1 for its column no patch at all.

    A tile's class token is ``Place(tile, -1, -1)``. A newline is ``Place(NEWLINE, row, -1)``, where ``row`` counts the
    rows of all tiles put together, those left out at the top among them.
    """

    tile: int
    row: int
    column: int


def image_tokens(
    size: Size,
    image_size: int | Size,
    patch_size: int,
    pinpoints: Sequence[Sequence[int]] | None = None,
    *,
    has_class_token: bool = False,
) -> tuple[Place, ...]:
    """The tokens of a picture of ``size`` for a vision tower that sees ``image_size``, in the language model's order.

    Without ``pinpoints`` (LLaVA-1.5, BLIP) those of one tile. With them (LLaVA-NeXT) those of tile 0, which sees the
    whole picture; then the rows of the other tiles put together, without the padding, and a newline after each.
    """
    shape = grid_shape(image_size, patch_size)
    whole = tile_tokens(0, shape, has_class_token=has_class_token)
    if pinpoints is None:
        return whole
    if has_class_token:
        raise ValueError("tiles are put together without their class tokens; give has_class_token=False")
    (rows, columns), (tile_height, tile_width) = shape, _sides(image_size)
    height, width = best_resolution(size, pinpoints)
    if height % tile_height or width % tile_width:
        raise ValueError(f"the resolution {height}x{width} cannot be cut into tiles of {tile_height}x{tile_width}")
    down, across = height // tile_height, width // tile_width
    top, left = _padding(size, (down * rows, across * columns))
    tokens = list(whole)
    for row in range(top, down * rows - top):
        for column in range(left, across * columns - left):
            tile = 1 + row // rows * across + column // columns
            tokens.append(Place(tile, row % rows, column % columns))
        tokens.append(Place(NEWLINE, row, -1))
    return tuple(tokens)


def tile_tokens(tile: int, shape: Size, *, has_class_token: bool = False) -> tuple[Place, ...]:
    """The tokens of one tile, as the vision tower reads them: row after row, behind the class token if it has one."""
    patches = (Place(tile, row, column) for row in range(shape[0]) for column in range(shape[1]))
    return (*([Place(tile, -1, -1)] if has_class_token else []), *patches)


def grid_shape(image_size: int | Size, patch_size: int) -> Size:
    """Rows and columns of a tile's patches; pixels left over at its right and bottom are in none."""
    height, width = _sides(image_size)
    return height // patch_size, width // patch_size


def n_tiles(size: Size, image_size: int | Size, pinpoints: Sequence[Sequence[int]] | None) -> int:
    """Tiles of one picture, the whole picture among them (HF's ``image_size_to_num_patches``)."""
    if pinpoints is None:
        return 1
    height, width = best_resolution(size, pinpoints)
    tile_height, tile_width = _sides(image_size)
    return 1 + math.ceil(height / tile_height) * math.ceil(width / tile_width)


def best_resolution(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """Of ``pinpoints``, each (height, width), the one that keeps most of a picture's pixels, and of those that keep
    as many the smallest, and of those the first (HF's ``select_best_resolution``)."""
    if not pinpoints:
        raise ValueError("there are no resolutions to choose from; give pinpoints=None for a picture of one tile")
    height, width = size

    def preference(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, pinpoint[0] * pinpoint[1] - kept

    best = min(pinpoints, key=preference)
    return best[0], best[1]


def _sides(image_size: int | Size) -> Size:
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def _padding(size: Size, grid: Size) -> Size:
    """Rows and columns of ``grid`` that are left out on each side (HF's ``unpad_image``, its rounding too)."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


class Axis(NamedTuple):
    """One side of a tile: where its pixels lie on the original picture, ``offset + scale * x``.

    From ``start`` to ``stop`` it shows the picture, elsewhere padding. Fractions, so that what meets meets exactly.
    """

    length: int
    scale: Fraction
    offset: Fraction
    start: Fraction
    stop: Fraction

    def resized(self, length: int) -> Axis:
        ratio = Fraction(self.length, length)
        return Axis(length, self.scale * ratio, self.offset, self.start / ratio, self.stop / ratio)

    def window(self, first: int, length: int) -> Axis:
        """From pixel ``first`` on, which is negative for padding before the first, ``length`` pixels."""
        start, stop = (min(max(end - first, Fraction(0)), Fraction(length)) for end in (self.start, self.stop))
        return Axis(length, self.scale, self.offset + self.scale * first, start, stop)

    def cells(self, patch_size: int) -> list[tuple[float, float]]:
        """Where each patch begins and ends on the picture; NaN for one that sees only padding."""
        cells = []
        for first in range(0, self.length - patch_size + 1, patch_size):
            edges = [min(max(Fraction(edge), self.start), self.stop) for edge in (first, first + patch_size)]
            begin, end = (float(self.offset + self.scale * edge) for edge in edges)
            cells.append((begin, end) if begin < end else (math.nan, math.nan))
        return cells


class Frame(NamedTuple):
    """What one tile shows of the original picture."""

    y: Axis
    x: Axis

    @classmethod
    def whole(cls, size: Size) -> Frame:
        """A picture at its own size."""
        return cls(*(Axis(side, Fraction(1), Fraction(0), Fraction(0), Fraction(side)) for side in size))

    @property
    def size(self) -> Size:
        """The tile's, in its own pixels."""
        return self.y.length, self.x.length

    def resized(self, size: Size) -> Frame:
        return Frame(self.y.resized(size[0]), self.x.resized(size[1]))

    def window(self, corner: Size, size: Size) -> Frame:
        """The part of ``size`` whose top left pixel is ``corner``; padding, where it reaches over the edge."""
        return Frame(self.y.window(corner[0], size[0]), self.x.window(corner[1], size[1]))


def frames(image_processor: Any, size: Size, settings: Mapping[str, Any] | None = None) -> tuple[Frame, ...]:
    """What an HF image processor shows of a picture of ``size``: one frame a tile.

    Args:
        settings: what the processor is called with besides the picture, and obeys before its attributes.

    Raises:
        ValueError: a processor of a class that is not known here, or that resizes in a way that is not.
    """
    name = type(image_processor).__name__
    steps = _STEPS.get(name.removesuffix("Pil").removesuffix("Fast"))
    if steps is None:
        raise ValueError(f"where {name} puts a picture's pixels is not known; known: {', '.join(_STEPS)}")
    return steps(Frame.whole(size), _in_force(image_processor, settings))


def _in_force(image_processor: Any, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """All that a processor works by, as far as it moves pixels."""
    backend = "torchvision" if type(image_processor).__name__.endswith("Fast") else "pil"
    names = "do_resize size do_center_crop crop_size do_pad pad_size image_grid_pinpoints".split()
    attributes = {name: getattr(image_processor, name, None) for name in names}
    return {**attributes, "backend": getattr(image_processor, "backend", backend), **(settings or {})}


def _plain(frame: Frame, settings: dict[str, Any]) -> tuple[Frame, ...]:
    frame = _resized_and_cropped(frame, settings)
    if settings["do_pad"] and settings["pad_size"]:
        frame = frame.window((0, 0), (settings["pad_size"]["height"], settings["pad_size"]["width"]))
    return (frame,)


def _squared(frame: Frame, settings: dict[str, Any]) -> tuple[Frame, ...]:
    if settings["do_pad"]:
        frame = _centred(frame, (max(frame.size), max(frame.size)))
    return (_resized_and_cropped(frame, settings),)


def _tiled(frame: Frame, settings: dict[str, Any]) -> tuple[Frame, ...]:
    size, shortest = settings["size"], settings["size"].get("shortest_edge")
    whole = frame.resized((size.get("height") or shortest, size.get("width") or shortest))
    edge = (settings["crop_size"] or {}).get("height") or whole.y.length
    height, width = target = best_resolution(frame.size, settings["image_grid_pinpoints"])
    fitted = _centred(frame.resized(_fitted(frame.size, target)), target)
    tiles = [
        fitted.window((top, left), (min(edge, height - top), min(edge, width - left)))
        for top in range(0, height, edge)
        for left in range(0, width, edge)
    ]
    return tuple(_resized_and_cropped(tile, settings) for tile in (whole, *tiles))


_STEPS = {
    "BlipImageProcessor": _plain,
    "CLIPImageProcessor": _plain,
    "ViTImageProcessor": _plain,
    "LlavaImageProcessor": _squared,
    "LlavaNextImageProcessor": _tiled,
}


def _resized_and_cropped(frame: Frame, settings: dict[str, Any]) -> Frame:
    if settings["do_resize"]:
        frame = frame.resized(_resized_size(frame.size, settings["size"]))
    if not settings["do_center_crop"]:
        return frame
    crop = settings["crop_size"]["height"], settings["crop_size"]["width"]
    excess = [side - wanted for side, wanted in zip(frame.size, crop, strict=True)]
    # Where a picture is smaller than the crop by an odd number, HF's two backends put the pixel on different sides.
    top, left = (int(side / 2) if settings["backend"] == "torchvision" else side // 2 for side in excess)
    return frame.window((top, left), crop)


def _resized_size(size: Size, wanted: Any) -> Size:
    height, width, shortest = (wanted.get(name) for name in ("height", "width", "shortest_edge"))
    if height and width:
        return height, width
    if not shortest or wanted.get("longest_edge"):
        raise ValueError(f"what is resized to {dict(wanted)} is not known; known: height and width, or shortest_edge")
    longest = int(shortest * max(size) / min(size))
    return (longest, shortest) if size[1] <= size[0] else (shortest, longest)


def _fitted(size: Size, target: Size) -> Size:
    """The largest size of the same proportions inside ``target``, rounded up (HF's ``get_patch_output_size``)."""
    scale_y, scale_x = target[0] / size[0], target[1] / size[1]
    if scale_x < scale_y:
        return min(math.ceil(size[0] * scale_x), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * scale_y), target[1])


def _centred(frame: Frame, size: Size) -> Frame:
    """``frame`` padded to ``size``; the odd pixel goes behind."""
    return frame.window((-((size[0] - frame.size[0]) // 2), -((size[1] - frame.size[1]) // 2)), size)


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The tokens of one picture in one sequence, and the part of the picture that each of them sees."""

    image: int
    """Which picture of the batch."""
    row: int
    """Which row of the batch."""
    tower: str
    """In whose sequence."""
    size: Size
    """The original picture's."""
    patch_size: int
    views: tuple[Frame, ...]
    """What each tile shows."""
    places: tuple[Place, ...]
    positions: tuple[int, ...]
    """Where in the sequence each place is."""

    @classmethod
    def of(
        cls,
        image_processor: Any,
        size: Size,
        positions: Sequence[int],
        *,
        image_size: int | Size,
        patch_size: int,
        tower: str,
        pinpoints: Sequence[Sequence[int]] | None = None,
        has_class_token: bool = False,
        settings: Mapping[str, Any] | None = None,
        image: int = 0,
        row: int = 0,
    ) -> PatchGrid:
        """The grid of a picture of ``size`` that an HF image processor prepares for a model.

        Args:
            image_processor: None for a picture that is fed at its own size.
            positions: where in the sequence the picture's tokens are.
            image_size: what the vision tower sees; one number for a square.
            pinpoints: the model's, if it sees pictures in tiles.
            has_class_token: whether a class token is among ``positions``.
            settings: as for :func:`frames`.

        Raises:
            ValueError: another number of positions than of tokens; a processor that is not known, or not this model's.
        """
        views = (Frame.whole(size),) if image_processor is None else frames(image_processor, size, settings)
        made, wanted = [view.size for view in views], [_sides(image_size)] * n_tiles(size, image_size, pinpoints)
        if made != wanted:
            raise ValueError(f"of this picture the processor makes tiles of {made}, and the model sees {wanted}")
        if pinpoints is not None:
            own = _in_force(image_processor, settings)["image_grid_pinpoints"]
            if best_resolution(size, own) != best_resolution(size, pinpoints):
                raise ValueError(f"the model tiles pictures at {pinpoints}, and the processor at {own}")
        places = image_tokens(size, image_size, patch_size, pinpoints, has_class_token=has_class_token)
        if len(positions) != len(places):
            raise ValueError(f"a picture of {size[1]}x{size[0]} pixels has {len(places)} tokens, not {len(positions)}")
        return cls(image, row, tower, size, patch_size, views, places, tuple(positions))

    def of_tile(self, tile: int, first: int = 1, *, tower: str = "vision_encoder") -> PatchGrid:
        """The grid of one tile in its own sequence in another tower, where its first patch is at ``first``."""
        patches = tile_tokens(tile, self.shape)
        positions = tuple(range(first, first + len(patches)))
        return replace(self, tower=tower, places=patches, positions=positions)

    @property
    def shape(self) -> Size:
        """Rows and columns of a tile."""
        return grid_shape(self.views[0].size, self.patch_size)

    @property
    def has_class_token(self) -> bool:
        return any(place.row < 0 for place in self.places)

    @cached_property
    def boxes(self) -> Float[np.ndarray, "n 4"]:
        """What each place sees; NaN for class tokens, newlines, and patches that see only padding."""
        cells = [(view.x.cells(self.patch_size), view.y.cells(self.patch_size)) for view in self.views]
        boxes = np.full((len(self.places), 4), np.nan)
        for box, place in zip(boxes, self.places, strict=True):
            if place.column >= 0:
                columns, rows = cells[place.tile]
                box[[0, 2]], box[[1, 3]] = columns[place.column], rows[place.row]
        boxes[np.isnan(boxes).any(1)] = np.nan
        return boxes

    @property
    def sees(self) -> Bool[np.ndarray, " n"]:
        """Which places see a part of the picture: no padding, newline or class token."""
        return ~np.isnan(self.boxes[:, 0])

    def overlaps(self, region: Region) -> Float[np.ndarray, " n"]:
        """The share of what each place sees that ``region`` covers; 0 for a place that sees nothing.

        Raises:
            ValueError: a box that is empty or reaches out of the picture; a mask that is empty or of another shape.
        """
        xs, ys, inside = region_cells(region, self.size)
        boxes = self.boxes[self.sees]
        columns, column = np.unique(boxes[:, [0, 2]], axis=0, return_inverse=True)
        rows, row = np.unique(boxes[:, [1, 3]], axis=0, return_inverse=True)
        covered = shared_lengths(rows, ys) @ inside @ shared_lengths(columns, xs).T
        own = (rows[:, 1] - rows[:, 0])[:, None] * (columns[:, 1] - columns[:, 0])
        shares = np.zeros(len(self.places))
        shares[self.sees] = np.minimum(covered / own, 1.0)[row.reshape(-1), column.reshape(-1)]
        return shares

    def positions_in(self, region: Region, *, min_overlap: float = 0.0) -> tuple[int, ...]:
        """Positions of the patches of which ``region`` covers more than ``min_overlap``, in reading order."""
        if not 0 <= min_overlap < 1:
            raise ValueError(f"no patch is covered by more than {min_overlap}; give min_overlap from 0 to below 1")
        found = np.flatnonzero(self.overlaps(region) > min_overlap)
        return tuple(self.positions[index] for index in found)

    def tile(self, tile: int) -> Int[np.ndarray, "rows columns"]:
        """The positions of one tile's patches, as they lie; -1 for those that are not in the sequence."""
        known = {place.tile for place in self.places} - {NEWLINE}
        if tile not in known:
            raise ValueError(f"there is no tile {tile} in this sequence; there are {sorted(known)}")
        positions = np.full(self.shape, -1)
        for place, position in zip(self.places, self.positions, strict=True):
            if place.tile == tile and place.column >= 0:
                positions[place.row, place.column] = position
        return positions

    def paint(self, values: Float[np.ndarray, " n"], *, tile: int | None = None) -> Float[np.ndarray, "height width"]:
        """The picture with each pixel's patch's value: of ``tile``, or else of the finest that sees the pixel's middle.

        ``values`` has one entry for each of ``positions``. Pixels that no patch sees are NaN.
        """
        if len(values) != len(self.places):
            raise ValueError(f"there are {len(values)} values for {len(self.places)} positions")
        painted = np.full(self.size, np.nan)
        # Finer tiles come later, and paint over the whole picture's.
        for place, sees, box, value in zip(self.places, self.sees, self.boxes, values, strict=True):
            if sees and tile in (None, place.tile):
                left, top, right, bottom = np.ceil(box - 0.5).astype(int)
                painted[top:bottom, left:right] = value
        return painted


def is_region(value: Any) -> bool:
    """Whether a value is one region, rather than several."""
    if isinstance(value, np.ndarray):
        return value.ndim == (2 if value.dtype == bool else 1)
    return all(isinstance(side, int | float | np.number) for side in value)


def region_cells(region: Region, size: Size) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, "rows columns"]]:
    """A region as a grid: the edges of its columns and of its rows, and which of its cells are inside."""
    height, width = size
    array = np.asarray(region)
    if array.dtype == bool:
        if array.shape != size:
            raise ValueError(f"the mask has shape {array.shape}; this picture's is {size}, [height width]")
        if not array.any():
            raise ValueError("the mask is empty")
        return np.arange(width + 1), np.arange(height + 1), array.astype(float)
    if array.shape != (4,) or not np.issubdtype(array.dtype, np.number):
        got = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"a region is a box (left, top, right, bottom) or a mask of bool [height width], not {got}")
    left, top, right, bottom = box = tuple(array.astype(float).tolist())
    if not (left < right and top < bottom):
        raise ValueError(f"the box {box} is empty; give (left, top, right, bottom), left < right and top < bottom")
    if left < 0 or top < 0 or right > width or bottom > height:
        raise ValueError(f"the box {box} reaches out of the picture of {width}x{height} pixels")
    return np.array([left, right]), np.array([top, bottom]), np.ones((1, 1))


def shared_lengths(stretches: Float[np.ndarray, "n 2"], edges: np.ndarray) -> Float[np.ndarray, "n cells"]:
    """How much each stretch has in common with each cell between two edges."""
    return np.clip(np.minimum(stretches[:, 1:], edges[1:]) - np.maximum(stretches[:, :1], edges[:-1]), 0, None)

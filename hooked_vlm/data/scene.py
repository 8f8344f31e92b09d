"""Pictures of coloured shapes on a grid of cells.

Axes: ``row`` runs down, ``column`` runs right, pixels are ``[row column channel]``. A cell is exactly one patch of the
toy model's vision tower, and an object never leaves its cell, so that one image token holds one whole object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 56, 56),
    "green": (44, 160, 74),
    "blue": (48, 104, 222),
    "yellow": (246, 198, 28),
    "purple": (148, 70, 188),
    "black": (44, 44, 52),
}
"""Colour words and their RGB values. Every word takes the article "a", so that one can stand for another."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star")

GRID = 6
"""Cells along each side of a picture."""

CELL = 16
"""Pixels along each side of a cell, at ``scale=1``."""

IMAGE_SIZE = GRID * CELL

# Odd enough for smooth edges at 16 pixels, and cheap because every sprite is made once.
_SUBPIXELS = 8
_MASK_COVERAGE = 0.5


@dataclass(frozen=True, slots=True)
class ShapeObject:
    """One flat shape in one cell.

    Attributes:
        shape: one of :data:`SHAPES`.
        color: a key of :data:`COLORS`.
        cell: (row, column) in the grid.
        offset: (down, right), in pixels, from the middle of the cell to the middle of the object.
        radius: half of the object's extent, in pixels.
    """

    shape: str
    color: str
    cell: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    radius: float = 6.0

    @property
    def cell_index(self) -> int:
        """Index of the cell in reading order. The image token that sees the object is ``1 + cell_index``."""
        return self.cell[0] * GRID + self.cell[1]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The tight pixel box (left, top, right, bottom) of the mask; right and bottom are exclusive."""
        rows, columns = np.nonzero(self._coverage(1) >= _MASK_COVERAGE)
        top, left = self.cell[0] * CELL, self.cell[1] * CELL
        return (
            left + int(columns.min()),
            top + int(rows.min()),
            left + int(columns.max()) + 1,
            top + int(rows.max()) + 1,
        )

    def mask(self, scale: int = 1) -> Bool[np.ndarray, "height width"]:
        """Pixels of the whole picture that the object covers by half or more."""
        covered = np.zeros((IMAGE_SIZE * scale, IMAGE_SIZE * scale), dtype=bool)
        covered[self._window(scale)] = self._coverage(scale) >= _MASK_COVERAGE
        return covered

    def _coverage(self, scale: int) -> Float[np.ndarray, "cell cell"]:
        return _sprite(self.shape, self.radius, self.offset, scale)

    def _window(self, scale: int) -> tuple[slice, slice]:
        size = CELL * scale
        row, column = self.cell
        return slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that is in a picture: the objects, and the colour that they lie on."""

    objects: tuple[ShapeObject, ...]
    background: tuple[int, int, int] = (243, 243, 240)

    @property
    def pixels(self) -> UInt8[np.ndarray, "height width 3"]:
        """The picture at the size that the toy model reads."""
        return render(self.objects, self.background)

    @property
    def image(self) -> Image.Image:
        """The picture at the size that the toy model reads, as the processor takes it."""
        return Image.fromarray(self.pixels)

    def enlarged(self, scale: int = 4) -> Image.Image:
        """The same picture drawn ``scale`` times as large, for a reader's eyes."""
        return Image.fromarray(render(self.objects, self.background, scale))

    @property
    def masks(self) -> Bool[np.ndarray, "object height width"]:
        """One mask an object, in the order of ``objects``."""
        return np.stack([item.mask() for item in self.objects])


def render(
    objects: Sequence[ShapeObject],
    background: tuple[int, int, int] = (243, 243, 240),
    scale: int = 1,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw objects, with smooth edges, on a plain background.

    Args:
        objects: what to draw; of two objects in one cell, the later is drawn over the earlier.
        background: RGB value.
        scale: how many pixels a side each pixel of the model's picture becomes. The shapes are drawn anew, not resized.

    Raises:
        ValueError: ``scale`` is below 1.
    """
    if scale < 1:
        raise ValueError(f"scale must be 1 or more, got {scale}")
    pixels = np.empty((IMAGE_SIZE * scale, IMAGE_SIZE * scale, 3), dtype=np.uint8)
    pixels[:] = background
    for item in objects:
        window = item._window(scale)
        coverage = item._coverage(scale)[..., None]
        painted = pixels[window] * (1 - coverage) + np.asarray(COLORS[item.color], dtype=np.float32) * coverage
        pixels[window] = (painted + 0.5).astype(np.uint8)
    return pixels


@lru_cache(maxsize=2048)
def _sprite(shape: str, radius: float, offset: tuple[int, int], scale: int) -> Float[np.ndarray, "cell cell"]:
    """The share of every pixel of a cell that the shape covers."""
    fine = CELL * scale * _SUBPIXELS
    middle = (np.arange(fine, dtype=np.float32) + 0.5) / (scale * _SUBPIXELS) - CELL / 2
    down = ((middle - offset[0]) / radius)[:, None]
    right = ((middle - offset[1]) / radius)[None, :]
    inside = _INSIDE[shape](down, right)
    size = CELL * scale
    coverage = inside.reshape(size, _SUBPIXELS, size, _SUBPIXELS).mean(axis=(1, 3), dtype=np.float32)
    coverage.flags.writeable = False
    return coverage


def _in_circle(down: np.ndarray, right: np.ndarray) -> np.ndarray:
    return down**2 + right**2 <= 0.95**2


def _in_square(down: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(down), np.abs(right)) <= 0.85


def _in_triangle(down: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (down <= 0.85) & (np.abs(right) <= (down + 1) * 0.54)


def _in_star(down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Five points: by symmetry only the angle to the nearest point's axis matters, and there the edge is a line."""
    step = 2 * np.pi / 5
    from_top = np.arctan2(right, -down)
    angle = np.abs((from_top + step / 2) % step - step / 2)
    distance = np.hypot(down, right)
    tip, notch = np.array([1.0, 0.0]), 0.45 * np.array([np.cos(step / 2), np.sin(step / 2)])
    along, aside = distance * np.cos(angle), distance * np.sin(angle)
    edge = notch - tip
    return edge[0] * (aside - tip[1]) - edge[1] * (along - tip[0]) >= 0


_INSIDE = {"circle": _in_circle, "square": _in_square, "triangle": _in_triangle, "star": _in_star}

"""Pictures of which it is known what is in them: things, each with its attributes. Concepts are about these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, overload

from hooked_vlm.data.samples import Dropped
from hooked_vlm.data.scene import Scene, ShapeObject
from hooked_vlm.data.shapes import generate
from hooked_vlm.patches import Region

SYNONYMS = {
    "metallic": "metal",
    "shiny": "metal",
    "matte": "rubber",
    "ball": "sphere",
    "block": "cube",
    "big": "large",
    "tiny": "small",
    "grey": "gray",
}
"""Other words for the values in CLEVR's scenes, as CLEVR's questions use them."""


@dataclass(frozen=True, eq=False)
class Thing:
    """One object."""

    attributes: Mapping[str, str]
    """Such as ``color``: ``red``."""
    region: Region | None = None
    """Where it is in the picture, if that is known."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", MappingProxyType(dict(self.attributes)))

    def has(self, value: str, attribute: str | None = None) -> bool:
        """Whether an attribute (or any) has a value, or what the value is another word for."""
        values = self.attributes.values() if attribute is None else [self.attributes.get(attribute)]
        return value in values or SYNONYMS.get(value, value) in values


def attributes_of(item: ShapeObject) -> dict[str, str]:
    """Of an object of a generated scene."""
    return {"color": item.color, "shape": item.shape}


@dataclass(frozen=True, eq=False)
class World:
    """One picture and what is in it."""

    id: str
    image: Any
    """As of a :class:`~hooked_vlm.data.Sample`."""
    things: tuple[Thing, ...]
    scene: Scene | None = None
    """What it was drawn from, if it can be drawn anew with something changed."""

    @classmethod
    def of(cls, id: str, scene: Scene) -> World:
        """The world of a generated scene."""
        things = (Thing(attributes_of(one), one.box) for one in scene.objects)
        return cls(id, lambda: scene.image, tuple(things), scene)


@dataclass(frozen=True, eq=False)
class Worlds(Sequence[World]):
    """A list of worlds that remembers which rows of its file were left out."""

    worlds: tuple[World, ...]
    dropped: tuple[Dropped, ...] = ()

    def __init__(self, worlds: Iterable[World], dropped: Iterable[Dropped] = ()) -> None:
        object.__setattr__(self, "worlds", tuple(worlds))
        object.__setattr__(self, "dropped", tuple(dropped))

    def __len__(self) -> int:
        return len(self.worlds)

    @overload
    def __getitem__(self, index: int) -> World: ...
    @overload
    def __getitem__(self, index: slice) -> Worlds: ...
    def __getitem__(self, index: int | slice) -> World | Worlds:
        return Worlds(self.worlds[index], self.dropped) if isinstance(index, slice) else self.worlds[index]


def shape_worlds(n: int, seed: int) -> Worlds:
    """The worlds of the first ``n`` samples that the generator of coloured shapes draws from ``seed``."""
    return Worlds(World.of(f"shapes-{seed}-{index}", one.scene) for index, one in enumerate(generate(n, seed)))

"""The embedded trained checkpoints, how they were trained, and what they score.

Each is a folder in HF's own format. It is small enough to lie in the package, and good enough that what an experiment
finds in it is about a model that sees and reads.
"""

from __future__ import annotations

from pathlib import Path

from hooked_vlm.data.shapes import ShapesSample, sample

_ROOM = Path(__file__).parent
# Chosen because it is easy to see: four objects, all of other colors and other shapes, and well apart.
_DEMO = (7, 2828)


def names() -> tuple[str, ...]:
    """The embedded checkpoints that ``HookedVLM.from_pretrained`` knows by name."""
    return tuple(sorted(config.parent.name for config in _ROOM.glob("*/config.json")))


def folder(name: str) -> Path:
    """Where an embedded checkpoint lies.

    Raises:
        KeyError: there is none of this name.
    """
    if name not in names():
        raise KeyError(f"no embedded checkpoint {name!r}; there are {', '.join(names()) or 'none'}")
    return _ROOM / name


def demo_sample() -> ShapesSample:
    """The picture and question of the demo: a colour asked of one of four objects. Never trained on."""
    seed, index = _DEMO
    return sample(seed, index, kinds=("color",), object_counts=(4,))

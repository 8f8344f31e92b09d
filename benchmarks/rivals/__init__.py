"""Other ways to run a grid's cells, over the same parameters and inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from benchmarks.sweeps.cells import Cell
from benchmarks.sweeps.grids import Grid


class Contender(Protocol):
    """One way to run cells. ``at_once``: how many it takes together."""

    at_once: int

    def prepare(self) -> None:
        """What it does once for a whole grid."""

    def scores(self, cells: Sequence[Cell]) -> Tensor:
        """The metric of each cell."""
        ...


RIVALS: dict[str, tuple[str, str, str]] = {
    "papers": ("HF, hooks, as published", "hf_hooks", "Published"),
    "hooks": ("HF, hooks, a row a cell", "hf_hooks", "OneRow"),
    "batched": ("HF, hooks, batched", "hf_batched", "Batched"),
    "transformer-lens": ("TransformerLens", "transformer_lens", "Bridge"),
    "nnsight": ("nnsight", "nnsight", "Traces"),
}
"""By name: what a table calls it, and the module and class that it is."""

PEERS = ("transformer-lens", "nnsight")
"""Those that are packages of others."""


class CannotError(Exception):
    """A contender that cannot run a grid; says why."""


def rival(name: str, grid: Grid, batch: int) -> Contender:
    """A contender on a grid, with the clean run behind it.

    Raises:
        CannotError: it is not installed, or cannot run this model.
    """
    _, module, kind = RIVALS[name]
    made: Callable[[Grid, int], Any] = getattr(import_module(f"benchmarks.rivals.{module}"), kind)
    try:
        return made(grid, batch)
    except ImportError as error:
        raise CannotError(f"not installed ({error})") from None

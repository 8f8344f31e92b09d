"""Activations of many runs that hold only the positions that differ: packed, one token after the other.

Axes: set, row of the tower, p its positions; token a (set, row, position) that is held, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from torch import Tensor


class Layout:
    """Which tokens are held: of each set the same positions in every row."""

    def __init__(self, mask: Bool[ndarray, "set p"], n_rows: int, device: torch.device) -> None:
        self.mask, self.n_rows, self.device = mask, n_rows, device
        self.counts: Int[ndarray, " set"] = mask.sum(1)
        self.firsts: Int[ndarray, " set"] = np.concatenate([[0], np.cumsum(self.counts * n_rows)])[:-1]
        """The first token of each set."""

    def __len__(self) -> int:
        return int(self.counts.sum()) * self.n_rows

    def holds(self, mask: Bool[ndarray, "set p"]) -> bool:
        """Whether it is of these tokens."""
        return self.mask is mask or np.array_equal(self.mask, mask)

    @cached_property
    def places(self) -> Int[ndarray, " token"]:
        """Each token's place among all: ``(set, row, position)`` counted through."""
        size = self.mask.shape[1]
        if self.n_rows == 1:
            return np.flatnonzero(self.mask)
        every = np.broadcast_to(self.mask[:, None], (len(self.mask), self.n_rows, size))
        return np.flatnonzero(every)

    @cached_property
    def positions(self) -> Int[Tensor, " token"]:
        return self.index(self.places % self.mask.shape[1])

    @cached_property
    def rows(self) -> Int[Tensor, " token"]:
        return self.index(self.places // self.mask.shape[1] % self.n_rows)

    def index(self, numbers: Shaped[ndarray, "..."]) -> Shaped[Tensor, "..."]:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.device)

    def of(self, whole: Float[Tensor, "row p ..."]) -> Float[Tensor, "token ..."]:
        """The same tokens of an activation that all sets share."""
        return whole[self.rows, self.positions]

    def tokens_of(self, one: int) -> slice:
        """One set's tokens."""
        first = int(self.firsts[one])
        return slice(first, first + int(self.counts[one]) * self.n_rows)

    def positions_of(self, one: int) -> Int[ndarray, " n"]:
        return np.flatnonzero(self.mask[one])

    def padded(self, members: Sequence[int]) -> Padded:
        """The tokens of some sets side by side, as many for each as the longest has."""
        mask = self.mask[members]
        counts = self.counts[members]
        length = int(counts.max())
        positions = np.argsort(~mask, axis=1, kind="stable")[:, :length]
        column = np.arange(length)
        held = column < counts[:, None]
        firsts = self.firsts[members][:, None, None] + np.arange(self.n_rows)[None, :, None] * counts[:, None, None]
        # A column that is not held repeats its own set's first token: what is not finite there stays there.
        tokens = firsts + np.where(held, column, 0)[:, None]
        return Padded(self.index(tokens), self.index(positions), self.index(held), bool(held.all()))


@dataclass(frozen=True, eq=False)
class Padded:
    """Tokens as a block of sets, rows and columns."""

    tokens: Int[Tensor, "set row n"]
    """Which packed token; for a column that is not held, the set's first."""
    positions: Int[Tensor, "set n"]
    held: Bool[Tensor, "set n"]
    is_full: bool

    def of(self, packed: Float[Tensor, "1 token ..."]) -> Float[Tensor, "set row n ..."]:
        return packed[0][self.tokens]

    def put(self, values: Float[Tensor, "set row n ..."], packed: Float[Tensor, "token ..."]) -> None:
        """Write the held ones where they belong."""
        if self.is_full:
            packed[self.tokens] = values
        else:
            held = self.held[:, None].expand(self.tokens.shape)
            packed[self.tokens[held]] = values[held]


@dataclass(frozen=True, eq=False)
class Packed:
    """Values of the tokens of a layout."""

    values: Float[Tensor, "1 token d"]
    layout: Layout

    def carry(self, mask: Bool[ndarray, "set p"], clean: Float[Tensor, "row p d"]) -> Packed:
        """Other tokens: those that are held already, and beside them the base run's."""
        old = self.layout
        if old.holds(mask):
            return self
        new = Layout(mask, old.n_rows, old.device)
        lookup = np.full(mask.shape[0] * old.n_rows * mask.shape[1], -1)
        lookup[old.places] = np.arange(len(old))
        found = lookup[new.places]
        is_held = found >= 0
        if is_held.all():
            return Packed(self.values[:, new.index(found)], new)
        values = new.of(clean)
        values[new.index(np.flatnonzero(is_held))] = self.values[0, new.index(found[is_held])]
        return Packed(values[None], new)

    def of_set(self, one: int, clean: Float[Tensor, "row p d"]) -> Float[Tensor, "row p d"]:
        """One set's whole activation."""
        tokens, layout = self.layout.tokens_of(one), self.layout
        whole = clean.clone()
        whole[layout.rows[tokens], layout.positions[tokens]] = self.values[0, tokens]
        return whole


def nothing(n_sets: int, clean: Float[Tensor, "row p d"]) -> Packed:
    """No tokens yet."""
    mask = np.zeros((n_sets, clean.shape[1]), dtype=bool)
    return Packed(clean.new_zeros(1, 0, clean.shape[-1]), Layout(mask, len(clean), clean.device))

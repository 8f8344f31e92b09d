"""Which edit sets run together, and how many at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hooked_vlm.sweep.plan import Compiler, EditSet
from hooked_vlm.sweep.trail import Trail

SHARE = 0.4
"""Of the memory that is free, how much a chunk may take."""

MOST_TOKENS = {"cpu": 6144, "cuda": 131072}
"""More tokens at once make nothing faster: the products are large enough, and what they read leaves the caches."""


_BUDGET: ContextVar[int | None] = ContextVar("budget", default=None)


@dataclass(frozen=True)
class Batcher:
    """Cuts edit sets into chunks, those that can share work side by side."""

    compiler: Compiler
    trail: Trail
    n_read: int
    """Positions of the output that the metric reads."""

    def chunks(self, sets: Sequence[EditSet], batch_size: int | None) -> Iterator[list[EditSet]]:
        """Sets with the same needs, in an order in which neighbours hold like positions.

        Args:
            batch_size: how many sets a chunk has; by default as many as free memory admits.
        """
        groups: dict[tuple, list[EditSet]] = {}
        for one in sets:
            # What is large, or needs all positions, is run with its like, so that the others need not pay for it.
            place = one.start if one.looks_beside else None
            groups.setdefault((bool(one.whole), one.looks_beside, place), []).append(one)
        for group in groups.values():
            group.sort(key=self._order)
            yield from self._cut(group, batch_size)

    def null(self, sets: Sequence[EditSet]) -> EditSet:
        """A set that goes the longest of their ways and edits nothing: what it strays by is rounding."""
        return max(sets, key=self.tokens).without_edits()

    def tokens(self, one: EditSet) -> int:
        """How many tokens a set holds at most, in any tower."""
        towers = list(self.trail.towers)
        most = 0
        for place, mask in one.dirt.items():
            if place.tower not in towers:
                continue
            trail = self.trail.towers[place.tower]
            first = int(mask.argmax()) if place.reaches != "other" and self._is_causal(place.tower) else 0
            most = max(most, trail.n_rows * (trail.n_positions - first))
            for later in towers[towers.index(place.tower) + 1 :]:
                most = max(most, self.trail.towers[later].n_rows * self.trail.towers[later].n_positions)
        return most

    def _order(self, one: EditSet) -> tuple:
        return one.start is not None and self.compiler.moment(one.start)[0], -self.tokens(one), one.index

    def _cut(self, group: Sequence[EditSet], batch_size: int | None) -> Iterator[list[EditSet]]:
        chunk: list[EditSet] = []
        tokens, limit = 0, self._limit() if batch_size is None else 0
        for one in group:
            own = self.tokens(one) + self.trail.logits.shape[0] * self._logit_tokens
            if chunk and (len(chunk) == batch_size if batch_size else tokens + own > limit):
                yield chunk
                chunk, tokens = [], 0
            chunk.append(one)
            tokens += own
        if chunk:
            yield chunk

    def _is_causal(self, tower: str) -> bool:
        config: Any = self.compiler.model.get_submodule(tower).config
        return bool(config.is_causal)

    @property
    def _logit_tokens(self) -> int:
        """What the logits of a set take, in tokens."""
        return -(-self.n_read * self.trail.logits.shape[-1] * 4 // self._bytes_a_token)

    def _limit(self) -> int:
        device = self.trail.logits.device
        memory = _BUDGET.get() or chunk_memory(device)
        return min(memory // self._bytes_a_token, MOST_TOKENS.get(device.type, 16384))

    @property
    def _bytes_a_token(self) -> int:
        """What one token takes at once in its hungriest stage: the MLP's inside, or attention's scores."""
        most = 0
        for tower, trail in self.trail.towers.items():
            config: Any = self.compiler.model.get_submodule(tower).config
            inside = 3 * config.d_mlp + 8 * config.d_model
            scores = 3 * config.n_heads * max(trail.n_positions, trail.n_other)
            most = max(most, inside + scores)
        return most * self.trail.logits.element_size()


def chunk_memory(device: torch.device) -> int:
    """Bytes that a chunk may take on a device, as things stand there."""
    return int(SHARE * free_memory(device))


@contextmanager
def memory_budget(n_bytes: int) -> Iterator[None]:
    """Sweeps in this block take chunks of so many bytes, whatever is free: the same chunks give the same numbers."""
    token = _BUDGET.set(n_bytes)
    try:
        yield
    finally:
        _BUDGET.reset(token)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 if hasattr(os, "sysconf") else 2**31


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, on a CPU or an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)

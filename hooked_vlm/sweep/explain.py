"""What a sweep is going to do, before it does it: who starts where, what gets dirty, and the arithmetic.

FLOPs are those of matrix products, two a multiply-add. The floor counts what the edits leave no way around: a position
is computed in a stage if it was dirty when it came there or attends to keys that are; what an edit overwrites costs
nothing. It is a bound from below for any method that gives the numbers of the runs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hooked_vlm.components import Mask
from hooked_vlm.edits import Edit
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import Generated, Metric
from hooked_vlm.models import HookedVLM
from hooked_vlm.sweep.batches import Batcher
from hooked_vlm.sweep.plan import Chunk, Compiler, EditSet, Step
from hooked_vlm.sweep.run import Scorer, why_alone
from hooked_vlm.sweep.trail import TowerTrail
from hooked_vlm.sweep.wave import passes


@dataclass(frozen=True)
class Group:
    """Edit sets that start at one place."""

    start: str
    n_sets: int
    dirty: float
    """Positions that a set's first edit changes, on average over the sets."""
    held: int
    """The most tokens (positions times rows) that one of these sets has to compute in any tower."""
    needs_all: bool
    """Whether some set has an edit that may read and change all positions: a ``Function``, a ``Noise``, a ``Mean`` of
    the activation's own, or an edit that is not ``is_local``."""


@dataclass(frozen=True)
class Plan:
    """A sweep that has not been run. ``print`` it."""

    n_sets: int
    groups: tuple[Group, ...]
    chunks: int
    flops: float
    """Of the whole sweep, its base run included, in matrix products."""
    floor: float
    """What any method has to compute to give the numbers of the runs alone: the base run, and each position wherever it
    differs."""
    base_flops: float
    alone: str
    """Why each set has a forward of its own, if so."""

    @property
    def forwards(self) -> float:
        """``flops`` in units of the base run. Without sharing it would be about the number of sets."""
        return self.flops / self.base_flops

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as captured:
            self.show(console)
        return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())

    def show(self, console: Any = None) -> None:
        """Print the plan as a table."""
        from rich.console import Console
        from rich.table import Table

        console = console or Console()
        table = Table("start", "sets", "dirty there", "held at most", title="where the edit sets start")
        for group in self.groups:
            note = " (needs all)" if group.needs_all else ""
            table.add_row(group.start, f"{group.n_sets:,}", f"{group.dirty:.3g}{note}", f"{group.held:,}")
        if self.groups:
            console.print(table)
        if self.alone:
            console.print(f"{self.n_sets:,} forwards, one a set: {self.alone}")
            return
        batches = f"{self.chunks:,} batch{'es' * (self.chunks != 1)}"
        console.print(
            f"{self.n_sets:,} sets in {batches}: {self.flops / 1e9:.4g} GFLOP, base run and all, as much "
            f"as {self.forwards:.3g} forwards; {self.flops / self.floor:.3f} of the floor ({self.floor / 1e9:.4g})"
        )


@torch.no_grad()
def explain(
    model: HookedVLM,
    inputs: VLMInputs | Mapping[str, Any],
    edit_sets: Sequence[Sequence[Edit]],
    metric: Metric | Generated,
    *,
    base: Sequence[Edit] = (),
    batch_size: int | Literal["auto"] = "auto",
    show: bool = True,
) -> Plan:
    """What :func:`sweep` would do with the same arguments, printed: where the sets start, how many positions they hold,
    and the FLOPs. Only the base run is run, to learn its shapes.

    Args:
        show: print the plan.

    Raises:
        What ``sweep`` raises before it runs a set.
    """
    plan = _plan(model, model._inputs(inputs), edit_sets, metric, base, batch_size)
    if show:
        plan.show()
    return plan


def _plan(
    model: HookedVLM,
    inputs: VLMInputs,
    edit_sets: Sequence[Sequence[Edit]],
    metric: Metric | Generated,
    base: Sequence[Edit],
    batch_size: int | Literal["auto"],
) -> Plan:
    reason = why_alone(model, edit_sets, base, metric)
    compiler = Compiler(model, inputs, base)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        trail = compiler.record(edit_sets)
    base_flops = float(counter.get_total_flops())
    if reason:
        n_sets = len(edit_sets)
        return Plan(n_sets, (), n_sets, n_sets * base_flops, n_sets * base_flops, base_flops, reason)
    assert not isinstance(metric, Generated)
    sets = compiler.compile_all(edit_sets, trail)
    scorer = Scorer(compiler, trail, metric)
    batcher = Batcher(compiler, trail, scorer.n_read)
    flops = floor = base_flops
    n_chunks = 0
    for chunk in batcher.chunks(sets, None if batch_size == "auto" else batch_size):
        n_chunks += 1
        for tower, step in passes(compiler, Chunk(chunk, trail), scorer.read):
            planned, least = _work(model, tower, trail.towers[tower], step)
            flops, floor = flops + planned, floor + least
        for tower, step in passes(compiler, Chunk([batcher.null(chunk)], trail), scorer.read):
            flops += _work(model, tower, trail.towers[tower], step)[0]
    return Plan(len(sets), tuple(_groups(compiler, batcher, sets)), n_chunks, flops, floor, base_flops, "")


def _groups(compiler: Compiler, batcher: Batcher, sets: Sequence[EditSet]) -> Iterator[Group]:
    by_start: dict[Any, list[EditSet]] = {}
    for one in sets:
        by_start.setdefault(one.start and one.start._replace(reaches="own"), []).append(one)
    nowhere = [one for start, members in by_start.items() if start is None for one in members]
    if nowhere:
        yield Group("nowhere: nothing that is read", len(nowhere), 0, 0, False)
    for start in sorted(filter(None, by_start), key=compiler.moment):
        members = by_start[start]
        where = "" if start.stage in ("enter", "leave", "head") else f" layer {start.layer}"
        dirty = float(np.mean([next(iter(one.dirt.values())).sum() for one in members]))
        held = max(batcher.tokens(one) for one in members)
        yield Group(
            f"{start.tower}{where}, {start.stage}", len(members), dirty, held, any(one.needs_all for one in members)
        )


def _work(model: HookedVLM, tower: str, trail: TowerTrail, step: Step) -> tuple[float, float]:
    """FLOPs of a stage, as it will be run, and at least."""
    module: Any = model.get_submodule(tower)
    config, rows = module.config, trail.n_rows
    d_q, d_kv = config.n_heads * config.d_head, (config.n_kv_heads or config.n_heads) * config.d_head

    def tokens(mask: ndarray) -> float:
        return float(mask.sum()) * rows

    entered = step.entered & step.queries
    if step.stage == "attend":
        assert step.keys is not None
        read = _n_read(trail.masks.get(step.layer), trail.n_positions)
        reached = entered | (step.queries & step.keys.any(1, keepdims=True))
        asked = tokens((step.entered | step.keys) & step.queries)
        planned = 2 * config.d_model * (d_q + 2 * d_kv) * tokens(step.tokens) + _read(step.queries, read, rows, d_q)
        least = 2 * config.d_model * (d_q * asked + 2 * d_kv * tokens(step.keys)) + _read(reached, read, rows, d_q)
        out = 2 * d_q * config.d_model
        return planned + out * tokens(step.queries), least + out * tokens(reached)
    if step.stage == "cross_attend":
        assert step.other is not None
        read = np.full(trail.n_positions, trail.n_other)
        reached = entered | (step.queries & step.other.any(1, keepdims=True))
        made = 4 * config.d_cross * d_kv * tokens(step.other)
        through = 2 * config.d_model * d_q
        return (
            2 * through * tokens(step.queries) + _read(step.queries, read, rows, d_q) + made,
            through * (tokens(entered) + tokens(reached)) + _read(reached, read, rows, d_q) + made,
        )
    if step.stage == "feed_forward":
        products = 2 * config.d_model * config.d_mlp * (3 if config.gated_mlp else 2)
        return products * tokens(step.queries), products * tokens(entered)
    if step.stage == "head":
        a_token = 2 * config.d_model * (config.d_vocab + (config.d_model if hasattr(module.unembed, "dense") else 0))
        return a_token * tokens(step.queries), a_token * tokens(entered)
    return 0.0, 0.0


def _n_read(mask: Mask | None, n_positions: int) -> Int[ndarray, " p"]:
    """How many keys each query reads."""
    return np.full(n_positions, n_positions) if mask is None else mask.in_any_row.sum(1).numpy()


def _read(queries: ndarray, read: Int[ndarray, " p"], rows: int, d_q: int) -> float:
    """FLOPs of scores and of their sums over values."""
    return 4.0 * d_q * rows * float((queries * read).sum())


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


FUSED_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What PyTorch's counter does not know."""

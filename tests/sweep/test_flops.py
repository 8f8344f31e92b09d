"""The arithmetic of a sweep, counted, against the floor that its dirty positions set."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch

from benchmarks.models import BlipSize, LlavaSize
from benchmarks.sweeps.contest import Ours
from benchmarks.sweeps.counting import flops
from benchmarks.sweeps.grids import GRIDS, Grid
from benchmarks.sweeps.subject import SUBJECTS, Subject
from hooked_vlm import VLMInputs
from hooked_vlm.metrics import Probability
from hooked_vlm.sweep import Plan, explain

LAYERS = {"blip": 12, "llava": 12}


@lru_cache
def subject(family: str) -> Subject:
    """As deep as the real models, and narrow."""
    size = SUBJECTS["small"][family]
    assert isinstance(size, (BlipSize, LlavaSize))
    return Subject(replace(size, n_layers=LAYERS[family]))


@lru_cache
def grids(name: str) -> list[Grid]:
    family, make = GRIDS[name]
    return list(make(subject(family), 1))


def planned(grid: Grid) -> tuple[Plan, int]:
    """What is planned, and what is counted."""
    ours, model = Ours(grid), grid.subject.model
    edits = [cell.edits(model, ours.clean) for cell in grid.cells]
    plan = explain(model, ours.corrupted, edits, grid.subject.metric, base=grid.base, show=False)
    return plan, flops(partial(ours.scores, grid.cells))[1]


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_of_a_published_method_costs_hardly_more_than_its_floor(name: str) -> None:
    for grid in grids(name):
        plan, counted = planned(grid)
        assert counted <= 1.15 * plan.floor, f"{grid.title}: {counted / plan.floor:.3f} of the floor"
        assert counted >= 0.999 * plan.floor, "the floor is one"
        assert counted == pytest.approx(plan.flops, rel=0.05), "what is planned is what is run"


def test_the_floor_of_a_stream_patched_in_every_layer() -> None:
    """Palit's grid by hand: what each layer behind a cell, the decoder, and the head cost."""
    (grid,) = grids("palit")
    plan, _ = planned(grid)
    size = grid.subject.size
    assert isinstance(size, BlipSize)
    config = grid.subject.model.config
    d, d_mlp, vocabulary = size.d_model, config.text.d_mlp, config.d_vocab  # type: ignore[attr-defined]
    n, image, layers = 9, (size.image // 16) ** 2 + 1, 12

    def product(tokens: int, *shape: int) -> int:
        return 2 * tokens * int(torch.tensor(shape).prod())

    def sublayers(tokens: int, dirty: int, own_keys: int, other_keys: int) -> int:
        """One layer: ``dirty`` positions come in, and ``tokens`` of them are then dirty through attention."""
        attend = product(dirty, d, d) + product(dirty, d, 2 * d) + product(tokens, d, d) + 4 * tokens * own_keys * d
        cross = product(tokens, d, d) + product(tokens, d, d) + 4 * tokens * other_keys * d
        return attend + cross + product(tokens, d, 2 * d_mlp)

    head = product(1, d, d) + product(1, d, vocabulary)
    decoder_layer = sublayers(1, 1, 1, n)
    floor = plan.base_flops
    for layer in range(layers):
        in_decoder = (layers - 1 - layer) * decoder_layer + head
        floor += in_decoder  # a cell of the decoder
        rest = layers - 1 - layer
        behind = sublayers(n, 1, n, image) + (rest - 1) * sublayers(n, n, n, image) if rest else 0
        changed = n if rest else 1
        # In the first decoder layer only cross-attention reads what has changed: its query is the base run's.
        first = product(1, d, d) + 4 * n * d + product(1, d, 2 * d_mlp)
        keys = layers * product(changed, d, 2 * d)
        floor += n * (behind + first + (layers - 1) * decoder_layer + keys + head)
    assert plan.floor == pytest.approx(floor, rel=1e-6)


def test_the_last_layer_is_computed_where_the_metric_reads() -> None:
    """A metric of all positions costs more than one of the last alone."""
    grid = grids("llava-text")[0]
    ours, model = Ours(grid), grid.subject.model
    edits = [cell.edits(model, ours.clean) for cell in grid.cells[:40]]

    def cost(metric: object) -> float:
        return explain(model, ours.corrupted, edits, metric, show=False).flops  # type: ignore[arg-type]

    last, all_of_them = cost(Probability(torch.tensor([3]))), cost(lambda logits: logits[:, -1, 3])
    tokens = VLMInputs.of(grid.corrupted).input_ids
    assert tokens is not None
    assert all_of_them > 1.2 * last

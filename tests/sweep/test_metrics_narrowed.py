"""Metrics that say which positions they read: what they give in a sweep is what they give of ``patch``'s logits."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from hooked_vlm.edits import Edit
from hooked_vlm.metrics import (
    KLDivergence,
    LogitDifference,
    LogProbability,
    Metric,
    Probability,
    ReadsPositions,
    SequenceLogProbability,
    Together,
)
from hooked_vlm.sweep import sweep
from tests.sweep.drawing import Draw, Sites
from tests.sweep.families import ATTENTION, family
from tests.sweep.one_at_a_time import padding_mask, told

pytestmark = pytest.mark.usefixtures("unchecked")

KINDS = (
    *("blip vqa, spans", "blip vqa, padded", "blip vqa, [DEC] alone", "blip caption, padded"),
    *("llava, one row", "llava, spans", "llava, padded", "llava, some rows without an image"),
    *("llava, sliding windows", "llava, windows in some layers, padded", "llava-next"),
)


def metrics(sites: Sites, logits: Tensor, random: Random) -> dict[str, Metric]:
    """At positions that are padding in no row."""
    rows, n_positions, d_vocab = logits.shape
    mask = padding_mask(sites.model, sites.inputs)
    words = torch.ones(n_positions, dtype=torch.bool) if mask is None else mask.bool().all(0)
    places: list[int] = words.nonzero()[:, 0].tolist()
    answer, foil = (torch.tensor([random.randrange(d_vocab) for _ in range(rows)]) for _ in range(2))
    row_by_row = torch.tensor([random.choice(places) for _ in range(rows)])
    targets = torch.tensor([[random.randrange(d_vocab) for _ in range(n_positions)] for _ in range(rows)])
    answered = torch.zeros(rows, n_positions, dtype=torch.bool)
    for row in range(rows):
        answered[row, random.sample(places, min(2, len(places)))] = True
    one = Probability(answer, places[-1] - n_positions)
    of_each = LogitDifference(answer, foil, row_by_row)
    reference = logits.flip(-1).contiguous()
    return {
        "from the end": one,
        "one position": LogProbability(answer[:1], random.choice(places)),
        "row by row": of_each,
        "a sequence": SequenceLogProbability(targets, answered),
        "a divergence": KLDivergence(reference, places[-1]),
        "a divergence, row by row": KLDivergence(reference, row_by_row),
        "together": Together((one, of_each, KLDivergence(reference, row_by_row))),
        "together with all positions": Together((one, lambda logits: logits[:, places].mean((1, 2)))),
    }


def edit_sets(sites: Sites, random: Random, count: int = 9) -> list[list[Edit]]:
    draw = Draw(sites, random)
    return [[], *([draw.edit() for _ in range(1 + one % 3)] for one in range(count))]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_metric_of_a_sweep_is_that_of_the_logits(kind: str) -> None:
    turn = KINDS.index(kind)
    sites, random = family(kind, ATTENTION[turn % 2]), Random(turn)
    model, inputs = sites.model, sites.inputs
    sets, base = edit_sets(sites, random), edit_sets(sites, random, 1)[1]
    logits = [model.patch(inputs, [*base, *edits]) for edits in sets]
    scale = max(1.0, *(float(found.abs().max()) for found in logits))
    for name, metric in metrics(sites, model(inputs), random).items():
        if name in ("one position", "a divergence"):  # others are like them
            continue
        swept = sweep(model, inputs, sets, metric, base=base, progress=False)
        for edits, found, alone in zip(sets, swept, logits, strict=True):
            assert (found - metric(alone)).abs().max() <= 1e-5 * scale, f"{name}: {told(base)}, {told(edits)}"


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_narrowed_metric_of_some_positions_is_the_metric(kind: str) -> None:
    """And each says that it reads no more than it needs."""
    sites, random = family(kind, "sdpa"), Random(0)
    logits = sites.model(sites.inputs)
    n_positions = logits.shape[1]
    for name, metric in metrics(sites, logits, random).items():
        assert isinstance(metric, ReadsPositions)
        read = metric.reads(n_positions)
        assert read == sorted(set(read))
        assert len(read) <= 3 * len(logits) or name == "together with all positions"
        of_some = metric.narrowed(read, n_positions)(logits[:, read])
        torch.testing.assert_close(of_some, metric(logits), rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["blip vqa, padded", "llava, spans", "llava-next", "clip", "vit, pooler"])
@torch.no_grad()
def test_how_many_sets_run_together_does_not_matter(kind: str) -> None:
    sites, random = family(kind, "sdpa"), Random(3)
    model, inputs = sites.model, sites.inputs
    sets, base = edit_sets(sites, random), edit_sets(sites, random, 1)[1]
    metric: Metric = lambda logits: logits  # noqa: E731
    if f"{model.towers[-1]}.hook_logits" in model.hook_dict:
        metric = metrics(sites, model(inputs), random)["together"]
    scale = max(1.0, float(model(inputs).abs().max()))
    together = sweep(model, inputs, sets, metric, base=base, progress=False)
    for batch_size in (1, 3, len(sets)):
        found = sweep(model, inputs, sets, metric, base=base, batch_size=batch_size, progress=False)
        torch.testing.assert_close(found, together, rtol=0, atol=1e-5 * scale)
        assert bool((found.noise_floor <= 1e-5 * scale).all())


@torch.no_grad()
def test_the_order_of_the_sets_is_that_of_the_effects() -> None:
    """Sets are sorted to run with their like; what comes back is in the order in which they were given."""
    sites, random = family("llava, spans", "sdpa"), Random(5)
    sets = edit_sets(sites, random)
    order = random.sample(range(len(sets)), len(sets))

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1]

    in_order = sweep(sites.model, sites.inputs, sets, metric, progress=False)
    shuffled = sweep(sites.model, sites.inputs, [sets[index] for index in order], metric, progress=False)
    torch.testing.assert_close(shuffled, in_order[order], rtol=0, atol=1e-5 * max(1.0, float(in_order.abs().max())))

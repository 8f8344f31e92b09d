"""What a sweep holds at its worst: bytes of tensors that are alive together, counted as operations make them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch

from benchmarks.sweeps.counting import peak_memory
from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.edits import BlockAttention, Edit, Scale
from hooked_vlm.metrics import Probability
from hooked_vlm.sweep import sweep
from tests.tiny_llava import hf_llava, prompts

SITE = "language_model.blocks.0.hook_mlp_out"
SIZE = 80
METRIC = Probability(torch.tensor([5]))

pytestmark = pytest.mark.usefixtures("unchecked")


@cache
def model(attention: AttentionImplementation = "sdpa") -> HookedVLM:
    return HookedVLM.from_hf(hf_llava(), attention=attention)


@cache
def inputs() -> VLMInputs:
    made = model()._inputs(prompts(hf_llava(), (1,), n_words=(SIZE - 16,)))
    assert made.input_ids is not None
    assert made.input_ids.shape == (1, SIZE)
    return made


def peak(sets: list[list[Edit]], batch_size: int, attention: AttentionImplementation = "sdpa") -> int:
    run = partial(sweep, model(attention), inputs(), sets, METRIC, batch_size=batch_size, progress=False)
    return peak_memory(run, "cpu")


def scaled(n_sets: int, position: int) -> list[list[Edit]]:
    return [[Scale(SITE, 1 + one / 100, positions=[position])] for one in range(n_sets)]


def blocked(n_sets: int, position: int) -> list[list[Edit]]:
    return [
        [BlockAttention("language_model.blocks.1.attn", positions=[position], keys=[one % 9])] for one in range(n_sets)
    ]


@pytest.mark.parametrize("kind", [scaled, blocked])
def test_memory_does_not_grow_with_the_number_of_sets(kind: Callable[[int, int], list[list[Edit]]]) -> None:
    """But for a set's own bookkeeping: its number, its mask of positions."""
    few, many, together = peak(kind(40, 50), 10), peak(kind(200, 50), 10), peak(kind(40, 50), 40)
    assert many - few < 160 * 2 * SIZE
    assert together - few > 5 * (many - few), "what does grow it is the size of a batch"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_memory_grows_no_faster_than_dirty_positions(attention: AttentionImplementation) -> None:
    """In a causal tower those from the first edited one on; keys and values of the others are nobody's own."""
    counts = [1, 5, 10, 20, 40, 80]
    peaks = [peak(scaled(8, SIZE - count), 8, attention) for count in counts]
    assert peaks == sorted(peaks)
    # So much a position, where what every wave costs is outgrown.
    slope = (peaks[2] - peaks[1]) / (counts[2] - counts[1])
    assert slope > 0
    for count, taken in zip(counts[3:], peaks[3:], strict=True):
        assert taken < 1.1 * (peaks[2] + slope * (count - counts[2])), f"{count} positions"


def test_a_set_costs_less_than_a_copy_of_the_base_run() -> None:
    """Its positions, not the whole sequence."""
    late = [peak(scaled(n_sets, SIZE - 2), n_sets) for n_sets in (8, 40)]
    whole = [peak(scaled(n_sets, 0), n_sets) for n_sets in (8, 40)]
    assert late[1] - late[0] < 0.1 * (whole[1] - whole[0])

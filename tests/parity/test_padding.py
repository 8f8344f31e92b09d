"""Padding changes nothing: a padded row gives what it gives alone; and where that is asked for, what HF gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm import HookedVLM
from tests.parity.hf_record import disagreements, hf_activations
from tests.parity.hf_repaired import cross_attention_masked
from tests.tiny_blip import DEC, hf_blip, inputs, padded_ids, padded_inputs, pixels

TASKS = ["vqa", "caption", "retrieval"]
MODES = [("vqa", {}), ("caption", {}), ("retrieval", {}), ("retrieval", {"use_itm_head": False})]

# A row alone is multiplied in matrices of other sizes than the same row in a batch, and its softmax sums fewer (zero)
# terms, so sums round differently: by units in the last place, a few dozen of them after five layers. Anything that
# read padding would show at 1e-2 and more (as the test of HF's way below asserts), in float64 as much as in float32.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-13}


def row_alone(batch: dict[str, Any], row: int) -> dict[str, Tensor]:
    """One row without its padding."""
    alone = {}
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in batch:
            alone[ids] = batch[ids][row : row + 1, : int(batch[mask][row].sum())]
    return alone | {"pixel_values": batch["pixel_values"][row : row + 1]}


def rows_and_alone(ours: HookedVLM, task: str, batch: dict[str, Any], **options: bool) -> list[tuple[Tensor, Tensor]]:
    """For each row, what the batch gives it and what it gives alone; at its own positions."""
    with torch.no_grad():
        together = ours(batch, **options)
        pairs = []
        for row in range(len(together)):
            alone = ours(row_alone(batch, row), **options)
            if task == "retrieval":
                pairs.append((together[row, [row]] if "use_itm_head" in options else together[row], alone[0]))
            else:
                pairs.append((together[row, : alone.shape[1]], alone[0]))
    return pairs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("task", "options"), MODES)
def test_a_padded_row_gives_what_it_gives_alone(task: str, options: dict, dtype: torch.dtype, attention: str) -> None:
    ours = HookedVLM.from_hf(hf_blip(task).to(dtype), attention=attention)
    for together, alone in rows_and_alone(ours, task, padded_inputs(task), **options):
        scale = float(alone.abs().max())
        torch.testing.assert_close(together, alone, rtol=0, atol=ROUNDING[dtype] * scale)


def test_hf_does_not_give_a_padded_row_what_it_gives_alone() -> None:
    """Why there is a choice, and why the tolerance above means something."""
    ours = HookedVLM.from_hf(hf_blip("vqa"), cross_attention_padding="hf")
    pairs = rows_and_alone(ours, "vqa", padded_inputs("vqa"))
    strayed = [float((together - alone).abs().max() / alone.abs().max()) for together, alone in pairs]
    assert strayed[1] < 1e-5  # the longest row has no padding
    assert min(strayed[0], strayed[2]) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_padded_batch_equals_hf_without_its_fault(pair, task: str, dtype: torch.dtype) -> None:
    """The default, to the bit: HF's own modules, with the mask put where HF lost it."""
    hf, ours = pair(task, dtype=dtype)
    batch = padded_inputs(task)
    with cross_attention_masked(hf):
        _, record = hf_activations(hf, task, batch)
    with torch.no_grad():
        logits, cache = ours.run_with_cache(batch)
        assert torch.equal(logits, ours(batch))
    assert not disagreements(cache, record)


@pytest.fixture(scope="module")
def vqa() -> tuple[Any, HookedVLM, HookedVLM]:
    hf = hf_blip("vqa")
    return hf, HookedVLM.from_hf(hf), HookedVLM.from_hf(hf, cross_attention_padding="hf")


@settings(max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_any_lengths(vqa, lengths: list[tuple[int, int]], seed: int) -> None:
    """Any mixture of question and answer lengths: HF's numbers in HF's way, and each row's own in ours."""
    hf, masked, as_hf = vqa
    torch.manual_seed(seed)
    ids, mask = padded_ids([question for question, _ in lengths])
    answer_ids, answer_mask = padded_ids([answer for _, answer in lengths], first=DEC)
    batch = {
        **{"pixel_values": pixels(len(lengths)), "input_ids": ids, "attention_mask": mask},
        **{"decoder_input_ids": answer_ids, "decoder_attention_mask": answer_mask},
    }
    _, record = hf_activations(hf, "vqa", batch)
    with torch.no_grad():
        assert torch.equal(as_hf(batch), record["answer_decoder.hook_logits"])
    for together, alone in rows_and_alone(masked, "vqa", batch):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("task", TASKS)
def test_a_mask_of_ones_is_no_mask(task: str) -> None:
    ours = HookedVLM.from_hf(hf_blip(task))
    batch = inputs(task, batch=2)
    mask = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        assert torch.equal(ours(batch), ours(batch | {"attention_mask": mask}))
        assert torch.equal(ours(batch), ours(batch | {"attention_mask": mask.bool().long()}))


@pytest.mark.parametrize("task", TASKS)
def test_what_stands_at_padded_positions_does_not_matter(task: str) -> None:
    ours = HookedVLM.from_hf(hf_blip(task))
    batch = padded_inputs(task)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)}
    with torch.no_grad():
        before, after = ours(batch), ours(other)
    if task == "caption":  # whose own positions the padded ones are
        keep = batch["attention_mask"].bool()
        before, after = before[keep], after[keep]
    assert torch.equal(before, after)

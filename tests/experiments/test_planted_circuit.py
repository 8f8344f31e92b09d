"""The trace must light the planted head's cell, what lies downstream of it, and nothing else."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hooked_vlm import VLMInputs, results
from hooked_vlm.corruptions import Corrupted
from hooked_vlm.edits import Replace
from hooked_vlm.experiments import causal_trace
from tests.experiments import planted


@dataclass(frozen=True)
class OtherColor:
    """The blue picture in place of the red one."""

    draws: int = 1

    def __call__(self, model: planted.HookedBlipVQA, clean: VLMInputs) -> Corrupted:
        return Corrupted(planted.planted_inputs("blue"))


@pytest.fixture(scope="module")
def model():
    return planted.planted_model()


@pytest.fixture(scope="module", params=["denoising", "noising"])
def traced(model, request):
    model._processor = _Words()
    return causal_trace(model, planted.planted_inputs("red"), OtherColor(), direction=request.param), request.param


class _Words:
    """As much of a processor as labels need."""

    class tokenizer:  # noqa: N801
        @staticmethod
        def convert_ids_to_tokens(ids):
            return [f"t{token_id}" for token_id in ids]


@torch.no_grad()
def test_the_circuit_answers(model):
    for color, token in (("red", planted.RED_TOKEN), ("blue", planted.BLUE_TOKEN)):
        assert planted.answer_logits(model, color).argmax() == token


def expected(tower: str, site: str, shape: tuple[int, int]) -> np.ndarray:
    """1 where the answer passes, 0 elsewhere: layers down, positions across."""
    cells = np.zeros(shape)
    layer, position = {
        "question_encoder": (planted.LAYER, planted.ASKING_POSITION),
        "answer_decoder": (planted.DECODER_LAYER, 0),
    }[tower]
    if site == "resid":
        cells[layer:, position] = 1
    if site == "cross_attn":
        cells[layer, position] = 1
    return cells


@pytest.mark.parametrize("tower", ["question_encoder", "answer_decoder"])
@pytest.mark.parametrize("site", ["resid", "attn", "cross_attn", "mlp"])
def test_only_the_planted_cells_light_up(traced, tower, site):
    result, direction = traced
    part = results.tower(result, tower).sel(site=site)
    for metric in ("probability", "logit_difference"):
        found = part.normalized.sel(metric=metric).transpose("layer", "position").values
        lit = expected(tower, site, found.shape)
        # A restored state brings the clean answer back; a spoilt one brings the corrupted answer.
        assert found == pytest.approx(lit if direction == "denoising" else 1 - lit, abs=1e-4)


@torch.no_grad()
def test_only_the_planted_head_carries_the_answer(model):
    clean, corrupted = planted.planted_inputs("red"), planted.planted_inputs("blue")
    _, cache = model.run_with_cache(clean)
    start, goal = model(corrupted), model(clean)
    for layer in range(planted.N_LAYERS):
        for head in range(planted.N_HEADS):
            site = f"question_encoder.blocks.{layer}.cross_attn.hook_z"
            patched = model.patch(corrupted, [Replace(site, cache, positions=planted.ASKING_POSITION, heads=head)])
            planted_here = (layer, head) == (planted.LAYER, planted.HEAD)
            assert torch.allclose(patched, goal if planted_here else start, atol=1e-4)

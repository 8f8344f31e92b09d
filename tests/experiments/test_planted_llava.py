"""In a LLaVA the trace must light the one patch, the word that reads it and the token that answers, each in its layers,
and nothing else."""

from dataclasses import dataclass

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from hooked_vlm import VLMInputs, results
from hooked_vlm.corruptions import Corrupted
from hooked_vlm.edits import BlockAttention, Replace
from hooked_vlm.experiments import causal_trace
from hooked_vlm.experiments.parts.sites import window
from hooked_vlm.plots import patch_trace_figure
from tests.experiments import planted_llava as planted

ALL, ALL_OF_IMAGE = -1, -2


@dataclass(frozen=True)
class OtherColor:
    """The blue picture in place of the red one."""

    draws: int = 1

    def __call__(self, model: planted.HookedLlava, clean: VLMInputs) -> Corrupted:
        return Corrupted(planted.planted_inputs("blue"))


class _Words:
    """As much of a processor as labels need."""

    class tokenizer:  # noqa: N801
        @staticmethod
        def convert_ids_to_tokens(ids):
            return [f"t{token_id}" for token_id in ids]


@pytest.fixture(scope="module")
def model():
    model = planted.planted_model()
    model._processor = _Words()
    return model


@pytest.fixture(scope="module", params=[("denoising", 1), ("noising", 1), ("denoising", 3)], ids=str)
def traced(model, request):
    direction, width = request.param
    clean, settings = planted.planted_inputs("red"), {"direction": direction, "width": width, "all_positions": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        return causal_trace(model, clean, OtherColor(), **settings), request.param


@torch.no_grad()
def test_the_circuit_answers(model):
    for color, token in (("red", planted.RED_TOKEN), ("blue", planted.BLUE_TOKEN)):
        assert planted.answer_logits(model, color).argmax() == token


def carries(site: str, layer: int, position: int) -> bool:
    """Whether the color is there and still needed, or passes there."""
    if position == ALL:
        return site == "resid" or (site == "attn" and layer in (planted.TO_QUESTION, planted.TO_ANSWER))
    steps = {
        planted.OBJECT_POSITION: (0, planted.TO_QUESTION),
        ALL_OF_IMAGE: (0, planted.TO_QUESTION),
        planted.ASKING_POSITION: (planted.TO_QUESTION, planted.TO_ANSWER),
        planted.LAST_POSITION: (planted.TO_ANSWER, planted.N_LAYERS),
    }
    first, beyond = steps.get(position, (0, 0))
    if site == "resid":
        return first <= layer < beyond
    return site == "attn" and layer == first and position in (planted.ASKING_POSITION, planted.LAST_POSITION)


@pytest.mark.parametrize("site", ["resid", "attn", "mlp"])
def test_only_the_planted_cells_light_up(traced, site):
    result, (direction, width) = traced
    part = results.tower(result, "language_model").sel(site=site)
    lit = np.array(
        [
            [
                any(carries(site, own, position) for own in window(layer, width, planted.N_LAYERS))
                for position in part.position.values.tolist()
            ]
            for layer in part.layer.values.tolist()
        ],
        dtype=float,
    )
    assert (lit.sum() > 0) == (site != "mlp")
    for metric in ("probability", "logit_difference"):
        found = part.normalized.sel(metric=metric).transpose("layer", "position").values
        # A restored state brings the clean answer back; a spoilt one brings the corrupted answer.
        assert found == pytest.approx(lit if direction == "denoising" else 1 - lit, abs=1e-4)


def test_the_figure_lights_the_object(traced):
    result, (_, width) = traced
    picture = Image.new("RGB", (planted.IMAGE, planted.IMAGE), "white")
    figure = patch_trace_figure(result.sel(site=["resid"]), picture)
    row, column = divmod(planted.OBJECT_PATCH, planted.IMAGE // planted.PATCH)
    for layer, axes in enumerate(figure.axes[: planted.N_LAYERS]):
        (patches,) = axes.collections
        patches.update_scalarmappable()
        opacity = patches.get_facecolor()[:, 3]
        is_lit = any(own < planted.TO_QUESTION for own in window(layer, width, planted.N_LAYERS))
        expected = np.zeros(planted.N_PATCHES)
        expected[planted.OBJECT_PATCH] = is_lit
        assert (opacity > 0.5).tolist() == expected.astype(bool).tolist()
        assert (opacity[expected == 0] < 0.01).all()
        corners = patches.get_paths()[planted.OBJECT_PATCH].get_extents()
        assert corners.bounds == (planted.PATCH * column, planted.PATCH * row, planted.PATCH, planted.PATCH)


@torch.no_grad()
def test_only_the_planted_heads_carry_the_answer(model):
    clean, corrupted = planted.planted_inputs("red"), planted.planted_inputs("blue")
    _, cache = model.run_with_cache(clean)
    start, goal = model(corrupted)[:, -1], model(clean)[:, -1]
    places = {planted.TO_QUESTION: planted.ASKING_POSITION, planted.TO_ANSWER: planted.LAST_POSITION}
    for layer in range(planted.N_LAYERS):
        for head in range(planted.N_HEADS):
            for position in places.values():
                site = f"language_model.blocks.{layer}.attn.hook_z"
                patched = model.patch(corrupted, [Replace(site, cache, positions=position, heads=head)])[:, -1]
                planted_here = head == planted.HEAD and places.get(layer) == position
                assert torch.allclose(patched, goal if planted_here else start, atol=1e-4)


@torch.no_grad()
def test_the_answer_is_lost_where_either_edge_is_cut(model):
    """Attention knockout finds the same two edges, each in its layer."""
    clean = planted.planted_inputs("red")
    whole, nothing = model(clean)[:, -1], torch.zeros(1, planted.D_VOCAB)
    edges = {
        planted.TO_QUESTION: (planted.ASKING_POSITION, "image"),
        planted.TO_ANSWER: ("last", planted.ASKING_POSITION),
    }
    for layer in range(planted.N_LAYERS):
        for query, key in (*edges.values(), ("last", "image")):
            site = f"language_model.blocks.{layer}.attn"
            cut = model.patch(clean, [BlockAttention(site, positions=query, keys=key)])[:, -1]
            is_lost = edges.get(layer) == (query, key)
            assert torch.allclose(cut, nothing if is_lost else whole, atol=1e-4), (layer, query, key)

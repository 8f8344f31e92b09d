"""What makes one position depend on others: edits that need all positions, and edits of what a query may read.

A plan that follows the model's own masks alone would miss them.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, HookPoint
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.edits import Add, BlockAttention, Edit, Function, Mean, Noise, Replace, Scale, Zero
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import LogitDifference
from hooked_vlm.sweep import sweep
from tests.models.modes import model_and_inputs
from tests.sweep.families import ATTENTION
from tests.sweep.one_at_a_time import assert_as_alone, distance

pytestmark = pytest.mark.usefixtures("unchecked")

ANSWER, FOIL = torch.tensor([5]), torch.tensor([8])


@cache
def made(mode: str, attention: AttentionImplementation = "sdpa") -> tuple[HookedVLM, VLMInputs]:
    model, inputs = model_and_inputs(mode, attention)
    return model, model._inputs(inputs)


@cache
def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def turned(activation: Tensor, hook: HookPoint) -> Tensor:
    return activation.flip(1)


def across(site: str) -> list[Edit]:
    """Edits that make of a number something of other positions'."""
    return [Function(site, turned), Noise(site, 0.3), Mean(site, over="p")]


@torch.no_grad()
def assert_read_as_alone(
    model: HookedVLM, inputs: VLMInputs, sets: list[list[Edit]], position: int, base: tuple[Edit, ...] = ()
) -> None:
    """By a metric that reads one position."""
    metric = LogitDifference(ANSWER, FOIL, position)
    swept = sweep(model, inputs, sets, metric, base=base, progress=False)
    alone = torch.stack([metric(model.patch(inputs, [*base, *edits])) for edits in sets])
    assert distance(swept, alone) <= 1e-5


SITES = {
    "vqa": ("hook_embed", "blocks.0.attn.hook_v", "blocks.1.hook_resid_mid", "ln_final.hook_normalized", "hook_logits"),
    "llava": (
        *("hook_merged_embed", "blocks.0.ln1.hook_normalized", "blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_z"),
        *("blocks.1.mlp.hook_post", "ln_final.hook_scale", "hook_out", "hook_logits"),
    ),
}


@pytest.mark.parametrize(("mode", "end"), [(mode, end) for mode in SITES for end in SITES[mode]])
def test_edits_that_need_all_positions(mode: str, end: str) -> None:
    """Where they are, in a set or in the base, all positions are at hand, whatever the metric reads."""
    model, inputs = made(mode)
    tower = model.towers[-1]
    early = Add(f"{tower}.blocks.0.attn.hook_q", drawn(12), positions=1)
    late = Add(f"{tower}.blocks.1.hook_mlp_out", drawn(model.get_submodule(tower).config.d_model), positions=0)
    for whole in (*across(f"{tower}.{end}"), Function(f"{tower}.{end}", turned, positions=-1)):
        sets = [[whole], [early, whole], [late, whole], [late]]
        assert_as_alone(model, inputs, sets)
        assert_read_as_alone(model, inputs, sets[:2], -1)
        assert_read_as_alone(model, inputs, [[early], [late]], -1, base=(whole,))


@pytest.mark.parametrize("end", ["hook_k", "hook_v"])
@pytest.mark.parametrize(
    ("tower", "other"), [("question_encoder", "vision_encoder"), ("answer_decoder", "question_encoder")]
)
def test_edits_that_need_all_positions_of_another_tower(tower: str, other: str, end: str) -> None:
    """Also where no more than one of them is changed."""
    model, inputs = made("vqa")
    site = f"{tower}.blocks.1.cross_attn.{end}"
    one = Add(f"{other}.blocks.1.hook_mlp_out", drawn(36), positions=2)
    for whole in across(site):
        assert_as_alone(model, inputs, [[one], [one, Zero(site, positions=1)]], base=(whole,))
        assert_as_alone(model, inputs, [[one, whole], [whole], [one], [Add(site, drawn(12), positions=2)]])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_queries_that_are_made_to_read_later_keys(point: str, attention: AttentionImplementation) -> None:
    """In a causal tower a mask says which keys a query reads; scores and patterns that are put in need not heed it."""
    model, inputs = made("llava", attention)
    n = inputs.input_ids.shape[1]  # type: ignore[union-attr]
    site = f"language_model.blocks.1.attn.{point}"
    values = drawn(1, 4, n, n)
    ahead = Replace(site, values.softmax(-1) if point == "hook_pattern" else values)
    one_ahead = Replace(site, ahead.source, positions=2, neurons=[n - 1, 1])
    late = Add("language_model.blocks.0.hook_resid_post", drawn(48), positions=n - 1)
    key = Add("language_model.blocks.1.attn.hook_v", drawn(12), positions=n - 1)
    for edit in (ahead, one_ahead):
        sets: list[list[Edit]] = [[edit], [edit, late], [late, edit], [edit, key], [late], [key]]
        based: list[list[Edit]] = [[late], [key], [Zero("language_model.blocks.1.hook_mlp_out", positions=2)], []]
        assert_as_alone(model, inputs, sets)
        assert_as_alone(model, inputs, based, base=(edit,))
        for position in (2, -1):
            assert_read_as_alone(model, inputs, sets, position)
            assert_read_as_alone(model, inputs, based, position, base=(edit,))


LAYERS = {
    "vqa": ("vision_encoder.blocks.1.attn", "question_encoder.blocks.0.cross_attn", "answer_decoder.blocks.1.attn"),
    "llava": ("language_model.blocks.0.attn", "language_model.blocks.1.attn"),
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("mode", "layer"), [(mode, layer) for mode in LAYERS for layer in LAYERS[mode]])
def test_knockouts_beside_other_edits_of_what_is_read(
    mode: str, layer: str, attention: AttentionImplementation
) -> None:
    """Queries that are left nothing to read get nothing; also twice over, and whichever edit comes first."""
    model, inputs = made(mode, attention)
    some, dead = BlockAttention(layer, positions=[1, 2], keys=[0]), BlockAttention(layer, positions=1, heads=[0, 1])
    rest = BlockAttention(layer, positions=1, keys=[0, 1])
    scores = Scale(f"{layer}.hook_attn_scores", 0.5, positions=[0, 1])
    pattern = Add(f"{layer}.hook_pattern", 0.1, positions=1)
    other = Zero(f"{layer}.hook_q", positions=2, heads=0)
    earlier = Add(layer.replace(".1.", ".0.").rsplit(".", 1)[0] + ".hook_resid_pre", 0.5, positions=1, neurons=[0, 3])
    sets: list[list[Edit]] = [
        *([some], [dead], [some, some], [dead, dead], [some, rest], [some, dead, earlier]),
        *([some, scores], [scores, some], [some, some, scores], [dead, scores], [scores, dead]),
        *([dead, pattern], [pattern, dead], [dead, dead, pattern], [dead, scores, pattern, some, other]),
        *([scores], [pattern], [other], [earlier], []),
    ]
    assert_as_alone(model, inputs, sets)
    for base in (dead, scores):
        assert_as_alone(model, inputs, [[some, scores], [dead, pattern], [other], [earlier]], base=(base,))


@pytest.mark.parametrize("mode", ["vqa", "llava", "vit"])
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
@torch.no_grad()
def test_numbers_that_overflow_stay_in_their_set(mode: str, wrong: float) -> None:
    """As in half precision where a steering vector is too long."""
    model, inputs = made(mode)
    tower = model.towers[-1]
    site, values = f"{tower}.blocks.0.hook_mlp_out", f"{tower}.blocks.1.attn.hook_v"
    _, cache = model.run_with_cache(inputs, names_filter=site)
    n = cache[site].shape[1]
    sets: list[list[Edit]] = [[Add(site, wrong, positions=0)]]
    for first in range(n):
        sets += [
            [Add(site, 0.5, positions=[*range(first, n)], neurons=0)],
            [Add(values, 0.5, positions=first, heads=0)],
        ]
    assert_as_alone(model, inputs, sets, may_overflow=True)
    assert_as_alone(model, inputs, sets[::-1], may_overflow=True)

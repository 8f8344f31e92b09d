"""Identities that right attributions satisfy, what they cost, and their errors."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from hooked_vlm import results
from hooked_vlm.analysis import atp, compare_nodes, eap
from hooked_vlm.analysis.nodes import GROUPS
from hooked_vlm.corruptions import AdditiveGaussian, PixelNoise, Scaled
from tests.analysis.pairs import Given, first_less_second, linear, pair, toy
from tests.tiny_llava import hf_llava, prompts
from tests.tiny_runs import n_hooks

pytestmark = pytest.mark.usefixtures("unchecked")
NAMES = ("blip", "caption", "retrieval", "llava", "vit", "clip")
EVERY = tuple(GROUPS)


@pytest.fixture(scope="module", params=NAMES)
def scored(request):
    made = pair(request.param)
    return made, atp(*made.all, nodes=EVERY)


def close(one, other, within: float = 1e-4) -> bool:
    one, other = np.asarray(one, float), np.asarray(other, float)
    return np.allclose(one, other, atol=within * max(1.0, np.nanmax(np.abs(other))), equal_nan=True)


def test_every_node_of_every_tower_has_a_score(scored):
    made, result = scored
    with_blocks = [name for name in made.model.towers if hasattr(made.model.get_submodule(name), "blocks")]
    assert bool(result.resid_post.sel(tower=with_blocks).notnull().any(["layer", "position"]).all())
    assert all(bool((result[kind] != 0).any()) for kind in ("attn_out", "mlp_out", "z", "v", "mlp_post", "pattern"))
    assert list(result.tower.values) == [name for name in made.model.towers if name in result.tower.values]


def test_the_same_inputs_score_nothing(scored):
    made, _ = scored
    result = atp(made.model, made.clean, Given(made.clean), made.metric, nodes=EVERY)
    assert all(float(abs(result[kind]).max()) == 0 for kind in result.data_vars if kind not in ("clean", "corrupted"))


def test_parts_sum_to_what_they_make_up(scored):
    """Heads to their attention's output, neurons to their MLP's: biases do not change."""
    _, result = scored
    assert close(result.z.sum("head"), result.attn_out.fillna(0))
    assert close(result.mlp_post.sum("neuron"), result.mlp_out.fillna(0))
    if "cross_z" in result:
        assert close(result.cross_z.sum("head"), result.cross_attn_out.fillna(0))


def test_rows_are_scored_as_alone(scored):
    made, result = scored
    assert isinstance(made.corruption, Given)
    row = atp(made.model, made.clean.rows([1]), Given(made.corruption.inputs.rows([1])), made.metric, nodes=EVERY)
    assert all(close(row[kind].isel(sample=0), result[kind].isel(sample=1)) for kind in row.data_vars)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["vit", "blip"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_linear_model_is_patched_exactly(name, direction, monkeypatch):
    made = linear(name, monkeypatch)
    kinds = ["resid", "sublayers", "heads", "v", "q", "neurons", "full_embed"]
    compared = compare_nodes(*made.all, nodes=kinds, direction=direction, n=8)
    assert close(compared.approximate, compared.exact)
    assert float(abs(compared.exact).max()) > 0.1


def test_a_node_that_only_linear_maps_follow_is_patched_exactly():
    """The language model's last states: logits are a matrix times them."""
    made = pair("llava")
    compared = compare_nodes(*made.all, nodes="out", towers=["language_model"])
    assert close(compared.approximate, compared.exact)


def test_a_small_change_is_patched_nearly_exactly():
    made = toy("toy-blip-vqa")
    for direction in ("noising", "denoising"):
        result = atp(made.model, made.clean, Scaled(0.999), made.metric, nodes="out", direction=direction)
        whole = float(result.out.sel(tower="vision_encoder").sum())
        effect = (result.corrupted - result.clean).item() * (1 if direction == "noising" else -1)
        assert abs(whole - effect) < 0.02 * abs(effect)


def test_costs_two_forwards_and_a_backward(monkeypatch):
    made = pair("blip")
    calls = {"forward": 0, "backward": 0}
    forward, grad = type(made.model).forward, torch.autograd.grad

    def counted_forward(self, *args, **options):
        calls["forward"] += 1
        return forward(self, *args, **options)

    def counted_grad(*args, **options):
        calls["backward"] += 1
        return grad(*args, **options)

    monkeypatch.setattr(type(made.model), "forward", counted_forward)
    monkeypatch.setattr(torch.autograd, "grad", counted_grad)
    atp(*made.all, nodes=EVERY, qk_fix=True)
    assert calls == {"forward": 2, "backward": 1}
    atp(*made.all, grad_drop=True)
    n_layers = sum(made.model.get_submodule(tower).config.n_layers for tower in made.model.towers)
    assert calls == {"forward": 4, "backward": 1 + n_layers}


def test_leaves_the_model_as_it_was():
    made = pair("blip")
    trained = [parameter.requires_grad for parameter in made.model.parameters()]
    atp(*made.all)
    with pytest.raises(ValueError, match="differentiated"):
        atp(made.model, made.clean, made.corruption, lambda logits: logits[:, 0].argmax(-1).float())
    assert [parameter.requires_grad for parameter in made.model.parameters()] == trained
    assert all(parameter.grad is None for parameter in made.model.parameters())
    assert n_hooks(made.model) == 0


def test_frozen_parameters_and_fused_attention_change_nothing():
    made = pair("blip")
    expected = atp(*made.all, nodes=EVERY)
    model = deepcopy(made.model).requires_grad_(False)
    model.attention = "sdpa" if made.model.attention == "eager" else "eager"
    other = atp(model, made.clean, made.corruption, made.metric, nodes=EVERY)
    assert all(close(other[kind], expected[kind]) for kind in expected.data_vars)


def test_draws_are_averaged():
    made = toy("toy-blip-vqa")
    result = atp(made.model, made.clean, AdditiveGaussian(draws=3), made.metric)
    logits = made.model(made.clean)
    assert close(result.clean, made.metric(logits).detach())
    assert result.sizes["sample"] == 1
    before = result.resid_post.sel(tower="vision_encoder")
    assert float(abs(before).max()) == 0, "noise is added after the vision encoder"


def test_results_are_saved_with_their_provenance(tmp_path):
    made = toy("toy-llava")
    result = atp(*made.all, direction="denoising", qk_fix=True)
    results.save(result, tmp_path / "atp.nc")
    assert results.load(tmp_path / "atp.nc").equals(result)
    assert result.attrs["method"] == "atp_star"
    assert result.attrs["direction"] == "denoising"
    assert result.token.sel(tower="language_model").values[0, -1] == "ASSISTANT:"


@pytest.mark.usefixtures("unchecked")
def test_errors():
    made = pair("blip")
    with pytest.raises(ValueError, match="no nodes are called mlp.*neurons"):
        atp(*made.all, nodes="mlp")
    with pytest.raises(ValueError, match="no tower 'decoder'; this model has vision_encoder"):
        atp(*made.all, towers=["decoder"])
    with pytest.raises(ValueError, match="vision_encoder have no cross_z"):
        atp(*made.all, nodes="cross_z", towers=["vision_encoder"])
    with pytest.raises(ValueError, match="'noising' or 'denoising', not 'forwards'"):
        atp(*made.all, direction="forwards")
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        atp(*made.all)
    with pytest.raises(ValueError, match=r"one number a row, \[2\]; it is \[2, 99\]"):
        atp(made.model, made.clean, made.corruption, lambda logits: logits[:, -1])


def test_several_pictures_a_row_leave_the_vision_encoder_out():
    made = pair("llava")
    inputs = made.model._inputs(prompts(hf_llava(), [2, 1]))
    with pytest.raises(ValueError, match="one picture a row"):
        atp(made.model, inputs, Given(inputs), first_less_second)
    result = atp(made.model, inputs, Given(inputs), first_less_second, towers=["language_model"])
    assert result.sizes["sample"] == 2


def test_rows_without_a_picture_have_no_nodes_of_one():
    made = pair("llava")
    words, others = (made.model._inputs({"input_ids": torch.randint(3, 90, (2, 6))}) for _ in range(2))
    result = atp(made.model, words, Given(others), first_less_second)
    assert list(result.tower.values) == ["language_model"]
    scores = eap(made.model, words, Given(others), first_less_second)
    assert scores.graph.towers == ("language_model",)
    with pytest.raises(ValueError, match="sees no picture"):
        atp(made.model, words, Given(others), first_less_second, towers=["vision_encoder"])


def test_draws_of_a_model_in_which_rows_meet():
    made = pair("clip")
    with pytest.raises(ValueError, match="HookedClip compares every image with every text"):
        atp(made.model, made.clean, PixelNoise(draws=2), made.metric)

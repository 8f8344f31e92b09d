"""Approximations held against exact patching, on the trained toys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_vlm.analysis import compare_edges, compare_nodes, eap, worst
from hooked_vlm.corruptions import AdditiveGaussian
from hooked_vlm.edits import Replace
from tests.analysis.pairs import pair, toy

TOYS = ("toy-blip-vqa", "toy-llava")
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("name", TOYS)
def test_nodes_of_a_toy(name):
    compared = compare_nodes(*toy(name).all, nodes=["sublayers", "heads"], n=25)
    of_all = compared.sel(group="all")
    assert float(of_all.rank_correlation) > 0.5
    assert float(of_all.same_sign) > 0.7
    assert int(of_all.n_effects) == int(compared.n_effects[:-1].sum()) == compared.sizes["node"]
    assert int(compared.n_effects.sel(group="z")) == 25


@pytest.mark.parametrize(
    ("name", "method"), [("toy-blip-vqa", "eap"), ("toy-llava", "eap"), ("toy-llava", "ig_activations")]
)
def test_edges_of_a_toy(name, method):
    compared = compare_edges(eap(*toy(name).all, method=method, steps=1), n=100)
    assert float(compared.rank_correlation.sel(group="all")) > 0.5
    assert compared.sizes["edge"] == 100


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_exact_effects_are_those_of_the_patched_runs(direction):
    made = toy("toy-llava")
    kinds = ["z", "k", "mlp_post", "pattern", "resid_pre", "full_embed"]
    compared = compare_nodes(*made.all, nodes=kinds, direction=direction, n=3)
    runs = made.runs
    start, source = runs.directed(direction)
    (before, _), (_, cache) = runs.activations(start, None), runs.activations(source, None)
    for node in range(compared.sizes["node"]):
        at = {name: compared[name].values[node] for name in ("kind", "tower", "layer", "position", "head", "kv_head")}
        at |= {name: compared[name].values[node] for name in ("neuron", "query", "key")}
        ending = {"mlp_post": "mlp.hook_post", "z": "attn.hook_z", "k": "attn.hook_k", "pattern": "attn.hook_pattern"}
        ending = ending.get(at["kind"], f"hook_{at['kind']}")
        site = f"{at['tower']}.{ending}" if at["layer"] < 0 else f"{at['tower']}.blocks.{at['layer']}.{ending}"
        chosen = {"positions": int(max(at["position"], at["query"]))}
        if at["kind"] in ("z", "k", "pattern"):
            chosen["heads"] = int(max(at["head"], at["kv_head"]))
        if at["kind"] in ("mlp_post", "pattern"):
            chosen["neurons"] = int(max(at["neuron"], at["key"]))
        with torch.no_grad():
            patched = made.metric(made.model.patch(start.inputs, [Replace(site, cache, **chosen)]))
        assert abs(compared.exact.values[node, 0] - float(patched - before)) < 1e-4


def test_cross_attentions_keys_are_patched_at_the_other_towers_positions():
    made = toy("toy-blip-vqa")
    compared = compare_nodes(*made.all, nodes=["cross_v"], towers=["question_encoder"], n=40)
    assert int(compared.key.max()) > 8
    assert float(compared.rank_correlation.sel(group="cross_v")) > 0.8


def test_the_attention_fix_brings_queries_and_keys_nearer():
    made = toy("toy-blip-vqa")
    plain, fixed = (compare_nodes(*made.all, nodes=["q", "k"], n=60, qk_fix=fix) for fix in (False, True))
    errors = [float(abs(compared.approximate - compared.exact).max()) for compared in (plain, fixed)]
    assert errors[1] < 0.5 * errors[0]
    assert float(fixed.rank_correlation.sel(group="all")) > 0.9


def test_grad_drop_is_compared_in_absolute_effects():
    compared = compare_nodes(*toy("toy-llava").all, nodes="attn_out", n=30, grad_drop=True)
    assert bool((compared.exact >= 0).all())
    assert float(compared.rank_correlation.sel(group="all")) > 0.5


def test_draws_and_rows():
    made = toy("toy-blip-vqa")
    noise = AdditiveGaussian(draws=2)
    compared = compare_nodes(
        made.model, made.clean, noise, made.metric, nodes="mlp_out", towers=["question_encoder"], n=5
    )
    edges = compare_edges(eap(made.model, made.clean, noise, made.metric, direction="denoising"), n=5)
    assert compared.exact.shape == (5, 1)
    assert edges.exact.shape == (5, 1)
    assert compare_nodes(*pair("vit").all, nodes="mlp_out", n=4).exact.shape == (4, 2)


def test_worst_are_the_largest_errors():
    compared = compare_nodes(*toy("toy-llava").all, nodes="sublayers", n=30)
    wrong = worst(compared, 5)
    errors = np.sort(abs(compared.approximate - compared.exact).values[:, 0])[::-1]
    np.testing.assert_allclose(wrong.error, errors[:5])
    assert list(wrong.to_dataframe().columns[:1]) == ["approximate"]
    edges = worst(compare_edges(eap(*toy("toy-llava").all), n=30), 3)
    assert edges.sizes["edge"] == 3

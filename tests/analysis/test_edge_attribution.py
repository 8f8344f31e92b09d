"""Identities of edge scores: with nodes, with gradients, with small differences, and of their integrals."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from einops import einsum

from hooked_vlm.analysis import atp, eap
from hooked_vlm.analysis.edge_patching import patch_each_edge
from hooked_vlm.analysis.graph import Senders
from hooked_vlm.corruptions import AdditiveGaussian
from hooked_vlm.edits import Replace
from tests.analysis.pairs import Given, linear, nearby, pair, toy
from tests.tiny_llava import hf_llava, prompts
from tests.tiny_runs import n_hooks

pytestmark = pytest.mark.usefixtures("unchecked")
NAMES = ("blip", "caption", "retrieval", "llava", "vit", "clip")


@pytest.fixture(scope="module", params=NAMES)
def scored(request):
    made = pair(request.param)
    return made, eap(*made.all)


def test_sizes_of_the_graph_are_those_of_its_formula():
    """n_fwd = 1 + L(H + 1), n_bwd = L(3H + 1) + 1, and |E| as in the paper's code."""
    made = pair("vit")
    graph = eap(*made.all).graph
    n_layers, n_heads = 3, 3
    before = [1 + layer * (n_heads + 1) for layer in range(n_layers + 1)]
    n_edges = sum(3 * n_heads * n + n + n_heads for n in before[:-1]) + before[-1]
    assert graph.edges.shape == (1 + n_layers * (n_heads + 1), n_layers * (3 * n_heads + 1) + 1)
    assert int(graph.edges.sum()) == n_edges
    assert graph.senders[:2] == ("vision_encoder.embed", "vision_encoder.L0.attn.H0")
    assert graph.receivers[-1] == "vision_encoder.out"
    assert repr(graph) == f"Graph(vision_encoder: 13 senders, {n_edges} edges)"


def test_the_same_inputs_score_nothing(scored):
    made, _ = scored
    scores = eap(made.model, made.clean, Given(made.clean), made.metric)
    assert not scores.values.any()


def test_edges_from_a_node_sum_to_the_node(scored):
    """All that a node does goes along its edges: heads, MLPs and inputs, of pre-LN and of post-LN towers."""
    made, scores = scored
    nodes = atp(*made.all, nodes=["heads", "mlp_out", "full_embed", "merged_embed", "out"])
    sums = scores.values.sum(2)
    for column, sender in enumerate(scores.graph.senders):
        if sender == "projector":
            inputs = [scores.graph.senders.index(name) for name in ("projector", "language_model.embed")]
            own = sums[:, inputs].sum(1)
            expected = nodes.merged_embed.sel(tower="language_model").sum("position")
        elif sender.endswith(".embed"):
            tower = sender.split(".")[0]
            if tower == "language_model":
                continue
            own, expected = sums[:, column], nodes.full_embed.sel(tower=tower).sum("position")
        else:
            tower, layer, *rest = sender.split(".")
            own, layer = sums[:, column], int(layer[1:])
            if rest == ["mlp"]:
                expected = nodes.mlp_out.sel(tower=tower, layer=layer).sum("position")
            else:
                kind = {"attn": "z", "cross_attn": "cross_z"}[rest[0]]
                expected = nodes[kind].sel(tower=tower, layer=layer, head=int(rest[1][1:])).sum("position")
        torch.testing.assert_close(own, torch.tensor(expected.values), rtol=1e-3, atol=1e-4 * float(sums.abs().max()))


def test_edges_into_a_head_sum_to_the_change_of_what_it_reads():
    """In a pre-LN tower: the stream's change is the sum of its senders', and gradients are those of each head's copy.

    Keys and values are shared by two heads each in this LLaVA.
    """
    made = pair("llava")
    scores = eap(*made.all)
    place = "language_model.blocks.1"
    copies = [f"{place}.hook_{kind}_input" for kind in "qkv"]
    names = [f"{place}.hook_resid_pre", f"{place}.hook_resid_mid", f"{place}.hook_mlp_in", *copies]
    with torch.enable_grad():
        _, clean = made.model.run_with_cache(
            made.clean, names_filter=names, incl_bwd=lambda logits: made.metric(logits).sum()
        )
    made.model.zero_grad(set_to_none=True)
    _, other = made.runs.activations(made.runs.corrupted, names)
    change = other[f"{place}.hook_resid_pre"] - clean[f"{place}.hook_resid_pre"]
    receivers = list(scores.graph.receivers)
    for kind, letter, n in (("q", "H", 4), ("k", "KV", 2), ("v", "KV", 2)):
        expected = einsum(change, clean[f"{place}.hook_{kind}_input_grad"], "b p m, b p h m -> b h")
        columns = [receivers.index(f"language_model.L1.attn.{letter}{head}.{kind}") for head in range(n)]
        torch.testing.assert_close(scores.values[:, :, columns].sum(1), expected, rtol=1e-3, atol=1e-4)
    mid = other[f"{place}.hook_resid_mid"] - clean[f"{place}.hook_resid_mid"]
    expected = (mid * clean[f"{place}.hook_mlp_in_grad"]).sum((1, 2))
    own = scores.values[:, :, receivers.index("language_model.L1.mlp")].sum(1)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "first"), [("blip", 1e-4), ("llava", 1e-2)])
def test_a_small_change_is_patched_exactly(name, first):
    """Every edge, through LayerNorms and across towers: the score is the derivative of patching the edge.

    LLaVA's language model computes norms in single precision, whatever it is given: its steps are larger.
    """
    errors = []
    for step in (first, first / 10):
        made = nearby(pair(name, rows=1), step)
        scores = eap(*made.all)
        runs, graph = made.runs, scores.graph
        torch.manual_seed(3)
        edges = graph.edges.nonzero()
        edges = edges[torch.randperm(len(edges))[:150]]
        (before, _), (_, source) = (runs.activations(run, graph.names) for run in (runs.clean, runs.corrupted))
        effects = (patch_each_edge(runs, runs.clean, source, graph, edges, batch=150) - before)[:, 0]
        approximate = scores.values[0, edges[:, 0], edges[:, 1]]
        errors.append(float((effects - approximate).abs().max() / effects.abs().max()))
    assert errors[1] < 2e-2
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("name", ["vit", "blip"])
def test_a_linear_model_is_patched_exactly(name, monkeypatch):
    made = linear(name, monkeypatch)
    scores = eap(*made.all)
    runs, graph = made.runs, scores.graph
    edges = graph.edges.nonzero()
    edges = edges[torch.randperm(len(edges))[:100]]
    (before, _), (_, source) = (runs.activations(run, graph.names) for run in (runs.clean, runs.corrupted))
    effects = patch_each_edge(runs, runs.clean, source, graph, edges) - before
    approximate = scores.values[:, edges[:, 0], edges[:, 1]].T
    torch.testing.assert_close(approximate, effects, rtol=1e-3, atol=1e-4 * float(effects.abs().max()))


@pytest.mark.parametrize(("name", "direction"), [("toy-blip-vqa", "noising"), ("toy-llava", "denoising")])
def test_integrals_over_inputs_are_complete(name, direction):
    """What leaves the inputs sums to the metric's change, within 2 per cent."""
    made = toy(name)
    scores = eap(*made.all, method="ig_inputs", steps=20, direction=direction)
    nodes = atp(*made.all, nodes="out")
    change = (nodes.corrupted - nodes.clean).item() * (1 if direction == "noising" else -1)
    assert abs(float(scores.values[0, scores.graph.is_input].sum()) - change) < 0.02 * abs(change)


def test_integrals_over_the_language_models_own_inputs_are_complete():
    """The image's embeddings are an input where the vision encoder is left out, and interpolated with the words'."""
    made = toy("toy-llava")
    scores = eap(*made.all, method="ig_inputs", steps=20, towers=["language_model"])
    nodes = atp(*made.all, nodes="out")
    change = (nodes.corrupted - nodes.clean).item()
    inputs = [scores.graph.senders[place] for place in scores.graph.is_input.nonzero().flatten().tolist()]
    assert inputs == ["projector", "language_model.embed"]
    assert abs(float(scores.values[0, scores.graph.is_input].sum()) - change) < 0.02 * abs(change)


def test_integrals_over_activations_are_complete():
    """Each group of senders that is moved together: the sum is the effect of patching the group."""
    made = toy("toy-llava")
    scores = eap(*made.all, method="ig_activations", steps=6, towers=["language_model"])
    runs, graph = made.runs, scores.graph
    before, _ = runs.activations(runs.clean, graph.names)
    _, source = runs.activations(runs.corrupted, graph.names)
    for senders in graph.stages(Senders):
        with torch.no_grad():
            patched = made.metric(made.model.patch(made.clean, [Replace(senders.site, source)]))
        effect = float(patched - before)
        total = float(scores.values[0, graph.columns(senders)].sum())
        assert abs(total - effect) < 0.02 * max(1.0, abs(effect)), senders.site


def test_left_and_right_rules_converge():
    made = pair("llava")
    distances = []
    for steps in (2, 12):
        left, right = (eap(*made.all, method="ig_inputs", steps=steps, rule=rule).values for rule in ("left", "right"))
        distances.append(float((left - right).abs().max()))
        middle = eap(*made.all, method="ig_inputs", steps=steps).values
    assert distances[1] < 0.2 * distances[0]
    assert float((middle - (left + right) / 2).abs().max()) < 2 * distances[1]


def test_rules_are_of_the_way_from_corrupted_to_clean():
    """One step: the left end is the corrupted inputs, the right end the clean ones, in both directions."""
    made = pair("blip")
    clean = eap(*made.all)
    for direction in ("noising", "denoising"):
        right = eap(*made.all, method="ig_inputs", steps=1, rule="right", direction=direction).values
        sign = 1 if direction == "noising" else -1
        torch.testing.assert_close(right, sign * clean.values, rtol=1e-3, atol=1e-4)
    left = eap(*made.all, method="ig_inputs", steps=1, rule="left").values
    torch.testing.assert_close(left, -eap(*made.all, direction="denoising").values, rtol=1e-3, atol=1e-4)


def test_clean_corrupted_is_the_mean_of_both_ends():
    made = pair("llava")
    noising, denoising = (eap(*made.all, direction=direction).values for direction in ("noising", "denoising"))
    both = eap(*made.all, method="clean_corrupted").values
    torch.testing.assert_close(both, (noising - denoising) / 2, rtol=1e-4, atol=1e-5)


def test_costs_two_forwards_and_a_backward(monkeypatch):
    made = pair("blip")
    forward, n = type(made.model).forward, []

    def counted(self, *args, **options):
        n.append(torch.is_grad_enabled())
        return forward(self, *args, **options)

    monkeypatch.setattr(type(made.model), "forward", counted)
    eap(*made.all)
    assert n == [False, True]
    n.clear()
    eap(*made.all, method="ig_inputs", steps=3)
    assert n == [False, False, True, True, True]
    assert n_hooks(made.model) == 0
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_what_is_read_of_a_tower_that_is_left_out_is_an_input():
    """As under noise on the image embeddings, which is added after the vision encoder: left out by itself."""
    made = toy("toy-blip-vqa")
    corruption = AdditiveGaussian(draws=2)
    scores = eap(made.model, made.clean, corruption, made.metric)
    assert scores.graph.towers == ("question_encoder", "answer_decoder")
    assert scores.graph.senders[0] == "vision_encoder.out"
    assert scores.values.shape[0] == 1
    node = atp(made.model, made.clean, corruption, made.metric, nodes="out").out.sel(tower="vision_encoder").sum()
    torch.testing.assert_close(scores.values[0, 0].sum(), torch.tensor(node.item()), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="edits vision_encoder.hook_out, which is not before the graph.*towers"):
        eap(made.model, made.clean, corruption, made.metric, towers=made.model.towers)


@pytest.mark.parametrize("site", ["projector.hook_out", "language_model.hook_merged_embed", "vision_encoder.hook_out"])
def test_noise_between_llavas_towers_leaves_the_language_model(site):
    made = toy("toy-llava")
    scores = eap(made.model, made.clean, AdditiveGaussian(draws=1, site=site), made.metric, method="ig_inputs", steps=2)
    assert scores.graph.towers == ("language_model",)
    assert scores.values[0, 0].any(), "the projector's edges"
    with pytest.raises(ValueError, match=f"edits {site}"):
        eap(made.model, made.clean, AdditiveGaussian(draws=1, site=site), made.metric, towers=made.model.towers)


def test_results_are_labelled():
    made = toy("toy-llava")
    result = eap(*made.all, method="ig_inputs", steps=2).dataset()
    edge = result.score.sel(sender="projector", receiver="language_model.L1.attn.H1.v")
    assert abs(edge).item() > 0
    assert int(result.score.notnull().sum()) == 1089
    assert result.attrs["method"] == "ig_inputs"
    assert (result.attrs["steps"], result.attrs["rule"]) == (2, "midpoint")
    assert result.receiver_kind.sel(receiver="projector") == "out"


def test_errors():
    made = pair("llava")
    with pytest.raises(ValueError, match="method must be one of eap, ig_inputs, .*, not 'exact'"):
        eap(*made.all, method="exact")
    with pytest.raises(ValueError, match="rule must be one of left, midpoint, right, not 'middle'"):
        eap(*made.all, method="ig_inputs", rule="middle")
    with pytest.raises(ValueError, match="at least one step, not 0"):
        eap(*made.all, method="ig_inputs", steps=0)
    with pytest.raises(ValueError, match="a tower with layers"):
        eap(*made.all, towers=["projector"])
    with pytest.raises(ValueError, match="vision_encoder and answer_decoder do not follow each other"):
        eap(*pair("blip").all, towers=["vision_encoder", "answer_decoder"])
    several = deepcopy(made.model)
    several.vision_encoder.config = replace(several.vision_encoder.config, feature_layers=(1, 3))
    with pytest.raises(ValueError, match=r"vision_encoder is read at layers \[1, 3\] together"):
        eap(several, made.clean, made.corruption, made.metric)
    inputs = made.model._inputs(prompts(hf_llava(), [2, 1]))
    with pytest.raises(ValueError, match="one picture a row"):
        eap(made.model, inputs, Given(inputs), made.metric)

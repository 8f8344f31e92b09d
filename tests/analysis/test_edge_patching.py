"""Edges patched exactly, against the same by hand."""

from __future__ import annotations

import pytest
import torch

from hooked_vlm.analysis.edge_patching import patch_each_edge, patch_edges
from hooked_vlm.analysis.graph import build_graph
from tests.analysis.pairs import pair

NAMES = ("blip", "caption", "retrieval", "llava", "vit", "clip")


def given(name):
    made = pair(name)
    runs, graph = made.runs, build_graph(made.model, made.model.towers)
    clean, here = runs.activations(runs.clean, None)
    corrupted, source = runs.activations(runs.corrupted, None)
    return made, runs, graph, here, source, clean, corrupted


def one_edge(graph, sender, receiver):
    edges = torch.zeros_like(graph.edges)
    edges[graph.senders.index(sender), graph.receivers.index(receiver)] = True
    assert bool((edges & graph.edges).any())
    return edges


@torch.no_grad()
def by_hand(made, name, fn):
    return made.metric(made.model.run_with_hooks(made.clean, fwd_hooks=[(name, fn)]))


@pytest.mark.parametrize("name", NAMES)
def test_all_edges_give_the_corrupted_run_and_none_the_clean_one(name):
    _, runs, graph, _, source, clean, corrupted = given(name)
    assert torch.equal(patch_edges(runs, runs.clean, source, graph, torch.zeros_like(graph.edges)), clean)
    patched = patch_edges(runs, runs.clean, source, graph, graph.edges)
    torch.testing.assert_close(patched, corrupted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(clean, corrupted, atol=0.01)


def test_a_head_of_a_pre_ln_tower_reads_the_stream_with_the_sender_replaced():
    """At the head's own copy of the stream, which the LayerNorm then sees."""
    made, runs, graph, here, source, *_ = given("llava")
    sender, receiver = "language_model.L0.attn.H2", "language_model.L2.attn.H1.q"
    z = "language_model.blocks.0.attn.hook_z"
    weight = made.model.language_model.blocks[0].attn.W_O[2]
    change = (source[z] - here[z])[:, :, 2] @ weight.detach()

    def add(activation, hook):
        activation[:, :, 1] += change

    expected = by_hand(made, "language_model.blocks.2.hook_q_input", add)
    own = patch_edges(runs, runs.clean, source, graph, one_edge(graph, sender, receiver))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_an_mlp_of_a_post_ln_tower_reads_the_stream_made_anew():
    """The first layer's attention head, through three LayerNorms, to the second layer's MLP."""
    made, runs, graph, here, source, *_ = given("blip")
    first, second = made.model.question_encoder.blocks
    place = "question_encoder.blocks.{}.hook_{}".format
    z = "question_encoder.blocks.0.attn.hook_z"
    with torch.no_grad():
        change = (source[z] - here[z])[:, :, 1] @ first.attn.W_O[1]
        stream = first.ln1(here[place(0, "resid_pre")] + here[place(0, "attn_out")] + change)
        stream = first.ln_cross(stream + here[place(0, "cross_attn_out")])
        stream = first.ln2(stream + here[place(0, "mlp_out")])
        stream = second.ln1(stream + here[place(1, "attn_out")])
        stream = second.ln_cross(stream + here[place(1, "cross_attn_out")])
    expected = by_hand(made, place(1, "mlp_in"), lambda activation, hook: stream)
    edge = one_edge(graph, "question_encoder.L0.attn.H1", "question_encoder.L1.mlp")
    own = patch_edges(runs, runs.clean, source, graph, edge)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["k", "v"])
def test_cross_attention_reads_the_other_towers_stream_made_anew(kind):
    """An MLP of the vision encoder, through its last LayerNorm, to one head's keys or values."""
    made, runs, graph, here, source, *_ = given("blip")
    vision, attention = made.model.vision_encoder, made.model.question_encoder.blocks[1].cross_attn
    site = "vision_encoder.blocks.1.hook_mlp_out"
    with torch.no_grad():
        states = vision.ln_post(here["vision_encoder.blocks.2.hook_resid_post"] + source[site] - here[site])
        weight, bias = (attention.W_K, attention.b_K) if kind == "k" else (attention.W_V, attention.b_V)
        head = states @ weight[2] + bias[2]

    def put(activation, hook):
        activation[:, :, 2] = head

    expected = by_hand(made, f"question_encoder.blocks.1.cross_attn.hook_{kind}", put)
    edge = one_edge(graph, "vision_encoder.L1.mlp", f"question_encoder.L1.cross_attn.H2.{kind}")
    own = patch_edges(runs, runs.clean, source, graph, edge)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_the_decoder_reads_the_question_encoders_post_ln_stream():
    made, runs, graph, here, source, *_ = given("blip")
    block, attention = made.model.question_encoder.blocks[1], made.model.answer_decoder.blocks[0].cross_attn
    place = "question_encoder.blocks.1.hook_{}".format
    with torch.no_grad():
        mlp = source[place("mlp_out")]
        head = block.ln2(here[place("normalized_resid_mid_cross")] + mlp) @ attention.W_V[0] + attention.b_V[0]

    def put(activation, hook):
        activation[:, :, 0] = head

    expected = by_hand(made, "answer_decoder.blocks.0.cross_attn.hook_v", put)
    edge = one_edge(graph, "question_encoder.L1.mlp", "answer_decoder.L0.cross_attn.H0.v")
    torch.testing.assert_close(patch_edges(runs, runs.clean, source, graph, edge), expected, rtol=1e-4, atol=1e-5)


def test_the_projector_reads_the_feature_layer_and_writes_at_the_image():
    made, runs, graph, here, source, *_ = given("llava")
    site = "vision_encoder.blocks.0.hook_mlp_out"
    change = source[site] - here[site]
    expected = by_hand(made, "vision_encoder.hook_out", lambda activation, hook: activation + change)
    edge = one_edge(graph, "vision_encoder.L0.mlp", "projector")
    own = patch_edges(runs, runs.clean, source, graph, edge)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)

    embeds = "language_model.hook_merged_embed"
    is_image = (made.clean.input_ids == made.model.config.image_token_id)[..., None]
    written = (source[embeds] - here[embeds]) * is_image

    def add(activation, hook):
        activation += written

    expected = by_hand(made, "language_model.blocks.1.hook_mlp_in", add)
    own = patch_edges(runs, runs.clean, source, graph, one_edge(graph, "projector", "language_model.L1.mlp"))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["blip", "llava"])
def test_edges_patched_together_in_a_batch_are_as_alone(name):
    _, runs, graph, _, source, *_ = given(name)
    edges = graph.edges.nonzero()
    edges = edges[torch.randperm(len(edges))[:12]]
    together = patch_each_edge(runs, runs.clean, source, graph, edges, batch=5)
    alone = patch_each_edge(runs, runs.clean, source, graph, edges, batch=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no edges"):
        patch_each_edge(runs, runs.clean, source, graph, torch.tensor([[len(graph.senders) - 1, 0]]))


def test_senders_of_one_attention_add_up_in_a_pre_ln_tower():
    """Edges from all heads of a layer into one MLP: the stream with the layer's attention output replaced."""
    made, runs, graph, here, source, *_ = given("vit")
    edges = sum(one_edge(graph, f"vision_encoder.L0.attn.H{head}", "vision_encoder.L1.mlp") for head in range(3)).bool()
    site = "vision_encoder.blocks.0.hook_attn_out"
    change = source[site] - here[site]
    expected = by_hand(made, "vision_encoder.blocks.1.hook_mlp_in", lambda activation, hook: activation + change)
    own = patch_edges(runs, runs.clean, source, graph, edges)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)

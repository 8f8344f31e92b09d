"""Circuits: what is chosen, and how faithful it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_vlm.analysis import Circuit, eap, faithfulness
from hooked_vlm.analysis.circuits import find_circuit
from hooked_vlm.corruptions import AdditiveGaussian
from tests.analysis.pairs import Given, pair, toy

pytestmark = pytest.mark.usefixtures("unchecked")
TOYS = ("toy-blip-vqa", "toy-llava")


@pytest.fixture(scope="module", params=TOYS)
def scored(request):
    made = toy(request.param)
    return made, eap(*made.all, method="ig_inputs", steps=5)


def connected(circuit: Circuit) -> bool:
    """Whether every edge starts at an input or a node that reads, and ends at an output or a node that is read."""
    graph = circuit.graph
    for u, v in circuit.edges.nonzero().tolist():
        reads = bool(graph.is_input[u]) or bool((graph.owned[u] & circuit.edges.any(0)).any())
        is_read = bool(graph.is_output[v]) or bool((graph.owned[:, v] & circuit.edges.any(1)).any())
        if not (reads and is_read):
            return False
    return True


def test_the_whole_graph_is_faithful_and_none_of_it_is_not(scored):
    made, scores = scored
    graph = scores.graph
    result = scores.faithfulness([Circuit(graph, graph.edges), Circuit(graph, torch.zeros_like(graph.edges))])
    assert result.faithfulness.values.tolist() == [[1.0], [0.0]]
    runs = made.runs
    (clean, _), (corrupted, _) = (runs.activations(run, graph.names) for run in (runs.clean, runs.corrupted))
    assert result.whole.item() == clean.item()
    assert abs(result.empty.item() - corrupted.item()) < 1e-4


@pytest.mark.parametrize("how", ["top", "greedy"])
def test_circuits_are_connected_and_no_larger_than_asked(scored, how):
    _, scores = scored
    for n in (0, 1, 30, 200):
        circuit = scores.circuit(n, how)
        assert len(circuit) <= n
        assert connected(circuit)
    assert len(scores.circuit(10**9)) == int(scores.graph.edges.sum())


def test_a_fifth_of_the_edges_does_nearly_all(scored):
    _, scores = scored
    for how in ("top", "greedy"):
        (value,) = scores.faithfulness(scores.circuit(len(scores.graph.edges.nonzero()) // 5, how)).faithfulness.values
        assert abs(value - 1) < 0.15, how


def test_top_takes_the_largest_and_greedy_grows_from_the_outputs():
    """In a graph of two layers with scores set by hand."""
    graph = eap(*pair("vit").all).graph
    row, column = graph.senders.index, graph.receivers.index
    scores = torch.zeros(graph.edges.shape)
    embed, mlp, out = "vision_encoder.embed", "vision_encoder.L0.mlp", "vision_encoder.out"
    scores[row(embed), column(mlp)] = -5.0
    scores[row(mlp), column(out)] = 1.0
    scores[row(embed), column("vision_encoder.L2.attn.H0.q")] = 4.0
    scores[row("vision_encoder.L2.attn.H1"), column(out)] = 2.0
    assert find_circuit(graph, scores, 2).named_edges == [], "neither is on a path"
    assert find_circuit(graph, scores, 4).named_edges == [(embed, mlp), (mlp, out)]
    assert find_circuit(graph, scores, 3, "greedy").named_edges == [(embed, mlp), (mlp, out)]
    assert find_circuit(graph, scores, 4).nodes == [embed, mlp]


def test_curves_end_in_the_whole_graph(scored):
    _, scores = scored
    curve = scores.curve([0, 20, 100, len(scores.graph.edges.nonzero())])
    assert curve.mean_faithfulness.values[[0, -1]].tolist() == [0.0, 1.0]
    assert curve.share.values[-1] == 1.0
    assert 0 < float(curve.cpr) < 1.1
    assert float(curve.cmd) > 0
    assert curve.attrs["method"] == "ig_inputs"


def test_faithfulness_is_of_any_rows_and_many_at_once():
    made = pair("blip", rows=3)
    scores = eap(*made.all)
    circuits = [scores.circuit(n) for n in (50, 150)]
    assert isinstance(made.corruption, Given)
    result = faithfulness(*made.all, circuits)
    assert result.faithfulness.shape == (2, 3)
    for row in range(3):
        corruption = Given(made.corruption.inputs.rows([row]))
        alone = faithfulness(made.model, made.clean.rows([row]), corruption, made.metric, circuits)
        np.testing.assert_allclose(alone.metric[:, 0], result.metric[:, row], rtol=1e-4, atol=1e-4)
    assert result.attrs["method"] == "faithfulness"
    means = result.metric.mean("sample")
    expected = (means - result.empty.mean()) / (result.whole.mean() - result.empty.mean())
    np.testing.assert_allclose(result.mean_faithfulness, expected)


def test_noise_on_the_image_embeddings_is_an_input():
    made = toy("toy-blip-vqa")
    corruption = AdditiveGaussian(std=6.0, draws=2)
    scores = eap(made.model, made.clean, corruption, made.metric)
    result = scores.faithfulness([scores.circuit(300), Circuit(scores.graph, scores.graph.edges)])
    assert result.faithfulness.values[1].item() == 1.0
    assert np.isfinite(result.faithfulness.values).all()


def test_the_same_inputs_have_no_faithfulness():
    made = pair("vit")
    scores = eap(made.model, made.clean, Given(made.clean), made.metric)
    assert bool(scores.faithfulness(scores.circuit(10)).faithfulness.isnull().all())


def test_errors(scored):
    made, scores = scored
    with pytest.raises(ValueError, match="no -1 edges"):
        scores.circuit(-1)
    with pytest.raises(ValueError, match="'top' or 'greedy', not 'best'"):
        scores.circuit(3, "best")
    with pytest.raises(ValueError, match="all of one graph"):
        faithfulness(*made.all, [])
    with pytest.raises(ValueError, match="all of one graph"):
        faithfulness(*made.all, [scores.circuit(3), eap(*made.all).circuit(3)])

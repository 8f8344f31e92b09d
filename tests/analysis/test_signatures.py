"""Everything once, with signatures and shapes checked: most other tests of this folder leave that out, for time."""

from __future__ import annotations

import pytest

from hooked_vlm.analysis import atp, compare_edges, compare_nodes, eap, faithfulness, worst
from hooked_vlm.analysis.nodes import GROUPS
from tests.analysis.pairs import pair


@pytest.mark.parametrize("name", ["blip", "llava"])
def test_shapes_are_as_said(name):
    made = pair(name)
    result = atp(*made.all, nodes=tuple(GROUPS), qk_fix=True, grad_drop=True)
    assert result.clean.shape == (2,)
    for method in ("eap", "ig_inputs", "clean_corrupted"):
        scores = eap(*made.all, method=method, steps=1)
        assert scores.values.shape == (2, *scores.graph.edges.shape)
    circuits = [scores.circuit(40), scores.circuit(40, "greedy")]
    assert faithfulness(*made.all, circuits).sizes == {"circuit": 2, "sample": 2}
    assert worst(compare_edges(scores, n=8, batch=3), 2).sizes["edge"] == 2
    assert (
        worst(compare_nodes(*made.all, nodes=["heads", "pattern"], towers=made.model.towers[-1:], n=2), 2).sizes["node"]
        == 2
    )

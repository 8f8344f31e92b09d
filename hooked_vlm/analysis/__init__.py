"""What is computed from runs: attributions to nodes and edges, and circuits."""

from hooked_vlm.analysis.attribution import atp
from hooked_vlm.analysis.circuits import Circuit, faithfulness
from hooked_vlm.analysis.comparison import compare_edges, compare_nodes, worst
from hooked_vlm.analysis.edge_attribution import EdgeScores, eap

__all__ = ["Circuit", "EdgeScores", "atp", "compare_edges", "compare_nodes", "eap", "faithfulness", "worst"]

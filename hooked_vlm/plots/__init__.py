"""Every figure. Each function draws one and returns it; :func:`save_figure` writes PNG and PDF."""

from hooked_vlm.plots.ablation import ablated_sets_figure, ablation_grid_figure, path_patch_figure
from hooked_vlm.plots.constraint import constraint_trace_figure, contribution_figure, window_study_figure
from hooked_vlm.plots.flow import answer_by_layer_figure, information_flow_figure
from hooked_vlm.plots.head_looks import attention_overlay_figure, head_function_figure
from hooked_vlm.plots.heads import head_grid_figure, selection_matrix_figure
from hooked_vlm.plots.roles import comparison_figure, role_figure
from hooked_vlm.plots.style import save_figure
from hooked_vlm.plots.trace import causal_trace_figure, patch_trace_figure
from hooked_vlm.plots.visual_tokens import ablated_tokens_figure, visual_tokens_figure

__all__ = [
    "ablated_sets_figure",
    "ablated_tokens_figure",
    "ablation_grid_figure",
    "answer_by_layer_figure",
    "attention_overlay_figure",
    "causal_trace_figure",
    "comparison_figure",
    "constraint_trace_figure",
    "contribution_figure",
    "head_function_figure",
    "head_grid_figure",
    "information_flow_figure",
    "patch_trace_figure",
    "path_patch_figure",
    "role_figure",
    "save_figure",
    "selection_matrix_figure",
    "visual_tokens_figure",
    "window_study_figure",
]

"""The published methods, one file each. Each is a call over samples, and gives a labelled result."""

from hooked_vlm.experiments.ablate import ablate, ablation_sweep
from hooked_vlm.experiments.answer_by_layer import answer_by_layer
from hooked_vlm.experiments.attention_contribution import attention_contribution, predict_correctness
from hooked_vlm.experiments.causal_trace import causal_trace
from hooked_vlm.experiments.compare import compare, compare_results
from hooked_vlm.experiments.constraint_trace import constraint_trace, peak_by_layer, window_study
from hooked_vlm.experiments.edit_mlp import edit_mlp, edit_side_effects, edited_mlp, find_value, key_of, multedit
from hooked_vlm.experiments.head_function import head_function, head_summary
from hooked_vlm.experiments.information_flow import information_flow, layer_groups
from hooked_vlm.experiments.notice import notice, patch_heads
from hooked_vlm.experiments.parts.components import Component, all_heads, all_mlps
from hooked_vlm.experiments.parts.controls import random_control
from hooked_vlm.experiments.parts.dataset_means import dataset_means
from hooked_vlm.experiments.parts.heads import (
    Head,
    agreement,
    heads_of,
    select_heads,
    split_half_agreement,
    universal_heads,
)
from hooked_vlm.experiments.parts.roles import by_role
from hooked_vlm.experiments.path_patch import path_patch
from hooked_vlm.experiments.visual_tokens import mean_visual_embedding, paper_conditions, visual_tokens

__all__ = [
    "Component",
    "Head",
    "ablate",
    "ablation_sweep",
    "agreement",
    "all_heads",
    "all_mlps",
    "answer_by_layer",
    "attention_contribution",
    "by_role",
    "causal_trace",
    "compare",
    "compare_results",
    "constraint_trace",
    "dataset_means",
    "edit_mlp",
    "edit_side_effects",
    "edited_mlp",
    "find_value",
    "head_function",
    "head_summary",
    "heads_of",
    "information_flow",
    "key_of",
    "layer_groups",
    "mean_visual_embedding",
    "multedit",
    "notice",
    "paper_conditions",
    "patch_heads",
    "path_patch",
    "peak_by_layer",
    "predict_correctness",
    "random_control",
    "select_heads",
    "split_half_agreement",
    "universal_heads",
    "visual_tokens",
    "window_study",
]

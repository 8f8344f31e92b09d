"""The published methods, one file each. Each is a call over samples, and gives a labelled result."""

from hooked_vlm.experiments.ablate import ablate, ablation_sweep
from hooked_vlm.experiments.answer_by_layer import answer_by_layer
from hooked_vlm.experiments.attention_contribution import attention_contribution, predict_correctness
from hooked_vlm.experiments.causal_trace import causal_trace
from hooked_vlm.experiments.compare import compare, compare_results
from hooked_vlm.experiments.constraint_trace import constraint_trace, peak_by_layer, window_study
from hooked_vlm.experiments.edit_mlp import (
    MultEdit,
    edit_mlp,
    edit_side_effects,
    edited_mlp,
    find_value,
    key_of,
    multedit,
)
from hooked_vlm.experiments.head_function import head_function, head_summary
from hooked_vlm.experiments.information_flow import information_flow, layer_groups
from hooked_vlm.experiments.notice import notice, patch_heads
from hooked_vlm.experiments.parts.components import Component, all_heads, all_mlps, over_nodes
from hooked_vlm.experiments.parts.controls import random_control
from hooked_vlm.experiments.parts.dataset_means import Means, dataset_means
from hooked_vlm.experiments.parts.heads import (
    Head,
    agreement,
    heads_of,
    select_heads,
    split_half_agreement,
    universal_heads,
)
from hooked_vlm.experiments.parts.identification import NextToken, Said, says_yes
from hooked_vlm.experiments.parts.roles import by_role
from hooked_vlm.experiments.parts.sites import window
from hooked_vlm.experiments.parts.token_choice import (
    AllTokens,
    GradientTokens,
    LastRowTokens,
    ObjectTokens,
    OtherTokens,
    RandomTokens,
    RegisterTokens,
    SurroundingTokens,
    choose_tokens,
)
from hooked_vlm.experiments.path_patch import path_patch
from hooked_vlm.experiments.visual_tokens import mean_visual_embedding, paper_conditions, visual_tokens

__all__ = [
    "AllTokens",
    "Component",
    "GradientTokens",
    "Head",
    "LastRowTokens",
    "Means",
    "MultEdit",
    "NextToken",
    "ObjectTokens",
    "OtherTokens",
    "RandomTokens",
    "RegisterTokens",
    "Said",
    "SurroundingTokens",
    "ablate",
    "ablation_sweep",
    "agreement",
    "all_heads",
    "all_mlps",
    "answer_by_layer",
    "attention_contribution",
    "by_role",
    "causal_trace",
    "choose_tokens",
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
    "over_nodes",
    "paper_conditions",
    "patch_heads",
    "path_patch",
    "peak_by_layer",
    "predict_correctness",
    "random_control",
    "says_yes",
    "select_heads",
    "split_half_agreement",
    "universal_heads",
    "visual_tokens",
    "window",
    "window_study",
]

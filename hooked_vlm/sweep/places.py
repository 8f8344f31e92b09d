"""Where in a forward a hook point lies, and who reads what an edit there changes.

A tower is passed in stages: it is *entered* (embeddings), each block *attends*, *cross-attends* and *feeds forward*,
and the tower is *left* (last normalisation); behind all towers is the *head* (logits, similarities). In a stage
positions are apart from each other, but for attention's keys and values, which other positions read.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from hooked_vlm.config import TowerConfig
from hooked_vlm.models import HookedVLM

Stage = Literal["enter", "attend", "cross_attend", "feed_forward", "leave", "head"]

BLOCK_STAGES: tuple[Stage, ...] = ("attend", "cross_attend", "feed_forward")

CROSS = ("cross_attn.", "ln_cross.", "hook_cross", "hook_resid_mid_cross", "hook_normalized_resid_mid_cross")
FEED_FORWARD = ("mlp.", "ln2.", "hook_mlp", "hook_resid_post", "hook_normalized_resid_post")

BESIDE = ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input")
"""Made only where someone looks, and a head's worth of residual streams each."""

PATTERNS = ("hook_attn_scores", "hook_pattern")


class Place(NamedTuple):
    """A tower, a stage of it, and whom a change there reaches."""

    tower: str
    layer: int
    """The block; 0 outside the blocks."""
    stage: Stage
    reaches: Literal["own", "keys", "other"] = "own"
    """``"own"``: in this stage only the same position reads the change. ``"keys"``: so do all that attend to it.
    ``"other"``: it is a key or value made of another tower's output, and all queries read it."""


def place_of(name: str, model: HookedVLM) -> Place | None:
    """Where a hook point lies; None if nothing of the model's output reads it.

    What lies before a tower and in no tower with blocks (LLaVA's projector) is the entry of the next one.
    """
    tower = name.split(".")[0]
    if tower not in model.towers:
        return Place(model.towers[-1], 0, "head")
    module = model.get_submodule(tower)
    if any(point.name == name for point in getattr(module, "unread", ())):
        return None
    if not hasattr(module, "blocks"):
        return Place(model.towers[model.towers.index(tower) + 1], 0, "enter")
    if ".blocks." in name:
        _, _, layer, local = name.split(".", 3)
        return _in_block(tower, int(layer), local, module.config)  # type: ignore[arg-type]
    order = model.hook_names.index
    if order(name) < order(f"{tower}.blocks.0.hook_resid_pre"):
        return Place(tower, 0, "enter")
    return Place(tower, 0, "leave" if order(name) <= order(f"{tower}.hook_out") else "head")


def _in_block(tower: str, layer: int, local: str, config: TowerConfig) -> Place:
    if local.startswith(CROSS):
        is_others = local in ("cross_attn.hook_k", "cross_attn.hook_v")
        return Place(tower, layer, "cross_attend", "other" if is_others else "own")
    if local.startswith(FEED_FORWARD):
        return Place(tower, layer, "feed_forward")
    keys = ("hook_resid_pre", "hook_attn_in", "hook_k_input", "hook_v_input", "attn.hook_k", "attn.hook_v")
    is_read = local in (*keys, "attn.hook_rot_k") or (local.startswith("ln1.") and config.norm_order == "pre")
    return Place(tower, layer, "attend", "keys" if is_read else "own")

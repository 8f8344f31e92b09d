"""The plan against what truly differs: enough positions always, and in plain cases no more than needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.cache import ActivationCache
from hooked_vlm.edits import Add, BlockAttention, Edit, Function, Noise, Replace, Scale, Zero
from hooked_vlm.selection import position_axis
from hooked_vlm.sweep.places import place_of
from tests.models.modes import MODES
from tests.sweep.planned import Stage, differing, ends, made, planned, states

KINDS = ["vqa", "caption", "itm", "llava", "llava-next", "windows", "clip", "vit"]

pytestmark = pytest.mark.usefixtures("unchecked")


@cache
def plain(kind: str) -> ActivationCache:
    model, inputs = made(kind)
    unpassed = MODES[kind].unpassed if kind in MODES else ()
    names = [name for name in model.hook_names if not any(part in name for part in unpassed)]
    return states(model, inputs, names)[1]


# Enough ---------------------------------------------------------------------------------------------------------------

VALUES: dict[str, Callable[..., Edit]] = {
    "add": lambda site, shape, **where: Add(site, 3 * torch.randn(shape[1:]), **where),
    "scale": lambda site, shape, **where: Scale(site, -2.0, **where),
    "zero": lambda site, shape, **where: Zero(site, **where),
    "replace": lambda site, shape, **where: Replace(site, torch.randn(shape).abs(), **where),
    "noise": lambda site, shape, **where: Noise(site, 2.0, **where),
    "function": lambda site, shape, **where: Function(site, lambda activation, hook: activation.flip(1) * 2, **where),
}


@st.composite
def edits(draw: Any, kind: str) -> Edit:
    """Any edit at any name that is read, of some positions or all."""
    model, _ = made(kind)
    site = draw(st.sampled_from([name for name in plain(kind) if place_of(name, model) is not None]))
    shape = tuple(plain(kind)[site].shape)
    axis = position_axis(model.hook_dict[site])
    positions = None if axis is None else draw(st.none() | st.sets(st.integers(0, shape[axis] - 1), max_size=3))
    where = {} if positions is None else {"positions": sorted(positions)}
    if site.endswith(("hook_attn_scores", "hook_pattern")) and draw(st.booleans()):
        keys = draw(st.sets(st.integers(0, shape[3] - 1)))
        return BlockAttention(site.rsplit(".", 1)[0], keys=sorted(keys), **where)
    return VALUES[draw(st.sampled_from(sorted(VALUES)))](site, shape, **where)


def wanted(model: HookedVLM, inputs: VLMInputs, stage: Stage, size: int) -> np.ndarray:
    """Which positions of a stage's end anything reads: of the last block no more than what is read of the tower."""
    tower, layer, which = stage
    config: Any = model.get_submodule(tower).config
    read = model.positions_read(tower, inputs)
    is_last = which == "leave" or layer == max(getattr(config, "feature_layers", None) or (config.n_layers,)) - 1
    positions = np.arange(size)
    if read is None or not (is_last or config.is_causal):
        return positions >= 0
    return np.isin(positions, read) if is_last else positions <= max(read)


def real(tower: str, inputs: VLMInputs) -> Tensor | None:
    mask = inputs.attention_mask
    return None if mask is None or tower != "language_model" else mask.bool()


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=12)
def test_no_position_that_differs_is_missed(kind: str, data: st.DataObject) -> None:
    """At the end of every stage of every tower, for each of several sets together; and of keys and values."""
    model, inputs = made(kind)
    edit_sets = data.draw(st.lists(st.lists(edits(kind), min_size=1, max_size=3), min_size=1, max_size=3))
    steps, stages = planned(model, inputs, edit_sets), ends(model)
    for one, edit_set in enumerate(edit_sets):
        _, found = states(model, inputs, list(plain(kind)), edit_set)
        for stage, end in stages.items():
            tower, layer, which = stage
            if which == "enter":
                continue
            step, clean = steps.get(stage), plain(kind)
            differs = differing(found[end], clean[end], real(tower, inputs))
            differs &= wanted(model, inputs, stage, len(differs))
            assert_covered(differs, None if step is None else step.queries[one], stage, edit_set)
            for of, name in (("keys", "attn"), ("other", "cross_attn")):
                if which != {"keys": "attend", "other": "cross_attend"}[of]:
                    continue
                names = [f"{tower}.blocks.{layer}.{name}.hook_{state}" for state in "kv"]
                kept = real(tower, inputs) if of == "keys" else None
                differs = np.logical_or(*(differing(found[key], clean[key], kept) for key in names))
                if of == "keys" and (read := model.positions_read(tower, inputs)) and is_causal(model, tower):
                    differs[max(read) + 1 :] = False
                assert_covered(differs, None if step is None else getattr(step, of)[one], stage, edit_set)


def is_causal(model: HookedVLM, tower: str) -> bool:
    config: Any = model.get_submodule(tower).config
    return bool(config.is_causal)


def assert_covered(differs: np.ndarray, marked: np.ndarray | None, stage: Stage, edit_set: Sequence[Edit]) -> None:
    missed = differs if marked is None else differs & ~marked
    what = ", ".join(f"{type(edit).__name__} at {edit.site}, positions {edit.positions}" for edit in edit_set)
    assert not missed.any(), f"{missed.nonzero()[0].tolist()} at the end of {stage} of {what}"


# And no more ----------------------------------------------------------------------------------------------------------

CAUSAL = [
    ("llava", "language_model"),
    ("windows", "language_model"),
    ("vqa", "answer_decoder"),
    ("clip", "text_encoder"),
]


@pytest.mark.parametrize(("kind", "tower"), CAUSAL)
def test_in_a_causal_tower_no_position_before_the_first_that_is_edited(kind: str, tower: str) -> None:
    model, inputs = made(kind)
    others = ("cross_attn.hook_k", "cross_attn.hook_v")  # their positions are those of another tower
    names = [name for name in plain(kind) if name.startswith(f"{tower}.blocks.") and not name.endswith(others)]
    for group in by_reach(names):
        first, edit_sets = [1, 2] * len(group), [[Zero(name, positions=[at])] for name in group for at in (1, 2)]
        steps = planned(model, inputs, edit_sets)
        assert {stage[0] for stage in steps} == {tower}
        reached = np.zeros(len(edit_sets), dtype=bool)
        for step in steps.values():
            reached |= step.tokens.any(1)
            for one, at in enumerate(first):
                assert not step.tokens[one, :at].any(), (
                    f"{edit_sets[one][0].site} at {at}, {step.stage} of {step.layer}"
                )
        # A position that nothing reads any more is not reached: of a last layer, it may be.
        assert all(reached[one] for one, (edit,) in enumerate(edit_sets) if ".blocks.0." in edit.site)


def by_reach(names: Sequence[str]) -> list[list[str]]:
    """Edited scores and patterns may read any position, so that they are planned, and run, with their like."""
    looks = [name for name in names if name.endswith(("hook_attn_scores", "hook_pattern"))]
    return [[name for name in names if name not in looks], *([name] for name in looks)]


EXACT = {
    "question_encoder.blocks.0.hook_mlp_out": "vqa",
    "question_encoder.blocks.1.attn.hook_z": "vqa",
    "vision_encoder.blocks.0.attn.hook_v": "vqa",
    "answer_decoder.blocks.0.hook_resid_pre": "vqa",
    "answer_decoder.blocks.1.cross_attn.hook_k": "vqa",
    "language_model.blocks.0.attn.hook_rot_k": "windows",
    "language_model.blocks.1.hook_mlp_in": "windows",
    "language_model.blocks.2.attn.hook_q": "windows",
    "vision_encoder.blocks.1.hook_attn_out": "caption",
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_marked_does_differ(name: str) -> None:
    """Where the edit is a large one, and everything is read: at all of the stages that follow."""
    kind = EXACT[name]
    model, inputs = made(kind)
    clean = plain(kind)
    at = 3 if kind == "windows" else 1
    edit = Add(name, 3 * torch.randn(clean[name].shape[1:]), positions=[at])
    steps, (_, found) = planned(model, inputs, [[edit]]), states(model, inputs, list(clean), [edit])
    for stage, end in ends(model).items():
        if stage in steps:
            differs = differing(found[end], clean[end], real(stage[0], inputs), tolerance=1e-6)
            assert differs.tolist() == steps[stage].queries[0].tolist(), stage
        else:
            assert torch.equal(found[end], clean[end]), stage


@pytest.mark.parametrize(
    ("kind", "tower", "read"),
    [("vqa", "answer_decoder", [2]), ("vqa", "answer_decoder", [0, 2]), ("llava", "language_model", [4, 9])],
)
def test_of_the_last_layer_only_what_is_read(kind: str, tower: str, read: list[int]) -> None:
    model, inputs = made(kind)
    steps = planned(model, inputs, [[Zero(f"{tower}.blocks.0.hook_resid_pre")]], read)
    size = plain(kind)[f"{tower}.hook_out"].shape[1]
    for stage in ("attend", "cross_attend", "feed_forward"):
        if (tower, 1, stage) in steps:
            assert steps[tower, 1, stage].queries[0].nonzero()[0].tolist() == read
            before = steps[tower, 0, stage].queries[0]
            assert before.nonzero()[0].tolist() == list(range(max(read) + 1)), "and before, what those read"
    assert steps[tower, 1, "attend"].tokens[0].nonzero()[0].tolist() == list(range(max(read) + 1)), "for their keys"
    for stage in ("leave", "head"):
        assert steps[tower, 0, stage].tokens[0].nonzero()[0].tolist() == read
    assert max(read) < size


def test_what_a_head_reads_alone_is_all_of_the_last_layer() -> None:
    for kind, tower in (("itm", "text_encoder"), ("vit", "vision_encoder"), ("clip", "vision_encoder")):
        model, inputs = made(kind)
        steps = planned(model, inputs, [[Zero(f"{tower}.blocks.0.hook_mlp_out")]])
        assert steps[tower, 0, "feed_forward"].queries.all()
        assert steps[tower, 1, "feed_forward"].queries[0].nonzero()[0].tolist() == [0]


UNREAD: dict[str, tuple[str, list[Edit]]] = {
    "no edit": ("vqa", []),
    "no position": ("vqa", [Zero("question_encoder.blocks.0.hook_mlp_out", positions=[])]),
    "another position of the last layer": ("vqa", [Zero("answer_decoder.blocks.1.hook_mlp_out", positions=[1])]),
    "and of its attention": ("vqa", [Zero("answer_decoder.blocks.1.cross_attn.hook_z", positions=[1])]),
    "later than what is read": ("vqa", [Zero("answer_decoder.blocks.0.hook_resid_pre", positions=[1, 2])]),
    "later keys": ("vqa", [Zero("answer_decoder.blocks.1.attn.hook_v", positions=[2])]),
    "other states than the class token's": ("itm", [Zero("text_encoder.blocks.1.hook_resid_post", positions=[1, 3])]),
    "beyond the features": ("llava", [Zero("vision_encoder.blocks.1.hook_mlp_out")]),
    "the head, where it is not read": ("vqa", [Zero("answer_decoder.hook_logits", positions=[1])]),
}


@pytest.mark.parametrize("case", UNREAD)
def test_nothing_where_nothing_is_read(case: str) -> None:
    kind, edit_set = UNREAD[case]
    model, inputs = made(kind)
    read = [0] if kind == "vqa" else None
    steps = planned(model, inputs, [edit_set], read)
    assert not any(step.tokens.any() for step in steps.values())


def test_towers_before_an_edit_and_layers_before_it_are_left_alone() -> None:
    model, inputs = made("vqa")
    stages = [stage for stage in ends(model) if stage[2] != "enter"] + [("answer_decoder", 0, "head")]
    for name, first in (
        ("question_encoder.blocks.1.attn.hook_z", ("question_encoder", 1, "attend")),
        ("question_encoder.blocks.0.hook_cross_attn_in", ("question_encoder", 0, "cross_attend")),
        ("answer_decoder.blocks.0.mlp.hook_post", ("answer_decoder", 0, "feed_forward")),
        ("vision_encoder.hook_out", ("vision_encoder", 0, "leave")),
        ("answer_decoder.ln_final.hook_scale", ("answer_decoder", 0, "head")),
    ):
        steps = {stage for stage, step in planned(model, inputs, [[Zero(name)]]).items() if step.tokens.any()}
        expected = set(stages[stages.index(first) :])
        # A tower that reads another by cross-attention does its self-attention in the first layer without it.
        later = {(tower, 0, "attend") for tower in model.towers if tower != first[0]}
        assert steps == expected - later, name


def test_sets_of_a_chunk_do_not_widen_each_other() -> None:
    model, inputs = made("llava")
    site = "language_model.blocks.{}.hook_mlp_out"
    edit_sets: list[list[Edit]] = [
        [Zero(site.format(0), positions=[20])],
        [Zero(site.format(1), positions=[3])],
        [Zero("vision_encoder.blocks.0.hook_mlp_out", positions=[2])],
        [],
    ]
    together, n_marked = planned(model, inputs, edit_sets), 0
    for one, edit_set in enumerate(edit_sets):
        alone = planned(model, inputs, [edit_set])
        for stage, step in together.items():
            own = alone[stage].tokens[0] if stage in alone else np.zeros_like(step.tokens[one])
            assert step.tokens[one].tolist() == own.tolist(), stage
            n_marked += int(own.sum())
    assert n_marked

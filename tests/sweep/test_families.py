"""Every family of models, every shape of inputs: batches, padding, several images or none, windows, feature layers."""

from __future__ import annotations

from random import Random

import pytest
import torch

from hooked_vlm.config import AttentionImplementation
from hooked_vlm.edits import Add, BlockAttention, Edit, EditError, Function, Replace, Scale, Zero
from hooked_vlm.sweep import sweep
from tests.sweep.drawing import Draw, Sites
from tests.sweep.families import ATTENTION, FAMILIES, family
from tests.sweep.one_at_a_time import assert_as_alone, assert_patch_is_the_hook_path

pytestmark = pytest.mark.usefixtures("unchecked")


def sets_of(sites: Sites, seed: int, count: int) -> list[list[Edit]]:
    """Sets of up to four edits, in any towers; among them an empty one."""
    draw = Draw(sites, Random(seed))
    return [[], *([draw.edit() for _ in range(1 + one % 4)] for one in range(count))]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", FAMILIES)
def test_sets_of_several_edits(kind: str, attention: AttentionImplementation) -> None:
    sites, seed = family(kind, attention), ATTENTION.index(attention)
    sets = sets_of(sites, seed, 5)
    assert_as_alone(sites.model, sites.inputs, sets, may_overflow=True)
    assert_patch_is_the_hook_path(sites.model, sites.inputs, sets[-1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_windows_of_layers(kind: str) -> None:
    """A pattern of names, at one position after the other."""
    sites = family(kind, "sdpa")
    tower = sites.model.towers[-1]
    ends = ("hook_mlp_out", "attn.hook_v")
    sets: list[list[Edit]] = []
    for end in ends:
        names = [name for name in sites.names if name.startswith(tower) and name.endswith(f".{end}")]
        every, n_positions = f"{tower}.blocks.*.{end}", sites.clean[names[0]].shape[1]
        if end == "attn.hook_v":  # not the cross-attention's, whose positions are the other tower's
            every = f"{tower}.blocks.*[0-9].{end}"
        for position in {0, n_positions // 2, n_positions - 1}:
            sets += [
                [Replace(every, sites.other, positions=position)],
                [Replace(names[-1], sites.other, positions=position)],
            ]
    assert_as_alone(sites.model, sites.inputs, sets)


@pytest.mark.parametrize("kind", FAMILIES)
def test_base_edits_that_a_set_does_not_reach(kind: str) -> None:
    """All that the base does at the first position, in a set of the last one."""
    sites = family(kind, "sdpa")
    tower = sites.model.towers[-1]
    others = ("cross_attn.hook_k", "cross_attn.hook_v")
    names = [name for name in sites.names if name.startswith(f"{tower}.blocks.") and not name.endswith(others)]
    base = [Scale(name, 0.9, positions=0) for name in names]
    sets: list[list[Edit]] = [
        [Scale(f"{tower}.blocks.{layer}.{end}", 0.5, positions=-1)]
        for layer in range(2)
        for end in ("hook_resid_pre", "attn.hook_z", "hook_mlp_out")
    ]
    assert_as_alone(sites.model, sites.inputs, sets, base=base)


@pytest.mark.parametrize("kind", ["llava, layers beyond the features", "llava, several feature layers"])
@torch.no_grad()
def test_layers_that_nothing_reads(kind: str) -> None:
    """LLaVA's vision layers after the last that is a feature: an edit there is the run without it."""
    sites = family(kind, "eager")
    model, clean = sites.model, sites.model(sites.inputs)
    beyond = [point.name for point in model.vision_encoder.unread]
    unread: list[list[Edit]] = [[Scale(name, 2.0)] for name in beyond]
    functions: list[list[Edit]] = [[Function(name, lambda activation, hook: activation * 0)] for name in beyond]
    swept = sweep(model, sites.inputs, [*unread, *functions], lambda logits: logits, progress=False)
    assert all(torch.equal(found, clean) for found in swept)
    felt = Add("vision_encoder.blocks.0.hook_mlp_out", 0.5, positions=3, neurons=0)
    mixed = [[felt, *edits] for edits in unread[:4]]
    assert_as_alone(model, sites.inputs, [*mixed, [felt]], base=unread[0])


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("llava, text alone", "vision_encoder.blocks.0.hook_mlp_out"),
        ("llava, text alone", "projector.hook_out"),
        ("blip retrieval", "hook_text_embeds"),
    ],
)
def test_a_site_that_is_not_passed_is_refused(kind: str, site: str) -> None:
    """As by ``patch``; and where one site of several is passed, the others do not matter."""
    sites = family(kind, "eager")
    for refused in ([Zero(site)], [Zero("*.blocks.0.hook_mlp_out"), Zero(site)]):
        with pytest.raises(EditError, match="is not passed in this run"):
            sites.model.patch(sites.inputs, refused)
        with pytest.raises(EditError, match="is not passed in this run"):
            sweep(sites.model, sites.inputs, [[], refused], lambda logits: logits, progress=False)
    assert_as_alone(sites.model, sites.inputs, [[Scale("*.blocks.0.hook_mlp_out", 0.5)]])


def test_a_question_of_another_length_in_each_row() -> None:
    """A position that is a word in one row and padding in another is edited in both, and read where it is a word."""
    sites = family("blip vqa, padded", "sdpa")
    lengths = sites.inputs.attention_mask.sum(1).tolist()  # type: ignore[union-attr]
    assert len(set(lengths)) == 3
    sets: list[list[Edit]] = [
        [Replace(f"question_encoder.blocks.{layer}.{end}", sites.other, positions=position)]
        for layer in range(2)
        for end in ("hook_resid_pre", "attn.hook_k", "hook_normalized_resid_post")
        for position in range(max(lengths))
    ]
    sets += [[BlockAttention("*.cross_attn", keys=position)] for position in range(max(lengths))]
    effects = assert_as_alone(sites.model, sites.inputs, sets)
    assert min(effects) > 1e-4

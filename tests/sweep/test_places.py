"""Where a hook point lies: an edit there changes nothing before its stage, and at the stage's end what it reaches."""

from __future__ import annotations

import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.edits import Add
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.selection import position_axis
from hooked_vlm.sweep.places import Place, place_of
from tests.models.modes import MODES
from tests.sweep.planned import differing, ends, made, states

KINDS = ["toy-blip-vqa", "toy-llava", "clip", "vit", "itm"]


def passed(kind: str, model: HookedVLM) -> list[str]:
    unpassed = MODES[kind].unpassed if kind in MODES else ()
    return [name for name in model.hook_names if not any(part in name for part in unpassed)]


def edited_at(name: str, model: HookedVLM, inputs: VLMInputs) -> int:
    """The position that is edited: of the text, and not the first, which reads itself alone whatever is edited."""
    fed = model.positions_fed(inputs)
    return max(fed) + 2 if fed and name.startswith("language_model.") else 2


def reached(name: str, at: int, place: Place, model: HookedVLM, inputs: VLMInputs, size: int) -> list[int]:
    """The positions of its tower that an edit there changes."""
    if name.endswith("hook_patch_embed"):
        return [at + 1]  # behind the class token
    if name.endswith("hook_cls_embed"):
        return [0]
    if name.startswith("projector."):
        return [model.positions_fed(inputs)[at]]
    if place.reaches == "own":
        return [at]
    is_causal = place.reaches == "keys" and model.get_submodule(place.tower).config.is_causal
    return list(range(at if is_causal else 0, size))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_nothing_before_its_stage_and_at_its_end_what_it_reaches(kind: str) -> None:
    model, inputs = made(kind)
    stages = ends(model)
    order, names = list(stages), list(stages.values())
    plain_output, plain = states(model, inputs, model.hook_names)
    for name in passed(kind, model):
        place = place_of(name, model)
        if place is None:
            continue
        axis, shape = position_axis(model.hook_dict[name]), plain[name].shape
        at = edited_at(name, model, inputs)
        amount = 5 + 3 * torch.randn(shape[1:], generator=torch.Generator().manual_seed(len(name)))
        edit = Add(name, amount, positions=None if axis is None else min(at, shape[axis] - 1))
        if place.stage == "head":
            output, found = states(model, inputs, names, [edit])
            assert not torch.equal(output, plain_output), name
            assert all(torch.equal(found[end], plain[end]) for end in names), f"{name} is in no tower"
            continue
        key = place[:3]
        end = stages[key]
        _, found = states(model, inputs, names[: order.index(key) + 1], [edit], stop_at=end)
        changed = [other for other in found if other != end and not torch.equal(found[other], plain[other])]
        assert not changed, name
        differs = differing(found[end], plain[end])
        assert differs.nonzero()[0].tolist() == reached(name, at, place, model, inputs, len(differs)), name


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["toy-llava", "llava", "llava-next"])
def test_what_lies_beyond_the_features_has_no_place(kind: str) -> None:
    """And just that: no edit there changes the answer, and every other does."""
    model, inputs = made(kind)
    plain, found = states(model, inputs, model.hook_names)
    without = [name for name in model.hook_names if place_of(name, model) is None]
    assert without
    for name in without:
        assert torch.equal(model.patch(inputs, [Add(name, torch.randn_like(found[name]))]), plain), name
    last = max(model.get_submodule("vision_encoder").config.feature_layers)
    beyond = tuple(f"vision_encoder.{part}" for part in (f"blocks.{last}.", "ln_post", "hook_pooled"))
    assert without == [name for name in model.hook_names if name.startswith(beyond)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("toy-llava")])
def test_every_name_has_a_place_where_all_is_read(kind: str) -> None:
    model, _ = made(kind)
    assert not [name for name in model.hook_names if place_of(name, model) is None]


@pytest.mark.parametrize("kind", KINDS)
def test_places_come_in_the_order_of_the_forward(kind: str) -> None:
    """Block by block; only what is normalised before the next tower is entered stands for itself."""
    model, _ = made(kind)
    stages = list(ends(model))
    found = [place_of(name, model) for name in model.hook_names]
    moments = [stages.index(place[:3]) for place in found if place is not None and place.stage != "head"]
    assert moments == sorted(moments)
    assert {stages[moment] for moment in moments} == set(stages), "a stage without a hook point"

"""Random sets: as many of the same kinds, and others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm import HookedVLM
from hooked_vlm.data import shapes
from hooked_vlm.experiments.ablate import ablate
from hooked_vlm.experiments.parts.components import Component, all_heads, all_mlps, components_of
from hooked_vlm.experiments.parts.controls import random_control

(SAMPLE,) = shapes(1, seed=7, kinds=("color",))
MOVER = "language_model.L1.attn.H1"

# The pages of the documentation run the same code with every signature checked.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def blip():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@settings(max_examples=12)
@given(
    names=st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True),
    seed=st.integers(0, 5),
    within=st.sampled_from(["tower", "layer"]),
)
def test_controls_are_as_many_of_the_same_kinds_and_others(blip, names, seed, within):
    every = [*all_heads(blip, ["question_encoder"]), *all_mlps(blip, ["question_encoder"])][::-1]
    chosen = [every[place] for place in names]

    def units(parts):
        return [
            (part.site, head)
            for part in parts
            for head in (part.heads if isinstance(part.heads, list) else [part.heads])
        ]

    def kinds(own):
        return sorted((site if within == "layer" else site.split(".", 3)[3]) + str(head is None) for site, head in own)

    own = units(components_of(blip, chosen))
    n_mlps = sum("mlp" in name for name in chosen)
    if (within == "layer" and n_mlps) or n_mlps == 4:
        with pytest.raises(ValueError, match="there are no others"):
            random_control(blip, chosen, 4, seed, within=within)
        return
    controls = random_control(blip, chosen, 4, seed, within=within)
    assert [list(map(str, one)) for one in controls] == [
        list(map(str, one)) for one in random_control(blip, chosen, 4, seed, within=within)
    ]
    assert len({frozenset(units(one)) for one in controls}) == len(controls)
    for control in controls:
        assert len(set(units(control))) == len(own)
        assert kinds(units(control)) == kinds(own)
        if within == "tower" and n_mlps <= 2:
            assert not set(units(control)) & set(own)


def test_controls_of_neurons_and_of_what_has_no_other(llava):
    neurons = Component("language_model.blocks.1.mlp.hook_post", neurons=[3, 5, 8], positions="last")
    (control,) = random_control(llava, [neurons], 1)
    assert {part.site.split(".", 3)[3] for part in control} == {"mlp.hook_post"}
    assert sum(len(part.neurons) for part in control) == 3
    assert {part.positions for part in control} == {"last"}
    found = ablate(llava, SAMPLE, {"some": [neurons]}, "zero", controls=2)
    assert found.sizes["set"] == 3
    for parts in (["language_model.embed"], ["language_model.L*.attn.H*"]):
        with pytest.raises(ValueError, match="there are no others to draw a control from"):
            random_control(llava, parts)
    with pytest.raises(ValueError, match="at least one random set"):
        random_control(llava, [MOVER], 0)

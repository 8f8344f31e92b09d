"""Every layout on record: each of its keys is one parameter of ours, in its shape, and none is left over.

The records are what HF's and the research code's own saving wrote, kept here because both go on changing.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm.models import MODELS
from tests.weights_conversion.layouts import (
    DATA,
    HEADS_OF_64,
    HF_CLASSES,
    LLAVA_LAYOUTS,
    RESEARCH_CONFIG,
    TILED,
    TO_RESEARCH,
    VIT_HUB,
    hf_clip,
    hf_llava,
    hf_vit,
    renamed,
)
from weights_conversion import Rules, family_of_config
from weights_conversion.rules import Leading

RECORDS: dict[str, dict[str, dict[str, list[int]]]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(DATA.glob("*.json"))
}
CASES = [(family, layout) for family, layouts in RECORDS.items() for layout in layouts]

COMPUTED_ANEW = ("position_ids", "rotary_emb.inv_freq")


def hf_config(family: str, layout: str) -> dict[str, Any]:
    """The config that the record was made with."""
    if layout.startswith("research"):
        return RESEARCH_CONFIG if "apart" in layout else {**RESEARCH_CONFIG, **TILED}
    if family == "llava":
        kind = {"hub, Phi-3": "phi3", "hub, Qwen2": "qwen2"}.get(layout, "llama")
        hf = hf_llava(kind, tiles=kind == "llama")
    else:
        hf = (
            hf_clip()
            if family == "clip"
            else hf_vit(HF_CLASSES["ViTModel" if "bare" in layout else "ViTForImageClassification"])
        )
    return {**hf.config.to_dict(), "architectures": [type(hf).__name__]}


def read(family: str, layout: str) -> tuple[Rules, dict[str, Tensor], dict[str, Tensor]]:
    """The rules, our parameters and the record's tensors, which hold no numbers."""
    config = hf_config(family, layout)
    state = {key: torch.empty(shape, device="meta") for key, shape in RECORDS[family][layout].items()}
    table = family_of_config(config)
    if table.companion(config, state) is not None:
        tower = {**hf_clip().config.to_dict(), "vision_config": HEADS_OF_64}
        config = {**config, "companion": tower}
        shapes = RECORDS["llava"]["research"].items()
        inside = "model.vision_tower.vision_tower."
        state |= {
            key.removeprefix(inside): torch.empty(s, device="meta") for key, s in shapes if key.startswith(inside)
        }
    ours = table.config(config, state)
    with torch.device("meta"):
        model = MODELS[ours.architecture](ours)
    return table.rules(ours), dict(model.named_parameters()), state


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_keys_and_parameters_are_one_to_one_and_of_one_shape(family: str, layout: str) -> None:
    rules, parameters, state = read(family, layout)
    names = {key: rules.parameter(key) for key in state if not rules.ignores(key)}
    assert len(set(names.values())) == len(names)
    assert set(names.values()) == set(parameters)
    for key, name in names.items():
        assert name is not None
        assert rules.to_parameter(key, state[key]).shape == parameters[name].shape, key
        assert rules.to_key(name, parameters[name]).shape == state[key].shape, key
    assert {key for key in state if rules.ignores(key)} == {key for key in state if key.endswith(COMPUTED_ANEW)}


@pytest.mark.parametrize(("family", "layout"), [case for case in CASES if not case[1].startswith("memory")])
def test_what_is_written_is_read_again_and_is_the_hubs_layout(family: str, layout: str) -> None:
    rules, parameters, state = read(family, layout)
    written = {name: rules.key(name) for name in parameters}
    assert len(set(written.values())) == len(written)
    for name, key in written.items():
        assert key is not None
        assert rules.parameter(key) == name
    if layout.startswith("hub") or layout == "research":
        assert set(written.values()) == {key for key in state if not key.endswith(COMPUTED_ANEW)}


def test_the_layouts_of_these_tests_are_those_on_record() -> None:
    llava, vit, bare = hf_llava(tiles=True), hf_vit(), hf_vit(HF_CLASSES["ViTModel"])
    for layout, steps in LLAVA_LAYOUTS.items():
        assert renamed(llava.state_dict(), steps).keys() == RECORDS["llava"][layout].keys()
    assert renamed(llava.state_dict(), TO_RESEARCH).keys() == RECORDS["llava"]["research"].keys()
    assert renamed(vit.state_dict(), VIT_HUB).keys() == RECORDS["vit"]["hub"].keys()
    assert renamed(bare.state_dict(), VIT_HUB).keys() == RECORDS["vit"]["hub, bare"].keys()


def test_a_view_is_no_copy_and_goes_back() -> None:
    tensor = torch.randn(5, 3)
    parameter = Leading(2).to_parameter(tensor)
    assert parameter.shape == (1, 1, 5, 3)
    assert parameter.data_ptr() == tensor.data_ptr()
    back = Leading(2).to_key(parameter)
    assert back.data_ptr() == tensor.data_ptr()
    assert torch.equal(back, tensor)


def test_a_row_without_a_view_gives_the_tensor_itself() -> None:
    rules = Rules(("a.*", "b.*"), ("c", "d", Leading(1)))
    tensor = torch.randn(3)
    assert rules.to_parameter("a.weight", tensor) is tensor
    assert rules.to_key("b.weight", tensor) is tensor
    assert rules.to_parameter("c", tensor).shape == (1, 3)
    assert (rules + rules).to_key("d", tensor[None]).shape == (3,)

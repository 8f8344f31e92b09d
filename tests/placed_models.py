"""Models to be put in places, and all that one can get out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM
from hooked_vlm.edits import Add, BlockAttention, Edit, Mean, Replace, Zero
from tests import tiny_blip, tiny_llava

load = HookedVLM.from_pretrained


class Case(NamedTuple):
    """A model of HF's, inputs for it, and the tower that edits are made in."""

    hf: Callable[[], PreTrainedModel]
    inputs: Callable[[PreTrainedModel], dict[str, Any]]
    tower: str
    generates: bool = True


def prompts(hf: PreTrainedModel) -> dict[str, Any]:
    return tiny_llava.prompts(hf, [1, 2])


CASES = {
    "llava": Case(tiny_llava.hf_llava, prompts, "language_model"),
    "llava, tied": Case(partial(tiny_llava.hf_llava, tie_word_embeddings=True), prompts, "language_model"),
    "llava next": Case(partial(tiny_llava.hf_llava, tiles=True), prompts, "language_model"),
    "blip": Case(partial(tiny_blip.hf_blip, "vqa"), lambda _: tiny_blip.inputs("vqa", batch=2), "question_encoder"),
    "clip": Case(tiny_llava.hf_clip, lambda _: tiny_llava.clip_inputs(), "text_encoder", generates=False),
    "vit": Case(tiny_llava.hf_vit, lambda _: {"pixel_values": tiny_blip.pixels(2, 28, 28)}, "vision_encoder", False),
}


def saved(folder: Path) -> dict[str, Path]:
    """Every case's model, saved."""
    folders = {name: folder / name.replace(", ", "-") for name in CASES}
    for name, path in folders.items():
        CASES[name].hf().save_pretrained(path)
    return folders


@cache
def inputs_of(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return CASES[name].inputs(CASES[name].hf())


def everything(model: HookedVLM, name: str) -> dict[str, Tensor]:
    """What one can get out of a model: every activation, edited runs, words."""
    inputs = inputs_of(name)
    _, clean = model.run_with_cache(inputs)
    assert set(clean) == set(model.hook_names)
    found = {f"cache: {hook}": activation for hook, activation in clean.items()}
    block = f"{CASES[name].tower}.blocks.1"
    shape = clean[f"{block}.hook_resid_post"].shape
    torch.manual_seed(1)
    edits: dict[str, list[Edit]] = {
        "a plain tensor": [Replace(f"{block}.hook_resid_post", torch.randn(shape))],
        "heads": [
            Add(f"{block}.hook_q_input", torch.randn(shape[-1]), heads=[1]),
            BlockAttention(f"{block}.attn", positions=[2, 3], keys=[0]),
            Zero(f"{block}.attn.hook_result", heads=0),
        ],
        "two towers": [
            Zero("vision_encoder.blocks.0.hook_mlp_out"),
            Mean(f"{block}.mlp.hook_post"),
            Replace(f"{block}.hook_resid_post", clean, positions=[0, 1]),
        ],
    }
    for edit, edited in edits.items():
        found[f"edit: {edit}"] = model.patch(inputs, edited)
    if CASES[name].generates:
        for beams in (1, 3):
            options = {"num_beams": beams, "max_new_tokens": 4, "return_type": "tokens"}
            found[f"words of {beams}"] = model.generate(inputs, **options)
    return {what: tensor.to("cpu") for what, tensor in found.items()}


EXPECTED: dict[tuple[str, Any, str], dict[str, Tensor]] = {}


def expected(
    checkpoints: Mapping[str, Path], name: str, *, dtype: Any = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """Everything of the plain model, computed once."""
    key = (name, dtype, device)
    if key not in EXPECTED:
        EXPECTED[key] = everything(load(checkpoints[name], dtype=dtype, device=device), name)
    return EXPECTED[key]


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [what for what in theirs if not torch.equal(ours[what], theirs[what])]
    assert not different

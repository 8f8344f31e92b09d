"""Every hook point of LLaVA, CLIP and ViT holds the tensor of HF's that the table names, or the table says why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTModel

from hooked_vlm import HookedVLM
from tests.weights_conversion.layouts import clip_batch, hf_clip, hf_llava, hf_vit, llava_batch, vit_batch
from weights_conversion import Counterpart, Counterparts, counterparts_of_config
from weights_conversion.counterparts import PARAMETER

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[nn.Module], dict[str, Tensor]]]] = {
    "llama": (hf_llava, llava_batch),
    "mistral, tiles": (partial(hf_llava, "mistral", tiles=True), llava_batch),
    "qwen2": (partial(hf_llava, "qwen2"), llava_batch),
    "phi3": (partial(hf_llava, "phi3"), llava_batch),
    "stream 0": (partial(hf_llava, vision_feature_layer=[0]), llava_batch),
    "streams": (partial(hf_llava, vision_feature_layer=[1, -1]), llava_batch),
    "CLIP": (hf_clip, lambda hf: clip_batch()),
    "ViT with a classifier": (hf_vit, lambda hf: vit_batch()),
    "ViT with a pooler": (partial(hf_vit, ViTModel), lambda hf: vit_batch()),
    "ViT with neither": (partial(hf_vit, ViTModel, False), lambda hf: vit_batch()),
}

WITHOUT = {"hook_scale", "hook_attn_scores", "hook_result", "hook_rot_q", "hook_rot_k"}
"""What no module of HF's gives, in any model."""


def record(hf: PreTrainedModel, wanted: dict[str, Counterpart], batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """HF's tensors by our names, as one forward gives them; the first time where a module runs twice."""
    kept: dict[str, Tensor | None] = {}

    def keep(names: list[str], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        for name in names:
            if name not in kept:
                tensor = wanted[name].read(first, output)
                kept[name] = None if tensor is None else tensor.clone()

    handles = []
    for name, side in wanted.items():
        if side.place == PARAMETER:
            kept[name] = hf.get_parameter(side.module).detach()
    for module in {side.module for side in wanted.values() if side.place != PARAMETER}:
        names = [name for name, side in wanted.items() if side.module == module]
        handles.append(hf.get_submodule(module).register_forward_hook(partial(keep, names), with_kwargs=True))
    with torch.no_grad():
        hf(**batch)
    for handle in handles:
        handle.remove()
    return kept


def compared(kind: str, attention: Any) -> tuple[HookedVLM, Counterparts, dict[str, Tensor], dict[str, Tensor | None]]:
    """Our model, its table, our tensors (what the forward returns as ``logits``), and HF's."""
    make, batch_of = MODELS[kind]
    hf = make()
    hf.set_attn_implementation(attention)
    model = HookedVLM.from_hf(hf, attention=attention)
    table = counterparts_of_config(model.config)
    batch = batch_of(hf)
    wanted = {name: side for name in [*model.hook_names, "logits"] if (side := table.of(name)) is not None}
    with torch.no_grad():
        output, cache = model.run_with_cache(batch)
    ours = {**{name: cache[name] for name in model.hook_names if name in cache}, "logits": output}
    return model, table, ours, record(hf, wanted, batch)


@pytest.mark.parametrize("kind", MODELS)
def test_every_hook_point_holds_what_the_table_says(kind: str) -> None:
    model, table, ours, theirs = compared(kind, "eager")
    assert "logits" in theirs
    for name, tensor in ours.items():
        side = table.of(name)
        if side is None:
            assert table.reason(name)
            several = name == "vision_encoder.hook_out" and len(model.config.vision.feature_layers or ()) > 1
            assert name.rpartition(".")[2] in WITHOUT or several, f"{name}: {table.reason(name)}"
            continue
        hf = theirs[name]
        assert hf is not None, name
        assert torch.equal(side.form(hf, tensor.shape), tensor), f"{name} is not {side}"


@pytest.mark.parametrize("kind", ["llama", "CLIP", "ViT with a classifier"])
def test_a_fused_attention_gives_no_pattern_and_the_table_says_so(kind: str) -> None:
    _, table, ours, theirs = compared(kind, "sdpa")
    for name, tensor in ours.items():
        side = table.of(name)
        if side is None:
            continue
        hf = theirs[name]
        if name.endswith("hook_pattern"):
            assert hf is None
            assert "sdpa" in side.not_given
        else:
            assert not side.not_given
            assert hf is not None
            assert torch.equal(side.form(hf, tensor.shape), tensor), f"{name} is not {side}"


def test_all_hook_points_fire_where_they_are_looked_at() -> None:
    """So that the tests above compare them all: the sub-layers that a LLaVA does not read, too."""
    for kind in MODELS:
        model, _, ours, _ = compared(kind, "eager")
        assert {*ours} == {*model.hook_names, "logits"}

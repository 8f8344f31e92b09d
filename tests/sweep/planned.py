"""Stages of a model, what truly changes at their ends, and what the sweep's plan says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from hooked_vlm import HookedVLM, VLMInputs, toys
from hooked_vlm.cache import ActivationCache
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.edits import Edit, edit_hooks
from hooked_vlm.sweep.plan import Chunk, Compiler, EditSet, Step
from hooked_vlm.sweep.trail import Trail
from hooked_vlm.sweep.wave import passes
from tests.models.modes import model_and_inputs
from tests.tiny_llava import LANGUAGE_MODELS, hf_llava, prompts

Stage = tuple[str, int, str]
"""A tower, a block of it (0 outside the blocks), and a stage, as in :mod:`hooked_vlm.sweep.places`."""


@cache
def made(kind: str, attention: AttentionImplementation = "eager") -> tuple[HookedVLM, VLMInputs]:
    """An embedded model with one row; one of :mod:`tests.models.modes` with several; or a LLaVA with windows of
    positions in some layers, and padding on the left."""
    if kind == "windows":
        hf = hf_llava(LANGUAGE_MODELS["qwen2, mixed"])
        model = HookedVLM.from_hf(hf, attention=attention)
        return model, model._inputs(prompts(hf, (1, 1), n_words=(8, 5)))
    if kind not in toys.names():
        model, batch = model_and_inputs(kind, attention)
        return model, model._inputs(batch)
    model, sample = HookedVLM.from_pretrained(kind, attention=attention), toys.demo_sample()
    inputs = model.prepare(sample.image, sample.question)
    if kind == "toy-blip-vqa":
        inputs = replace(inputs, decoder_input_ids=torch.tensor([[model.config.bos_token_id, 9, 11, 14]]))
    return model, model._inputs(inputs)


def ends(model: HookedVLM) -> dict[Stage, str]:
    """Where each stage that is passed ends: the hook point whose activation the next stage is given."""
    names: dict[Stage, str] = {}
    for tower in model.towers:
        module = model.get_submodule(tower)
        if not hasattr(module, "blocks"):
            continue
        names[tower, 0, "enter"] = f"{tower}.hook_full_embed"
        for layer in range(max(getattr(module.config, "feature_layers", None) or (len(module.blocks),))):
            stream = "hook_normalized_resid" if module.config.norm_order == "post" else "hook_resid"
            names[tower, layer, "attend"] = f"{tower}.blocks.{layer}.{stream}_mid"
            if module.config.d_cross is not None:
                names[tower, layer, "cross_attend"] = f"{tower}.blocks.{layer}.{stream}_mid_cross"
            names[tower, layer, "feed_forward"] = f"{tower}.blocks.{layer}.{stream}_post"
        names[tower, 0, "leave"] = f"{tower}.hook_out"
    return names


@torch.no_grad()
def states(
    model: HookedVLM,
    inputs: VLMInputs,
    names: Sequence[str],
    edits: Sequence[Edit] = (),
    *,
    stop_at: str | None = None,
) -> tuple[Tensor, ActivationCache]:
    """The output, and some activations, of the plain forward under edits."""
    with model.hooks(edit_hooks(model, inputs, edits)):
        return model.run_with_cache(inputs, names_filter=list(names), stop_at=stop_at)


def differing(one: Tensor, other: Tensor, real: Tensor | None = None, tolerance: float = 1e-4) -> ndarray:
    """At which positions two activations ``[b p ...]`` differ, in any row; more than two kernels do.

    ``real``: which positions are no padding: what a padded one gives is nobody's.
    """
    differs = (one - other).abs().flatten(2).amax(-1) > tolerance
    return (differs if real is None else differs & real).any(0).numpy()


def compiled(
    model: HookedVLM, inputs: VLMInputs, edit_sets: Sequence[Sequence[Edit]], base: Sequence[Edit] = ()
) -> tuple[Compiler, Trail, list[EditSet]]:
    compiler = Compiler(model, inputs, base)
    trail = compiler.record(edit_sets)
    return compiler, trail, compiler.compile_all(edit_sets, trail)


def planned(
    model: HookedVLM, inputs: VLMInputs, edit_sets: Sequence[Sequence[Edit]], read: Sequence[int] | None = None
) -> dict[Stage, Step]:
    """The steps of these sets together; ``read``: positions of the last tower's output, by default all that may be."""
    compiler, trail, sets = compiled(model, inputs, edit_sets)
    last = model.towers[-1]
    wanted = compiler.read_positions(last, trail.towers[last].n_positions)
    if read is not None:
        wanted = np.isin(np.arange(len(wanted)), read)
    steps = passes(compiler, Chunk(sets, trail), wanted)
    outside = ("enter", "leave", "head")
    return {(tower, 0 if step.stage in outside else step.layer, step.stage): step for tower, step in steps}

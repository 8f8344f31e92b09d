"""No dead names: every hook point fires, in the listed order, and an edit at it, returned or in place, is felt.

Edits are random numbers on all positions: a mere scaling might be cancelled by the next LayerNorm. The decoder reads
several tokens, because with one key alone a self-attention pattern is 1 whatever its scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, HookPoint
from tests.models.modes import LEAF, MODES, SHAPE, beyond_the_features, model_and_inputs, passed
from tests.tiny_blip import hf_blip, inputs
from tests.tiny_llava import hf_llava, prompts

ATTENTION = ["eager", "sdpa"]


@cache
def replacement(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random numbers; positive where they are divided by or are weights of a mean."""
    generator = torch.Generator().manual_seed(len(name))
    values = torch.randn(shape, generator=generator)
    return values.abs() + 0.5 if name.endswith(("hook_scale", "hook_pattern")) else values


def returned(activation: Tensor, hook: HookPoint) -> Tensor:
    return replacement(hook.name, tuple(activation.shape)).clone()


def in_place(activation: Tensor, hook: HookPoint) -> None:
    with torch.no_grad():
        activation.copy_(replacement(hook.name, tuple(activation.shape)))


def run(mode: str, attention: str, name: str, edit: Callable[..., Any]) -> Tensor:
    """The answer where ``name`` is edited; or beyond a LLaVA's features what comes of them, which is no answer."""
    model, batch = model_and_inputs(mode, attention)
    return model.run_with_hooks(batch, fwd_hooks=[(name, edit)], stop_at=end(mode, name), **MODES[mode].options)


@cache
@torch.no_grad()
def run_returned(mode: str, attention: str, name: str) -> Tensor:
    """Where the edit is returned; several tests compare with it."""
    return run(mode, attention, name, returned)


@cache
@torch.no_grad()
def run_plain(mode: str, attention: str, stop_at: str | None) -> Tensor:
    model, batch = model_and_inputs(mode, attention)
    return model.run_with_hooks(batch, stop_at=stop_at, **MODES[mode].options)


def end(mode: str, name: str) -> str | None:
    return LEAF if name in beyond_the_features(mode, model_and_inputs(mode, "sdpa")[0]) else None


def is_leaf(mode: str, name: str) -> bool:
    """Whether nothing reads it."""
    return mode.startswith("llava") and name == LEAF


CASES = [(mode, attention) for mode in MODES for attention in ATTENTION]
SAME_IN_EAGER = ("llava with phi3", "llava with qwen2", "vit with a pooler")
"""Whose edits are walked over with the fused kernel alone, which is compared with eager."""
EDIT_CASES = [(mode, attention) for mode, attention in CASES if attention == "sdpa" or mode not in SAME_IN_EAGER]
KEY_HEADS = ("hook_k", "hook_v", "hook_rot_k", "hook_k_input", "hook_v_input")


@pytest.mark.parametrize(("mode", "attention"), CASES)
@torch.no_grad()
def test_names_fire_in_their_order(mode: str, attention: str) -> None:
    model, batch = model_and_inputs(mode, attention)
    fired: list[str] = []
    everywhere = [(lambda name: True, lambda activation, hook: fired.append(hook.name))]
    model.run_with_hooks(batch, fwd_hooks=everywhere, **MODES[mode].options)
    assert fired == passed(mode, model)
    _, cached = model.run_with_cache(batch, **MODES[mode].options)
    assert list(cached) == fired


@pytest.mark.parametrize(("mode", "attention"), CASES)
@torch.no_grad()
def test_axes_are_as_listed(mode: str, attention: str) -> None:
    model, batch = model_and_inputs(mode, attention)
    _, cached = model.run_with_cache(batch, **MODES[mode].options)
    sizes: dict[tuple[str, str], set[int]] = {}
    for name, tensor in cached.items():
        point = model.hook_dict[name]
        assert len(point.axes) == tensor.dim(), name
        for axis, size in zip(point.axes, tensor.shape, strict=True):
            axis = "kv" if axis == "h" and name.endswith(KEY_HEADS) else axis
            sizes.setdefault((axis, name.split(".")[0]), set()).add(size)
            assert size == 1 or axis != "1"
    widths = ("b", "d_model", "h", "kv", "d_head", "d_mlp")
    assert all(len(found) == 1 for (axis, _), found in sizes.items() if axis in widths)
    texts = [tower for axis, tower in sizes if axis == "b" and tower not in ("vision_encoder", "projector")]
    rows = 4 if mode == "clip" else 2
    assert all(sizes["b", tower] == {rows} for tower in texts)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("mode", ["llava", "llava with phi3", "llava with qwen2"])
@torch.no_grad()
def test_keys_and_values_have_heads_of_their_own(mode: str, attention: str) -> None:
    """Two query heads share one; what is seen is what there is, not copies."""
    model, batch = model_and_inputs(mode, attention)
    _, cached = model.run_with_cache(batch, names_filter="language_model.blocks.*")
    for name, tensor in cached.items():
        if name.endswith(KEY_HEADS):
            assert tensor.shape[2] == 2, name
        elif "h" in model.hook_dict[name].axes:
            assert tensor.shape[model.hook_dict[name].axes.index("h")] == 4, name


@pytest.mark.parametrize(("mode", "attention"), EDIT_CASES)
@torch.no_grad()
@pytest.mark.usefixtures("unchecked")
def test_every_edit_is_felt_returned_or_in_place(mode: str, attention: str) -> None:
    """And under both implementations of attention an edit means the same."""
    model, batch = model_and_inputs(mode, attention)
    answer = model(batch, **MODES[mode].options)
    dead, differing, unfinished = [], {}, []
    for name in passed(mode, model):
        if is_leaf(mode, name):
            continue
        plain = run_plain(mode, attention, end(mode, name))
        from_returned, from_in_place = run_returned(mode, attention, name), run(mode, attention, name, in_place)
        if not bool(from_returned.isfinite().all()):
            unfinished.append(name)
        if float((from_returned - plain).abs().max()) < 1e-3:
            dead.append(name)
        # Written in place, the numbers stand where the old ones stood, in their memory layout; the next matrix product
        # may round differently. So do the kernels, and where an edit makes attention sharp, that is magnified.
        scale = max(float(plain.abs().max()), float(from_returned.abs().max()))
        strayed = {"in place": float((from_returned - from_in_place).abs().max()) / scale / 1e-5}
        if attention == "sdpa":
            from_eager = run_returned(mode, "eager", name)
            strayed["eager"] = float((from_returned - from_eager).abs().max()) / scale / 5e-5
        if max(strayed.values()) > 1:
            differing[name] = strayed
    assert not unfinished
    assert not dead
    assert not differing
    assert torch.equal(model(batch, **MODES[mode].options), answer)


GRADIENT_CASES = [("vqa", "eager"), ("vqa", "sdpa"), ("itc", "sdpa"), ("llava", "sdpa"), ("clip", "sdpa")]


@pytest.mark.parametrize(("mode", "attention"), GRADIENT_CASES)
@pytest.mark.usefixtures("unchecked")
def test_every_edit_is_felt_where_gradients_are_wanted(mode: str, attention: str) -> None:
    """A forward that is to be differentiated takes other ways past the fused kernels; the numbers are the same."""
    model, _ = model_and_inputs(mode, attention)
    wrong = {}
    for name in passed(mode, model):
        expected = run_returned(mode, attention, name)
        for edit in (returned, in_place):
            found = run(mode, attention, name, edit).detach()
            strayed = float((found - expected).abs().max())
            if strayed > 1e-5 * float(expected.abs().max()):
                wrong[name, edit.__name__] = strayed
    assert not wrong


ONE_LAYER = {"num_hidden_layers": 1}
ONE_LAYER_MODELS = {
    "vqa": lambda: (
        hf_blip("vqa", replace(SHAPE, text_layers=1, vision_layers=1)),
        inputs("vqa", batch=2, length=4, answer=3),
    ),
    "llava": lambda: (
        hf := hf_llava(ONE_LAYER, vision=ONE_LAYER, vision_feature_layer=-1),
        prompts(hf, (1, 1), n_words=(6, 6)),
    ),
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", ONE_LAYER_MODELS)
@pytest.mark.usefixtures("unchecked")
def test_gradients_flow_through_an_edit_in_place_as_through_a_returned_one(kind: str, attention: str) -> None:
    """Also where the operation before the hook point keeps its output for the backward."""
    hf, batch = ONE_LAYER_MODELS[kind]()
    model = HookedVLM.from_hf(hf, attention=attention)

    def half_in_place(activation: Tensor, hook: HookPoint) -> None:
        activation[:, 1:] *= 0.5

    def half_returned(activation: Tensor, hook: HookPoint) -> Tensor:
        return torch.cat([activation[:, :1], activation[:, 1:] * 0.5], dim=1)

    def gradient(name: str, edit: Callable[..., Any]) -> Tensor:
        logits = model.run_with_hooks(batch, fwd_hooks=[(name, edit)])
        return torch.autograd.grad(logits.sin().sum(), model.vision_encoder.embed.pos)[0]

    wrong = {}
    unread = ("vision_encoder.ln_post", "vision_encoder.hook_pooled") if kind == "llava" else ()
    for name in model.hook_names:
        if name.startswith(unread):
            continue
        returned, written = gradient(name, half_returned), gradient(name, half_in_place)
        strayed = float((returned - written).abs().max() / returned.abs().max())
        if not strayed < 1e-4:
            wrong[name] = strayed
    assert not wrong


@pytest.mark.parametrize(("mode", "attention"), CASES)
@torch.no_grad()
def test_names_that_are_not_passed_are_silent(mode: str, attention: str) -> None:
    model, batch = model_and_inputs(mode, attention)
    unpassed = [name for name in model.hook_names if name not in passed(mode, model)]
    assert bool(unpassed) == bool(MODES[mode].unpassed)
    fired: list[str] = []
    for name in unpassed:
        with model.hooks([(name, lambda activation, hook: fired.append(hook.name))]):
            model(batch, **MODES[mode].options)
    assert not fired


@pytest.mark.parametrize("mode", ["llava", "llava-next"])
@torch.no_grad()
def test_without_an_image_the_language_model_alone_is_passed(mode: str) -> None:
    model, batch = model_and_inputs(mode, "sdpa")
    words = {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, 7)}
    _, cached = model.run_with_cache(words)
    assert list(cached) == [name for name in model.hook_names if name.startswith("language_model.")]


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_unpassed_names_are_passed_in_another_mode(attention: str) -> None:
    model, _ = model_and_inputs("itm", attention)
    assert set(passed("itm", model)) | set(passed("itc", model)) == set(model.hook_names)


@torch.no_grad()
def test_what_cannot_reach_the_answer_by_construction() -> None:
    """The few places where an edit must be without effect; everywhere else the tests above hold."""
    model, batch = model_and_inputs("vqa", "eager")
    alone = batch | {"decoder_input_ids": batch["decoder_input_ids"][:, :1]}
    plain = model(alone)
    for kind in ("q", "k", "attn_scores"):  # one key alone: its weight is 1 whatever its score
        name = f"answer_decoder.blocks.1.attn.hook_{kind}"
        assert torch.equal(model.run_with_hooks(alone, fwd_hooks=[(name, returned)]), plain)

    def last_key(scores: Tensor, hook: HookPoint) -> None:
        scores[:, :, :-1, -1] += torch.finfo(scores.dtype).min / 2

    causal = "answer_decoder.blocks.0.attn.hook_attn_scores"  # keys to come: masked already
    assert torch.equal(model.run_with_hooks(batch, fwd_hooks=[(causal, last_key)]), model(batch))

    retrieval, pair = model_and_inputs("itm", "eager")

    def all_but_first(state: Tensor, hook: HookPoint) -> None:
        state[:, 1:] += torch.randn_like(state[:, 1:])

    read = "text_encoder.hook_out"  # the heads read the first position alone
    assert torch.equal(retrieval.run_with_hooks(pair, fwd_hooks=[(read, all_but_first)]), retrieval(pair))

"""No dead names: every hook point fires, in the listed order, and an edit at it, returned or in place, is felt.

Edits are random numbers on all positions: a mere scaling might be cancelled by the next LayerNorm. The decoder reads
several tokens, because with one key alone a self-attention pattern is 1 whatever its scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, HookPoint
from tests.tiny_blip import Shape, hf_blip, inputs

SHAPE = Shape(text=36, text_heads=3, vision=36, vision_heads=3, text_layers=2, vision_layers=2)
ATTENTION = ["eager", "sdpa"]


class Mode(NamedTuple):
    """A way to run a model, and the names that such a run does not pass, with the reason."""

    task: str
    options: dict[str, Any]
    unpassed: dict[str, str]


MODES = {
    "vqa": Mode("vqa", {}, {}),
    "caption": Mode("caption", {}, {}),
    "itm": Mode(
        "retrieval",
        {},
        {
            "hook_image_embeds": "the matching head reads the text encoder's first state alone",
            "hook_text_embeds": "the matching head reads the text encoder's first state alone",
        },
    ),
    "itc": Mode(
        "retrieval",
        {"use_itm_head": False},
        {
            "cross": "the text is embedded without a look at the image, so cross-attention is passed over",
            "hook_itm_logits": "this is the matching head, which is not asked",
        },
    ),
}


@cache
def model_and_inputs(mode: str, attention: str) -> tuple[HookedVLM, dict[str, Any]]:
    torch.manual_seed(0)
    model = HookedVLM.from_hf(hf_blip(MODES[mode].task, SHAPE), attention=attention)
    return model, inputs(MODES[mode].task, batch=2, length=4, answer=3)


def passed(mode: str, model: HookedVLM) -> list[str]:
    return [name for name in model.hook_names if not any(part in name for part in MODES[mode].unpassed)]


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
    model, batch = model_and_inputs(mode, attention)
    return model.run_with_hooks(batch, fwd_hooks=[(name, edit)], **MODES[mode].options)


CASES = [(mode, attention) for mode in MODES for attention in ATTENTION]


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
            sizes.setdefault((axis, name.split(".")[0]), set()).add(size)
            assert size == 1 or axis != "1"
    assert all(found == {2} for (axis, _), found in sizes.items() if axis == "b")
    assert all(len(found) == 1 for (axis, _), found in sizes.items() if axis in ("d_model", "h", "d_head", "d_mlp"))


@pytest.mark.parametrize(("mode", "attention"), CASES)
@torch.no_grad()
@pytest.mark.usefixtures("unchecked")
def test_every_edit_is_felt_returned_or_in_place(mode: str, attention: str) -> None:
    """And under both implementations of attention an edit means the same."""
    model, batch = model_and_inputs(mode, attention)
    plain = model(batch, **MODES[mode].options)
    dead, differing, unfinished = [], {}, []
    for name in passed(mode, model):
        from_returned, from_in_place = run(mode, attention, name, returned), run(mode, attention, name, in_place)
        if not bool(from_returned.isfinite().all()):
            unfinished.append(name)
        if float((from_returned - plain).abs().max()) < 1e-3:
            dead.append(name)
        # Written in place, the numbers stand where the old ones stood, in their memory layout; the next matrix product
        # may round differently.
        strayed = float((from_returned - from_in_place).abs().max())
        if attention == "sdpa":
            strayed = max(strayed, float((from_returned - run(mode, "eager", name, returned)).abs().max()))
        if strayed > 1e-5 * float(plain.abs().max()):
            differing[name] = strayed
    assert not unfinished
    assert not dead
    assert not differing
    assert torch.equal(model(batch, **MODES[mode].options), plain)


@pytest.mark.parametrize(("mode", "attention"), [("vqa", "eager"), ("vqa", "sdpa"), ("itc", "sdpa")])
@pytest.mark.usefixtures("unchecked")
def test_every_edit_is_felt_where_gradients_are_wanted(mode: str, attention: str) -> None:
    """A forward that is to be differentiated takes other ways past the fused kernels; the numbers are the same."""
    model, _ = model_and_inputs(mode, attention)
    wrong = {}
    for name in passed(mode, model):
        with torch.no_grad():
            expected = run(mode, attention, name, returned)
        for edit in (returned, in_place):
            found = run(mode, attention, name, edit).detach()
            strayed = float((found - expected).abs().max())
            if strayed > 1e-5 * float(expected.abs().max()):
                wrong[name, edit.__name__] = strayed
    assert not wrong


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.usefixtures("unchecked")
def test_gradients_flow_through_an_edit_in_place_as_through_a_returned_one(attention: str) -> None:
    """Also where the operation before the hook point keeps its output for the backward."""
    one_layer = replace(SHAPE, text_layers=1, vision_layers=1)
    model = HookedVLM.from_hf(hf_blip("vqa", one_layer), attention=attention)
    batch = inputs("vqa", batch=2, length=4, answer=3)

    def half_in_place(activation: Tensor, hook: HookPoint) -> None:
        activation[:, 1:] *= 0.5

    def half_returned(activation: Tensor, hook: HookPoint) -> Tensor:
        return torch.cat([activation[:, :1], activation[:, 1:] * 0.5], dim=1)

    def gradient(name: str, edit: Callable[..., Any]) -> Tensor:
        logits = model.run_with_hooks(batch, fwd_hooks=[(name, edit)])
        return torch.autograd.grad(logits.sin().sum(), model.vision_encoder.embed.pos)[0]

    wrong = {}
    for name in model.hook_names:
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

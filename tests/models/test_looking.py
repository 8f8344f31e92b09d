"""Looking changes nothing: a run that is cached, or hooked by what only reads, gives the plain numbers to the bit.

In every dtype, implementation of attention and gradient mode. What is computed only to be looked at (the pattern beside
a fused kernel, a head's own result, a LayerNorm's scale) still receives its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM, HookPoint
from hooked_vlm.components import RMSNorm
from tests.tiny_blip import Shape, hf_blip, padded_inputs, pixels
from tests.tiny_llava import IMAGE, LANGUAGE_MODELS, clip_inputs, hf_clip, hf_llava, hf_vit, prompts, row_alone

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENTS: dict[str, Callable[[], AbstractContextManager]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
MODES: dict[str, tuple[str, dict[str, bool]]] = {
    "vqa": ("vqa", {}),
    "caption": ("caption", {}),
    "itm": ("retrieval", {}),
    "itc": ("retrieval", {"use_itm_head": False}),
}
ONE_LAYER = Shape(text=36, text_heads=3, vision=36, vision_heads=3, text_layers=1, vision_layers=1)


def images_and_padding(hf: PreTrainedModel) -> dict[str, Any]:
    """Rows with one image, none and two, padded on the left; pictures of one size where they are tiled."""
    return prompts(hf, (1, 0, 2), sizes=[(20, 57)])


def llava(kind: str, n_layers: int, **entries: Any) -> PreTrainedModel:
    layers = {"num_hidden_layers": n_layers}
    return hf_llava(LANGUAGE_MODELS[kind] | layers, vision=layers, **entries)


OTHERS: dict[str, tuple[Callable[[int], PreTrainedModel], Callable[[PreTrainedModel], dict[str, Any]]]] = {
    "llava": (partial(llava, "llama"), images_and_padding),
    "llava with phi3": (partial(llava, "phi3"), images_and_padding),
    "llava with qwen2": (partial(llava, "qwen2, mixed", vision_feature_layer=[-1, 0]), images_and_padding),
    "llava-next": (partial(llava, "mistral, sliding", tiles=True), images_and_padding),
    "clip": (lambda n: hf_clip(eos=95, num_hidden_layers=n), lambda hf: clip_inputs(eos=95)),
    "vit": (lambda n: hf_vit(num_hidden_layers=n), lambda hf: {"pixel_values": pixels(2, IMAGE, IMAGE)}),
}
"""Models of so many layers, and inputs for them. Those with Qwen2 and Mistral have windows, which padding reaches."""

every_way = pytest.mark.parametrize("gradients", GRADIENTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@cache
def model_and_inputs(
    task: str, dtype: torch.dtype, attention: str, shape: str | Shape = "heads of 12"
) -> tuple[HookedVLM, dict[str, Any]]:
    torch.manual_seed(0)
    if task in OTHERS:
        build, inputs = OTHERS[task]
        hf = build(1 if shape is ONE_LAYER else 3 if "qwen2" in task else 2)
        return HookedVLM.from_hf(hf.to(dtype), attention=attention), inputs(hf)
    return HookedVLM.from_hf(hf_blip(task, shape).to(dtype), attention=attention), padded_inputs(task)


def look(activation: Tensor, hook: HookPoint) -> None:
    """What a researcher's reading hook does: computes something from the activation, and keeps it."""
    hook.ctx["seen"] = activation.detach().float().mean()


def assert_no_hooks(model: HookedVLM) -> None:
    assert not any(point.is_hooked or point.handles for point in model.hook_points())


def assert_looking_at_everything_changes_nothing(
    model: HookedVLM, batch: dict[str, Any], dtype: torch.dtype, **options: bool
) -> None:
    plain = model(batch, **options)
    assert plain.dtype == dtype
    assert bool(plain.isfinite().all())
    cached, cache = model.run_with_cache(batch, **options)
    assert torch.equal(cached, plain)
    assert len(cache) > 0.8 * len(model.hook_names)
    assert_no_hooks(model)
    hooked = model.run_with_hooks(batch, fwd_hooks=[("*", look)], **options)
    assert torch.equal(hooked, plain)
    assert_no_hooks(model)
    assert torch.equal(model(batch, **options), plain)


@every_way
@every_attention
@every_dtype
@pytest.mark.parametrize("mode", MODES)
def test_looking_at_everything(mode: str, dtype: torch.dtype, attention: str, gradients: str) -> None:
    task, options = MODES[mode]
    with GRADIENTS[gradients]():
        assert_looking_at_everything_changes_nothing(*model_and_inputs(task, dtype, attention), dtype, **options)


@every_way
@every_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.usefixtures("unchecked")
def test_looking_at_everything_in_other_models(kind: str, dtype: torch.dtype, attention: str, gradients: str) -> None:
    with GRADIENTS[gradients]():
        assert_looking_at_everything_changes_nothing(*model_and_inputs(kind, dtype, attention), dtype)


def assert_looking_at_each_name_changes_nothing(model: HookedVLM, batch: dict[str, Any]) -> None:
    changed = []
    plain = model(batch)
    for name in model.hook_names:
        if not torch.equal(model.run_with_hooks(batch, fwd_hooks=[(name, look)]), plain):
            changed.append(f"{name} hooked")
        logits, cache = model.run_with_cache(batch, names_filter=name)
        assert list(cache) == [name]
        if not torch.equal(logits, plain):
            changed.append(f"{name} cached")
    assert not changed
    assert_no_hooks(model)


@every_way
@every_attention
@every_dtype
@pytest.mark.usefixtures("unchecked")
def test_looking_at_each_name_alone(dtype: torch.dtype, attention: str, gradients: str) -> None:
    with GRADIENTS[gradients]():
        assert_looking_at_each_name_changes_nothing(*model_and_inputs("vqa", dtype, attention, ONE_LAYER))


EACH_NAME = [
    *(("llava", torch.float32, attention, "grad") for attention in ("eager", "sdpa")),
    *(("llava", torch.bfloat16, attention, "no_grad") for attention in ("eager", "sdpa")),
    ("llava", torch.bfloat16, "sdpa", "grad"),
    *((kind, torch.bfloat16, "sdpa", "no_grad") for kind in ("llava with phi3", "llava-next", "clip", "vit")),
]


@pytest.mark.parametrize(("kind", "dtype", "attention", "gradients"), EACH_NAME)
@pytest.mark.usefixtures("unchecked")
def test_looking_at_each_name_alone_in_other_models(
    kind: str, dtype: torch.dtype, attention: str, gradients: str
) -> None:
    with GRADIENTS[gradients]():
        assert_looking_at_each_name_changes_nothing(*model_and_inputs(kind, dtype, attention, ONE_LAYER))


@every_attention
@every_dtype
@pytest.mark.parametrize("kind", ["vqa", "llava", "clip"])
@pytest.mark.usefixtures("unchecked")
def test_what_is_seen_is_the_same_whoever_looks(kind: str, dtype: torch.dtype, attention: str) -> None:
    """One name at a time or all at once, by a cache or by a hook."""
    model, batch = model_and_inputs(kind, dtype, attention)
    seen: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = activation.clone()

    with torch.no_grad():
        _, cache = model.run_with_cache(batch)
        model.run_with_hooks(batch, fwd_hooks=[("*", keep)])
        assert list(seen) == list(cache)
        assert all(torch.equal(seen[name], cache[name]) for name in cache)
        for name in model.hook_names[::7]:
            assert torch.equal(model.run_with_cache(batch, names_filter=name)[1][name], cache[name])


@every_dtype
@pytest.mark.parametrize("kind", ["vqa", "llava", "llava with qwen2", "clip"])
@torch.no_grad()
def test_pattern_is_the_softmax_of_scores_in_both(kind: str, dtype: torch.dtype) -> None:
    """Beside the fused kernel the same pattern is shown that the eager way computes with. BLIP alone does not go to
    float32 for it."""
    softmax_dtype = None if kind == "vqa" else torch.float32
    eager, batch = model_and_inputs(kind, dtype, "eager")
    fused, _ = model_and_inputs(kind, dtype, "sdpa")
    for model in (eager, fused):
        _, cache = model.run_with_cache(batch, names_filter=["*hook_attn_scores", "*hook_pattern"])
        for name in cache:
            if name.endswith("hook_pattern"):
                scores = cache[name.replace("hook_pattern", "hook_attn_scores")]
                assert torch.equal(cache[name], scores.softmax(-1, dtype=softmax_dtype).to(dtype))
                ones = torch.ones(scores.shape[:-1])
                torch.testing.assert_close(cache[name].float().sum(-1), ones, rtol=0, atol=2e-2)
    first = "vision_encoder.blocks.0.attn.hook_pattern"
    patterns = [model.run_with_cache(batch, names_filter=first)[1][first] for model in (eager, fused)]
    assert torch.equal(*patterns)


@pytest.mark.parametrize("kind", ["vqa", "llava", "llava with phi3", "clip", "vit"])
@torch.no_grad()
def test_results_and_scale_are_what_they_are_called(kind: str) -> None:
    model, batch = model_and_inputs(kind, torch.float32, "eager")
    _, cache = model.run_with_cache(batch)
    for name in cache:
        owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
        if name.endswith("hook_result"):
            block, module = name.split(".")[:-2], name.split(".")[-2]
            out = cache[".".join([*block, f"hook_{module}_out"])]
            bias = 0 if owner.b_O is None else owner.b_O
            torch.testing.assert_close(cache[name].sum(2) + bias, out, rtol=1e-5, atol=2e-5)
        if name.endswith("hook_scale"):
            normalized = cache[name.replace("hook_scale", "hook_normalized")]
            bias = 0 if isinstance(owner, RMSNorm) else owner.bias
            centered = (normalized - bias) / owner.weight * cache[name]  # what the norm read, less its mean
            variance = centered.pow(2).mean(-1, keepdim=True)
            torch.testing.assert_close((variance + owner.eps).sqrt(), cache[name], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_scale_is_finite_in_half_precision_where_its_square_is_not() -> None:
    model, batch = model_and_inputs("vqa", torch.float16, "eager")
    bright = batch | {"pixel_values": batch["pixel_values"] * 3000}
    plain = model(bright)
    _, cache = model.run_with_cache(bright)
    assert float(cache["resid_post", 0, "vision_encoder"].abs().max()) > 300
    assert all(bool(tensor.isfinite().all()) for name, tensor in cache.items() if name.endswith("hook_scale"))
    keep = [("vision_encoder.blocks.1.ln1.hook_scale", lambda scale, hook: scale.clone())]
    torch.testing.assert_close(model.run_with_hooks(bright, fwd_hooks=keep), plain, rtol=0, atol=5e-2)


BESIDE = ["hook_pattern", "hook_attn_scores", "hook_result", "ln1.hook_scale", "ln2.hook_scale", "hook_q_input"]


def read_and_unpadded(kind: str, attention: str) -> tuple[HookedVLM, dict[str, Any], list[str]]:
    """A model, inputs, and where something is computed beside that the answer is made from. Kernels differ in what they
    make of padded positions."""
    model, batch = model_and_inputs(kind, torch.float32, attention)
    unread = "vision_encoder.blocks.1." if kind == "llava" else "nowhere"
    names = [name for name in model.hook_names if name.endswith(tuple(BESIDE)) and unread not in name]
    return model, row_alone(batch, 2) if kind == "llava" else batch, names


def gradients_at(kind: str, attention: str, backward_hook: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a forward, and the gradients of a number made of them where something is computed beside."""
    model, batch, names = read_and_unpadded(kind, attention)
    found: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def retain(activation: Tensor, hook: HookPoint) -> None:
        activation.retain_grad()
        kept[hook.name] = activation

    def note(gradient: Tensor, hook: HookPoint) -> None:
        found[hook.name] = gradient.detach().clone()

    hooks = {"bwd_hooks": [(names, note)]} if backward_hook else {"fwd_hooks": [(names, retain)]}
    with model.hooks(**hooks):
        logits = model(batch)
        logits.float().sin().sum().backward()
    model.zero_grad(set_to_none=True)
    return logits.detach(), found or {name: activation.grad for name, activation in kept.items()}


@pytest.mark.parametrize("backward_hook", [True, False], ids=["backward hook", "retained"])
@pytest.mark.parametrize("kind", ["vqa", "llava", "clip"])
def test_what_is_computed_beside_has_its_gradient(kind: str, backward_hook: bool) -> None:
    """Under the fused kernel the same gradient as in eager; and the logits are still the fused kernel's, to the bit."""
    gradients = {}
    for attention in ("eager", "sdpa"):
        model, batch, names = read_and_unpadded(kind, attention)
        logits, gradients[attention] = gradients_at(kind, attention, backward_hook)
        assert torch.equal(logits, model(batch).detach())
        assert_no_hooks(model)
    assert set(gradients["eager"]) == set(gradients["sdpa"]) == set(names)
    for name in names:
        eager, fused = gradients["eager"][name], gradients["sdpa"][name]
        assert float(eager.abs().max()) > 0, name
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()), msg=name)


def overwrite(activation: Tensor, hook: HookPoint) -> None:
    with torch.no_grad():
        activation.mul_(0.5)


WRITERS: dict[str, tuple[Callable[..., Any], bool]] = {
    "returns another": (lambda activation, hook: activation * 0.5, True),
    "writes in place": (overwrite, True),
    "returns nothing": (look, False),
    "returns the same": (lambda activation, hook: activation, False),
}


@every_way
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("ending", BESIDE)
def test_a_backward_hook_hides_no_edit_and_is_none(ending: str, writer: str, gradients: str) -> None:
    """Torch puts another object in the place of a tensor that a backward hook watches."""
    model, batch = model_and_inputs("vqa", torch.float32, "sdpa")
    name = next(name for name in model.hook_names if "question_encoder.blocks.1." in name and name.endswith(ending))
    edit, edits = WRITERS[writer]
    with GRADIENTS[gradients]():
        plain = model(batch)
        expected = model.run_with_hooks(batch, fwd_hooks=[(name, edit)])
        with model.hooks(fwd_hooks=[(name, edit)], bwd_hooks=[(name, lambda gradient, hook: None)]):
            watched = model(batch)
        assert torch.equal(watched, expected)
        assert torch.equal(expected, plain) == (not edits)


@every_attention
@pytest.mark.parametrize("kind", ["caption", "llava", "clip", "vit"])
def test_parameters_get_the_same_gradient_whether_looked_at_or_not(kind: str, attention: str) -> None:
    """Of an answer that does not read padded positions, of which kernels make different things."""
    model, batch = model_and_inputs(kind, torch.float32, attention)
    read = batch["attention_mask"].bool() if kind == "llava" else slice(None)

    def parameter_gradients(**hooks: Any) -> dict[str, Tensor]:
        with model.hooks(**hooks):
            model(batch)[read].sin().sum().backward()
        with_gradient = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
        gradients = {name: parameter.grad.clone() for name, parameter in with_gradient.items()}
        model.zero_grad(set_to_none=True)
        return gradients

    plain = parameter_gradients()
    looked_at = parameter_gradients(fwd_hooks=[("*", look)])
    assert plain.keys() == looked_at.keys()
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(looked_at[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


@every_attention
@pytest.mark.parametrize("kind", ["vqa", "llava", "llava with qwen2"])
@torch.no_grad()
def test_edits_of_scores_in_a_padded_batch_mean_the_same(kind: str, attention: str) -> None:
    """Beside the fused kernel, scores carry the padding's mask too."""
    model, batch = model_and_inputs(kind, torch.float32, attention)
    eager, _ = model_and_inputs(kind, torch.float32, "eager")

    def sharpen(scores: Tensor, hook: HookPoint) -> Tensor:
        return (scores * 2).clamp(min=torch.finfo(scores.dtype).min)

    real = batch["decoder_attention_mask" if kind == "vqa" else "attention_mask"].bool()
    for name in model.hook_names:
        if name.endswith("hook_attn_scores") and (kind != "llava" or "vision_encoder.blocks.1." not in name):
            found = model.run_with_hooks(batch, fwd_hooks=[(name, sharpen)])[real]
            expected = eager.run_with_hooks(batch, fwd_hooks=[(name, sharpen)])[real]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
            assert not torch.equal(found, model(batch)[real])

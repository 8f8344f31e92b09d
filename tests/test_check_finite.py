"""``check_finite`` names the first activation that is not finite, and finds none where there is none."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, HookPoint
from hooked_vlm.toys import demo_sample
from tests.tiny_blip import hf_blip, padded_inputs, pixels
from tests.tiny_llava import IMAGE, MODELS, clip_inputs, prompts
from tests.tiny_runs import n_hooks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ATTENTION = ["eager", "sdpa"]

pytestmark = pytest.mark.usefixtures("unchecked")


def fresh(kind: str, dtype: torch.dtype = torch.float16, attention: str = "sdpa") -> tuple[HookedVLM, dict[str, Any]]:
    torch.manual_seed(0)
    if kind == "blip":
        return HookedVLM.from_hf(hf_blip("vqa").to(dtype), attention=attention), padded_inputs("vqa")
    hf = MODELS[kind]()
    model = HookedVLM.from_hf(hf.to(dtype), attention=attention)
    if kind == "clip":
        return model, clip_inputs(eos=95)
    return model, {"pixel_values": pixels(2, IMAGE, IMAGE)} if kind == "vit" else prompts(hf, (1, 0, 2))


@cache
def kept(kind: str, dtype: torch.dtype, attention: str) -> tuple[HookedVLM, dict[str, Any]]:
    return fresh(kind, dtype, attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["blip", "llama", "mistral, sliding", "phi3", "next", "clip", "vit"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_sound_model_passes(kind: str, dtype: torch.dtype, attention: str) -> None:
    """With padding and windows too."""
    model, batch = kept(kind, dtype, attention)
    assert model.check_finite(batch) is None
    assert n_hooks(model) == 0


FAULTS = [
    ("llama", "vision_encoder.embed.patch.weight", "vision_encoder.hook_patch_embed"),
    ("llama", "vision_encoder.blocks.0.mlp.up.weight", "vision_encoder.blocks.0.mlp.hook_pre"),
    ("llama", "vision_encoder.blocks.2.attn.v.weight", "vision_encoder.blocks.2.attn.hook_v"),
    ("llama", "projector.up.weight", "projector.hook_pre"),
    ("llama", "language_model.blocks.0.attn.o.weight", "language_model.blocks.0.hook_attn_out"),
    ("llama", "language_model.blocks.1.mlp.down.weight", "language_model.blocks.1.hook_mlp_out"),
    ("llama", "language_model.ln_final.weight", "language_model.ln_final.hook_normalized"),
    ("llama", "language_model.unembed.weight", "language_model.hook_logits"),
    ("phi3", "language_model.blocks.1.attn.qkv.weight", "language_model.blocks.1.attn.hook_q"),
    ("phi3", "language_model.blocks.2.mlp.gate_up.weight", "language_model.blocks.2.mlp.hook_pre"),
    ("next", "projector.down.weight", "projector.hook_out"),
    ("clip", "text_encoder.blocks.1.attn.k.weight", "text_encoder.blocks.1.attn.hook_k"),
    ("clip", "vision_proj.weight", "hook_image_embeds"),
    ("vit", "classifier.weight", "hook_logits"),
    ("blip", "question_encoder.blocks.1.mlp.down.weight", "question_encoder.blocks.1.hook_mlp_out"),
]


@pytest.mark.parametrize(("kind", "parameter", "first"), FAULTS)
def test_an_overflow_in_float16_is_named_where_it_begins(kind: str, parameter: str, first: str) -> None:
    """The first of all that are not finite from there on, in forward order."""
    model, batch = fresh(kind)
    weights = model.get_parameter(parameter)
    with torch.no_grad():
        weights.copy_(weights.sign() * 60000)
        _, activations = model.run_with_cache(batch)
    bad = [
        name
        for name, tensor in activations.items()
        # What is made only to be looked at is not checked.
        if not name.endswith(("hook_result", "_input"))
        and not bool((tensor.isfinite() | (name.endswith("hook_attn_scores") & (tensor == -torch.inf))).all())
    ]
    assert bad[0] == first
    with pytest.raises(FloatingPointError) as caught:
        model.check_finite(batch)
    assert str(caught.value).startswith(f"{first} is the first activation that is not finite")
    assert n_hooks(model) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_many_and_where_is_told(dtype: torch.dtype, value: float) -> None:
    """An edit's fault is found too, and it is told by the names of the axes."""
    model, batch = kept("llama", dtype, "sdpa")

    def spoil(activation: Tensor, hook: HookPoint) -> None:
        activation[1, 3, 2] = value
        activation[2, 0, :2] = value

    with model.hooks([("language_model.blocks.1.hook_resid_mid", spoil)]):
        with pytest.raises(FloatingPointError) as caught:
            model.check_finite(batch)
        assert n_hooks(model) == 1  # the edit is still there
    n_numbers = batch["input_ids"].numel() * 48
    assert str(caught.value) == (
        "language_model.blocks.1.hook_resid_mid is the first activation that is not finite: 3 of "
        f"{n_numbers} numbers in {str(dtype).removeprefix('torch.')}, the first {value} at b 1, p 3, d_model 2"
    )
    model.check_finite(batch)


@pytest.mark.parametrize("attention", ATTENTION)
def test_masked_scores_of_minus_infinity_are_no_fault(attention: str) -> None:
    """To which float16 rounds its most negative number less sixteen."""
    model, batch = fresh("llama", torch.float16, attention)
    with torch.no_grad():
        for block in model.language_model.blocks:
            block.attn.q.weight.mul_(8)
        _, scores = model.run_with_cache(batch, names_filter="language_model*hook_attn_scores")
        assert any(bool((layer == -torch.inf).any()) for layer in scores.values())
        assert bool(model(batch)[batch["attention_mask"].bool()].isfinite().all())
    model.check_finite(batch)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_other_scores_that_are_not_finite_are(value: float) -> None:
    model, batch = kept("llama", torch.float16, "eager")

    def spoil(scores: Tensor, hook: HookPoint) -> None:
        scores[0, 0, -1, -1] = value

    name = "language_model.blocks.0.attn.hook_attn_scores"
    with (
        model.hooks([(name, spoil)]),
        pytest.raises(FloatingPointError, match=f"{name} is the first .* 1 of .* at b 0, h 0, q"),
    ):
        model.check_finite(batch)


def test_a_pattern_is_checked_whose_row_is_masked_all_over() -> None:
    """Where every score of a row is minus infinity, its softmax is none."""
    model, batch = kept("llama", torch.float16, "eager")
    name = "language_model.blocks.0.attn.hook_attn_scores"

    def mask_a_row(scores: Tensor, hook: HookPoint) -> None:
        scores[0, 1, 5] = -torch.inf

    with model.hooks([(name, mask_a_row)]), pytest.raises(FloatingPointError, match="blocks.0.attn.hook_pattern is"):
        model.check_finite(batch)


def test_options_go_to_the_forward_and_bad_inputs_are_told_as_ever() -> None:
    model = HookedVLM.from_hf(hf_blip("retrieval").to(torch.float16))
    with torch.no_grad():
        model.text_proj.weight.fill_(60000)
    model.check_finite(padded_inputs("retrieval"))
    with pytest.raises(FloatingPointError, match="hook_text_embeds is"):
        model.check_finite(padded_inputs("retrieval"), use_itm_head=False)
    llava, batch = kept("llama", torch.float16, "sdpa")
    with pytest.raises(ValueError, match="no pixel_values"):
        llava.check_finite({"input_ids": batch["input_ids"]})
    assert n_hooks(model) == n_hooks(llava) == 0


def test_no_gradients_are_kept() -> None:
    model, batch = kept("llama", torch.float32, "sdpa")
    torch.set_grad_enabled(True)
    model.check_finite(batch)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_that_nothing_reads_are_left_out() -> None:
    """LLaVA's vision tower goes on beyond the layer that is read; what overflows there changes no answer."""
    model = HookedVLM.from_pretrained("toy-llava")
    last = model.vision_encoder.blocks[-1]
    with torch.no_grad():
        last.mlp.down.bias.fill_(torch.inf)
    sample = demo_sample()
    model.check_finite(model.prepare(sample.image, sample.question))

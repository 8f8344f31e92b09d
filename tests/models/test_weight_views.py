"""TransformerLens's names for weights are views of the checkpoint's own tensors, and mean the same products."""

from __future__ import annotations

import pytest
import torch
from einops import einsum
from torch import Tensor, nn

from hooked_vlm import HookedVLM
from hooked_vlm.components import MLP, Attention
from tests.tiny_blip import Shape, hf_blip, inputs

SHAPE = Shape(text=48, text_heads=3, vision=80, vision_heads=5)


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_hf(hf_blip("caption", SHAPE))


@pytest.fixture(scope="module")
def run(model: HookedVLM):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.run_with_cache(inputs("caption", batch=2))[1]


def parts(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def assert_is_view(view: Tensor, parameter: Tensor) -> None:
    assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    first = view.flatten()[0].item()
    with torch.no_grad():
        parameter += 1
        assert view.flatten()[0].item() != first
        parameter -= 1
        parameter.add_(0)  # and writing through the view reaches the parameter
        before = parameter.clone()
        view.add_(1)
        assert not torch.equal(parameter, before)
        parameter.copy_(before)


def test_attention_views_share_the_parameters_memory(model: HookedVLM) -> None:
    for _, attention in parts(model, Attention):
        for name in "QKV":
            owner = attention.qkv if attention.fused_qkv else getattr(attention, name.lower())
            assert_is_view(getattr(attention, f"W_{name}"), owner.weight)
            assert_is_view(getattr(attention, f"b_{name}"), owner.bias)
        assert_is_view(attention.W_O, attention.o.weight)
        assert attention.b_O is attention.o.bias


def test_other_views_share_the_parameters_memory(model: HookedVLM) -> None:
    for _, mlp in parts(model, MLP):
        assert_is_view(mlp.W_in, mlp.up.weight)
        assert_is_view(mlp.W_out, mlp.down.weight)
        assert mlp.b_in is mlp.up.bias
        assert mlp.b_out is mlp.down.bias
    tower = model.text_decoder
    assert tower.W_E is tower.embed.token.weight
    assert tower.W_pos is tower.embed.pos.weight
    assert_is_view(tower.W_U, tower.unembed.decoder.weight)
    assert tower.b_U is tower.unembed.decoder.bias
    assert tower.unembed.decoder.weight is tower.embed.token.weight


def test_shapes(model: HookedVLM) -> None:
    attention, cross = model.text_decoder.blocks[0].attn, model.text_decoder.blocks[0].cross_attn
    assert attention.W_Q.shape == attention.W_K.shape == attention.W_V.shape == (3, 48, 16)
    assert (cross.W_Q.shape, cross.W_K.shape, cross.W_V.shape) == ((3, 48, 16), (3, 80, 16), (3, 80, 16))
    assert attention.W_O.shape == cross.W_O.shape == (3, 16, 48)
    assert model.vision_encoder.blocks[0].attn.W_Q.shape == (5, 80, 16)
    assert model.vision_encoder.blocks[0].mlp.W_in.shape == (80, 70)
    assert model.text_decoder.W_U.shape == (48, 99)


def test_attention_products(model: HookedVLM, run) -> None:
    """``x W_Q + b_Q`` is ``hook_q``, head by head, and so on to ``W_O``."""
    for name, attention in parts(model, Attention):
        block, _, kind = name.rpartition(".")
        reads = "ln1.hook_normalized" if "vision" in name else "hook_attn_in"
        x = run[f"{block}.{'hook_cross_attn_in' if kind == 'cross_attn' else reads}"]
        source = run["vision_encoder.hook_out"] if kind == "cross_attn" else x
        for letter, given in (("Q", x), ("K", source), ("V", source)):
            weight, bias = getattr(attention, f"W_{letter}"), getattr(attention, f"b_{letter}")
            expected = einsum(given, weight, "b p m, h m d -> b p h d") + bias
            torch.testing.assert_close(run[f"{name}.hook_{letter.lower()}"], expected, rtol=1e-5, atol=1e-4)
        written = einsum(run[f"{name}.hook_z"], attention.W_O, "b p h d, h d m -> b p m") + attention.b_O
        torch.testing.assert_close(run[f"{block}.hook_{kind}_out"], written, rtol=1e-5, atol=1e-4)


def test_mlp_and_unembedding_products(model: HookedVLM, run) -> None:
    for name, mlp in parts(model, MLP):
        block = name.rpartition(".")[0]
        x = run[f"{block}.ln2.hook_normalized" if "vision" in name else f"{block}.hook_mlp_in"]
        torch.testing.assert_close(run[f"{name}.hook_pre"], x @ mlp.W_in + mlp.b_in, rtol=1e-5, atol=1e-4)
        out = run[f"{name}.hook_post"] @ mlp.W_out + mlp.b_out
        torch.testing.assert_close(run[f"{block}.hook_mlp_out"], out, rtol=1e-5, atol=1e-4)
    tower, name = model.text_decoder, "text_decoder"
    logits = run[f"{name}.ln_final.hook_normalized"] @ tower.W_U + tower.b_U
    torch.testing.assert_close(run[f"{name}.hook_logits"], logits, rtol=1e-5, atol=1e-4)

"""TransformerLens's names for weights are views of the checkpoint's own tensors, and mean the same products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from einops import einsum
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM
from hooked_vlm.components import MLP, Attention, GatedMLP
from tests.tiny_blip import Shape, hf_blip, inputs, pixels
from tests.tiny_llava import IMAGE, MODELS, clip_inputs, prompts

SHAPE = Shape(text=48, text_heads=3, vision=80, vision_heads=5)
KINDS = ["caption", "llama", "llama, biases", "mistral", "phi3", "qwen2", "tied", "clip", "vit, no biases"]
LLAVAS = KINDS[1:-2]


def built(kind: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(0)
    if kind == "caption":
        return hf_blip("caption", SHAPE), inputs("caption", batch=2)
    hf = MODELS[kind]()
    if kind == "clip":
        return hf, clip_inputs(eos=95)
    return hf, {"pixel_values": pixels(2, IMAGE, IMAGE)} if "vit" in kind else prompts(hf, (1, 1), n_words=(7, 7))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> HookedVLM:
    return HookedVLM.from_hf(built(kind)[0])


@pytest.fixture(scope="module")
def run(kind: str, model: HookedVLM) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return model.run_with_cache(built(kind)[1])[1]


def parts(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def assert_is_view(view: Tensor, parameter: Tensor) -> None:
    assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    first, before = view.flatten()[0].item(), parameter.detach().clone()
    with torch.no_grad():
        parameter += 1
        assert view.flatten()[0].item() != first
        parameter.copy_(before)
        view.add_(1)  # and writing through the view reaches the parameter
        assert not torch.equal(parameter, before)
        parameter.copy_(before)


def assert_bias_is_view(view: Tensor | None, parameter: Tensor | None) -> None:
    """None where there is none."""
    if parameter is None:
        assert view is None
    else:
        assert view is not None
        assert_is_view(view, parameter)


def test_attention_views_share_the_parameters_memory(model: HookedVLM) -> None:
    for _, attention in parts(model, Attention):
        for name in "QKV":
            owner = attention.qkv if attention.fused_qkv else getattr(attention, name.lower())
            assert_is_view(getattr(attention, f"W_{name}"), owner.weight)
            assert_bias_is_view(getattr(attention, f"b_{name}"), owner.bias)
        assert_is_view(attention.W_O, attention.o.weight)
        assert attention.b_O is attention.o.bias


def test_feed_forward_views_share_the_parameters_memory(model: HookedVLM) -> None:
    for _, mlp in parts(model, MLP):
        assert_is_view(mlp.W_in, mlp.up.weight)
        assert_bias_is_view(mlp.b_in, mlp.up.bias)
    for _, mlp in parts(model, GatedMLP):
        gate, up = (mlp.gate_up, mlp.gate_up) if mlp.fused_gate else (mlp.gate, mlp.up)
        assert_is_view(mlp.W_gate, gate.weight)
        assert_is_view(mlp.W_in, up.weight)
        assert_bias_is_view(mlp.b_gate, gate.bias)
        assert_bias_is_view(mlp.b_in, up.bias)
    for _, mlp in parts(model, (MLP, GatedMLP)):
        assert_is_view(mlp.W_out, mlp.down.weight)
        assert mlp.b_out is mlp.down.bias


def test_biases_are_where_the_checkpoint_has_them(kind: str, model: HookedVLM) -> None:
    towers = {"caption": "text_decoder", "clip": "text_encoder", "vit, no biases": "vision_encoder"}
    block = model.get_submodule(towers.get(kind, "language_model")).blocks[0]
    attention, mlp = block.attn, block.mlp
    found = [bias is not None for bias in (attention.b_Q, attention.b_K, attention.b_V, attention.b_O)]
    found += [mlp.b_in is not None, mlp.b_out is not None]
    has = {
        **{"caption": [True] * 6, "clip": [True] * 6, "llama, biases": [True] * 6},
        **{"qwen2": [True] * 3 + [False] * 3, "vit, no biases": [False] * 3 + [True] * 3},
    }
    assert found == has.get(kind, [False] * 6)


@pytest.mark.parametrize("kind", ["caption"], scope="module", indirect=True)
def test_a_bert_s_embeddings(model: HookedVLM) -> None:
    tower = model.text_decoder
    assert tower.W_E is tower.embed.token.weight
    assert tower.W_pos is tower.embed.pos.weight
    assert_is_view(tower.W_U, tower.unembed.decoder.weight)
    assert tower.b_U is tower.unembed.decoder.bias
    assert tower.unembed.decoder.weight is tower.embed.token.weight


@pytest.mark.parametrize("kind", LLAVAS, scope="module", indirect=True)
def test_a_language_model_s_embeddings(kind: str, model: HookedVLM, run: Mapping[str, Tensor]) -> None:
    tower = model.language_model
    assert tower.W_E is tower.embed.token.weight
    assert_is_view(tower.W_U, tower.unembed.weight)
    assert tower.b_U is None
    assert (tower.unembed.weight is tower.embed.token.weight) == (kind == "tied")
    ids = built(kind)[1]["input_ids"]
    assert torch.equal(run["language_model.hook_embed"], tower.W_E[ids])
    logits = run["language_model.hook_out"] @ tower.W_U
    torch.testing.assert_close(run["language_model.hook_logits"], logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["caption"], scope="module", indirect=True)
def test_shapes_where_towers_are_of_different_widths(model: HookedVLM) -> None:
    attention, cross = model.text_decoder.blocks[0].attn, model.text_decoder.blocks[0].cross_attn
    assert attention.W_Q.shape == attention.W_K.shape == attention.W_V.shape == (3, 48, 16)
    assert (cross.W_Q.shape, cross.W_K.shape, cross.W_V.shape) == ((3, 48, 16), (3, 80, 16), (3, 80, 16))
    assert attention.W_O.shape == cross.W_O.shape == (3, 16, 48)
    assert model.vision_encoder.blocks[0].attn.W_Q.shape == (5, 80, 16)
    assert model.vision_encoder.blocks[0].mlp.W_in.shape == (80, 70)
    assert model.text_decoder.W_U.shape == (48, 99)


@pytest.mark.parametrize("kind", LLAVAS, scope="module", indirect=True)
def test_shapes_where_queries_share_keys(kind: str, model: HookedVLM) -> None:
    block, d_head = model.language_model.blocks[1], 20 if kind == "mistral" else 12
    assert block.attn.W_Q.shape == (4, 48, d_head)
    assert block.attn.W_K.shape == block.attn.W_V.shape == (2, 48, d_head)
    assert block.attn.W_O.shape == (4, d_head, 48)
    if block.attn.b_K is not None:
        assert (block.attn.b_Q.shape, block.attn.b_K.shape) == ((4, d_head), (2, d_head))
    assert block.mlp.W_gate.shape == block.mlp.W_in.shape == (48, 56)
    assert block.mlp.W_out.shape == (56, 48)
    assert (model.language_model.W_E.shape, model.language_model.W_U.shape) == ((99, 48), (48, 99))


def reads(model: HookedVLM, name: str, run: Mapping[str, Tensor], norm: str, plain: str) -> Tensor:
    """What a sub-layer of a block multiplies: the normalised stream in pre-LN towers."""
    is_pre = model.get_submodule(name.split(".")[0]).config.norm_order == "pre"
    return run[f"{name.rpartition('.')[0]}.{f'{norm}.hook_normalized' if is_pre else plain}"]


def plus(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias


def test_attention_products(model: HookedVLM, run: Mapping[str, Tensor]) -> None:
    """``x W_Q + b_Q`` is ``hook_q``, head by head, and so on to ``W_O``."""
    for name, attention in parts(model, Attention):
        block, _, kind = name.rpartition(".")
        is_cross = kind == "cross_attn"
        x = run[f"{block}.hook_cross_attn_in"] if is_cross else reads(model, name, run, "ln1", "hook_attn_in")
        source = run["vision_encoder.hook_out"] if is_cross else x
        for letter, given in (("Q", x), ("K", source), ("V", source)):
            weight, bias = getattr(attention, f"W_{letter}"), getattr(attention, f"b_{letter}")
            expected = plus(einsum(given, weight, "b p m, h m d -> b p h d"), bias)
            torch.testing.assert_close(run[f"{name}.hook_{letter.lower()}"], expected, rtol=1e-5, atol=1e-4)
        written = plus(einsum(run[f"{name}.hook_z"], attention.W_O, "b p h d, h d m -> b p m"), attention.b_O)
        torch.testing.assert_close(run[f"{block}.hook_{kind}_out"], written, rtol=1e-5, atol=1e-4)


def test_feed_forward_products(model: HookedVLM, run: Mapping[str, Tensor]) -> None:
    for name, mlp in parts(model, (MLP, GatedMLP)):
        x = reads(model, name, run, "ln2", "hook_mlp_in")
        enters = {"hook_pre": (mlp.W_in, mlp.b_in)}
        if isinstance(mlp, GatedMLP):
            enters = {"hook_pre": (mlp.W_gate, mlp.b_gate), "hook_pre_linear": (mlp.W_in, mlp.b_in)}
        for hook, (weight, bias) in enters.items():
            torch.testing.assert_close(run[f"{name}.{hook}"], plus(x @ weight, bias), rtol=1e-5, atol=1e-4)
        written = plus(run[f"{name}.hook_post"] @ mlp.W_out, mlp.b_out)
        torch.testing.assert_close(run[f"{name.rpartition('.')[0]}.hook_mlp_out"], written, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["caption"], scope="module", indirect=True)
def test_a_bert_s_unembedding(model: HookedVLM, run: Mapping[str, Tensor]) -> None:
    logits = run["text_decoder.ln_final.hook_normalized"] @ model.text_decoder.W_U + model.text_decoder.b_U
    torch.testing.assert_close(run["text_decoder.hook_logits"], logits, rtol=1e-5, atol=1e-4)

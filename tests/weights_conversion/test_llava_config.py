"""What a LLaVA's config.json says, as our config; and what in it cannot be, in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hooked_vlm.components.mlp import ACTIVATIONS
from hooked_vlm.config import LlavaConfig, RotaryConfig
from hooked_vlm.models import MODELS
from tests.weights_conversion.layouts import PINPOINTS, RESEARCH_CONFIG, TEXT, VISION
from weights_conversion import CheckpointError, family_of_config, hf_config

LLAVA_1_5: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    **{"ignore_index": -100, "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu"},
    "text_config": {
        **{"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064},
    },
    **{"tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0"},
    "vision_config": {
        **{"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model"},
        **{"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768},
        "vocab_size": 32000,
    },
    **{"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
}
"""As ``llava-hf/llava-1.5-7b-hf`` has it."""

TINY = {"model_type": "llava", "vision_config": VISION, "text_config": {"model_type": "llama", **TEXT}}


def config_of(entries: dict[str, Any], generation: dict[str, Any] | None = None) -> LlavaConfig:
    config = family_of_config(entries).config(entries, {}, generation or {})
    assert isinstance(config, LlavaConfig)
    return config


def tiny(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **entries: Any) -> dict[str, Any]:
    return {
        **TINY,
        "text_config": {**TINY["text_config"], **(text or {})},
        "vision_config": {**VISION, **(vision or {})},
        **entries,
    }


def test_llava_1_5() -> None:
    config = config_of(LLAVA_1_5)
    assert config.architecture == "LlavaForConditionalGeneration"
    assert (config.image_token_id, config.d_vocab, config.eos_token_ids, config.pad_token_id) == (
        32000,
        32064,
        (2,),
        32001,
    )
    assert (config.select, config.pinpoints, config.projector_act, config.projector_bias) == (
        "default",
        None,
        "gelu",
        True,
    )
    vision, text = config.vision, config.text
    assert (vision.d_model, vision.n_layers, vision.n_heads, vision.d_head, vision.d_mlp) == (1024, 24, 16, 64, 4096)
    assert (vision.act, vision.eps, vision.image_size, vision.patch_size) == ("quick_gelu", 1e-5, 336, 14)
    assert (vision.feature_layers, vision.has_pre_norm, vision.patch_bias, vision.pools) == ((23,), True, False, False)
    assert (text.d_model, text.n_layers, text.n_heads, text.n_kv_heads, text.d_head) == (4096, 32, 32, 32, 128)
    assert (text.d_mlp, text.act, text.eps, text.norm, text.n_ctx) == (11008, "silu", 1e-5, "rms", 4096)
    assert (text.qkv_bias, text.out_bias, text.mlp_bias, text.ties_embeddings, text.windows) == (
        False,
        False,
        False,
        False,
        (),
    )
    assert text.rotary == RotaryConfig(d_rotary=128, n_ctx=4096)
    assert text.is_causal
    assert text.gated_mlp
    assert text.softmax_in_float32
    assert vision.softmax_in_float32


def parameters_of(config: LlavaConfig) -> dict[str, int]:
    with torch.device("meta"):
        return {name: parameter.numel() for name, parameter in MODELS[config.architecture](config).named_parameters()}


def test_llava_1_5_at_full_size_has_as_many_parameters_as_hfs() -> None:
    counts = parameters_of(config_of(LLAVA_1_5))
    assert (len(counts), sum(counts.values())) == (686, 7_063_427_072)


def test_llava_1_5_of_the_research_code_has_as_many_bytes_as_its_index_says() -> None:
    """``total_size`` of ``liuhaotian/llava-v1.5-7b``: float16, with one float32 tensor of frequencies a layer."""
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    entries = {
        **RESEARCH_CONFIG,
        **text,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    entries["companion"] = {"model_type": "clip", "vision_config": LLAVA_1_5["vision_config"]}
    words = torch.empty(32000, 4096, device="meta")
    config = family_of_config(entries).config(entries, {"model.embed_tokens.weight": words})
    counts = parameters_of(config)
    inside = sum(count for name, count in counts.items() if not name.startswith("vision_encoder."))
    assert 2 * inside + 32 * 4 * 64 == 13_518_798_848
    assert config.vision == config_of(LLAVA_1_5).vision
    assert dataclasses.replace(config.text, d_vocab=32064) == config_of(LLAVA_1_5).text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, {"n_kv_heads": 2, "windows": (), "fused_qkv": False, "fused_gate": False}),
        ({"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
        ({"model_type": "mistral", "sliding_window": 7}, {"windows": (7, 7), "qkv_bias": False}),
        ({"model_type": "mistral", "sliding_window": None, "head_dim": 20}, {"windows": (), "d_head": 20}),
        ({"model_type": "mistral"}, {"windows": (4096, 4096)}),
        ({"model_type": "qwen2"}, {"qkv_bias": True, "out_bias": False, "windows": ()}),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, {"windows": (None, 4096)}),
        ({"model_type": "phi3"}, {"fused_qkv": True, "fused_gate": True, "windows": (), "qkv_bias": False}),
        ({"model_type": "phi3", "sliding_window": 9}, {"windows": (9, 9)}),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, {"rotary": RotaryConfig(d_rotary=6, n_ctx=200)}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rotary": RotaryConfig(d_rotary=12, theta=5e5, kind="linear", factor=2.0, n_ctx=200)},
        ),
        ({"tie_word_embeddings": True}, {"ties_embeddings": True}),
    ],
)
def test_language_models(text: dict[str, Any], expected: dict[str, Any]) -> None:
    config = config_of(tiny(text)).text
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("generation", "text", "top", "expected"),
    [
        ({}, {"eos_token_id": 7, "pad_token_id": None}, {}, ((7,), 7)),
        ({}, {"eos_token_id": [7, 8], "pad_token_id": None}, {}, ((7, 8), 7)),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7, "pad_token_id": 3}, {}, ((5, 6), 3)),
        ({"eos_token_id": 5, "pad_token_id": 4}, {"pad_token_id": 3}, {}, ((5,), 4)),
        ({}, {"eos_token_id": None, "pad_token_id": None}, {"eos_token_id": 9, "pad_token_id": 8}, ((9,), 8)),
        ({}, {"eos_token_id": None, "pad_token_id": None}, {}, ((), 0)),
    ],
)
def test_what_ends_a_text(generation: Any, text: Any, top: Any, expected: Any) -> None:
    config = config_of(tiny(text, **top), generation)
    assert (config.eos_token_ids, config.pad_token_id) == expected


def test_what_is_written_back_is_what_was_read() -> None:
    assert family_of_config(LLAVA_1_5).hf_config(config_of(LLAVA_1_5)) == LLAVA_1_5


def test_the_activations_are_those_that_we_compute() -> None:
    assert {*hf_config.ACTIVATIONS} == {*ACTIVATIONS}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"architectures": ["LlavaModel"]}, "architecture LlavaModel; supported: LlavaForConditionalGeneration"),
        (
            tiny(model_type="llava_onevision"),
            "unsupported model_type 'llava_onevision'; supported: blip, llava, llava_next",
        ),
        ({"text_config": "large"}, "config.json is not one of a LLaVA model"),
        (tiny({"model_type": "gemma"}), "text_config.model_type is 'gemma', .* supported: llama, mistral, qwen2, phi3"),
        (tiny({"hidden_act": "swish"}), "text_config.hidden_act is 'swish', which is not supported; supported: gelu"),
        (
            tiny({"model_type": "mistral", "hidden_size": 50}),
            "text_config .* hidden_size 50, num_attention_heads 4",
        ),
        (tiny({"num_key_value_heads": 3}), "num_attention_heads 4, num_key_value_heads 3"),
        (tiny({"num_hidden_layers": 0}), "text_config does not fit together"),
        (
            tiny({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0] * 6}}),
            "rope_type 'longrope', which is not supported; supported: default, linear, dynamic, llama3, yarn",
        ),
        (tiny({"rope_scaling": {"type": "linear", "factor": None}}), "rope_type 'linear' without a factor"),
        (
            tiny({"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
            "turns 6 of a head's 12 dimensions",
        ),
        (
            tiny(
                {
                    "model_type": "qwen2",
                    "use_sliding_window": True,
                    "layer_types": ["full_attention", "chunked_attention"],
                }
            ),
            "layers of chunked_attention; supported: sliding_attention, full_attention",
        ),
        (tiny({"eos_token_id": "</s>"}), "eos_token_id"),
        (
            tiny(vision={"model_type": "siglip_vision_model"}),
            "vision_config.model_type is 'siglip_vision_model'.*: clip_vision",
        ),
        (tiny(vision={"hidden_act": "gelu_new"}), "vision_config.hidden_act is 'gelu_new'"),
        (tiny(vision={"image_size": [28, 56]}), r"only square images .* not image_size \[28, 56\]"),
        (tiny(vision={"patch_size": 29}), "no patch of patch_size 29 fits into an image of image_size 28"),
        (tiny(vision={"num_channels": 1}), "num_channels is 1"),
        (
            tiny(vision_feature_layer=3),
            "vision_feature_layer is 3; .* 2 layers has the hidden states 0 to 2, or -3 to -1",
        ),
        (tiny(vision_feature_layer=[-2, -4]), r"vision_feature_layer is \[-2, -4\]"),
        (tiny(vision_feature_layer=[]), r"vision_feature_layer is \[\]"),
        (tiny(vision_feature_select_strategy="patch"), "config.json is not one of a LLaVA model"),
        (tiny(projector_hidden_act="mish"), "projector_hidden_act is 'mish'"),
        (
            tiny(model_type="llava_next", vision_feature_select_strategy="full"),
            "'full'; a LLaVA-NeXT .* should be 'default'",
        ),
        (
            tiny(model_type="llava_next", image_grid_pinpoints=[[28, 50]]),
            "multiples of the vision tower's image_size 28",
        ),
        (
            tiny(model_type="llava_next", image_grid_pinpoints=[[28, 56, 28]]),
            "it should be pairs of a height and a width",
        ),
        (tiny(model_type="llava_next", image_grid_pinpoints=[]), "it should be pairs"),
    ],
)
def test_what_cannot_be(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        config_of({**TINY, **entries})


def test_pinpoints() -> None:
    assert config_of(tiny(model_type="llava_next", image_grid_pinpoints=PINPOINTS)).pinpoints == (
        (28, 56),
        (56, 28),
        (56, 56),
    )

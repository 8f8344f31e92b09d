"""Rotary embeddings equal HF's modules to the last bit: every kind, dtype and family, call after call."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2

from hooked_vlm.components.rotary import KINDS, Rotary, rotate
from hooked_vlm.config import RotaryConfig

N_CTX, D_HEAD = 48, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONG = torch.arange(3 * N_CTX)[None]

FAMILIES: dict[str, tuple[Any, type[nn.Module], Any]] = {
    "llama": (LlamaConfig, modeling_llama.LlamaRotaryEmbedding, modeling_llama.apply_rotary_pos_emb),
    "mistral": (MistralConfig, modeling_mistral.MistralRotaryEmbedding, modeling_mistral.apply_rotary_pos_emb),
    "qwen2": (Qwen2Config, modeling_qwen2.Qwen2RotaryEmbedding, modeling_qwen2.apply_rotary_pos_emb),
    "phi3": (Phi3Config, modeling_phi3.Phi3RotaryEmbedding, modeling_phi3.apply_rotary_pos_emb),
}

HF_NAMES = {"kind": "rope_type", "theta": "rope_theta", "original_n_ctx": "original_max_position_embeddings"}

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 2.5},
    "linear, whole factor": {"kind": "linear", "factor": 4, "theta": 1e6},
    "dynamic": {"kind": "dynamic", "factor": 2.0},
    "dynamic, odd factor": {"kind": "dynamic", "factor": 1.1, "theta": 500000.0},
    "llama3": {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_n_ctx": 24},
    "llama3, odd factors": {
        **{"kind": "llama3", "factor": 32.0, "low_freq_factor": 0.7, "high_freq_factor": 2.9},
        **{"original_n_ctx": 40, "theta": 500000.0},
    },
    "yarn": {"kind": "yarn", "factor": 4.0, "original_n_ctx": 12},
    "yarn, wide ramp": {"kind": "yarn", "factor": 1.7, "original_n_ctx": 4096, "beta_fast": 20.0, "beta_slow": 2.5},
    "yarn, no ramp": {"kind": "yarn", "factor": 4.0, "original_n_ctx": 12, "beta_fast": 1.0, "beta_slow": 1.0},
    "yarn, one bound": {"kind": "yarn", "factor": 4.0, "original_n_ctx": 2, "theta": 1e6},
    "yarn, not truncated": {"kind": "yarn", "factor": 3.0, "original_n_ctx": 4096, "truncate": False},
    "yarn, mscale": {"kind": "yarn", "factor": 40.0, "original_n_ctx": 24, "mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn, half an mscale": {"kind": "yarn", "factor": 40.0, "original_n_ctx": 24, "mscale": 0.707},
    "yarn, attention factor": {"kind": "yarn", "factor": 4.0, "original_n_ctx": 24, "attention_factor": 0.83},
    "yarn, nothing stretched": {"kind": "yarn", "factor": 1.0, "original_n_ctx": 48},
}


def hf_rotary(family: str, said: dict[str, Any], **more: Any) -> nn.Module:
    """HF's module of a tiny config; ``said`` in our words."""
    rope = {"rope_type": "default", "rope_theta": 10000.0} | {HF_NAMES.get(k, k): v for k, v in said.items()}
    config = FAMILIES[family][0](
        hidden_size=2 * D_HEAD, num_attention_heads=2, max_position_embeddings=N_CTX, rope_parameters=rope, **more
    )
    return FAMILIES[family][1](config)


def our_rotary(said: dict[str, Any], d_rotary: int = D_HEAD) -> Rotary:
    return Rotary(RotaryConfig(d_rotary=d_rotary, n_ctx=N_CTX, **said))


def hf_says(hf: nn.Module, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return hf(torch.zeros(1, dtype=dtype), position_ids)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert torch.equal(our, their)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_default_equals_hf(family: str, dtype: torch.dtype) -> None:
    for theta in (10000.0, 1000000):
        hf, ours = hf_rotary(family, {"theta": theta}), our_rotary({"theta": theta})
        for positions in (LONG, torch.randint(0, 100000, (2, 7)), torch.tensor([[131071]])):
            assert_same(ours(positions, dtype), hf_says(hf, positions, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("case", SCALED)
def test_stretched_equals_hf_within_and_beyond_the_context(case: str, family: str, dtype: torch.dtype) -> None:
    said = SCALED[case]
    for n in (1, N_CTX - 1, N_CTX, N_CTX + 1, 3 * N_CTX):
        hf, ours = hf_rotary(family, said), our_rotary(said)
        positions = torch.stack([torch.arange(n), torch.arange(n).flip(0)])
        assert_same(ours(positions, dtype), hf_says(hf, positions, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d_head", [8, 80, 128])
def test_other_head_sizes_equal_hf(kind: str, d_head: int) -> None:
    said = {"kind": kind}
    if kind != "default":
        said = next(said for said in SCALED.values() if said["kind"] == kind)
    hf, ours = hf_rotary("mistral", said, head_dim=d_head), our_rotary(said, d_head)
    assert_same(ours(LONG, torch.float32), hf_says(hf, LONG))


def test_the_original_context_is_the_config_s_where_none_is_said() -> None:
    for said in (SCALED["llama3"], SCALED["yarn"]):
        said = {key: value for key, value in said.items() if key != "original_n_ctx"}
        assert_same(our_rotary(said)(LONG, torch.float32), hf_says(hf_rotary("llama", said), LONG))


def test_the_cases_differ_from_the_default_where_they_should() -> None:
    """Else a test above could compare the default with itself."""
    default = our_rotary({})(LONG, torch.float32)[0]
    for case, said in SCALED.items():
        is_default = case == "yarn, nothing stretched"
        assert torch.equal(our_rotary(said)(LONG, torch.float32)[0], default) == is_default, case


@pytest.mark.parametrize("case", [case for case in SCALED if "dynamic" in case])
def test_dynamic_follows_hf_through_generations(case: str) -> None:
    """A prompt, then one position at a time; then the next prompt. The module is one."""
    hf, ours = hf_rotary("llama", SCALED[case]), our_rotary(SCALED[case])
    for n_prompt, n_steps in [(2 * N_CTX, 9), (N_CTX - 9, 20), (5, 3), (3 * N_CTX, 2), (4 * N_CTX, 2), (N_CTX - 1, 4)]:
        for positions in (torch.arange(n_prompt), *torch.arange(n_prompt, n_prompt + n_steps)[:, None]):
            assert_same(ours(positions[None], torch.float32), hf_says(hf, positions[None]))


def test_dynamic_forgets_a_longer_sequence() -> None:
    """HF's module goes on turning by its frequencies until a sequence fits the context."""
    said, shorter = SCALED["dynamic"], LONG[:, : 2 * N_CTX]
    hf, ours = hf_rotary("llama", said), our_rotary(said)
    fresh = hf_says(hf, shorter)
    assert_same(ours(LONG, torch.float32), hf_says(hf, LONG))
    assert_same(ours(shorter, torch.float32), fresh)
    assert not torch.equal(hf_says(hf, shorter)[0], fresh[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotate_equals_hf(family: str, dtype: torch.dtype) -> None:
    apply = FAMILIES[family][2]
    q, k = torch.randn(2, 9, 4, D_HEAD).to(dtype).transpose(1, 2), torch.randn(2, 2, 9, D_HEAD).to(dtype)
    for positions in (torch.arange(9)[None], torch.randint(0, 100, (2, 9))):
        cos, sin = our_rotary({})(positions, dtype)
        assert_same((rotate(q, cos, sin), rotate(k, cos, sin)), apply(q, k, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.25, 0.75, 0.8])
def test_phi3_turns_the_first_part_of_a_head(share: float, dtype: torch.dtype) -> None:
    d_rotary = int(D_HEAD * share) // 2 * 2
    hf = hf_rotary("phi3", {"partial_rotary_factor": d_rotary / D_HEAD})
    cos, sin = our_rotary({}, d_rotary)(LONG, dtype)
    assert_same((cos, sin), hf_says(hf, LONG, dtype))
    q, k = torch.randn(2, 2, 4, LONG.shape[1], D_HEAD).to(dtype)
    turned = rotate(q, cos, sin), rotate(k, cos, sin)
    assert_same(turned, FAMILIES["phi3"][2](q, k, cos, sin))
    assert torch.equal(turned[0][..., d_rotary:], q[..., d_rotary:])


def test_turning_keeps_lengths_and_products_know_only_the_distance() -> None:
    x, y = torch.randn(2, 1, 1, 1, D_HEAD).unbind(0)
    at = {p: our_rotary({})(torch.tensor([[p]]), torch.float32) for p in (0, 3, 40, 43)}
    assert torch.equal(rotate(x, *at[0]), x)
    torch.testing.assert_close(rotate(x, *at[40]).norm(), x.norm())
    near, far = rotate(x, *at[3]) * rotate(y, *at[0]), rotate(x, *at[43]) * rotate(y, *at[40])
    torch.testing.assert_close(near.sum(), far.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["linear", "dynamic", "llama3", "yarn"])
def test_neither_dtype_nor_meta_device_nor_copies_change_the_numbers(case: str) -> None:
    expected = our_rotary(SCALED[case])(LONG, torch.float32)
    with torch.device("meta"):
        rotary = our_rotary(SCALED[case])
    assert not rotary.state_dict()
    assert not [*rotary.parameters(), *rotary.buffers()]
    rotary.to(torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    assert_same(rotary(LONG, torch.float32), expected)
    torch.set_default_dtype(torch.bfloat16)
    assert_same(rotary.to(torch.float16)(LONG, torch.float32), expected)
    for copied in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary)), rotary.to_empty(device="cpu").half()):
        assert_same(copied(LONG, torch.float32), expected)


def test_a_first_call_under_the_meta_device_or_inference_mode_spoils_no_later_one() -> None:
    rotary, expected = our_rotary({}), our_rotary({})(LONG, torch.float32)
    with torch.device("meta"):
        assert rotary(LONG.to("meta"), torch.float32)[0].shape == (1, *LONG.shape[1:], D_HEAD)
        assert_same(rotary(LONG, torch.float32), expected)
    rotary = our_rotary({})
    with torch.inference_mode():
        assert_same(rotary(LONG, torch.float32), expected)
    x = torch.randn(1, 1, LONG.shape[1], D_HEAD, requires_grad=True)
    for module in (rotary, copy.deepcopy(rotary)):
        rotate(x, *module(LONG, torch.float32)).sum().backward()


def test_gradients_equal_hf_s() -> None:
    cos, sin = our_rotary({})(LONG, torch.float32)
    x = torch.randn(2, 3, LONG.shape[1], D_HEAD, requires_grad=True)
    weights = torch.randn_like(x)
    (ours,) = torch.autograd.grad((rotate(x, cos, sin) * weights).sum(), x)
    (theirs,) = torch.autograd.grad((modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0] * weights).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_an_unknown_kind_is_named_with_those_supported(unchecked: None) -> None:
    with pytest.raises(ValueError, match="'longrope'.*supported: default, linear, dynamic, llama3, yarn"):
        Rotary(RotaryConfig(d_rotary=8, kind="longrope"))  # type: ignore[arg-type]

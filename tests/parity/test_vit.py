"""A vision transformer's forward is HF's, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, ViTModel

from hooked_vlm import HookedVLM
from tests.parity.hf_record import disagreements
from tests.parity.hf_towers import hf_activations
from tests.tiny_blip import pixels, randomised
from tests.tiny_llava import IMAGE, MODELS, PATCH, hf_vit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["vit", "vit, no biases", "vit, pooler"]

pytestmark = pytest.mark.usefixtures("unchecked")
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_equal_to_hf(hf: PreTrainedModel, ours: HookedVLM, batch: dict[str, Tensor], **options: bool) -> None:
    """All that can be seen of both, in a forward that is looked at; and the output of a plain forward."""
    output, record = hf_activations(hf, batch, **options)
    with torch.no_grad():
        plain = ours({**batch, **options})
        _, cache = ours.run_with_cache({**batch, **options})
    assert not disagreements(cache, record)
    assert plain.dtype == hf.dtype
    if hasattr(output, "logits"):
        expected = output.logits
    else:
        expected = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    assert torch.equal(plain, expected)


@every_attention
@every_dtype
@pytest.mark.parametrize("name", NAMES)
def test_forward_equals_hf(both, name: str, dtype: torch.dtype, attention: str) -> None:
    hf, ours = both(name, dtype, attention)
    for rows in (1, 3):
        assert_equal_to_hf(hf, ours, {"pixel_values": pixels(rows, IMAGE, IMAGE)})


@every_attention
@every_dtype
@pytest.mark.parametrize(("height", "width"), [(35, 49), (14, 14), (33, 29), (IMAGE + PATCH - 1,) * 2])
def test_other_image_sizes(both, height: int, width: int, dtype: torch.dtype, attention: str) -> None:
    hf, ours = both("vit", dtype, attention)
    batch = {"pixel_values": pixels(2, height, width)}
    assert_equal_to_hf(hf, ours, batch, interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        ours(batch)


@every_attention
def test_without_a_pooler_the_states_are_the_answer(attention: str) -> None:
    config = hf_vit(ViTModel).config
    hf = randomised(ViTModel(config, add_pooling_layer=False).eval(), seed=0, scale=0.25)
    hf.set_attn_implementation(attention)
    ours = HookedVLM.from_hf(hf, attention=attention)
    assert "hook_pooled" not in ours.hook_names
    assert_equal_to_hf(hf, ours, {"pixel_values": pixels(2, IMAGE, IMAGE)})


def test_hf_s_own_hidden_states_and_attentions(both) -> None:
    hf, ours = both("vit")
    batch = {"pixel_values": pixels(2, IMAGE, IMAGE)}
    with torch.no_grad():
        output = hf(**batch, output_hidden_states=True, output_attentions=True)
        _, cache = ours.run_with_cache(batch)
    for layer, pattern in enumerate(output.attentions):
        assert torch.equal(cache[f"vision_encoder.blocks.{layer}.hook_resid_pre"], output.hidden_states[layer])
        assert torch.equal(cache[f"vision_encoder.blocks.{layer}.hook_resid_post"], output.hidden_states[layer + 1])
        assert torch.equal(cache[f"vision_encoder.blocks.{layer}.attn.hook_pattern"], pattern)


@pytest.mark.parametrize("name", NAMES)
def test_one_perturbed_weight_shows(name: str) -> None:
    """A negative control, for every parameter."""
    hf = MODELS[name]()
    hf.set_attn_implementation("eager")
    ours = HookedVLM.from_hf(hf, attention="eager")
    batch = {"pixel_values": pixels(2, IMAGE, IMAGE)}
    with torch.no_grad():
        _, cache = ours.run_with_cache(batch)
    unseen = []
    for parameter_name, parameter in hf.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter[..., :1] += 1e-3
        _, record = hf_activations(hf, batch)
        with torch.no_grad():
            parameter.copy_(before)
        if not disagreements(cache, record):
            unseen.append(parameter_name)
    assert not unseen
    assert not disagreements(cache, hf_activations(hf, batch)[1])

"""CLIP's forward is HF's, to the bit: both towers, the embeddings, the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM
from tests.parity.hf_record import disagreements
from tests.parity.hf_towers import hf_activations
from tests.tiny_blip import pixels
from tests.tiny_llava import IMAGE, MODELS, PATCH, clip_inputs, hf_clip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
END = {"clip": 95, "clip, read at the highest id": 2}
"""The config's end-of-text token."""

pytestmark = pytest.mark.usefixtures("unchecked")
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_equal_to_hf(hf: PreTrainedModel, ours: HookedVLM, batch: dict[str, Tensor], **options: bool) -> None:
    """All that can be seen of both, in a forward that is looked at; and the logits of a plain forward."""
    output, record = hf_activations(hf, batch, **options)
    with torch.no_grad():
        plain = ours({**batch, **options})
        _, cache = ours.run_with_cache({**batch, **options})
        image, text = ours.encode_image({**batch, **options}), ours.encode_text(batch)
    assert not disagreements(cache, record)
    assert plain.dtype == hf.dtype
    assert torch.equal(plain, output.logits_per_image)
    assert torch.equal(plain, output.logits_per_text.T)
    assert torch.equal(image, output.image_embeds)
    assert torch.equal(text, output.text_embeds)


@every_attention
@every_dtype
@pytest.mark.parametrize("name", END)
def test_forward_equals_hf(both, name: str, dtype: torch.dtype, attention: str) -> None:
    """Images and texts need not be as many; texts are padded, or all of one length."""
    hf, ours = both(name, dtype, attention)
    batch = clip_inputs(eos=END[name])
    assert_equal_to_hf(hf, ours, batch)
    assert_equal_to_hf(hf, ours, {name: batch[name] for name in ("pixel_values", "input_ids")})
    assert_equal_to_hf(hf, ours, clip_inputs(1, (7, 7), eos=END[name]))


@every_attention
@every_dtype
@pytest.mark.parametrize(("height", "width"), [(35, 49), (14, 14), (33, 29), (IMAGE + PATCH - 1,) * 2, (49, 16)])
def test_other_image_sizes(both, height: int, width: int, dtype: torch.dtype, attention: str) -> None:
    hf, ours = both("clip", dtype, attention)
    batch = clip_inputs(eos=95) | {"pixel_values": pixels(2, height, width)}
    assert_equal_to_hf(hf, ours, batch, interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        ours(batch)


def test_patterns_are_what_hf_s_attention_returns(both) -> None:
    hf, ours = both("clip")
    seen: list[Tensor] = []
    layers = [*hf.vision_model.encoder.layers, *hf.text_model.encoder.layers]
    handles = [layer.self_attn.register_forward_hook(lambda _m, _i, made: seen.append(made[1])) for layer in layers]
    batch = clip_inputs(eos=95)
    with torch.no_grad():
        hf(**batch)
        _, cache = ours.run_with_cache(batch, names_filter="*hook_pattern")
    for handle in handles:
        handle.remove()
    assert len(seen) == len(cache) == len(layers)
    assert all(torch.equal(found, theirs) for found, theirs in zip(cache.values(), seen, strict=True))


@every_attention
def test_texts_are_read_where_they_end(both, attention: str) -> None:
    """Which is another position by the config's end-of-text token; and padding changes nothing."""
    for name, end in END.items():
        _, ours = both(name, attention=attention)
        batch = clip_inputs(1, (9, 4, 7, 2), eos=end)
        lengths = batch["attention_mask"].sum(1)
        assert ours.text_encoder.read_at(batch["input_ids"]).tolist() == (lengths - 1).tolist()
        with torch.no_grad():
            together = ours.encode_text(batch)
            unmasked = ours.encode_text({"input_ids": batch["input_ids"]})
            for row, length in enumerate(lengths):
                alone = ours.encode_text({"input_ids": batch["input_ids"][row : row + 1, :length]})
                torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)
                # What stands behind the end is not read, masked or not: the tower is causal.
                torch.testing.assert_close(unmasked[row], alone[0], rtol=0, atol=1e-5)
    _, exact = both("clip")
    _, highest = both("clip, read at the highest id")
    ids = torch.tensor([[1, 95, 98, 3], [1, 5, 95, 97]])
    assert exact.text_encoder.read_at(ids).tolist() == [1, 2]
    assert highest.text_encoder.read_at(ids).tolist() == [2, 3]


def test_a_tower_alone_needs_only_its_own_inputs(both) -> None:
    hf, ours = both("clip")
    batch = clip_inputs(eos=95)
    with torch.no_grad():
        output = hf(**batch)
        assert torch.equal(ours.encode_image({"pixel_values": batch["pixel_values"]}), output.image_embeds)
        assert torch.equal(ours.encode_text({"input_ids": batch["input_ids"]}), hf_text(hf, batch["input_ids"]))
    with pytest.raises(ValueError, match="needs pixel_values"):
        ours(clip_inputs(0) | {"pixel_values": None})
    with pytest.raises(ValueError, match="needs a text's input_ids"):
        ours({"pixel_values": batch["pixel_values"]})


def hf_text(hf: PreTrainedModel, ids: Tensor) -> Tensor:
    return hf(input_ids=ids, pixel_values=pixels(1, IMAGE, IMAGE)).text_embeds


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_kind_of_tensor_is_compared(both, attention: str) -> None:
    hf, ours = both("clip", attention=attention)
    _, record = hf_activations(hf, clip_inputs(eos=95))
    unmatched = {name.split(".", 3)[-1] for name in ours.hook_names if name not in record}
    made_here = {"hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result"}  # by us alone
    assert unmatched == made_here | {name for name in unmatched if name.endswith("hook_scale")}
    assert all(float(tensor.float().std()) > 1e-3 for tensor in record.values())


def test_one_perturbed_weight_shows() -> None:
    """A negative control, for every parameter."""
    hf = MODELS["clip"]()
    hf.set_attn_implementation("eager")
    ours = HookedVLM.from_hf(hf, attention="eager")
    batch = clip_inputs(eos=95)
    with torch.no_grad():
        _, cache = ours.run_with_cache(batch)
    unseen = []
    for name, parameter in hf.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter[..., :1].add_(1e-3) if parameter.dim() else parameter.add_(1e-3)
        _, record = hf_activations(hf, batch)
        with torch.no_grad():
            parameter.copy_(before)
        if not disagreements(cache, record):
            unseen.append(name)
    assert not unseen
    assert not disagreements(cache, hf_activations(hf, batch)[1])


def test_other_sizes_and_activations() -> None:
    hf = hf_clip(eos=95, hidden_act="gelu", num_hidden_layers=2, layer_norm_eps=1e-3)
    hf.set_attn_implementation("eager")
    assert_equal_to_hf(hf, HookedVLM.from_hf(hf, attention="eager"), clip_inputs(eos=95))

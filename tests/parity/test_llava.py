"""LLaVA's forward is HF's, to the bit: all that can be seen of it, for every language model and kind of LLaVA.

Eager against eager, the fused kernel against the fused kernel, from a checkpoint that each side has loaded by itself.
Rows have different numbers of images and of words, so all but the longest are padded on the left; padded positions are
compared like all others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.patches import n_tiles
from tests.parity.hf_record import disagreements
from tests.parity.hf_towers import hf_activations
from tests.tiny_blip import pixels
from tests.tiny_llava import (
    FEATURES,
    IMAGE,
    IMAGE_ID,
    LANGUAGE_MODELS,
    MODELS,
    NEXT_FEATURES,
    PINPOINTS,
    ROPES,
    TEXT,
    prompts,
    row_alone,
)

DTYPES = [torch.float32, torch.bfloat16]
ATTENTION = ["eager", "sdpa"]
IMAGES = (1, 0, 2)
"""How many each row has."""

every_attention = pytest.mark.parametrize("attention", ATTENTION)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
fast = pytest.mark.usefixtures("unchecked")


def assert_equal_to_hf(hf: PreTrainedModel, ours: HookedVLM, batch: dict[str, Tensor]) -> None:
    """All that can be seen of both, in a forward that is looked at; and the logits of a plain forward."""
    output, record = hf_activations(hf, batch)
    with torch.no_grad():
        plain = ours(batch)
        looked_at, cache = ours.run_with_cache(batch)
    assert not disagreements(cache, record)
    assert plain.dtype == hf.dtype
    assert torch.equal(plain, output.logits)
    assert torch.equal(looked_at, output.logits)
    if "pixel_values" in batch:
        assert_images_equal_to_hf(ours, batch, output, cache)


def assert_images_equal_to_hf(ours: HookedVLM, batch: dict[str, Tensor], output: Any, cache: Any) -> None:
    """What the projector makes of the images, and where it goes."""
    with torch.no_grad():
        features = ours.encode_images(VLMInputs.of(batch))
    assert torch.equal(features, output.image_hidden_states)
    merged = cache["language_model.hook_merged_embed"]
    assert torch.equal(merged[batch["input_ids"] == IMAGE_ID], features)


@every_attention
@every_dtype
@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *ROPES, "tied"])
@fast
def test_every_language_model(both, name: str, dtype: torch.dtype, attention: str) -> None:
    """And every kind of rotary embedding, on prompts longer than the context that it was stretched from."""
    hf, ours = both(name, dtype, attention)
    batch = prompts(hf, IMAGES)
    assert batch["input_ids"].shape[1] > 2 * 20
    assert bool((batch["attention_mask"] == 0).any())
    assert_equal_to_hf(hf, ours, batch)


@every_dtype
@pytest.mark.parametrize("name", FEATURES)
@fast
def test_every_choice_of_vision_features(both, name: str, dtype: torch.dtype) -> None:
    attention = "sdpa" if dtype == torch.float32 else "eager"
    hf, ours = both(name, dtype, attention)
    assert_equal_to_hf(hf, ours, prompts(hf, IMAGES))


@every_attention
@every_dtype
@pytest.mark.parametrize("name", ["next", "next, mistral", *(f"next, {name}" for name in NEXT_FEATURES)])
@fast
def test_llava_next(both, name: str, dtype: torch.dtype, attention: str) -> None:
    """Pictures of many proportions, tiled, their padding cut off and newlines put in."""
    hf, ours = both(name, dtype, attention)
    assert_equal_to_hf(hf, ours, prompts(hf, (1, 0, 2, 2)))


@every_attention
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2, mixed", "next"])
def test_float16(both, name: str, attention: str) -> None:
    hf, ours = both(name, torch.float16, attention)
    assert_equal_to_hf(hf, ours, prompts(hf, IMAGES))


@every_attention
@pytest.mark.parametrize("images", [(0,), (1,), (2,), (0, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["mistral, sliding", "next"])
@fast
def test_rows_alone_and_of_equal_length(both, name: str, images: tuple[int, ...], attention: str) -> None:
    """Without padding HF builds no mask, or another; with a mask of ones it should do the same."""
    hf, ours = both(name, torch.bfloat16, attention)
    batch = prompts(hf, images, n_words=[7] * len(images))
    if len(batch.get("image_sizes", ())) > 1:
        batch = prompts(hf, images[:1])
    assert bool(batch["attention_mask"].all())
    assert_equal_to_hf(hf, ours, batch)
    del batch["attention_mask"]
    assert_equal_to_hf(hf, ours, batch)


@every_dtype
@pytest.mark.parametrize("length", [1, 2, 8, 9, 10])
@pytest.mark.parametrize("name", ["mistral, sliding", "qwen2, mixed", "dynamic"])
@fast
def test_text_of_any_length(both, name: str, length: int, dtype: torch.dtype) -> None:
    """Around the length of a window, where HF changes from one mask to another."""
    for attention in ATTENTION:
        hf, ours = both(name, dtype, attention)
        assert_equal_to_hf(hf, ours, prompts(hf, (0, 0), n_words=[length, length]))
        if length > 1:
            assert_equal_to_hf(hf, ours, prompts(hf, (0, 0), n_words=[length, length - 1]))


@every_attention
@pytest.mark.parametrize("name", ["llama", "phi3", "next"])
def test_over_a_model_in_memory(name: str, attention: str) -> None:
    hf = MODELS[name]()
    hf.set_attn_implementation(attention)
    assert_equal_to_hf(hf, HookedVLM.from_hf(hf, attention=attention), prompts(hf, IMAGES))


def test_what_hf_returns_itself(both) -> None:
    """Without a hook of ours in HF: its hidden states and attentions, the vision tower's too."""
    hf, ours = both("llama")
    batch = prompts(hf, IMAGES)
    with torch.no_grad():
        _, cache = ours.run_with_cache(batch)
        output = hf(**batch, output_hidden_states=True, output_attentions=True)
        images = hf.model.get_image_features(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    n_layers = hf.config.text_config.num_hidden_layers
    for layer in range(n_layers):
        assert torch.equal(cache[f"language_model.blocks.{layer}.hook_resid_pre"], output.hidden_states[layer])
        assert torch.equal(cache[f"language_model.blocks.{layer}.attn.hook_pattern"], output.attentions[layer])
    assert torch.equal(cache["language_model.hook_merged_embed"], output.hidden_states[0])
    assert torch.equal(cache["language_model.hook_out"], output.hidden_states[n_layers])
    for layer in range(hf.config.vision_config.num_hidden_layers):
        pattern = cache[f"vision_encoder.blocks.{layer}.attn.hook_pattern"]
        assert torch.equal(pattern, images.attentions[layer])
    assert torch.equal(cache["projector.hook_out"].flatten(0, 1), torch.cat(images.pooler_output))
    assert torch.equal(cache["vision_encoder.hook_out"], images.hidden_states[-2])


@pytest.mark.parametrize("name", ["llama", "phi3", "next"])
def test_every_kind_of_tensor_is_compared(both, name: str) -> None:
    """The comparisons above are worth something only if HF's side is there, and says something."""
    for attention in ATTENTION:
        hf, ours = both(name, attention=attention)
        _, record = hf_activations(hf, prompts(hf, IMAGES))
        unmatched = {name.split(".", 3)[-1] for name in ours.hook_names if name not in record}
        made_here = {"hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result"}  # by us alone
        assert unmatched == made_here | {name for name in unmatched if name.endswith("hook_scale")}
        assert all(float(tensor.float().std()) > 1e-3 for tensor in record.values())


def parameters_to_perturb(hf: nn.Module) -> list[str]:
    """One parameter of each kind, in the last layer of each tower."""
    last = (".encoder.layers.3.", f"language_model.layers.{TEXT['num_hidden_layers'] - 1}.")
    return [name for name, _ in hf.named_parameters() if ".layers." not in name or any(part in name for part in last)]


@pytest.mark.parametrize("name", ["llama, biases", "phi3", "next"])
def test_one_perturbed_weight_shows(name: str) -> None:
    """A negative control, for every parameter: were ours another one, the comparison would say so."""
    hf = MODELS[name]()
    hf.set_attn_implementation("eager")
    ours = HookedVLM.from_hf(hf, attention="eager")
    batch = prompts(hf, IMAGES)
    with torch.no_grad():
        _, cache = ours.run_with_cache(batch)
    unseen = []
    for parameter_name in parameters_to_perturb(hf):
        parameter = hf.get_parameter(parameter_name)
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


def assert_rows_are_as_alone(ours: HookedVLM, batch: dict[str, Tensor]) -> None:
    """Within rounding: alone, a row is multiplied in matrices of other sizes, whose sums round differently."""
    with torch.no_grad():
        together = ours(batch)
        for row, keep in enumerate(batch["attention_mask"].bool()):
            alone = ours(row_alone(batch, row))[0]
            torch.testing.assert_close(together[row, keep], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@every_attention
@pytest.mark.parametrize("name", ["llama", "mistral, sliding", "qwen2, mixed", "llama3", "next"])
def test_a_padded_row_gives_what_it_gives_alone(both, name: str, attention: str) -> None:
    _, ours = both(name, attention=attention)
    assert_rows_are_as_alone(ours, prompts(both(name)[0], IMAGES))


@settings(max_examples=15)
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(8, 14)), min_size=1, max_size=4), data=st.data())
def test_any_rows(rows: list[tuple[int, int]], data: Any) -> None:
    """Any mixture of images and words: HF's numbers, and each row's own."""
    name = data.draw(st.sampled_from(["llama", "qwen2, mixed", "next"]))
    hf = MODELS[name]()
    hf.set_attn_implementation("sdpa")
    ours = HookedVLM.from_hf(hf, attention="sdpa")
    batch = prompts(hf, [images for images, _ in rows], n_words=[words for _, words in rows])
    with torch.no_grad():
        assert torch.equal(ours(batch), hf(**batch).logits)
    assert_rows_are_as_alone(ours, batch)


@pytest.fixture(scope="module")
def next_models() -> tuple[PreTrainedModel, HookedVLM]:
    hf = MODELS["next"]()
    return hf, HookedVLM.from_hf(hf)


@settings(max_examples=40)
@given(sizes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=3))
def test_pictures_of_any_size(next_models, sizes: list[tuple[int, int]]) -> None:
    """LLaVA-NeXT: as many features as HF has, and the same."""
    hf, ours = next_models
    counts = [n_tiles(size, IMAGE, PINPOINTS) for size in sizes]
    tiles = torch.zeros(len(sizes), max(counts), 3, IMAGE, IMAGE)
    for image, count in enumerate(counts):
        tiles[image, :count] = pixels(count, IMAGE, IMAGE)
    batch = {"pixel_values": tiles, "image_sizes": torch.tensor(sizes)}
    with torch.no_grad():
        expected = hf.get_image_features(**batch).pooler_output
        assert torch.equal(ours.encode_images(VLMInputs(**batch)), torch.cat(expected))
    assert ours._feature_counts(VLMInputs(**batch)) == [len(own) for own in expected]

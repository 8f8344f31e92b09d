"""Rows of a batch do not know of each other."""

from dataclasses import replace

import pytest
import torch

from hooked_vlm import HookedVLM, toys
from hooked_vlm.inputs import VLMInputs
from tests.tiny_llava import MODELS, prompts

TOYS = ["toy-blip-vqa", "toy-llava"]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TOYS)
def test_identical_rows_give_identical_logits(name, attention):
    model = HookedVLM.from_pretrained(name, attention=attention)
    sample = toys.demo_sample()
    inputs = model.prepare(sample.image, sample.question)
    logits = model(inputs.repeat(4))
    # Rounding alone may tell rows apart: products of other sizes are summed in another order.
    expected = model(inputs)
    assert torch.allclose(logits, expected.expand_as(logits), rtol=0, atol=1e-5 * max(1, float(expected.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_order_of_rows_is_order_of_logits(name):
    model = HookedVLM.from_pretrained(name)
    samples = [toys.sample(21, index) for index in range(5)]
    inputs = model.prepare([sample.image for sample in samples], [sample.question for sample in samples])
    order = [3, 0, 4, 1, 2]
    logits = model(inputs)
    atol = 1e-5 * max(1, float(logits.abs().max()))
    assert torch.allclose(model(inputs.rows(order)), logits[order], rtol=0, atol=atol)
    assert model.generate(inputs.rows(order)) == [samples[row].answer for row in order]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral, sliding", "next"])
def test_rows_take_their_own_images_with_them(name, attention):
    """Rows of one, no and two images, moved, repeated and left out."""
    hf = MODELS[name]()
    model = HookedVLM.from_hf(hf, attention=attention)
    batch = prompts(hf, (1, 0, 2))
    inputs = replace(VLMInputs(**batch), image_rows=(0, 2, 2))
    logits, keep = model(inputs), batch["attention_mask"].bool()
    for order in ([2, 0, 1], [1], [2, 2, 0], [0, 1, 0]):
        moved = model(inputs.rows(order))
        for row, origin in zip(moved, order, strict=True):
            expected = logits[origin, keep[origin]]
            torch.testing.assert_close(row[keep[origin]], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_another_row_s_image_changes_nothing():
    hf = MODELS["llama"]()
    model = HookedVLM.from_hf(hf)
    batch = prompts(hf, (1, 0, 2))
    other = batch["pixel_values"].clone()
    other[0] = torch.randn_like(other[0])
    plain, changed = model(batch), model({**batch, "pixel_values": other})
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(changed[1:][keep[1:]], plain[1:][keep[1:]], rtol=0, atol=1e-5)
    assert float((changed[0, keep[0]] - plain[0, keep[0]]).abs().max()) > 1e-2

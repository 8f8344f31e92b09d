"""Rows of a batch do not know of each other."""

import pytest
import torch

from hooked_vlm import HookedVLM, toys


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_identical_rows_give_identical_logits(attention):
    model = HookedVLM.from_pretrained("toy-blip-vqa", attention=attention)
    sample = toys.demo_sample()
    inputs = model.prepare(sample.image, sample.question)
    logits = model(inputs.repeat(4))
    # Rounding alone may tell rows apart: products of other sizes are summed in another order.
    assert torch.allclose(logits, model(inputs).expand_as(logits), atol=1e-5)


@torch.no_grad()
def test_order_of_rows_is_order_of_logits():
    model = HookedVLM.from_pretrained("toy-blip-vqa")
    samples = [toys.sample(21, index) for index in range(5)]
    inputs = model.prepare([sample.image for sample in samples], [sample.question for sample in samples])
    order = [3, 0, 4, 1, 2]
    assert torch.allclose(model(inputs.rows(order)), model(inputs)[order], atol=1e-5)
    assert model.generate(inputs.rows(order)) == [samples[row].answer for row in order]

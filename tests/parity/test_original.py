"""``variant="original"``: what the research code computes, out of HF's modules with its choices made for it."""

from __future__ import annotations

import pytest
import torch

from tests.parity.hf_record import disagreements, hf_activations
from tests.parity.hf_repaired import cross_attention_masked, vision_eps, with_first_token
from tests.tiny_blip import ENC, inputs, padded_inputs

READS_ENC = {("vqa", None), ("retrieval", True)}
"""Where the research code puts [ENC] for [CLS]: where the text looks at the image, and is not generated."""

MODES = [("vqa", None), ("caption", None), ("retrieval", True), ("retrieval", False)]


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("task", "use_itm_head"), MODES)
def test_original_equals_hf_modules_with_its_choices(pair, task, use_itm_head, dtype, padded: bool) -> None:
    hf, ours = pair(task, dtype=dtype, variant="original")
    options = {} if use_itm_head is None else {"use_itm_head": use_itm_head}
    batch = padded_inputs(task) if padded else inputs(task)
    given = with_first_token(batch, ENC) if (task, use_itm_head) in READS_ENC else batch
    with vision_eps(hf, 1e-6), cross_attention_masked(hf):
        _, record = hf_activations(hf, task, given, **options)
    with torch.no_grad():
        _, cache = ours.run_with_cache(batch, **options)
    assert not disagreements(cache, record)


@pytest.mark.parametrize(("task", "use_itm_head"), MODES)
def test_each_choice_shows(pair, task, use_itm_head) -> None:
    """A negative control: without one of them, the comparison fails."""
    hf, ours = pair(task, variant="original")
    options = {} if use_itm_head is None else {"use_itm_head": use_itm_head}
    batch = inputs(task)
    given = with_first_token(batch, ENC) if (task, use_itm_head) in READS_ENC else batch
    with torch.no_grad():
        _, cache = ours.run_with_cache(batch, **options)
    assert disagreements(cache, hf_activations(hf, task, given, **options)[1])
    if given is not batch:
        with vision_eps(hf, 1e-6):
            assert disagreements(cache, hf_activations(hf, task, batch, **options)[1])


def test_original_is_recorded_and_hf_is_the_default(pair) -> None:
    _, original = pair("vqa", variant="original")
    _, default = pair("vqa")
    assert (original.config.variant, original.config.vision.eps, original.config.label_smoothing) == (
        *("original", 1e-6, 0.1),
    )
    assert (default.config.variant, default.config.vision.eps, default.config.label_smoothing) == ("hf", 1e-5, 0.0)
    assert original.config.text.eps == default.config.text.eps == 1e-12

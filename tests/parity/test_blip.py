"""BLIP's forward is HF's, to the bit: every residual, attention pattern and logit, in three dtypes and odd shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM
from tests.parity.hf_record import disagreements, hf_activations
from tests.tiny_blip import IMAGE, PATCH, SHAPES, hf_blip, inputs, padded_inputs, pixels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TASKS = ["vqa", "caption", "retrieval"]
CASES = [(task, shape) for task in TASKS for shape in SHAPES if (task, shape) != ("vqa", "narrow on wide")]
HF_PADDING = {"cross_attention_padding": "hf"}
"""HF's cross-attention reads padding; ours does where it is asked to."""


def hf_output(hf: PreTrainedModel, task: str, output: Any, record: dict[str, Tensor]) -> Tensor:
    """What answers the task; for VQA, HF's forward keeps the logits to itself."""
    return {"vqa": lambda: record["answer_decoder.hook_logits"], "caption": lambda: output.logits}.get(
        task, lambda: output.itm_score
    )()


def assert_equal_to_hf(hf: PreTrainedModel, ours: HookedVLM, task: str, batch: dict[str, Any], **options: bool) -> None:
    """All that can be seen of both, in a forward that is looked at; and the output of a plain forward."""
    output, record = hf_activations(hf, task, batch, **options)
    with torch.no_grad():
        plain = ours(batch, **options)
        looked_at, cache = ours.run_with_cache(batch, **options)
    assert not disagreements(cache, record)
    expected = hf_output(hf, task, output, record)
    assert plain.dtype == hf.dtype
    assert torch.equal(plain, expected)
    assert torch.equal(looked_at, expected)
    assert torch.equal(cache["vision_encoder.hook_out"], record["vision_encoder.hook_out"])


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("task", "shape"), CASES)
def test_forward_equals_hf(pair, task: str, shape: str, dtype: torch.dtype, padded: bool) -> None:
    hf, ours = pair(task, shape, dtype, **HF_PADDING)
    batch = padded_inputs(task) if padded else inputs(task)
    assert_equal_to_hf(hf, ours, task, batch)
    if task == "retrieval":
        assert_equal_to_hf(hf, ours, task, batch, use_itm_head=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_forward_over_a_model_in_memory_equals_it(load_hf, task: str, dtype: torch.dtype) -> None:
    hf = load_hf(task, "heads of 12", dtype)
    assert_equal_to_hf(hf, HookedVLM.from_hf(hf, **HF_PADDING), task, padded_inputs(task))


@pytest.mark.parametrize("task", TASKS)
def test_unpadded_forward_equals_hf_whatever_is_done_about_padding(pair, task: str) -> None:
    for choices in ({}, HF_PADDING):
        hf, ours = pair(task, **choices)
        batch = inputs(task, batch=3) | {"attention_mask": torch.ones(3, 5, dtype=torch.long)}
        assert_equal_to_hf(hf, ours, task, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("task", TASKS)
def test_text_lengths(pair, task: str, length: int, dtype: torch.dtype) -> None:
    hf, ours = pair(task, "heads of 20", dtype)
    for answer in [1, 2, 7] if task == "vqa" else [1]:
        assert_equal_to_hf(hf, ours, task, inputs(task, batch=2, length=length, answer=answer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (40, 40),
        (16, 16),
        (24, 48),
        (43, 17),  # not whole patches
        (72, 8),  # as many patches as the checkpoint's images have
        (IMAGE + PATCH - 1, IMAGE + PATCH - 1),  # likewise, and square
        (IMAGE, IMAGE),
    ],
)
@pytest.mark.parametrize("task", TASKS)
def test_other_image_sizes(pair, task: str, height: int, width: int, dtype: torch.dtype) -> None:
    hf, ours = pair(task, dtype=dtype)
    batch = inputs(task, batch=2) | {"pixel_values": pixels(2, height, width), "interpolate_pos_encoding": True}
    assert_equal_to_hf(hf, ours, task, batch)


def test_an_image_of_another_size_is_refused_unless_positions_may_be_resized(pair) -> None:
    """HF takes a smaller one without a word, and gives its patches the wrong positions."""
    _, ours = pair("vqa")
    with pytest.raises(ValueError, match=r"16x24 pixels.*24x24.*interpolate_pos_encoding=True"):
        ours(inputs("vqa") | {"pixel_values": pixels(1, 16, 24)})


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_tensor_is_compared(pair, task: str) -> None:
    """The comparisons above are worth something only if HF's side is there, and says something."""
    hf, ours = pair(task)
    _, record = hf_activations(hf, task, padded_inputs(task))
    kinds = {name.split(".", 3)[-1] for name in record if ".blocks." in name}
    for module in ("attn", "cross_attn"):
        assert {f"{module}.hook_{kind}" for kind in ("q", "k", "v", "pattern", "z")} <= kinds
    assert {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_normalized_resid_post"} <= kinds
    assert len(record) > 0.6 * len(ours.hook_names)
    assert all(float(tensor.float().std()) > 1e-3 for tensor in record.values())


def parameters_to_perturb(hf: nn.Module) -> list[str]:
    """One parameter of each kind, in the last layer of each tower; position embeddings where they are read."""
    names = dict.fromkeys(name for name, _ in hf.named_parameters() if "layer" not in name or ".1." in name)
    return [name for name in names if not name.startswith(("vision_proj", "text_proj"))]


@pytest.mark.parametrize("task", TASKS)
def test_one_perturbed_weight_shows(task: str) -> None:
    """A negative control, for every parameter: were ours another one, the comparison would say so."""
    hf = hf_blip(task)
    ours = HookedVLM.from_hf(hf, **HF_PADDING)
    batch = padded_inputs(task)
    with torch.no_grad():
        _, cache = ours.run_with_cache(batch)
    unseen = []
    for name in parameters_to_perturb(hf):
        parameter = hf.get_parameter(name)
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter[..., :1] += 1e-3
        _, record = hf_activations(hf, task, batch)
        with torch.no_grad():
            parameter.copy_(before)
        if not disagreements(cache, record):
            unseen.append(name)
    assert not unseen
    assert not disagreements(cache, hf_activations(hf, task, batch)[1])

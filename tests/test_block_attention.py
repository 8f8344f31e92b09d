"""Attention knockout: blocked edges carry nothing, the others carry all, and a query with none left gets nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.edits import BlockAttention, Edit, edit_hooks
from hooked_vlm.hooks import HookPoint
from hooked_vlm.inputs import VLMInputs
from tests.tiny_blip import hf_blip, padded_inputs
from tests.tiny_runs import batch, largest_difference, tiny

BOTH: list[AttentionImplementation] = ["eager", "sdpa"]
EVERY = slice(None)
# The first attention layer of its kind (so that what it reads is the clean run's), a selection, the same as an index.
EDGES: dict[str, tuple[str, dict[str, Any], tuple[Any, ...]]] = {
    "words to patches": (
        "question_encoder.blocks.0.cross_attn",
        {"positions": "question", "keys": "image"},
        (EVERY, EVERY, slice(1, 4), slice(1, 10)),
    ),
    "one head": (
        "question_encoder.blocks.0.attn",
        {"positions": [1, 2], "keys": [0], "heads": 1},
        (EVERY, 1, slice(1, 3), 0),
    ),
    "patches": ("vision_encoder.blocks.0.attn", {"keys": range(1, 9)}, (EVERY, EVERY, EVERY, slice(1, 9))),
    "causal": ("answer_decoder.blocks.0.attn", {"positions": [1, 2], "keys": 0}, (EVERY, EVERY, slice(1, 3), 0)),
    "answer to words": (
        "answer_decoder.blocks.0.cross_attn",
        {"positions": "last", "keys": "question"},
        (EVERY, EVERY, 0, slice(1, 4)),
    ),
}


def run(model: HookedVLM, inputs: VLMInputs, edits: list[Edit]) -> Any:
    with model.hooks(edit_hooks(model, inputs, edits)):
        return model.run_with_cache(inputs)


def attention_output_of_nothing(model: HookedVLM, site: str) -> Tensor:
    return model.get_submodule(site).b_O  # type: ignore[union-attr, return-value]


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("edges", EDGES)
def test_blocked_edges_are_0_and_the_others_share_the_rest(edges: str, attention: AttentionImplementation) -> None:
    site, where, index = EDGES[edges]
    model, inputs = tiny("vqa", attention), batch()
    _, clean = model.run_with_cache(inputs)
    logits, cache = run(model, inputs, [BlockAttention(site, **where)])
    pattern = cache[f"{site}.hook_pattern"]
    assert (pattern[index] == 0).all()
    left = clean[f"{site}.hook_pattern"].clone()
    left[index] = 0
    assert largest_difference(pattern, left / left.sum(-1, keepdim=True)) < 1e-6
    assert torch.equal(model.patch(inputs, [BlockAttention(site, **where)]), logits)

    def by_hand(scores: Tensor, hook: HookPoint) -> None:
        scores[index] = -torch.inf

    assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[(f"{site}.hook_attn_scores", by_hand)]), logits)


@torch.no_grad()
@pytest.mark.parametrize("edges", EDGES)
def test_sdpa_and_eager_agree(edges: str) -> None:
    site, where, _ = EDGES[edges]
    eager, sdpa = (tiny("vqa", kind).patch(batch(), [BlockAttention(site, **where)]) for kind in BOTH)
    assert largest_difference(eager, sdpa) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("edges", EDGES)
def test_a_query_with_nothing_left_gets_nothing(edges: str, attention: AttentionImplementation) -> None:
    site = EDGES[edges][0]
    model, inputs = tiny("vqa", attention), batch()
    _, clean = model.run_with_cache(inputs)
    _, cache = run(model, inputs, [BlockAttention(site, positions=[1])])
    out = f"{site.rpartition('.')[0]}.hook_{site.rpartition('.')[2]}_out"
    assert (cache[f"{site}.hook_pattern"][:, :, 1] == 0).all()
    assert (cache[f"{site}.hook_z"][:, 1] == 0).all()
    assert torch.equal(cache[out][:, 1], attention_output_of_nothing(model, site).expand(len(inputs), -1))
    others = [position for position in range(clean[out].shape[1]) if position != 1]
    assert largest_difference(cache[out][:, others], clean[out][:, others]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_is_nothing_to_read_either(dtype: torch.dtype, attention: AttentionImplementation) -> None:
    """With every word blocked, a query must not fall back on what the mask hides; in half precision the mask's
    number and a score add up to another one, or to minus infinity."""
    model = HookedVLM.from_hf(hf_blip("vqa", scale=0.7).to(dtype), attention=attention)
    inputs = VLMInputs(**padded_inputs("vqa"))
    assert inputs.attention_mask is not None
    words = inputs.attention_mask.bool()
    _, clean = model.run_with_cache(inputs, names_filter="*hook_attn_scores")
    assert max(scores.max() for scores in clean.values()) > 20, "scores too small to show in the mask's number"
    for site in ("question_encoder.blocks.0.attn", "answer_decoder.blocks.1.cross_attn"):
        _, cache = run(model, inputs, [BlockAttention(site, keys=words)])
        assert (cache[f"{site}.hook_z"] == 0).all()
    _, cache = run(model, inputs, [BlockAttention("answer_decoder.blocks.0.attn", positions=1, keys=[0, 1])])
    assert (cache["answer_decoder.blocks.0.attn.hook_z"][:, 1] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
def test_edits_that_leave_nothing_together(attention: AttentionImplementation) -> None:
    model, inputs, site = tiny("vqa", attention), batch(), "question_encoder.blocks.0.cross_attn"
    first, rest, all_ = ({"positions": 2, "keys": keys} for keys in ([0, 1, 2], range(3, 10), None))
    at_once = model.patch(inputs, [BlockAttention(site, **all_)])
    for edits in ([first, rest], [rest, first], [all_, first], [first, all_]):
        assert torch.equal(model.patch(inputs, [BlockAttention(site, **where) for where in edits]), at_once)


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
def test_no_edges_and_future_keys_are_no_loss(attention: AttentionImplementation) -> None:
    """Identity 7."""
    model, inputs = tiny("vqa", attention), batch()
    clean = model(inputs)
    nothing = [
        BlockAttention("*.attn", keys=[]),
        BlockAttention("*.cross_attn", positions=[]),
        BlockAttention("*.attn", heads=[]),
        BlockAttention("question_encoder.blocks.*.attn", keys=torch.zeros(3, 5, dtype=torch.bool)),
    ]
    future = [BlockAttention("answer_decoder.blocks.*.attn", positions=q, keys=range(q + 1, 3)) for q in range(2)]
    for edits in ([edit] for edit in nothing):
        assert largest_difference(model.patch(inputs, edits), clean) < 1e-5
    assert largest_difference(model.patch(inputs, future), clean) < 1e-5
    if attention == "eager":
        assert torch.equal(model.patch(inputs, nothing + future), clean)


@torch.no_grad()
def test_no_edges_leave_padding_as_it_is() -> None:
    """A query that may read nothing by its own mask is not this edit's doing."""
    model = tiny("caption")
    inputs = VLMInputs(**padded_inputs("caption"))
    assert inputs.attention_mask is not None
    hidden = torch.zeros_like(inputs.attention_mask)
    hidden[:, -1] = 1  # the mask lets the last position alone be read, and by itself alone
    clean = model(dict(inputs.tensors(), attention_mask=hidden))
    patched = model.patch(
        dict(inputs.tensors(), attention_mask=hidden), [BlockAttention("text_decoder.*.attn", keys=[])]
    )
    assert torch.equal(patched, clean)


@torch.no_grad()
def test_a_query_that_reads_itself_alone_gets_its_own_value() -> None:
    model, inputs, site = tiny(), batch(), "vision_encoder.blocks.1.attn"
    _, cache = run(model, inputs, [BlockAttention(site, positions=4, keys=[0, 1, 2, 3, *range(5, 10)])])
    assert torch.equal(cache[f"{site}.hook_z"][:, 4], cache[f"{site}.hook_v"][:, 4])


@torch.no_grad()
def test_layers_by_a_pattern_of_names() -> None:
    model, inputs = tiny(), batch()
    where = {"positions": "question", "keys": "image"}
    each = [BlockAttention(f"question_encoder.blocks.{layer}.cross_attn", **where) for layer in range(2)]
    for site in ("question_encoder.blocks.*.cross_attn", "question_encoder.*.cross_attn.hook_attn_scores"):
        assert torch.equal(model.patch(inputs, [BlockAttention(site, **where)]), model.patch(inputs, each))


@torch.no_grad()
def test_without_the_image_the_answer_depends_on_the_words_alone() -> None:
    model, inputs, other = tiny(), batch(), batch(seed=1)
    blind = [BlockAttention("question_encoder.blocks.*.cross_attn")]
    assert inputs.pixel_values is not None
    assert other.pixel_values is not None
    assert torch.equal(model.patch(inputs, blind), model.patch(inputs.with_pixels(other.pixel_values), blind))
    assert largest_difference(model(inputs), model(inputs.with_pixels(other.pixel_values))) > 1e-2

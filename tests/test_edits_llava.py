"""Edits of a LLaVA: spans of its prompt, the towers before it, knockout, and heads that share keys and values."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.edits import Add, BlockAttention, Edit, EditError, Replace, Scale, Zero, edit_hooks
from hooked_vlm.hooks import HookPoint
from hooked_vlm.inputs import Span
from tests import llava_processors
from tests.tiny_runs import largest_difference, n_hooks

BOTH: list[AttentionImplementation] = ["eager", "sdpa"]
EVERY = slice(None)
N_PATCHES, N_HEADS, N_KV_HEADS, N_LAYERS = 16, 4, 2, 3
TOWER = "language_model"
RESID = f"{TOWER}.blocks.1.hook_resid_pre"
QUESTIONS = ("what color is the circle ?", "is it red ?")


@cache
def tiny(attention: AttentionImplementation = "eager") -> HookedVLM:
    """Four query heads on two of keys and values."""
    return HookedVLM.from_hf(llava_processors.hf_model(), processor=llava_processors.processor(), attention=attention)


@cache
def batch() -> VLMInputs:
    """A row with one picture; and a shorter one, padded on the left."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    inputs = tiny().prepare([*pictures], QUESTIONS)
    assert inputs.attention_mask is not None
    assert inputs.attention_mask[:, :2].tolist() == [[1, 1], [0, 0]]
    return inputs


@cache
def pairs() -> VLMInputs:
    """A row with two pictures, and one with one."""
    pictures = np.random.default_rng(1).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    return tiny().prepare(
        [[*pictures[:2]], [pictures[2]]],
        ["USER: <image> and <image>\nis it red ? ASSISTANT:", "USER: <image>\nis it red ? ASSISTANT:"],
    )


def run(model: HookedVLM, inputs: VLMInputs, edits: list[Edit]) -> Any:
    with model.hooks(edit_hooks(model, inputs, edits)):
        return model.run_with_cache(inputs)


# Spans ----------------------------------------------------------------------------------------------------------------

WHERE: dict[str, tuple[list[int], list[int]]] = {
    "image": ([*range(2, 18)], [*range(4, 20)]),
    "image.0": ([*range(2, 18)], [*range(4, 20)]),
    "question": ([*range(19, 25)], [*range(21, 25)]),
    "last": ([25], [25]),
}
"""By name, the positions of each row: <s>, USER:, patches, a newline, words, ASSISTANT:."""


@torch.no_grad()
@pytest.mark.parametrize("site", [RESID, f"{TOWER}.hook_merged_embed", f"{TOWER}.blocks.2.attn.hook_z"])
@pytest.mark.parametrize("span", WHERE)
def test_a_span_is_these_positions_and_no_others(span: str, site: str) -> None:
    model, inputs = tiny(), batch()

    def by_hand(activation: Tensor, hook: HookPoint) -> None:
        for row, positions in enumerate(WHERE[span]):
            activation[row, positions] += 1

    expected = model.run_with_hooks(inputs, fwd_hooks=[(site, by_hand)])
    assert torch.equal(model.patch(inputs, [Add(site, 1.0, positions=span)]), expected)
    assert not torch.equal(expected, model(inputs))


@torch.no_grad()
@pytest.mark.parametrize("span", ["circle", "the circle", "color is"])
def test_words_of_the_question(span: str) -> None:
    model, inputs = tiny(), batch().rows([0])
    (positions,) = inputs.span(span).rows
    assert [inputs.tokens[0][position] for position in positions] == span.split()  # type: ignore[index]
    expected = model.patch(inputs, [Zero(RESID, positions=list(positions))])
    assert torch.equal(model.patch(inputs, [Zero(RESID, positions=span)]), expected)


@torch.no_grad()
def test_each_of_several_pictures() -> None:
    model, inputs = tiny(), pairs()
    ends = {"image.0": (2, 18), "image.1": (19, 35)}
    for span, (first, beyond) in ends.items():
        both = [inputs.spans[span].rows[0], inputs.spans[span].rows[1]]
        assert both[0] == tuple(range(first, beyond))
        assert len(both[1]) == (N_PATCHES if span == "image.0" else 0)
        positions = torch.zeros(inputs.input_ids.shape, dtype=torch.bool)  # type: ignore[union-attr]
        for row, own in enumerate(both):
            positions[row, list(own)] = True
        expected = model.patch(inputs, [Scale(RESID, 2.0, positions=positions)])
        assert torch.equal(model.patch(inputs, [Scale(RESID, 2.0, positions=span)]), expected)
    each = [Scale(RESID, 2.0, positions=span) for span in ends]
    assert torch.equal(model.patch(inputs, each), model.patch(inputs, [Scale(RESID, 2.0, positions="image")]))


@torch.no_grad()
def test_a_part_of_a_picture() -> None:
    """The patches of a box, in the language model and in the towers before it."""
    model, inputs = tiny(), batch()
    box, patches = (8, 1, 20, 13), [1, 2, 5, 6]  # pixels; patches are 7 wide
    assert inputs.positions_in(box).rows == tuple(tuple(first + patch for patch in patches) for first in (2, 4))
    for site, tower, first in (
        (RESID, None, None),
        ("projector.hook_out", "projector", 0),
        ("vision_encoder.blocks.1.hook_resid_pre", "vision_encoder", 1),
    ):
        span = inputs.positions_in(box, tower=tower)
        own = [[first + patch for patch in patches]] * 2 if first is not None else [list(row) for row in span.rows]

        def by_hand(activation: Tensor, hook: HookPoint, own: list[list[int]] = own) -> None:
            for row, positions in enumerate(own):
                activation[row, positions] = 0

        expected = model.run_with_hooks(inputs, fwd_hooks=[(site, by_hand)])
        assert torch.equal(model.patch(inputs, [Zero(site, positions=span)]), expected)
        assert not torch.equal(expected, model(inputs))


@torch.no_grad()
def test_what_the_projector_writes_is_what_the_language_model_reads() -> None:
    model, inputs = tiny(), batch()
    box = (0, 0, 14, 7)
    here, there = inputs.positions_in(box), inputs.positions_in(box, tower="projector")
    patched = model.patch(inputs, [Zero("projector.hook_out", positions=there)])
    assert torch.equal(model.patch(inputs, [Zero(f"{TOWER}.hook_merged_embed", positions=here)]), patched)
    assert torch.equal(
        model.patch(inputs, [Zero("projector.hook_out")]),
        model.patch(inputs, [Zero(f"{TOWER}.hook_merged_embed", positions="image")]),
    )


WRONG_TOWERS = [
    (Zero("vision_encoder.blocks.1.hook_resid_pre", positions="image"), "they are vision_encoder's"),
    (Zero("vision_encoder.hook_out", positions="question"), "they are vision_encoder's"),
    (Zero("vision_encoder.hook_patch_embed", positions="image"), "they are not those of its tower's stream"),
    (Zero("projector.hook_out", positions="image.0"), "they are projector's"),
    (BlockAttention("vision_encoder.blocks.0.attn", positions="last"), "they are vision_encoder's"),
    (BlockAttention("vision_encoder.blocks.0.attn", keys="image"), "they are vision_encoder's"),
    (Zero("*.blocks.0.hook_mlp_out", positions="last"), "they are vision_encoder's"),
]


@pytest.mark.parametrize(("edit", "message"), WRONG_TOWERS, ids=lambda value: "")
def test_a_span_of_the_language_model_elsewhere(edit: Edit, message: str) -> None:
    """A patch's position among the prompt's is not its position in the tower that looked at it."""
    model = tiny()
    with pytest.raises(EditError, match=f"a span of language_model cannot say positions at .*: {message}"):
        model.patch(batch(), [edit])
    assert n_hooks(model) == 0


@pytest.mark.parametrize("tower", ["vision_encoder", "projector"])
def test_a_span_of_another_tower_in_the_language_model(tower: str) -> None:
    span = batch().positions_in((0, 0, 7, 7), tower=tower)
    assert isinstance(span, Span)
    for edit in (Zero(RESID, positions=span), BlockAttention(f"{TOWER}.blocks.0.attn", keys=span)):
        with pytest.raises(EditError, match=f"a span of {tower} cannot say positions .* language_model's"):
            tiny().patch(batch(), [edit])


# Knockout -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize(("queries", "keys"), [("last", "image"), ("question", "image"), ("last", "question")])
@pytest.mark.parametrize("layers", ["0", "*"])
def test_knockout_is_minus_infinity_on_the_scores(
    queries: str, keys: str, layers: str, attention: AttentionImplementation
) -> None:
    """Zhang et al. 2025: image to question, image to last, question to last."""
    model, inputs = tiny(attention), batch()
    logits, cache = run(model, inputs, [BlockAttention(f"{TOWER}.blocks.{layers}.attn", positions=queries, keys=keys)])

    def by_hand(scores: Tensor, hook: HookPoint) -> None:
        for row, (query, key) in enumerate(zip(WHERE[queries], WHERE[keys], strict=True)):
            scores[row, :, query[0] : query[-1] + 1, key[0] : key[-1] + 1] = -torch.inf

    expected = model.run_with_hooks(inputs, fwd_hooks=[(f"{TOWER}.blocks.{layers}.attn.hook_attn_scores", by_hand)])
    assert torch.equal(logits, expected)
    assert largest_difference(logits[:, -1], model(inputs)[:, -1]) > 1e-3
    pattern = cache[f"{TOWER}.blocks.0.attn.hook_pattern"]
    for row, (query, key) in enumerate(zip(WHERE[queries], WHERE[keys], strict=True)):
        assert (pattern[row][:, query][:, :, key] == 0).all()
    assert torch.allclose(pattern.sum(-1)[:, :, -1], torch.ones(()))


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
def test_without_any_key_nothing_is_written(attention: AttentionImplementation) -> None:
    model, inputs, site = tiny(attention), batch(), f"{TOWER}.blocks.1"
    _, clean = model.run_with_cache(inputs)
    _, cache = run(model, inputs, [BlockAttention(f"{site}.attn", positions="last")])
    assert (cache[f"{site}.attn.hook_pattern"][:, :, -1] == 0).all()
    assert (cache[f"{site}.hook_attn_out"][:, -1] == 0).all()
    assert torch.equal(cache[f"{site}.hook_resid_mid"][:, -1], clean[f"{site}.hook_resid_pre"][:, -1])
    assert largest_difference(cache[f"{site}.hook_attn_out"][:, 4:-1], clean[f"{site}.hook_attn_out"][:, 4:-1]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
def test_knockout_that_is_none(attention: AttentionImplementation) -> None:
    """Identity 7: no edges, and edges from later positions, which a causal model does not have."""
    model, inputs = tiny(attention), batch()
    clean, every = model(inputs), f"{TOWER}.blocks.*.attn"
    for edits in (
        [BlockAttention(every, keys=[])],
        [
            BlockAttention(every, positions="image", keys="last"),
            BlockAttention(every, positions="image", keys="question"),
        ],
    ):
        real = slice(4, None)  # what a padded position gives is nobody's
        assert largest_difference(model.patch(inputs, edits)[:, real], clean[:, real]) < 1e-5


@torch.no_grad()
def test_without_the_image_the_answer_depends_on_the_words_alone() -> None:
    model, inputs = tiny("sdpa"), batch()
    text = [BlockAttention(f"{TOWER}.blocks.*.attn", positions=span, keys="image") for span in ("question", "last")]
    newline = BlockAttention(f"{TOWER}.blocks.*.attn", positions=r"\n", keys="image")
    blind = [*text, BlockAttention(f"{TOWER}.blocks.*.attn", positions=_newlines(inputs), keys="image")]
    assert inputs.pixel_values is not None
    other = inputs.with_pixels(inputs.pixel_values.flip(-1) * 2)
    assert largest_difference(model.patch(inputs, blind)[:, -1], model.patch(other, blind)[:, -1]) < 1e-5
    assert largest_difference(model.patch(inputs, text)[:, -1], model.patch(other, text)[:, -1]) > 1e-4
    with pytest.raises(ValueError, match="does not occur"):
        model.patch(inputs, [newline])


def _newlines(inputs: VLMInputs) -> Span:
    assert inputs.tokens is not None
    return Span(TOWER, tuple((row.index("\n"),) for row in inputs.tokens))


# Heads ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["hook_k", "hook_v", "hook_rot_k", "hook_q", "hook_rot_q", "hook_z"])
def test_heads_of_keys_and_values_are_fewer(name: str, attention: AttentionImplementation) -> None:
    model, inputs, site = tiny(attention), batch(), f"{TOWER}.blocks.1.attn.{name}"
    n_heads = N_HEADS if name in ("hook_q", "hook_rot_q", "hook_z") else N_KV_HEADS
    for head in (0, n_heads - 1, -1, [0, 1]):

        def by_hand(activation: Tensor, hook: HookPoint, head: Any = head) -> None:
            activation[:, :, head] *= -2

        expected = model.run_with_hooks(inputs, fwd_hooks=[(site, by_hand)])
        assert torch.equal(model.patch(inputs, [Scale(site, -2.0, heads=head)]), expected)
        assert not torch.equal(expected, model(inputs))
    with pytest.raises(EditError, match=rf"heads \[{n_heads}\] are out of range at {site}, which has {n_heads}"):
        model.patch(inputs, [Zero(site, heads=n_heads)])
    assert n_hooks(model) == 0


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("head", range(N_KV_HEADS))
def test_two_query_heads_share_one_of_values(head: int, attention: AttentionImplementation) -> None:
    model, inputs, site = tiny(attention), batch(), f"{TOWER}.blocks.1.attn"
    _, clean = model.run_with_cache(inputs)
    _, cache = run(model, inputs, [Zero(f"{site}.hook_v", heads=head)])
    own = [2 * head, 2 * head + 1]
    others = [query for query in range(N_HEADS) if query not in own]
    assert (cache[f"{site}.hook_z"][:, :, own] == 0).all()
    assert largest_difference(cache[f"{site}.hook_z"][:, :, others], clean[f"{site}.hook_z"][:, :, others]) < 1e-6
    patched = model.patch(inputs, [Zero(f"{site}.hook_z", heads=own)])
    assert largest_difference(patched, model.patch(inputs, [Zero(f"{site}.hook_v", heads=head)])) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
def test_knockout_in_one_query_head(attention: AttentionImplementation) -> None:
    model, inputs, site = tiny(attention), batch(), f"{TOWER}.blocks.0.attn"
    _, clean = model.run_with_cache(inputs)
    _, cache = run(model, inputs, [BlockAttention(site, positions="last", keys="image", heads=3)])
    changed = (cache[f"{site}.hook_pattern"] != clean[f"{site}.hook_pattern"]).any(-1)
    assert changed.nonzero().tolist() == [[row, 3, inputs.input_ids.shape[1] - 1] for row in range(2)]  # type: ignore[union-attr]
    with pytest.raises(EditError, match=r"heads \[4\] are out of range"):
        model.patch(inputs, [BlockAttention(site, heads=4)])


@torch.no_grad()
@pytest.mark.parametrize("attention", BOTH)
def test_replacing_an_activation_by_itself_changes_nothing(attention: AttentionImplementation) -> None:
    """Identity 1, at every name but those of other layers."""
    model, inputs = tiny(attention), batch()
    clean, cache = model.run_with_cache(inputs)
    names = [name for name in cache if ".blocks." not in name or ".blocks.1." in name]
    for name in names:
        assert largest_difference(model.patch(inputs, [Replace(name, cache)])[:, 4:], clean[:, 4:]) < 1e-4, name

"""Edits that do not fit: one clear error each, and no hook left behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from hooked_vlm.edits import Add, BlockAttention, Edit, EditError, Function, Mean, Noise, Replace, Scale, Zero
from hooked_vlm.hooks import HookError
from hooked_vlm.inputs import SpanError, VLMInputs
from tests.tiny_blip import inputs as plain_inputs
from tests.tiny_runs import batch, n_hooks, tiny

RESID = "question_encoder.blocks.1.hook_resid_pre"
NEURONS = "question_encoder.blocks.0.mlp.hook_post"
Z = "question_encoder.blocks.0.attn.hook_z"
CROSS = "question_encoder.blocks.1.cross_attn"
DECODER = "answer_decoder.blocks.0.hook_mlp_out"
ROWS, WORDS, WIDTH = 3, 5, 36


@contextmanager
def fails(error: type[Exception], *parts: str) -> Iterator[None]:
    """An error of one line that says all of ``parts``; nothing is left on the model."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert n_hooks(tiny()) == 0


def patch(*edits: Edit, inputs: VLMInputs | None = None) -> None:
    tiny().patch(batch() if inputs is None else inputs, list(edits))


WRONG_SELECTIONS: list[tuple[Edit, tuple[str, ...]]] = [
    (Zero(RESID, positions=WORDS), ("positions [5]", RESID, "has 5")),
    (Zero(RESID, positions=[0, -6, 7]), ("positions [-6, 7]", RESID, "has 5")),
    (Zero(RESID, neurons=[0, WIDTH]), ("neurons [36]", RESID, "has 36")),
    (Zero(NEURONS, neurons=-51), ("neurons [-51]", NEURONS, "has 50")),
    (Zero(Z, heads=3), ("heads [3]", Z, "has 3")),
    (Zero(RESID, heads=0), (RESID, "has no heads", "b p d_model")),
    (Zero(RESID, positions=torch.ones(4, dtype=torch.bool)), ("mask of positions", "(4,)", RESID, "has 5")),
    (Zero(RESID, positions=[True] * 6), ("mask of positions", "(6,)", RESID, "has 5")),
    (Zero(Z, heads=torch.ones(2, dtype=torch.bool)), ("mask of heads", "(2,)", Z, "has 3")),
    (Zero(RESID, positions=torch.ones(2, WORDS, dtype=torch.bool)), ("2 rows", RESID, "batch has 3")),
    (Zero(RESID, positions=torch.ones(ROWS, 4, dtype=torch.bool)), ("mask of positions", "(4,)", "has 5")),
    (
        Zero(RESID, positions=torch.zeros(ROWS, 2, dtype=torch.long)),
        ("positions", RESID, "one list of whole numbers", "(3, 2)"),
    ),
    (Zero(RESID, positions=torch.tensor([0.5])), ("positions", RESID, "one list of whole numbers", "float32")),
    (BlockAttention(CROSS, keys=10), ("positions [10]", f"{CROSS}.hook_attn_scores", "has 10")),
    (BlockAttention(CROSS, positions=WORDS), ("positions [5]", f"{CROSS}.hook_attn_scores", "has 5")),
]


@pytest.mark.parametrize(("edit", "parts"), WRONG_SELECTIONS, ids=lambda value: "")
def test_places_out_of_range_are_named_with_their_site_and_its_size(edit: Edit, parts: tuple[str, ...]) -> None:
    with fails(EditError, *parts):
        patch(edit)


@pytest.mark.parametrize("heads", ["all", [[0], [1, 2]], [None]])
def test_selections_that_are_no_numbers(heads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the types are not checked for users either
    with fails(EditError, "heads", Z, "whole numbers or a mask", repr(heads)):
        patch(Zero(Z, heads=heads))


WRONG_VALUES: list[tuple[Edit, tuple[str, ...]]] = [
    (Add(RESID, torch.zeros(7)), ("Add", RESID, "(7,)", f"({ROWS}, {WORDS}, {WIDTH})")),
    (Add(RESID, torch.zeros(1, ROWS, WORDS, WIDTH)), ("Add", RESID, f"(1, {ROWS}, {WORDS}, {WIDTH})")),
    (Scale(RESID, torch.zeros(2, 1, 1)), ("Scale", RESID, "(2, 1, 1)")),
    (Mean(RESID, torch.zeros(7)), ("Mean", RESID, "(7,)")),
    (Mean(RESID, over="b h"), ("Mean", RESID, "'b h'", "b p d_model")),
    (Mean(RESID, over=""), ("Mean", RESID, "''", "b p d_model")),
    (Replace(RESID, torch.zeros(ROWS, WORDS + 1, WIDTH)), ("Replace", RESID, f"({ROWS}, {WORDS + 1}, {WIDTH})")),
    (
        Replace(RESID, {RESID: torch.zeros(ROWS, WORDS + 1, WIDTH)}),
        ("Replace", RESID, f"({ROWS}, {WORDS + 1}, {WIDTH})", f"({ROWS}, {WORDS}, {WIDTH})"),
    ),
    (Replace(RESID, {RESID: torch.zeros(2, WORDS, WIDTH)}), ("Replace", RESID, f"(2, {WORDS}, {WIDTH})")),
    (Replace(RESID, {RESID: torch.zeros(WIDTH)}), ("Replace", RESID, f"({WIDTH},)")),
    (Replace(RESID, {DECODER: torch.zeros(1), NEURONS: torch.zeros(1)}), (RESID, "no such activation", DECODER)),
    (Replace(RESID, {}), (RESID, "no such activation", "none")),
    (
        Function(RESID, lambda x, hook: x[:, 0]),
        ("Function", RESID, f"({ROWS}, {WIDTH})", f"({ROWS}, {WORDS}, {WIDTH})"),
    ),
    (Function(RESID, lambda x, hook: x.sum()), ("Function", RESID, "()", f"({ROWS}, {WORDS}, {WIDTH})")),
]


@pytest.mark.parametrize(("edit", "parts"), WRONG_VALUES, ids=lambda value: "")
def test_values_that_do_not_fit(edit: Edit, parts: tuple[str, ...]) -> None:
    with fails(EditError, *parts):
        patch(edit)


def test_a_function_that_returns_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    with fails(EditError, "Function", RESID, "float"):
        patch(Function(RESID, lambda x, hook: 1.0))  # type: ignore[arg-type, return-value]


def test_noise_of_an_unknown_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with fails(EditError, "'additive' or 'multiplicative'", "'uniform'"):
        Noise(RESID, 1.0, kind="uniform")  # type: ignore[arg-type]


def test_unknown_sites_say_the_nearest() -> None:
    with fails(HookError, "no hook is called", "question_encoder.blocks.1.hook_resid_pre"):
        patch(Zero("question_encoder.blocks.1.resid_pre"))
    with fails(HookError, "pattern matches no hook", "question_encoder.blocks.*.hook_mlp"):
        patch(Zero("question_encoder.blocks.*.hook_mlp"))
    with fails(HookError, "no hook is called", "question_encoder.blocks.0.attn.hook_attn_scores"):
        patch(BlockAttention("question_encoder.blocks.0.atn"))


WRONG_TOWERS: list[tuple[Edit, tuple[str, ...]]] = [
    (Zero(RESID, positions="image"), ("vision_encoder", RESID, "question_encoder's")),
    (Zero(DECODER, positions="question"), ("question_encoder", DECODER, "answer_decoder's")),
    (Zero("*.blocks.0.hook_mlp_out", positions="question"), ("question_encoder", "vision_encoder's")),
    (BlockAttention(CROSS, keys="question"), ("question_encoder", CROSS, "vision_encoder's")),
    (BlockAttention(CROSS, keys="last"), ("answer_decoder", CROSS, "vision_encoder's")),
    (BlockAttention(CROSS, positions="image"), ("vision_encoder", CROSS, "question_encoder's")),
    (BlockAttention("answer_decoder.blocks.0.cross_attn", keys="image"), ("vision_encoder", "question_encoder's")),
    (Zero(f"{CROSS}.hook_k", positions="question"), ("question_encoder", f"{CROSS}.hook_k", "vision_encoder's")),
    (Zero(f"{CROSS}.hook_q", positions="image"), ("vision_encoder", f"{CROSS}.hook_q", "question_encoder's")),
    (Zero("vision_encoder.hook_patch_embed", positions="image"), ("hook_patch_embed", "not those of its tower's")),
    (Zero("vision_encoder.hook_cls_embed", positions="image"), ("hook_cls_embed", "not those of its tower's")),
]


@pytest.mark.parametrize(("edit", "parts"), WRONG_TOWERS, ids=lambda value: "")
def test_a_span_of_another_tower(edit: Edit, parts: tuple[str, ...]) -> None:
    """Two towers may be equally long: positions of one would pass for positions of the other."""
    with fails(EditError, "a span of", *parts):
        patch(edit)


def test_spans_of_keys_and_values_are_the_other_towers() -> None:
    patch(Zero(f"{CROSS}.hook_k", positions="image"), Zero(f"{CROSS}.hook_v", positions="image"))
    patch(Zero("answer_decoder.blocks.0.cross_attn.hook_v", positions="question"))


def test_spans_that_the_text_does_not_have() -> None:
    with fails(SpanError, "'cat' does not occur in 'red big dog'", "image, question, last"):
        patch(Zero(RESID, positions="cat"))
    with fails(SpanError, "do not know their texts", "none"):
        patch(Zero(RESID, positions="dog"), inputs=VLMInputs(**plain_inputs("vqa")))


def test_a_span_of_other_rows() -> None:
    two_rows = batch(2).span("dog")
    with fails(EditError, "2 rows", RESID, "batch has 3"):
        patch(Zero(RESID, positions=two_rows))


def test_sites_without_positions_or_heads() -> None:
    model, inputs = tiny("retrieval"), batch(task="retrieval")
    with fails(EditError, "hook_itm_logits has no positions", "b match"):
        model.patch(inputs, [Zero("hook_itm_logits", positions=0)])
    with fails(EditError, "hook_itm_logits has no heads", "b match"):
        model.patch(inputs, [Zero("hook_itm_logits", heads=0)])
    assert n_hooks(model) == 0


def test_a_site_that_the_run_does_not_pass() -> None:
    """Matching passes no contrastive embeddings; cross-attention is passed over where there is nothing to read."""
    model, inputs = tiny("retrieval"), batch(task="retrieval")
    with fails(EditError, "hook_text_embeds is not passed in this run", "Scale changed nothing"):
        model.patch(inputs, [Zero("text_encoder.hook_out"), Scale("hook_text_embeds", 2.0)])
    assert n_hooks(model) == 0


def test_an_error_inside_a_function_is_the_callers_and_leaves_no_hook() -> None:
    def broken(activation: Tensor, hook: object) -> Tensor:
        raise ZeroDivisionError("mine")

    with fails(ZeroDivisionError, "mine"):
        patch(Zero(NEURONS), Function(RESID, broken), BlockAttention(CROSS, keys="image"))


def test_the_run_after_an_error_is_as_before() -> None:
    model, inputs = tiny(), batch()
    clean = model(inputs)
    for edit, _ in (*WRONG_SELECTIONS, *WRONG_VALUES, *WRONG_TOWERS):
        with pytest.raises(EditError, match=re.compile(".")):
            patch(Scale(NEURONS, 3.0), edit)
    assert torch.equal(model(inputs), clean)

"""What does not fit a sweep: one clear error, and the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.edits import Add, BlockAttention, Edit, EditError, Function, Mean, Replace, Scale, Zero
from hooked_vlm.hooks import HookError
from hooked_vlm.inputs import SpanError
from hooked_vlm.metrics import LogProbability, Probability, SequenceLogProbability
from hooked_vlm.sweep import sweep
from tests.sweep.planned import made
from tests.tiny_llava import hf_llava, prompts
from tests.tiny_runs import batch, n_hooks, tiny

ANSWER = torch.tensor([5, 6, 7])
RESID = "question_encoder.blocks.1.hook_resid_pre"
Z = "question_encoder.blocks.0.attn.hook_z"
CROSS = "question_encoder.blocks.1.cross_attn"
DECODER = "answer_decoder.blocks.0.hook_mlp_out"
ROWS, WORDS, WIDTH = 3, 5, 36
pytestmark = pytest.mark.usefixtures("unchecked")  # nor are signatures checked for users

FITTING: list[Edit] = [Scale("answer_decoder.blocks.1.hook_mlp_out", 2.0, positions=[1])]


@contextmanager
def fails(
    error: type[Exception], *parts: str, model: HookedVLM | None = None, inputs: VLMInputs | None = None
) -> Iterator[None]:
    """An error of one line that says all of ``parts``; the model is as before."""
    model, inputs = model or tiny(), inputs or batch()
    with torch.no_grad():
        clean = model(inputs)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert n_hooks(model) == 0
    assert not any("run_blocks" in vars(model.get_submodule(tower)) for tower in model.towers)
    with torch.no_grad():
        assert torch.equal(model(inputs), clean)


def run(*edit_sets: list[Edit], metric: Any = None, base: tuple[Edit, ...] = (), **options: Any) -> Tensor:
    return sweep(tiny(), batch(), edit_sets, metric or Probability(ANSWER), base=base, progress=False, **options)


# Edits ----------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Edit, tuple[str, ...]]] = [
    (
        Replace(RESID, {RESID: torch.zeros(ROWS, WORDS + 1, WIDTH)}),
        ("Replace", RESID, f"({ROWS}, {WORDS + 1}, {WIDTH})", f"({ROWS}, {WORDS}, {WIDTH})"),
    ),
    (
        Replace(RESID, {RESID: torch.zeros(2, WORDS, WIDTH)}, positions=[1]),
        ("Replace", RESID, f"(2, {WORDS}, {WIDTH})", f"({ROWS}, {WORDS}, {WIDTH})"),
    ),
    (Replace(RESID, torch.zeros(ROWS, WORDS + 1, WIDTH)), ("Replace", RESID, f"({ROWS}, {WORDS}, {WIDTH})")),
    (Replace(RESID, torch.zeros(2, WORDS, WIDTH), positions=[1]), ("Replace", RESID, f"(2, {WORDS}, {WIDTH})")),
    (Replace(RESID, {DECODER: torch.zeros(1)}), (RESID, "no such activation", DECODER)),
    (Add(RESID, torch.zeros(7)), ("Add", RESID, "(7,)", f"({ROWS}, {WORDS}, {WIDTH})")),
    (Scale(Z, torch.zeros(2, 1, 1, 1), positions=[0]), ("Scale", Z, "(2, 1, 1, 1)")),
    (Mean(RESID, over="b h"), ("Mean", RESID, "'b h'", "b p d_model")),
    (Function(RESID, lambda x, hook: x[:, 0]), ("Function", RESID, f"({ROWS}, {WIDTH})")),
    (Zero(RESID, positions=WORDS), ("positions [5]", RESID, "has 5")),
    (Zero(RESID, positions=[0, -6, 7]), ("positions [-6, 7]", RESID, "has 5")),
    (Zero(Z, heads=3), ("heads [3]", Z, "has 3")),
    (Zero(RESID, neurons=[0, WIDTH]), ("neurons [36]", RESID, "has 36")),
    (Zero(RESID, heads=0), (RESID, "has no heads", "b p d_model")),
    (Zero(RESID, positions=torch.ones(2, WORDS, dtype=torch.bool)), ("2 rows", RESID, "batch has 3")),
    (BlockAttention(CROSS, keys=10), ("positions [10]", f"{CROSS}.hook_attn_scores", "has 10")),
    (BlockAttention(CROSS, positions=WORDS), ("positions [5]", f"{CROSS}.hook_attn_scores", "has 5")),
    (Zero(RESID, positions="image"), ("a span of vision_encoder", RESID, "question_encoder's")),
]


@pytest.mark.parametrize(("edit", "parts"), WRONG, ids=lambda value: "")
def test_an_edit_that_does_not_fit_is_told_with_its_site_and_its_set(edit: Edit, parts: tuple[str, ...]) -> None:
    """As by ``patch``; the sets around it fit."""
    with pytest.raises(EditError) as alone:
        tiny().patch(batch(), [edit])
    with fails(EditError, f"edit set 1: {alone.value}", *parts):
        run(FITTING, [*FITTING, edit], FITTING)


@pytest.mark.parametrize(("edit", "parts"), WRONG, ids=lambda value: "")
def test_base_edits_too(edit: Edit, parts: tuple[str, ...]) -> None:
    with fails(EditError, *parts):
        run(FITTING, base=(*FITTING, edit))


def test_wrong_names_say_the_nearest() -> None:
    for site, near in (
        ("question_encoder.blocks.1.resid_pre", "question_encoder.blocks.1.hook_resid_pre"),
        ("question_encoder.blocks.*.hook_mlp", "question_encoder.blocks.*.hook_mlp"),
    ):
        with fails(HookError, near):
            run(FITTING, [Zero(site)])
        with fails(HookError, near):
            run(FITTING, base=(Zero(site),))


def test_a_span_that_the_text_does_not_have() -> None:
    with fails(SpanError, "'cat' does not occur in 'red big dog'"):
        run(FITTING, [Zero(RESID, positions="cat")])


def test_sites_that_the_run_does_not_pass() -> None:
    model, inputs = tiny("retrieval"), batch(task="retrieval")
    with fails(EditError, "hook_text_embeds is not passed in this run, so Scale", model=model, inputs=inputs):
        sweep(model, inputs, [[Zero("text_encoder.hook_out")], [Scale("hook_text_embeds", 2.0)]], first, progress=False)


UNSEEN = [
    Zero("vision_encoder.blocks.0.hook_mlp_out"),
    Zero("vision_encoder.hook_out", positions=[1]),
    Zero("vision_encoder.hook_full_embed"),
    Zero("projector.hook_out"),
    BlockAttention("vision_encoder.blocks.1.attn"),
    Function("vision_encoder.blocks.*.hook_resid_post", lambda activation, hook: activation),
]


@pytest.mark.parametrize("edit", UNSEEN, ids=lambda edit: edit.site)
def test_a_text_without_a_picture_passes_no_vision_tower(edit: Edit) -> None:
    model, _ = made("windows")
    inputs = model._inputs(prompts(hf_llava(), (0, 0)))
    with pytest.raises(EditError) as alone:
        model.patch(inputs, [edit])
    with fails(EditError, str(alone.value), f"{edit.site} is not passed", model=model, inputs=inputs):
        sweep(model, inputs, [[Zero("language_model.hook_out")], [edit]], first, progress=False)
    # Together with one that is passed, it is not passed all the same.
    with fails(EditError, str(alone.value), model=model, inputs=inputs):
        sweep(model, inputs, [[Zero("language_model.hook_out"), edit]], first, progress=False)


def test_a_pattern_of_which_some_is_passed_is_no_error() -> None:
    model, _ = made("windows")
    inputs = model._inputs(prompts(hf_llava(), (0, 0)))
    edits: list[Edit] = [Zero("*.blocks.0.hook_mlp_out")]
    found = sweep(model, inputs, [edits], first, progress=False)
    torch.testing.assert_close(found[0], first(model.patch(inputs, edits)), rtol=0, atol=1e-5)


# Metrics --------------------------------------------------------------------------------------------------------------


def first(logits: Tensor) -> Tensor:
    return logits.flatten(1)[:, :3].detach()


WRONG_METRICS: list[tuple[Any, str]] = [
    (lambda logits: 0.5, "float"),
    (lambda logits: None, "NoneType"),
    (lambda logits: [1.0, 2.0, 3.0], "list"),
    (lambda logits: logits.mean(), "shape ()"),
    (lambda logits: logits[:2, -1, 0], "shape (2,)"),
    (lambda logits: logits[:, -1].T, "shape (99, 3)"),
]


@pytest.mark.parametrize(("metric", "said"), WRONG_METRICS)
@pytest.mark.parametrize("alone", [False, True])
def test_a_metric_that_gives_no_number_for_each_row(metric: Any, said: str, alone: bool) -> None:
    edit_sets: list[list[Edit]] = [FITTING]
    if alone:
        edit_sets.append([Own(RESID)])
    with fails(ValueError, said, "tensor with one entry a row, of 3 rows"):
        run(*edit_sets, metric=metric)


class Own(Zero):
    """One that the sweep cannot share work for."""

    def apply(self, *given: Any, **named: Any) -> Tensor:
        return super().apply(*given, **named)


def test_a_metric_that_does_not_fit_the_logits() -> None:
    with fails(ValueError, "positions [3]", "have 3"):
        run(FITTING, metric=Probability(ANSWER, position=3))
    with fails(ValueError, "positions [-4]", "have 3"):
        run(FITTING, metric=LogProbability(ANSWER, position=torch.tensor([0, -4, 1])))
    with fails(ValueError, "2 rows for logits of 3"):
        run(FITTING, metric=Probability(ANSWER[:2]))


@pytest.mark.parametrize("n_read", [1, 2])
@pytest.mark.parametrize("n_targets", [2, 4])
def test_targets_of_another_length(n_targets: int, n_read: int) -> None:
    """Refused as by the metric itself, whichever of them are read."""
    targets = torch.zeros(3, n_targets, dtype=torch.long)
    mask = (torch.arange(n_targets) < n_read).expand(3, -1)
    with fails(ValueError, "targets", f"{n_targets} positions", "logits of 3"):
        run(FITTING, metric=SequenceLogProbability(targets, mask))


def test_an_error_of_the_metric_itself() -> None:
    calls = []

    def breaks(logits: Tensor) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 3:
            raise ZeroDivisionError("mine")
        return logits[:, 0, 0]

    with fails(ZeroDivisionError, "mine"):
        run(FITTING, FITTING, metric=breaks)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_base_run_that_is_not_finite(value: float) -> None:
    with fails(FloatingPointError, "the base edits make the run's logits infinite or NaN", "check_finite"):
        run(FITTING, base=(Add(RESID, value, positions=[1]),))


def test_inputs_that_overflow() -> None:
    pixels = torch.full((ROWS, 3, 24, 24), 3e38)
    with fails(FloatingPointError, "the inputs make the run's logits infinite or NaN"):
        sweep(tiny(), batch().with_pixels(pixels), [FITTING], Probability(ANSWER), progress=False)


def test_a_set_that_is_not_finite_says_so_in_its_number_alone() -> None:
    found = run(FITTING, [Add(DECODER, torch.nan, positions=[2])], FITTING)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_of_none(batch_size: int) -> None:
    with fails(ValueError, "at least 1 or 'auto'", str(batch_size)):
        run(FITTING, batch_size=batch_size)


def test_no_sets() -> None:
    with fails(ValueError, "at least one edit set"):
        run()


def test_inputs_that_the_model_does_not_take() -> None:
    inputs = batch()
    assert inputs.pixel_values is not None
    with fails(ValueError, "different numbers of rows"):
        sweep(tiny(), inputs.with_pixels(inputs.pixel_values[:2]), [FITTING], Probability(ANSWER), progress=False)


@pytest.mark.parametrize("where", ["vision_encoder", "question_encoder", "answer_decoder"])
def test_an_error_while_the_base_run_is_written_down(where: str) -> None:
    def breaks(activation: Tensor, hook: object) -> Tensor:
        raise ZeroDivisionError("mine")

    with fails(ZeroDivisionError, "mine"):
        run(FITTING, base=(Function(f"{where}.blocks.1.attn.hook_q", breaks),))
    with fails(ZeroDivisionError, "mine"):
        run(FITTING, [Function(f"{where}.blocks.1.attn.hook_attn_scores", breaks)])

"""Metrics in closed form, row by row, in fp32 whatever the logits' dtype."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm.metrics import (
    KLDivergence,
    LogitDifference,
    LogProbability,
    Metric,
    Probability,
    SequenceLogProbability,
    Together,
    at,
    normalized,
)

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
# Three rows, two positions, three tokens. Probabilities at the last position: 1/8 3/8 4/8 | 1/6 2/6 3/6 | thirds.
LOGITS = torch.tensor(
    [
        [[9.0, 0.0, 0.0], [0.0, LN3, LN4]],
        [[0.0, 9.0, 0.0], [5.0, 5 + LN2, 5 + LN3]],
        [[0.0, 0.0, 9.0], [-7.0, -7.0, -7.0]],
    ]
)
ANSWER, FOIL = torch.tensor([2, 0, 1]), torch.tensor([0, 2, 1])


def approx(*values: float) -> object:
    return pytest.approx(list(values), abs=1e-6)


def test_each_row_has_its_own_answer() -> None:
    assert Probability(ANSWER)(LOGITS).tolist() == approx(1 / 2, 1 / 6, 1 / 3)
    assert LogProbability(ANSWER)(LOGITS).tolist() == approx(-LN2, -math.log(6), -LN3)
    assert LogitDifference(ANSWER, FOIL)(LOGITS).tolist() == approx(LN4, -LN3, 0)


def test_another_position() -> None:
    first = torch.softmax(torch.tensor([9.0, 0.0, 0.0]), 0).tolist()
    for position in (0, -2):
        assert Probability(torch.tensor([0, 0, 0]), position)(LOGITS).tolist() == approx(first[0], first[1], first[1])
    each = torch.tensor([0, 1, -1])
    assert LogitDifference(ANSWER, FOIL, each)(LOGITS).tolist() == approx(-9, -LN3, 0)
    assert torch.equal(at(LOGITS, torch.tensor([1])), at(LOGITS, 1))


def test_one_answer_serves_every_row() -> None:
    one, each = torch.tensor([1]), torch.tensor([1, 1, 1])
    assert torch.equal(Probability(one)(LOGITS), Probability(each)(LOGITS))
    assert torch.equal(LogitDifference(one, FOIL)(LOGITS), LogitDifference(each, FOIL)(LOGITS))


def test_whole_answers_are_scored_where_the_mask_says() -> None:
    log = LOGITS.log_softmax(-1)
    targets = torch.tensor([[0, 2], [1, -100], [-100, -100]])
    found = SequenceLogProbability(targets, targets >= 0)(LOGITS)
    assert found.tolist() == approx(float(log[0, 0, 0] + log[0, 1, 2]), float(log[1, 0, 1]), 0)
    assert torch.equal(SequenceLogProbability(targets, (targets >= 0).long())(LOGITS), found)
    impossible = LOGITS.clone()
    impossible[:, 1, 0] = -torch.inf
    targets[:, 1] = 0
    assert SequenceLogProbability(targets.clamp(min=0), torch.tensor([[1, 0]] * 3))(impossible).isfinite().all()


def test_kl_divergence_in_closed_form() -> None:
    uniform = torch.zeros(3, 2, 3)
    found = KLDivergence(LOGITS)(uniform)
    entropy = 1 / 8 * math.log(8) + 3 / 8 * math.log(8 / 3) + 1 / 2 * LN2
    assert found.tolist() == approx(LN3 - entropy, LN3 - (math.log(6) / 6 + LN3 / 3 + LN2 / 2), 0)
    assert KLDivergence(LOGITS)(LOGITS + 3).tolist() == approx(0, 0, 0)
    assert torch.equal(KLDivergence(LOGITS[:1])(uniform), KLDivergence(LOGITS[:1].expand(3, -1, -1))(uniform))
    assert KLDivergence(LOGITS, position=0)(LOGITS.flip(1))[2] > 1


def test_kl_divergence_where_the_reference_rules_a_token_out() -> None:
    reference = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    assert KLDivergence(reference)(torch.zeros(1, 1, 3)).tolist() == approx(math.log(3 / 2))


def test_metrics_together_stand_on_a_last_axis() -> None:
    both = Together((Probability(ANSWER), LogitDifference(ANSWER, FOIL)))(LOGITS)
    assert torch.equal(both[:, 0], Probability(ANSWER)(LOGITS))
    assert torch.equal(both[:, 1], LogitDifference(ANSWER, FOIL)(LOGITS))


EVERY_METRIC: list[Metric] = [
    Probability(ANSWER),
    LogProbability(ANSWER),
    LogitDifference(ANSWER, FOIL),
    SequenceLogProbability(torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)),
    KLDivergence(LOGITS),
]


@pytest.mark.parametrize("metric", EVERY_METRIC, ids=lambda metric: type(metric).__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(metric: Metric, dtype: torch.dtype) -> None:
    half = LOGITS.to(dtype)
    assert metric(half).dtype == torch.float32
    assert torch.equal(metric(half), metric(half.float()))


def test_a_probability_too_small_for_fp16() -> None:
    logits = torch.tensor([[[0.0, 20.0]]], dtype=torch.float16)
    assert Probability(torch.tensor([0]))(logits).tolist() == pytest.approx([math.exp(-20)], rel=1e-4)


@pytest.mark.parametrize("metric", EVERY_METRIC, ids=lambda metric: type(metric).__name__)
def test_rows_that_do_not_fit(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    """``gather`` would score the first rows and leave the others out."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shapes are not checked for users either
    with pytest.raises(ValueError, match=r"3.* for logits"):
        metric(torch.cat([LOGITS, LOGITS]))


def test_metrics_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Probability(ANSWER).position = 0  # type: ignore[misc]


def test_metrics_have_gradients() -> None:
    logits = LOGITS.clone().requires_grad_()
    sum(metric(logits).sum() for metric in EVERY_METRIC).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


scores = st.floats(-1e3, 1e3, width=32)


@given(st.lists(st.tuples(scores, scores, scores), min_size=1, max_size=5))
def test_normalized_is_0_as_corrupted_and_1_as_clean(rows: list[tuple[float, float, float]]) -> None:
    clean, corrupted, patched = torch.tensor(rows).T
    differ = (clean - corrupted).abs() > 1e-6 * torch.maximum(clean.abs(), corrupted.abs())
    ends = normalized(torch.stack([corrupted, clean]), clean, corrupted)
    assert (ends[0][differ] == 0).all()
    assert (ends[1][differ] == 1).all()
    assert ends[:, ~differ].isnan().all()
    between = normalized(patched, clean, corrupted)[differ]
    torch.testing.assert_close(between, ((patched - corrupted) / (clean - corrupted))[differ])


def test_normalized_is_nan_where_clean_and_corrupted_do_not_differ() -> None:
    clean, corrupted = torch.tensor([0.5, 0.0, 0.5, 0.5]), torch.tensor([0.5, 0.0, 0.5 + 3e-7, 0.4])
    assert normalized(torch.full((4,), 0.45), clean, corrupted).isnan().tolist() == [True, True, True, False]


def test_normalized_is_unbounded_outside() -> None:
    found = normalized(torch.tensor([[0.1], [1.5]]), torch.tensor([1.0]), torch.tensor([0.5]))
    assert found.flatten().tolist() == approx(-0.8, 2)


def test_normalized_broadcasts() -> None:
    clean, corrupted = torch.rand(2, 3, 1), torch.rand(2, 3, 1)
    patched: Tensor = torch.rand(2, 3, 4)
    assert torch.equal(
        normalized(patched, clean, corrupted)[:, :, 1:2], normalized(patched[:, :, 1:2], clean, corrupted)
    )

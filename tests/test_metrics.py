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
    narrowed,
    normalized,
    positions_read,
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


# What is read, and of less --------------------------------------------------------------------------------------------

N_POSITIONS, TOKENS = 5, torch.tensor([0, 3, 1])
EACH = torch.tensor([4, -4, 1])
READS: list[tuple[Metric, list[int]]] = [
    (Probability(TOKENS), [4]),
    (Probability(TOKENS[:1], 0), [0]),
    (LogProbability(TOKENS, -5), [0]),
    (LogProbability(TOKENS, EACH), [1, 4]),
    (LogitDifference(TOKENS, TOKENS.flip(0), torch.tensor([2])), [2]),
    (LogitDifference(TOKENS, TOKENS.flip(0), EACH), [1, 4]),
    (KLDivergence(torch.linspace(0, 3, 60).view(3, 5, 4).sin(), 3), [3]),
    (KLDivergence(torch.linspace(0, 3, 60).view(3, 5, 4).sin(), EACH), [1, 4]),
    (
        SequenceLogProbability(
            torch.arange(15).view(3, 5) % 4, torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]] * 2)[:3]
        ),
        [1, 3],
    ),
    (Together((Probability(TOKENS), LogProbability(TOKENS, 1), Probability(TOKENS, 1))), [1, 4]),
    (Together((Probability(TOKENS), lambda logits: logits[:, 0, 0])), [0, 1, 2, 3, 4]),
    (lambda logits: logits[:, 2, 0], [0, 1, 2, 3, 4]),
]
each_reader = pytest.mark.parametrize(("metric", "read"), READS, ids=lambda value: type(value).__name__)


@each_reader
def test_the_positions_that_a_metric_reads(metric: Metric, read: list[int]) -> None:
    """Numbers elsewhere may be anything; and unless it says which it reads, it may read all."""
    assert positions_read(metric, N_POSITIONS) == read
    logits = torch.randn(3, N_POSITIONS, 4)
    elsewhere = logits.clone()
    elsewhere[:, [place for place in range(N_POSITIONS) if place not in read]] = torch.nan
    assert torch.equal(metric(elsewhere), metric(logits))


@each_reader
@given(st.data())
def test_narrowed_to_what_it_reads_or_more_it_is_the_same(metric: Metric, read: list[int], data: st.DataObject) -> None:
    more = sorted({*read, *data.draw(st.sets(st.integers(0, N_POSITIONS - 1)))})
    logits = torch.linspace(0, 40, 3 * N_POSITIONS * 4).view(3, N_POSITIONS, 4).sin() * 3
    assert torch.equal(narrowed(metric, more, N_POSITIONS)(logits[:, more]), metric(logits))


def test_narrowed_twice() -> None:
    logits, metric = torch.randn(3, N_POSITIONS, 4), Probability(TOKENS, EACH)
    once = narrowed(metric, [1, 2, 4], N_POSITIONS)
    assert positions_read(once, 3) == [0, 2]
    assert torch.equal(narrowed(once, [0, 2], 3)(logits[:, [1, 4]]), metric(logits))


def test_all_of_the_positions_leave_a_metric_as_it_is() -> None:
    for metric, _ in READS:
        assert narrowed(metric, range(N_POSITIONS), N_POSITIONS) is metric


def test_where_no_target_is_read_every_position_is() -> None:
    """Rather than none, of which no forward can be made."""
    metric = SequenceLogProbability(torch.zeros(3, N_POSITIONS, dtype=torch.long), torch.zeros(3, N_POSITIONS))
    assert positions_read(metric, N_POSITIONS) == list(range(N_POSITIONS))
    assert metric(torch.randn(3, N_POSITIONS, 4)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("position", [5, -6, torch.tensor([0, 5, -1]), torch.tensor([-6])])
def test_positions_that_the_logits_do_not_have(position: int | Tensor) -> None:
    for metric in (Probability(TOKENS, position), Together((Probability(TOKENS), LogProbability(TOKENS, position)))):
        with pytest.raises(ValueError, match=r"a metric reads positions \[(5|-6)\], and the logits have 5"):
            positions_read(metric, N_POSITIONS)


@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize("position", [-1, 1, -2])
def test_narrowed_a_reference_has_its_own_last(length: int, position: int) -> None:
    """Of a prompt of another length, say: the last position of the one is compared with the last of the other."""
    logits = torch.randn(3, N_POSITIONS, 4)
    metric = KLDivergence(torch.randn(3, length, 4), position)
    read = positions_read(metric, N_POSITIONS)
    torch.testing.assert_close(narrowed(metric, read, N_POSITIONS)(logits[:, read]), metric(logits))

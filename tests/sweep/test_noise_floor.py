"""How exact a sweep is, by its own account; and that its effects are a tensor like any other."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, VLMInputs
from hooked_vlm.edits import Add, Edit, Scale, Zero
from hooked_vlm.metrics import LogitDifference, Probability, Together
from hooked_vlm.sweep import Effects, sweep
from hooked_vlm.sweep.wave import Wave
from tests.sweep.planned import made
from tests.tiny_runs import batch, tiny

KINDS = ["vqa", "llava", "clip", "vit"]
ANSWER, FOIL = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10])
METRIC = LogitDifference(ANSWER, FOIL)
BASE: list[Edit] = [Scale("vision_encoder.hook_full_embed", 1.1)]

pytestmark = pytest.mark.usefixtures("unchecked")


@cache
def half(kind: str) -> tuple[HookedVLM, VLMInputs]:
    model, inputs = made(kind)
    return copy.deepcopy(model).to(torch.bfloat16), inputs


def edit_sets(factor: float) -> list[list[Edit]]:
    return [[Scale("vision_encoder.blocks.0.hook_mlp_out", factor, positions=[position])] for position in range(8)]


def outputs(logits: Tensor) -> Tensor:
    return logits.flatten(1).float()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_rounding(kind: str) -> None:
    """Of each number of the metric its own; in single precision next to nothing, in half precision some."""
    single = sweep(*made(kind), edit_sets(2.0), outputs, base=BASE, progress=False)
    assert single.noise_floor.shape == single.shape[2:]
    assert single.noise_floor.isfinite().all()
    assert (single.noise_floor >= 0).all()
    assert single.noise_floor.max() < 1e-5
    low = sweep(*half(kind), edit_sets(2.0), outputs, base=BASE, progress=False)
    assert low.noise_floor.isfinite().all()
    assert single.noise_floor.max() < low.noise_floor.max() < 0.05 * low.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["single", "half"])
def test_edits_that_change_nothing_stay_about_as_near(kind: str, precision: str) -> None:
    """And those that change something go beyond it."""
    model, inputs = made(kind) if precision == "single" else half(kind)
    with torch.no_grad():
        plain = outputs(model.patch(inputs, BASE))
    nothing, something = (
        sweep(model, inputs, edit_sets(factor), outputs, base=BASE, progress=False) for factor in (1.0, 8.0)
    )
    floor = float(nothing.noise_floor.max())
    assert float((nothing - plain).abs().max()) <= 3 * floor + 1e-6
    assert float((something - plain).abs().max()) > 3 * floor


def test_one_null_set_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes the longest way of the batch, under the base's edits alone."""
    seen: list[tuple[list[int], Any]] = []
    run = Wave.run

    def noted(wave: Wave, *given: Any) -> None:
        seen.append(([one.index for one in wave.chunk.sets], wave.chunk.sets[-1]))
        run(wave, *given)

    monkeypatch.setattr(Wave, "run", noted)
    sets = [*edit_sets(2.0), [Zero("answer_decoder.blocks.1.hook_mlp_out")]]
    effects = sweep(tiny(), batch(), sets, METRIC, base=BASE, batch_size=4, progress=False)
    assert len(seen) > 1
    for indices, null in seen:
        assert indices[-1] == -1
        assert -1 not in indices[:-1]
        assert list(null.edits) == ["vision_encoder.hook_full_embed"]
        assert null.dirt
    assert sorted(index for indices, _ in seen for index in indices[:-1]) == list(range(9))
    assert effects.noise_floor.shape == ()
    assert effects.shape == (9, 3)


def test_it_is_the_most_that_any_batch_strays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wave that is off by something says so."""
    off = {"now": 0.0}
    logits = Wave.logits

    def strayed(wave: Wave, *given: Any) -> Any:
        packed = logits(wave, *given)
        packed.values[..., 5] += off["now"]  # the first row's answer, in a run that is otherwise the plain one
        off["now"] = 0.5 - off["now"]
        return packed

    monkeypatch.setattr(Wave, "logits", strayed)
    effects = sweep(tiny(), batch(), edit_sets(2.0), METRIC, base=BASE, batch_size=3, progress=False)
    assert float(effects.noise_floor) == pytest.approx(0.5, abs=1e-4)
    both = sweep(
        tiny(), batch(), edit_sets(2.0), Together((Probability(FOIL), METRIC)), base=BASE, batch_size=3, progress=False
    )
    assert both.noise_floor.shape == (2,)
    assert float(both.noise_floor[1]) == pytest.approx(0.5, abs=1e-4)
    assert 0 < float(both.noise_floor[0]) < 0.5


def test_where_nothing_is_shared_nothing_strays() -> None:
    with tiny().hooks([("vision_encoder.hook_out", lambda activation, hook: None)]):
        effects = sweep(tiny(), batch(), edit_sets(2.0), METRIC, progress=False)
    assert float(effects.noise_floor) == 0
    assert effects.alone


def test_sets_that_reach_nothing_are_the_plain_run_to_the_bit() -> None:
    with torch.no_grad():
        plain = METRIC(tiny()(batch()))
    nowhere = "answer_decoder.blocks.1.hook_mlp_out"
    effects = sweep(tiny(), batch(), [[], [Add(nowhere, 9.0, positions=[0])]], METRIC, progress=False)
    assert torch.equal(effects[0], plain)
    assert torch.equal(effects[1], plain)
    assert float(effects.noise_floor) == 0


# A tensor like any other ----------------------------------------------------------------------------------------------


@cache
def some() -> Effects:
    return sweep(tiny(), batch(), edit_sets(2.0), METRIC, progress=False)


def test_what_is_computed_from_effects_is_a_plain_tensor() -> None:
    effects, values = some(), torch.Tensor(some())
    assert type(effects) is Effects
    assert type(values) is Tensor
    for compute in (
        lambda effects: effects - 1,
        lambda effects: 1 - effects,
        lambda effects: effects[2],
        lambda effects: effects[:, 1:],
        lambda effects: effects.mean(),
        lambda effects: effects.clone(),
        lambda effects: effects.double(),
        lambda effects: torch.stack([effects, effects]),
        lambda effects: torch.where(effects > 0, effects, 0),
        lambda effects: next(iter(effects)),
    ):
        found, expected = compute(effects), compute(values)
        assert type(found) is Tensor
        assert torch.equal(found, expected)
    assert effects.tolist() == values.tolist()
    assert (effects.numpy() == values.numpy()).all()
    assert float(effects[0, 0]) == float(values[0, 0])
    assert f"{float(values[0, 0]):.4f}" in repr(effects)
    assert not effects.requires_grad


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda effects: pickle.loads(pickle.dumps(effects))])
def test_effects_are_copied_whole(again: Any) -> None:
    copied = again(some())
    assert torch.equal(torch.Tensor(copied), torch.Tensor(some()))
    assert torch.equal(copied.noise_floor, some().noise_floor)
    assert copied.alone == some().alone

"""A sweep: many edited runs, each as if alone."""

from __future__ import annotations

import io
import sys
import threading

import pytest
import torch
from torch import Tensor

from hooked_vlm.edits import Add, Edit, Function, Replace, Scale, Zero
from hooked_vlm.metrics import LogitDifference, Probability, Together, at
from hooked_vlm.sweep import sweep
from tests.tiny_runs import batch, n_hooks, tiny

ANSWER, FOIL = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10])


def edit_sets() -> list[list[Edit]]:
    _, source = tiny().run_with_cache(batch(seed=1), names_filter="*hook_mlp_out")
    sites = ("question_encoder.blocks.0.hook_mlp_out", "answer_decoder.blocks.0.hook_mlp_out")
    sets: list[list[Edit]] = [[Replace(site, source, positions=position)] for site in sites for position in (0, 2)]
    return [*sets, [edit for edits in sets for edit in edits], []]


def test_each_set_is_run_as_if_alone() -> None:
    model, inputs, metric = tiny(), batch(), Probability(ANSWER)
    effects = sweep(model, inputs, edit_sets(), metric)
    with torch.no_grad():
        expected = torch.stack([metric(model.patch(inputs, edits)) for edits in edit_sets()])
        assert torch.equal(effects[-1], metric(model(inputs))), "a set without edits is the plain run"
    assert effects.shape == (6, 3)
    torch.testing.assert_close(effects, expected, rtol=0, atol=1e-6)
    assert len({tuple(row) for row in effects.tolist()}) == 6, "no two sets do the same"
    assert not effects.requires_grad


def test_base_edits_are_in_every_run_and_come_first() -> None:
    model, inputs, metric = tiny(), batch(), LogitDifference(ANSWER, FOIL)
    site = "question_encoder.blocks.0.hook_mlp_out"
    base, sets = [Add(site, 1.0, neurons=0), Scale("vision_encoder.hook_out", 0.5)], [[Scale(site, 2.0)], [Zero(site)]]
    effects = sweep(model, inputs, sets, metric, base=base)
    with torch.no_grad():
        expected = torch.stack([metric(model.patch(inputs, [*base, *edits])) for edits in sets])
        other_order = metric(model.patch(inputs, [*sets[0], *base]))
    torch.testing.assert_close(effects, expected, rtol=0, atol=1e-6)
    assert (effects[0] - other_order).abs().max() > 1e-3


@pytest.mark.parametrize("is_hooked", [False, True])
def test_the_base_runs_metric_comes_with_the_effects(is_hooked: bool) -> None:
    model, inputs, metric = tiny(), batch(), Probability(ANSWER)
    base = [Scale("vision_encoder.hook_out", 0.5)]
    with model.hooks([("vision_encoder.hook_out", lambda activation, hook: None)] if is_hooked else []):
        effects = sweep(model, inputs, edit_sets(), metric, base=base)
    assert bool(effects.alone) == is_hooked
    with torch.no_grad():
        torch.testing.assert_close(effects.base, metric(model.patch(inputs, base)), rtol=0, atol=1e-6)


def test_metrics_may_have_more_axes() -> None:
    model, inputs = tiny(), batch()
    both = sweep(model, inputs, edit_sets(), Together((Probability(ANSWER), LogitDifference(ANSWER, FOIL))))
    assert both.shape == (6, 3, 2)
    assert torch.equal(both[..., 0], sweep(model, inputs, edit_sets(), Probability(ANSWER)))
    logits = sweep(model, inputs, edit_sets(), lambda logits: at(logits, -1))
    assert logits.shape == (6, 3, 99)


def test_inputs_may_be_an_hf_batch() -> None:
    inputs = batch()
    by_name = sweep(tiny(), inputs.tensors(), edit_sets(), Probability(ANSWER))
    assert torch.equal(by_name, sweep(tiny(), inputs, edit_sets(), Probability(ANSWER)))


def test_no_sets() -> None:
    with pytest.raises(ValueError, match="at least one edit set"):
        sweep(tiny(), batch(), [], Probability(ANSWER))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of stderr. (Not in a fixture: pytest sets stderr anew before each test's body.)"""
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_progress_is_shown_beside_the_output_unless_declined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = show(monkeypatch)
    shown = sweep(tiny(), batch(), edit_sets(), Probability(ANSWER), progress=True)
    text = screen.getvalue()
    assert "patching" in text
    assert "6/6" in text
    assert capsys.readouterr().out == ""
    assert torch.equal(shown, sweep(tiny(), batch(), edit_sets(), Probability(ANSWER), progress=False))
    assert screen.getvalue() == text, "no bar was wanted"


@pytest.mark.parametrize("progress", [False, True])
def test_an_error_ends_it_cleanly(progress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hook is left, nor a bar on the screen, while the error is still held (as notebooks do)."""

    def broken(activation: Tensor, hook: object) -> Tensor:
        raise ZeroDivisionError

    model, inputs, screen = tiny(), batch(), show(monkeypatch)
    clean, before = model(inputs), set(threading.enumerate())
    last: list[Edit] = [Function("answer_decoder.hook_out", broken)]
    with pytest.raises(ZeroDivisionError) as held:
        sweep(model, inputs, [*edit_sets(), last], Probability(ANSWER), progress=progress)
    assert ("patching" in screen.getvalue()) == progress
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=2)
        assert not thread.is_alive(), "a bar is still being drawn"
    assert n_hooks(model) == 0
    assert torch.equal(model(inputs), clean)
    assert held.tb is not None

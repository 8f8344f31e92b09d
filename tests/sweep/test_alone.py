"""Where work cannot be shared, each set has a forward of its own, and says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, HookPoint, VLMInputs, toys
from hooked_vlm.edits import Add, BlockAttention, Edit, Scale, Zero, edit_hooks
from hooked_vlm.hook_point import HookFunction
from hooked_vlm.metrics import Generated, LogitDifference
from hooked_vlm.selection import Part
from hooked_vlm.sweep import sweep
from tests.tiny_runs import batch, n_hooks, tiny

pytestmark = pytest.mark.usefixtures("unchecked")

METRIC = LogitDifference(torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10]))
SITE = "question_encoder.blocks.0.hook_mlp_out"
Z = "question_encoder.blocks.1.attn.hook_z"
BASE: list[Edit] = [Scale("vision_encoder.hook_out", 0.7)]


def patched(sets: Sequence[Sequence[Edit]], base: Sequence[Edit] = BASE) -> Tensor:
    with torch.no_grad():
        return torch.stack([METRIC(tiny().patch(batch(), [*base, *edits])) for edits in sets])


def swept(sets: Sequence[Sequence[Edit]], base: Sequence[Edit] = BASE) -> Any:
    return sweep(tiny(), batch(), sets, METRIC, base=base, progress=False)


# Hooks of the model's own ---------------------------------------------------------------------------------------------


def test_a_model_with_hooks_of_its_own() -> None:
    """They are in every run, as they are in every run of ``patch``; and stay."""
    sets: list[list[Edit]] = [[Zero(SITE, positions=[1])], [], [BlockAttention("question_encoder.blocks.1.cross_attn")]]
    without = swept(sets)
    assert not without.alone
    shapes = set()

    def doubles(activation: Tensor, hook: HookPoint) -> Tensor:
        shapes.add(tuple(activation.shape))
        return activation * 2

    with tiny().hooks([(Z, doubles)]):
        effects, expected = swept(sets), patched(sets)
        assert n_hooks(tiny()) == 1
    assert torch.equal(torch.Tensor(effects), expected)
    assert "hooks of its own" in effects.alone
    assert effects.noise_floor == 0
    assert shapes == {(3, 5, 3, 12)}, "a hook is given whole activations"
    assert (effects - without).abs().min() > 1e-4
    assert n_hooks(tiny()) == 0


def test_a_hook_that_only_looks_too() -> None:
    seen = []
    with tiny().hooks([(SITE, lambda activation, hook: seen.append(activation.shape))]):
        effects = swept([[Zero(SITE)], []])
    assert effects.alone
    assert seen == [(3, 5, 36)] * 3, "both sets, and the base run, whose metric comes with them"
    assert torch.equal(torch.Tensor(effects), patched([[Zero(SITE)], []]))
    assert torch.equal(effects.base, effects[1])


# Edits of one's own ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Negated(Edit):
    """Only another value, one position at a time."""

    @property
    def is_local(self) -> bool:
        return True

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        return -activation


@dataclass(frozen=True, eq=False)
class Reversed(Edit):
    """Only another value, of all positions; that it is not local need not be said."""

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        return activation.flip(1)


VALUES: dict[str, tuple[Callable[..., Edit], ...]] = {"local": (Negated,), "of all positions": (Reversed,)}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_edit_that_says_only_its_value_shares_work(kind: str, attention: Any) -> None:
    (made,) = VALUES[kind]
    sites = (SITE, Z, "answer_decoder.blocks.0.hook_resid_pre", "question_encoder.blocks.1.attn.hook_pattern")
    sets = [[made(site, **where)] for site in sites for where in ({}, {"positions": [1]}, {"positions": [0, 2]})]
    model, inputs = tiny(attention=attention), batch()
    effects = sweep(model, inputs, sets, METRIC, base=[*BASE, made(SITE, positions=[2])], progress=False)
    assert not effects.alone
    with torch.no_grad():
        runs = [METRIC(model.patch(inputs, [*BASE, made(SITE, positions=[2]), *edits])) for edits in sets]
    torch.testing.assert_close(torch.Tensor(effects), torch.stack(runs), rtol=0, atol=1e-5)
    assert len(effects.unique()) > len(sites)


class Hooks(Zero):
    """Carried out by a hook of another kind."""

    def hooks(self, model: HookedVLM, inputs: VLMInputs, fired: set[str]) -> list[tuple[str, HookFunction]]:
        def run(activation: Tensor, hook: HookPoint) -> Tensor:
            fired.add(hook.name)
            return activation.roll(1, 0)

        return [(self.site, run)]


class Applies(Zero):
    def apply(self, activation: Tensor, hook: HookPoint, inputs: VLMInputs, part: Part | None = None) -> Tensor:
        return activation.roll(1, 0)


class Selects(Zero):
    def selected(self, shape: Sequence[int], hook: HookPoint, inputs: VLMInputs, part: Part | None = None) -> Tensor:
        return (torch.arange(shape[1]) % 2 == 0)[None, :, None]


class Names(Zero):
    def names(self, model: HookedVLM, inputs: VLMInputs) -> list[str]:
        return [SITE, SITE.replace("0", "1")]


class Places(Zero):
    def places(self, hook: HookPoint) -> list[tuple[Any, str]]:
        return [([1, 2], "p")]


OWN = [Hooks, Applies, Selects, Names]


@pytest.mark.parametrize("kind", OWN)
def test_an_edit_that_is_carried_out_in_another_way_has_a_forward_of_its_own(kind: type[Edit]) -> None:
    sets: list[list[Edit]] = [[Scale(SITE, 2.0)], [kind(SITE)], []]
    effects = swept(sets)
    assert kind.__name__ in effects.alone
    assert torch.equal(torch.Tensor(effects), patched(sets))
    in_base = swept([[Scale(SITE, 2.0)]], [*BASE, kind(SITE)])
    assert kind.__name__ in in_base.alone
    assert torch.equal(torch.Tensor(in_base), patched([[Scale(SITE, 2.0)]], [*BASE, kind(SITE)]))


def test_an_edit_that_says_its_positions_in_another_way() -> None:
    """Wherever it is run, it does what it says."""
    sets: list[list[Edit]] = [[Places(SITE, positions=[1])], [Places(SITE, positions=[4])], [Places(SITE)]]
    torch.testing.assert_close(torch.Tensor(swept(sets)), patched(sets), rtol=0, atol=1e-5)


def test_every_kind_that_is_not_known_is_named_once() -> None:
    effects = swept([[Names(SITE)], [Applies(SITE), Names(SITE)]])
    assert effects.alone == "how Applies, Names is carried out is not known"


class Further(Scale):
    """Of an edit of the library's own, with another value."""

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        return super().value(activation, hook, part) + 1


class Softened(BlockAttention):
    """Scores less one, which leaves something to read."""

    def value(self, activation: Tensor, hook: HookPoint, part: Part | None = None) -> Tensor:
        return activation - 1


def test_what_is_made_of_the_librarys_edits_shares_work() -> None:
    sets: list[list[Edit]] = [[Further(SITE, 2.0, positions=[1])], [Further(SITE, 3.0)]]
    effects = swept(sets)
    assert not effects.alone
    torch.testing.assert_close(torch.Tensor(effects), patched(sets), rtol=0, atol=1e-5)


def test_what_is_made_of_a_knockout_is_not_taken_for_one() -> None:
    sets: list[list[Edit]] = [[Softened("question_encoder.blocks.1.cross_attn", keys=[3])]]
    effects = swept(sets)
    torch.testing.assert_close(torch.Tensor(effects), patched(sets), rtol=0, atol=1e-5)
    assert (effects - swept([[BlockAttention("question_encoder.blocks.1.cross_attn", keys=[3])]])).abs().max() > 1e-4


# Generated answers ----------------------------------------------------------------------------------------------------


@cache
def toy(name: str) -> tuple[HookedVLM, VLMInputs]:
    model, sample = HookedVLM.from_pretrained(name), toys.demo_sample()
    return model, model.prepare(sample.image, [sample.question, "is there a red circle ?"])


def lengths(texts: list[str]) -> list[float]:
    """Some number that tells texts from each other."""
    assert isinstance(texts, list)
    return [float(sum(place * ord(letter) for place, letter in enumerate(text, 1))) for text in texts]


GENERATED: dict[str, tuple[str, list[list[Edit]]]] = {
    "toy-blip-vqa": (
        "answer_decoder",
        [
            [],
            [BlockAttention("question_encoder.blocks.*.cross_attn")],
            [Zero("answer_decoder.blocks.*.hook_cross_attn_out")],
        ],
    ),
    "toy-llava": (
        "language_model",
        [
            [],
            [BlockAttention("language_model.blocks.*.attn", positions="last", keys="image")],
            [Zero("language_model.blocks.0.hook_mlp_out", positions="question")],
        ],
    ),
}


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_those_that_are_generated_under_the_edits(
    name: str, num_beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = toy(name)
    generate, asked = HookedVLM.generate, []

    def noted(model: HookedVLM, inputs: VLMInputs, **options: Any) -> Any:
        asked.append(options)
        return generate(model, inputs, **options)

    monkeypatch.setattr(HookedVLM, "generate", noted)
    tower, sets = GENERATED[name]
    base: list[Edit] = [Add(f"{tower}.blocks.1.hook_mlp_out", 0.01)]
    texts: list[list[str]] = []

    def score(answers: list[str]) -> list[float]:
        texts.append(answers)
        return lengths(answers)

    metric = Generated(score, max_new_tokens=4, num_beams=num_beams)
    effects = sweep(model, inputs, sets, metric, base=base, progress=False)
    # An answer may be the same with any number of beams.
    assert asked == [{"max_new_tokens": 4, "num_beams": num_beams}] * 3
    expected = []
    for edits in sets:
        with model.hooks(edit_hooks(model, inputs, [*base, *edits])):
            expected.append(list(model.generate(inputs, max_new_tokens=4, num_beams=num_beams)))
    assert texts == expected
    assert torch.equal(torch.Tensor(effects), torch.tensor([lengths(answers) for answers in expected]))
    assert effects.shape == (3, 2)
    assert effects.dtype == torch.float32
    assert "generated" in effects.alone
    assert len({tuple(answers) for answers in texts}) > 1, "no edit has changed an answer"
    assert n_hooks(model) == 0


def test_a_score_that_is_not_one_a_row() -> None:
    model, inputs = toy("toy-blip-vqa")
    with pytest.raises(ValueError, match=r"shape \(1,\); it should return a tensor with one entry a row, of 2 rows"):
        sweep(model, inputs, [[]], Generated(lambda texts: [1.0], max_new_tokens=1), progress=False)
    assert n_hooks(model) == 0

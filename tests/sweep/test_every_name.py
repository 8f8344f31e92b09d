"""Every hook name, edited at random positions and heads: the sweep gives what ``patch`` gives alone.

Equal within ``1e-5 * max(1, largest logit)``, see :mod:`tests.sweep.one_at_a_time`. The kinds of edits take turns:
each has its turn at names of the same ending, and the slow test has them all at every name.
"""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
import torch

from hooked_vlm import HookedVLM, toys
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.edits import Edit, Replace
from hooked_vlm.sweep import sweep
from tests.models.modes import MODES, model_and_inputs, passed
from tests.sweep.drawing import KINDS, Draw, Sites
from tests.sweep.families import ATTENTION
from tests.sweep.one_at_a_time import TOLERANCE, assert_as_alone, distance, without_padding

pytestmark = pytest.mark.usefixtures("unchecked")

TINY = [mode for mode in MODES if not MODES[mode].options]
"""A sweep runs a model as it runs without options."""

CASES = [*((mode, "sdpa") for mode in TINY), *((mode, "eager") for mode in ("vqa", "llava", "clip"))]
"""Names are walked over with the fused kernel, and those of one model of a kind in eager; combinations take either."""

OWN_ATTENTION: dict[str, AttentionImplementation] = {"toy-blip-vqa": "eager", "toy-llava": "sdpa"}
OTHER_ATTENTION: dict[str, AttentionImplementation] = {"toy-blip-vqa": "sdpa", "toy-llava": "eager"}


@cache
def toy(name: str, attention: AttentionImplementation) -> Sites:
    model, sample = HookedVLM.from_pretrained(name, attention=attention), toys.demo_sample()
    return Sites.of(model, model.prepare(sample.image, sample.question))


@cache
def tiny(mode: str, attention: AttentionImplementation) -> Sites:
    return Sites.of(*model_and_inputs(mode, attention))


def one_of_each_name(sites: Sites, seed: int) -> list[list[Edit]]:
    """An edit at every name, and a knockout at every attention layer."""
    draw, turns = Draw(sites, Random(seed)), dict[str, int]()
    sets: list[list[Edit]] = [[draw.knockout(attention)] for attention in sites.attentions]
    for name in sites.names:
        kinds, ending = draw.kinds(name), name.rsplit(".", 1)[-1]
        turn = turns.setdefault(ending, seed + len(ending))
        turns[ending] += 1
        sets.append([draw.edit(name, kinds[turn % len(kinds)])])
    return sets


def assert_most_are_felt(effects: list[float]) -> None:
    """Not all can be: what is drawn may be a position that nothing reads, or no position."""
    assert sum(effect > 100 * TOLERANCE for effect in effects) > 0.6 * len(effects)


@pytest.mark.parametrize(("name", "attention"), OWN_ATTENTION.items())
def test_every_name_of_the_embedded_models(name: str, attention: AttentionImplementation) -> None:
    sites = toy(name, attention)
    assert sites.names == sites.model.hook_names
    assert_most_are_felt(assert_as_alone(sites.model, sites.inputs, one_of_each_name(sites, 0)))


@pytest.mark.parametrize(("mode", "attention"), CASES)
def test_every_name_of_tiny_models(mode: str, attention: AttentionImplementation) -> None:
    """Of every family: cross-attention, post-LN, keys shared between heads, rotary embeddings, tiles."""
    sites = tiny(mode, attention)
    assert sites.names == passed(mode, sites.model)
    sets = one_of_each_name(sites, ATTENTION.index(attention))
    assert_most_are_felt(assert_as_alone(sites.model, sites.inputs, sets))


@pytest.mark.parametrize("mode", ["vqa", "llava"])
def test_every_name_after_every_kind_of_base_edit(mode: str) -> None:
    """The base's edits are of every kind and lie anywhere, those of the sets too."""
    sites = tiny(mode, "sdpa")
    for turn, kind in enumerate(KINDS):
        random = Random(turn)
        draw = Draw(sites, random)
        name = random.choice([name for name in sites.names if kind in draw.kinds(name)])
        base = [draw.edit(name, kind), draw.knockout()]
        sets: list[list[Edit]] = [[draw.edit(name)] for name in random.sample(sites.names, 6)]
        assert_as_alone(sites.model, sites.inputs, sets, base=base, may_overflow=True)


@pytest.mark.parametrize("mode", TINY)
def test_a_runs_own_activations_change_nothing(mode: str) -> None:
    """At any name, at any positions."""
    sites = tiny(mode, "sdpa")
    draw, metric = Draw(sites, Random(0)), without_padding(sites.model, sites.inputs)
    sets = [[Replace(name, sites.clean, **draw.where(name))] for name in sites.names]
    with torch.no_grad():
        swept, clean = sweep(sites.model, sites.inputs, sets, metric, progress=False), metric(sites.model(sites.inputs))
    strayed = {name: distance(found, clean) for name, found in zip(sites.names, swept, strict=True)}
    assert not {name: far for name, far in strayed.items() if not far <= TOLERANCE}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), [*OWN_ATTENTION.items(), *OTHER_ATTENTION.items()])
def test_every_kind_at_every_name_of_the_embedded_models(name: str, attention: AttentionImplementation) -> None:
    every_kind_at_every_name(toy(name, attention))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("mode", TINY)
def test_every_kind_at_every_name_of_tiny_models(mode: str, attention: AttentionImplementation) -> None:
    every_kind_at_every_name(tiny(mode, attention))


def every_kind_at_every_name(sites: Sites) -> None:
    draw = Draw(sites, Random(0))
    sets: list[list[Edit]] = [[draw.edit(name, kind)] for name in sites.names for kind in draw.kinds(name)]
    assert_as_alone(sites.model, sites.inputs, sets)

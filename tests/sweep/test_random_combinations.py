"""Any edits together, after any others: hypothesis draws the sets, and finds the smallest that stray."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hooked_vlm.config import AttentionImplementation
from hooked_vlm.edits import Edit
from tests.models.modes import MODES, model_and_inputs
from tests.sweep.drawing import Draw, Sites
from tests.sweep.families import ATTENTION, FAMILIES, family
from tests.sweep.one_at_a_time import assert_as_alone, assert_patch_is_the_hook_path

pytestmark = pytest.mark.usefixtures("unchecked")

KINDS = [*(mode for mode in MODES if not MODES[mode].options), *FAMILIES]
EDIT = st.integers(0, 10**6)
"""An edit, by the seed that it is drawn from; hypothesis leaves out edits and sets, not parts of an edit."""

_sites: dict[tuple[str, str], Sites] = {}


def sites_of(kind: str, attention: AttentionImplementation) -> Sites:
    if kind in FAMILIES:
        return family(kind, attention)
    if (kind, attention) not in _sites:
        _sites[kind, attention] = Sites.of(*model_and_inputs(kind, attention))
    return _sites[kind, attention]


def edits(sites: Sites, seeds: list[int]) -> list[Edit]:
    return [Draw(sites, Random(seed)).edit() for seed in seeds]


combinations: Any = given(
    kind=st.sampled_from(KINDS),
    attention=st.sampled_from(ATTENTION),
    base=st.lists(EDIT, max_size=2),
    sets=st.lists(st.lists(EDIT, max_size=5), min_size=1, max_size=7),
    batch_size=st.sampled_from(["auto", "auto", 1, 3]),
)


def compare(
    kind: str, attention: AttentionImplementation, base: list[int], sets: list[list[int]], batch_size: Any
) -> None:
    sites = sites_of(kind, attention)
    model, inputs, first = sites.model, sites.inputs, edits(sites, base)
    with torch.no_grad():
        assume(bool(model.patch(inputs, first).isfinite().all()))
    drawn = [edits(sites, seeds) for seeds in sets]
    assert_as_alone(model, inputs, drawn, base=first, batch_size=batch_size, may_overflow=True)
    assert_patch_is_the_hook_path(model, inputs, [*first, *drawn[0]])


@combinations
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_edits_together(**drawn: Any) -> None:
    compare(**drawn)


@pytest.mark.slow
@combinations
@settings(max_examples=8000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_edits_together_many_times(**drawn: Any) -> None:
    compare(**drawn)

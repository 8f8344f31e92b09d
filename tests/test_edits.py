"""Edits: each does what a hand-written hook does, to exactly the part that it names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm.edits import Add, Edit, Function, Mean, Noise, Replace, Scale, Zero, edit_hooks, gaussian
from hooked_vlm.hooks import HookPoint
from hooked_vlm.inputs import Span, VLMInputs
from tests.tiny_runs import batch, largest_difference, n_hooks, point, tiny

EVERY = slice(None)
# A site, a selection, and the same selection as an index.
PLACES: dict[str, tuple[str, dict[str, Any], tuple[Any, ...]]] = {
    "residual": ("question_encoder.blocks.1.hook_resid_pre", {"positions": [1, -1]}, (EVERY, [1, -1])),
    "vision residual": ("vision_encoder.blocks.1.hook_resid_mid", {"positions": "image"}, (EVERY, slice(1, None))),
    "neurons": (
        "question_encoder.blocks.0.mlp.hook_post",
        {"positions": 2, "neurons": [0, 7, -1]},
        (EVERY, 2, [0, 7, -1]),
    ),
    "z": ("answer_decoder.blocks.0.attn.hook_z", {"positions": "last", "heads": 1}, (EVERY, 0, 1)),
    "q": ("question_encoder.blocks.0.cross_attn.hook_q", {"heads": [0, 2]}, (EVERY, EVERY, [0, 2])),
    "other tower's v": (
        "question_encoder.blocks.1.cross_attn.hook_v",
        {"positions": "image", "heads": 0},
        (EVERY, slice(1, None), 0),
    ),
    "pattern": (
        "question_encoder.blocks.1.cross_attn.hook_pattern",
        {"positions": "question", "heads": [1]},
        (EVERY, 1, slice(1, 4)),
    ),
    "scores": (
        "answer_decoder.blocks.1.attn.hook_attn_scores",
        {"positions": -1, "heads": [0, 1]},
        (EVERY, [0, 1], -1),
    ),
    "everything": ("vision_encoder.blocks.0.hook_mlp_out", {}, (EVERY,)),
}
By = Callable[[Tensor, HookPoint], Tensor]


def kinds(site: str, where: dict[str, Any]) -> dict[str, tuple[Edit, By]]:
    """Every kind of edit, and what it does to an activation, in torch's words."""
    _, other = tiny().run_with_cache(batch(seed=1), names_filter=site)
    vector, factors = torch.randn(other[site].shape[-1:]), torch.randn(other[site].shape)
    dims = [0, 2] if "q" in tiny().hook_dict[site].axes else [0, 1]
    over = "b q" if "q" in tiny().hook_dict[site].axes else "b p"

    def noise(activation: Tensor) -> Tensor:
        return torch.stack([gaussian(activation.shape[1:], 7, site, row) for row in range(len(activation))])

    def spread(activation: Tensor) -> Tensor:
        return activation.flatten(1).std(1).view(-1, *[1] * (activation.ndim - 1))

    return {
        "Replace from a cache": (Replace(site, other, **where), lambda x, hook: other[hook.name]),
        "Replace by a tensor": (Replace(site, vector, **where), lambda x, hook: vector.expand_as(x)),
        "Add a number": (Add(site, 0.5, **where), lambda x, hook: x + 0.5),
        "Add a tensor": (Add(site, vector, **where), lambda x, hook: x + vector),
        "Scale by a number": (Scale(site, -2, **where), lambda x, hook: x * -2),
        "Scale by a tensor": (Scale(site, factors, **where), lambda x, hook: x * factors),
        "Zero": (Zero(site, **where), lambda x, hook: torch.zeros_like(x)),
        "Mean of its own": (
            Mean(site, over=over, **where),
            lambda x, hook: x.mean(dims, keepdim=True).expand_as(x),
        ),
        "Mean that is given": (Mean(site, vector, **where), lambda x, hook: vector.expand_as(x)),
        "Noise, additive": (
            Noise(site, 0.5, seed=7, **where),
            lambda x, hook: x + 0.5 * spread(x) * noise(x),
        ),
        "Noise, multiplicative": (
            Noise(site, 0.5, "multiplicative", 7, **where),
            lambda x, hook: x * (1 + 0.5 * noise(x)),
        ),
        "Function": (Function(site, lambda x, hook: x.cos() + len(hook.name), **where), _cosine),
        "Function in place": (Function(site, lambda x, hook: _in_place(x), **where), lambda x, hook: x.exp()),
    }


def _cosine(x: Tensor, hook: HookPoint) -> Tensor:
    return x.cos() + len(hook.name)


def _in_place(x: Tensor) -> None:
    x.exp_()


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_patch_equals_a_hand_written_hook(place: str) -> None:
    site, where, index = PLACES[place]
    model, inputs = tiny(), batch()
    plain = model(inputs)
    for kind, (edit, by) in kinds(site, where).items():

        def by_hand(activation: Tensor, hook: HookPoint, by: By = by) -> Tensor:
            edited = activation.clone()
            edited[index] = by(activation, hook)[index]
            return edited

        expected = model.run_with_hooks(inputs, fwd_hooks=[(site, by_hand)])
        patched = model.patch(inputs, [edit])
        assert torch.equal(patched, expected), kind
        assert not torch.equal(patched, plain), kind
    assert torch.equal(model(inputs), plain)
    assert n_hooks(model) == 0


AXES = ("b p d_model", "b p h d_head", "b p h d_model", "b h q k", "b p 1", "b match")
LENGTHS = {"b": 2, "p": 4, "q": 4, "k": 5, "h": 3, "d_model": 6, "d_head": 2, "1": 1, "match": 2}


def indices(size: int) -> st.SearchStrategy[Any]:
    one = st.integers(-size, size - 1)
    return st.one_of(
        st.none(),
        one,
        st.lists(one, max_size=4),
        st.lists(one, max_size=4).map(tuple),
        st.lists(one, min_size=1, max_size=4).map(torch.tensor),
        st.lists(st.booleans(), min_size=size, max_size=size),
        st.lists(st.booleans(), min_size=size, max_size=size).map(torch.tensor),
    )


def row_positions(size: int, rows: int) -> st.SearchStrategy[Any]:
    """Positions that differ from row to row."""
    row = st.lists(st.integers(0, size - 1), max_size=3).map(tuple)
    mask = st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=rows, max_size=rows)
    return st.one_of(
        mask.map(torch.tensor),
        st.lists(row, min_size=rows, max_size=rows).map(lambda spans: Span("text", tuple(spans))),
        row.map(lambda span: Span("text", (span,))),
    )


@st.composite
def selections(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    axes = draw(st.sampled_from(AXES))
    names = axes.split()
    where: dict[str, Any] = {"neurons": draw(indices(LENGTHS[names[-1]]))}
    if "h" in names:
        where["heads"] = draw(indices(LENGTHS["h"]))
    if "p" in names or "q" in names:
        where["positions"] = draw(st.one_of(indices(LENGTHS["p"]), row_positions(LENGTHS["p"], LENGTHS["b"])))
    return axes, where


def chosen(selection: Any, size: int, row: int) -> set[int]:
    """The places along an axis of ``size`` that a selection means in a row."""
    if selection is None:
        return set(range(size))
    if isinstance(selection, Span):
        return set(selection.rows[row if len(selection) > 1 else 0])
    values = np.asarray(selection)
    if values.dtype == bool:
        return set(np.flatnonzero(values[row] if values.ndim == 2 else values).tolist())
    return {int(value) % size for value in np.atleast_1d(values)}


@settings(max_examples=300)
@given(selections())
def test_exactly_what_is_selected_changes(drawn: tuple[str, dict[str, Any]]) -> None:
    axes, where = drawn
    shape = [LENGTHS[axis] for axis in axes.split()]
    keys = ["heads" if axis == "h" else "positions" if axis in "pq" else "neurons" for axis in axes.split()]
    keys = [key if axis != "k" or place == len(keys) - 1 else "" for place, (axis, key) in enumerate(zip(axes.split(), keys, strict=True))]
    selected = torch.zeros(shape, dtype=torch.bool)
    for entry in itertools.product(*map(range, shape)):
        selected[entry] = all(
            entry[place] in chosen(where.get(key), shape[place], entry[0])
            for place, key in enumerate(keys)
            if place > 0
        )
    activation = torch.randn(shape)
    before, version = activation.clone(), activation._version
    hook, inputs = point(axes, "text.blocks.0.hook_made_up"), VLMInputs(input_ids=torch.zeros(2, 4, dtype=torch.long))
    edited = Add("any", 1.0, **where).apply(activation, hook, inputs)
    assert torch.equal(edited, torch.where(selected, before + 1, before))
    assert torch.equal(activation, before)
    assert activation._version == version
    if not selected.all():
        assert torch.equal(Function("any", lambda x, hook: _in_place(x), **where).apply(activation, hook, inputs)[~selected], before[~selected])
        assert torch.equal(activation, before)

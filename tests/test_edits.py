"""Edits: each does what a hand-written hook does, to exactly the part that it names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

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
    "z": ("answer_decoder.blocks.1.attn.hook_z", {"positions": "last", "heads": 1}, (EVERY, 0, 1)),
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
        {"positions": -1, "heads": [0, 1], "neurons": 0},
        (EVERY, [0, 1], -1, 0),
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


class Rows(NamedTuple):
    """A span's rows. (The span itself is made outside the strategies: the checks of its types draw random numbers.)"""

    rows: tuple[tuple[int, ...], ...]


def row_positions(size: int, rows: int) -> st.SearchStrategy[Any]:
    """Positions that differ from row to row, or a span of one row."""
    row = st.lists(st.integers(0, size - 1), max_size=3).map(tuple)
    mask = st.lists(st.booleans(), min_size=size, max_size=size)
    return st.one_of(
        st.lists(mask, min_size=rows, max_size=rows).map(torch.tensor),
        st.lists(row, min_size=rows, max_size=rows).map(tuple).map(Rows),
        st.tuples(row).map(Rows),
    )


@st.composite
def selections(draw: st.DrawFn) -> tuple[tuple[str, ...], dict[str, Any]]:
    axes = tuple(draw(st.sampled_from(AXES)).split())
    where = {"neurons": draw(indices(LENGTHS[axes[-1]]))}
    if "h" in axes:
        where["heads"] = draw(indices(LENGTHS["h"]))
    if "p" in axes or "q" in axes:
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


def expected_mask(axes: tuple[str, ...], where: dict[str, Any]) -> Tensor:
    shape = [LENGTHS[axis] for axis in axes]
    keyword = {"p": "positions", "q": "positions", "h": "heads", axes[-1]: "neurons"}
    mask = torch.zeros(shape, dtype=torch.bool)
    for entry in itertools.product(*map(range, shape)):
        mask[entry] = all(
            place in chosen(where.get(keyword.get(axis, "")), size, entry[0])
            for axis, size, place in zip(axes, shape, entry, strict=True)
        )
    return mask


@settings(max_examples=300)
@given(selections())
def test_exactly_what_is_selected_changes(drawn: tuple[tuple[str, ...], dict[str, Any]]) -> None:
    axes, where = drawn
    if isinstance(where.get("positions"), Rows):
        where["positions"] = Span("text", where["positions"].rows)
    expected = expected_mask(axes, where)
    activation = torch.randn([LENGTHS[axis] for axis in axes])
    before = activation.clone()
    hook, inputs = point(" ".join(axes), "text.blocks.0.hook_made_up"), VLMInputs()
    for edit in (Add("any", 1.0, **where), Function("any", lambda x, hook: x.add_(1), **where)):
        edited = edit.apply(activation, hook, inputs)
        assert torch.equal(edited, torch.where(expected, before + 1, before))
        assert torch.equal(activation, before), "the given tensor was written to"
        assert edited.untyped_storage().data_ptr() != activation.untyped_storage().data_ptr()


@torch.no_grad()
def test_edits_apply_in_their_order_and_together() -> None:
    model, inputs = tiny(), batch()
    site, elsewhere = "question_encoder.blocks.0.hook_mlp_out", "vision_encoder.blocks.1.hook_attn_out"
    add, scale = Add(site, 2.0, positions=1, neurons=0), Scale(site, 3.0, positions=[0, 1])
    add_then_scale = Function(site, lambda x, hook: _by_hand(x, lambda y: _scaled(_added(y))))
    scale_then_add = Function(site, lambda x, hook: _by_hand(x, lambda y: _added(_scaled(y))))
    assert torch.equal(model.patch(inputs, [add, scale]), model.patch(inputs, [add_then_scale]))
    assert torch.equal(model.patch(inputs, [scale, add]), model.patch(inputs, [scale_then_add]))
    assert not torch.equal(model.patch(inputs, [add, scale]), model.patch(inputs, [scale, add]))

    two = model.patch(inputs, [add, Zero(elsewhere)])
    with model.hooks(edit_hooks(model, inputs, [Zero(elsewhere)])):
        assert torch.equal(model.patch(inputs, [add]), two)
    assert not torch.equal(model.patch(inputs, [add]), two)


def _by_hand(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(x.clone())


def _added(x: Tensor) -> Tensor:
    x[:, 1, 0] += 2
    return x


def _scaled(x: Tensor) -> Tensor:
    x[:, :2] *= 3
    return x


@torch.no_grad()
def test_a_pattern_of_names_edits_every_site_that_it_matches() -> None:
    model, inputs = tiny(), batch()
    each = [Scale(f"question_encoder.blocks.{layer}.hook_mlp_out", 0.5, positions="question") for layer in range(2)]
    at_once = Scale("question_encoder.*.hook_mlp_out", 0.5, positions="question")
    assert torch.equal(model.patch(inputs, [at_once]), model.patch(inputs, each))


@torch.no_grad()
def test_a_span_may_differ_from_row_to_row() -> None:
    """ "red" is the first word of row 0, the second of row 1, the last of row 2."""
    model, inputs = tiny(), batch()
    site = "question_encoder.blocks.1.hook_resid_pre"

    def by_hand(activation: Tensor, hook: HookPoint) -> None:
        activation[[0, 1, 2], [1, 2, 3]] = 0

    expected = model.run_with_hooks(inputs, fwd_hooks=[(site, by_hand)])
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[[0, 1, 2], [1, 2, 3]] = True
    for positions in ("red", " RED", inputs.span("red"), mask):
        assert torch.equal(model.patch(inputs, [Zero(site, positions=positions)]), expected)


@torch.no_grad()
def test_a_source_of_one_row_serves_every_row() -> None:
    model, inputs, source_inputs = tiny(), batch(), batch(1, seed=1)
    _, source = model.run_with_cache(source_inputs)
    patched = model.patch(inputs, [Replace("question_encoder.hook_out", source)])
    alone = model.patch(inputs.rows([2]), [Replace("question_encoder.hook_out", source)])
    assert largest_difference(patched[2:], alone) < 1e-5
    # All that the decoder knows of picture and question is the source's.
    own_answer = dataclasses.replace(source_inputs.repeat(3), decoder_input_ids=inputs.decoder_input_ids)
    assert largest_difference(patched, model(own_answer)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("task", ["vqa", "caption", "retrieval"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_replacing_an_activation_by_itself_changes_nothing(task: str, attention: str) -> None:
    """Identity 1, at every name that the run passes."""
    model, inputs = tiny(task, attention, layers=1), batch(2, task)
    clean, cache = model.run_with_cache(inputs)
    passed_not = {"hook_image_embeds", "hook_text_embeds"} if task == "retrieval" else set()
    assert set(model.hook_names) - set(cache) == passed_not
    for name in cache:
        with model.hooks(edit_hooks(model, inputs, [Replace(name, cache)])):
            assert largest_difference(model(inputs), clean) < 1e-5, name


@torch.no_grad()
def test_sources_are_cast_to_the_activation() -> None:
    """From a cache of another dtype, or a mapping of any kind."""
    model, inputs = tiny(), batch()
    site = "question_encoder.blocks.0.hook_mlp_out"
    _, cache = model.run_with_cache(batch(seed=1), names_filter=site)
    rounded = cache[site].bfloat16().float()
    expected = model.patch(inputs, [Replace(site, rounded)])
    assert torch.equal(model.patch(inputs, [Replace(site, cache.to(dtype=torch.bfloat16))]), expected)
    assert torch.equal(model.patch(inputs, [Replace(site, {site: rounded.double()})]), expected)


@pytest.mark.parametrize("over", ["b", "p", "b p", "p b", "h", "b p h d_head"])
def test_mean_over_axes(over: str) -> None:
    activation = torch.randn(3, 4, 2, 5)
    dims = ["b p h d_head".split().index(axis) for axis in over.split()]
    expected = torch.from_numpy(activation.numpy().mean(tuple(dims), keepdims=True)).expand_as(activation)
    made = Mean("any", over=over).apply(activation, point("b p h d_head", "text.hook"), VLMInputs())
    assert largest_difference(made, expected) < 1e-6


def noisy(activation: Tensor, name: str = "text.hook", **settings: Any) -> Tensor:
    edit = Noise("any", **({"std": 1.0} | settings))
    return edit.apply(activation, point("b p d_model", name), VLMInputs())


def test_noise_is_the_same_for_a_seed_and_a_row_whatever_the_batch() -> None:
    activation = torch.randn(4, 7, 9)
    whole = noisy(activation)
    assert torch.equal(whole, noisy(activation))
    assert torch.equal(whole[:2], noisy(activation[:2]))
    draws = [
        noisy(torch.zeros(1, 7, 9) + 1, kind="multiplicative"),
        noisy(torch.zeros(1, 7, 9) + 1, kind="multiplicative", seed=1),
        noisy(torch.zeros(1, 7, 9) + 1, kind="multiplicative", name="other.hook"),
        noisy(torch.zeros(2, 7, 9) + 1, kind="multiplicative")[1:],
        noisy(torch.zeros(2, 7, 9) + 1, kind="multiplicative", seed=1)[1:],
    ]
    for one, other in itertools.combinations(draws, 2):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.5


def test_noise_is_in_units_of_the_rows_own_spread() -> None:
    activation = torch.randn(2, 300, 40) * torch.tensor([1.0, 5.0])[:, None, None] + 3
    added = noisy(activation, std=0.5) - activation
    assert added.flatten(1).std(1).tolist() == pytest.approx([0.5, 2.5], rel=0.03)
    assert added.flatten(1).mean(1).tolist() == pytest.approx([0, 0], abs=0.1)
    factors = noisy(activation, std=0.5, kind="multiplicative") / activation
    assert factors.flatten(1).median(1).values.tolist() == pytest.approx([1, 1], abs=0.02)
    assert torch.equal(noisy(activation, std=0.0), activation)
    assert torch.equal(noisy(activation, std=0.0, kind="multiplicative"), activation)


def test_edits_are_frozen_values() -> None:
    edit = Zero("question_encoder.hook_out", positions=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.site = "vision_encoder.hook_out"  # type: ignore[misc]
    assert dataclasses.replace(edit, positions=2).positions == 2


def test_gradients_flow_through_edits() -> None:
    model, inputs = tiny(), batch(1)
    amount = torch.zeros(36, requires_grad=True)
    model.patch(inputs, [Add("question_encoder.blocks.0.hook_mlp_out", amount, positions=1)]).sum().backward()
    assert amount.grad is not None
    assert amount.grad.abs().max() > 0

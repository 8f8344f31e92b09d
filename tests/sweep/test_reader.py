"""Keys that are shared, and keys of one's own, against plain attention over all of them put in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from torch import Tensor

from hooked_vlm.components import Attention, KeyValues, Mask, bidirectional_mask, causal_mask
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.sweep.reader import SharedKeys
from hooked_vlm.sweep.tokens import Layout
from tests.sweep.planned import made

CPU = torch.device("cpu")
BOTH: list[AttentionImplementation] = ["eager", "sdpa"]
GROUPED = {"every head its own keys": "vqa", "two heads share keys": "llava"}


@cache
def layer(kind: str, implementation: AttentionImplementation) -> Attention:
    model, _ = made(GROUPED[kind], implementation)
    tower: Any = model.get_submodule(model.towers[-1])
    found = tower.blocks[0].attn
    assert isinstance(found, Attention)
    return found


@dataclass
class Case:
    """Which positions each set asks from, and which keys it has anew; what may be read; what is knocked out."""

    n_rows: int
    n_keys: int
    queries: ndarray
    own: ndarray | None
    mask: Mask | None
    shut: dict[int, Tensor] = field(default_factory=dict)
    edited: list[int] = field(default_factory=list)

    def draw(self, attention: Attention) -> tuple[Tensor, Tensor, Tensor, KeyValues]:
        """Packed queries, keys and values, and the base run's keys."""
        torch.manual_seed(0)
        n_queries = int(self.queries.sum()) * self.n_rows
        n_own = 0 if self.own is None else int(self.own.sum()) * self.n_rows
        q = 2 * torch.randn(1, n_queries, attention.n_heads, attention.d_head)
        k, v = 2 * torch.randn(2, 1, n_own, attention.n_kv_heads, attention.d_head)
        clean = torch.randn(2, self.n_rows, attention.n_kv_heads, self.n_keys, attention.d_head)
        return q, k, v, KeyValues(*clean)


def shared(attention: Attention, case: Case) -> tuple[Tensor, Tensor]:
    """What the queries read, and what they should."""
    q, k, v, clean = case.draw(attention)
    queries = Layout(case.queries, case.n_rows, CPU)
    own = None if case.own is None else Layout(case.own, case.n_rows, CPU)
    kept, calls = [clean.keys.clone(), clean.values.clone()], []
    reader = SharedKeys(
        *(queries, own, clean, case.mask, case.shut, case.edited),
        edit=edited,
        done=lambda: calls.append("done"),
    )
    found = reader(attention, q, *((None, None) if own is None else (k, v)))
    assert calls == ["done"]
    assert torch.equal(clean.keys, kept[0]), "the base run's keys are not written to"
    assert torch.equal(clean.values, kept[1])
    expected = [
        alone(attention, case, one, q[0, queries.tokens_of(one)], clean, own, k, v) for one in range(len(case.queries))
    ]
    return found[0], torch.cat(expected)


def edited(activation: Tensor, point: str, one: int) -> Tensor:
    is_scores = "scores" in point
    return activation + (one + 1) * torch.linspace(-1, 1, activation.shape[-1]) if is_scores else activation * 2


def alone(
    attention: Attention, case: Case, one: int, q: Tensor, clean: KeyValues, own: Layout | None, k: Tensor, v: Tensor
) -> Tensor:
    """One set's attention, all of its keys in place; where something is knocked out or edited, spelled out, with NaN
    for queries that are padding, which may read nothing as it is."""
    positions = np.flatnonzero(case.queries[one])
    if not len(positions):
        return q
    keys, values = clean.keys.clone(), clean.values.clone()
    if own is not None:
        at = own.positions_of(one)
        for whole, packed in ((keys, k), (values, v)):
            new = packed[0, own.tokens_of(one)].unflatten(0, (case.n_rows, len(at)))
            whole[:, :, at] = new.transpose(1, 2)
    q = q.unflatten(0, (case.n_rows, len(positions))).transpose(1, 2)
    if one not in case.shut and one not in case.edited:
        mask = case.mask and Mask(case.mask.keep[:, :, positions], torch.float32)
        return attention._attend(q, keys, values, mask).transpose(1, 2).flatten(0, 1)
    groups = attention.n_heads // attention.n_kv_heads
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = q @ keys.transpose(-1, -2) / attention.d_head**0.5
    keep = torch.ones(case.n_rows, 1, len(positions), case.n_keys, dtype=torch.bool)
    if case.mask is not None:
        keep = case.mask.keep[:, :, positions].expand_as(keep)
    is_padding = ~keep.any(-1, keepdim=True)
    keep = keep & ~case.shut[one] if one in case.shut else keep
    scores = scores.masked_fill(~keep, -torch.inf)
    if one in case.edited:
        scores = edited(scores, "scores", one)
    pattern = scores.softmax(-1).nan_to_num(0.0)
    if one in case.edited:
        pattern = edited(pattern, "pattern", one)
    return (pattern @ values).masked_fill(is_padding, torch.nan).transpose(1, 2).flatten(0, 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.isfinite().all(), "of padding too: it goes on through the layers"
    real = ~expected.isnan()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)


def some(draw: Any, size: int) -> list[bool]:
    kinds = st.one_of(
        st.just([False] * size), st.just([True] * size), st.lists(st.booleans(), min_size=size, max_size=size)
    )
    return draw(kinds)


@st.composite
def masks(draw: Any, n_rows: int, size: int, *, is_self: bool, n_queries: int) -> Mask | None:
    padded = torch.ones(n_rows, size, dtype=torch.long)
    for row in range(n_rows):
        padded[row, : draw(st.integers(0, size - 1))] = 0
    kinds = ["none", "padded", "causal", "causal, padded", "window"] if is_self else ["none", "padded"]
    kind = draw(st.sampled_from(kinds))
    if kind in ("none", "padded"):
        return bidirectional_mask(padded if kind == "padded" else None, n_queries, torch.float32)
    window = draw(st.integers(1, size)) if kind == "window" else None
    return causal_mask(padded if kind == "causal, padded" else None, size, 0, torch.float32, CPU, window)


@st.composite
def cases(draw: Any, *, n_heads: int, is_self: bool = True, knocks_out: bool = False, edits: bool = False) -> Case:
    n_sets, n_rows, n_queries = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 9))
    n_keys = n_queries if is_self else draw(st.integers(1, 9))
    queries = np.array([some(draw, n_queries) for _ in range(n_sets)])
    own = np.array([some(draw, n_keys) for _ in range(n_sets)])
    if is_self:  # who asks anew has keys anew
        own = own | queries
    case = Case(
        n_rows,
        n_keys,
        queries,
        own if own.any() or is_self else None,
        draw(masks(n_rows, n_keys, is_self=is_self, n_queries=n_queries)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for one in range(n_sets):
        count = int(queries[one].sum())
        if count and knocks_out and draw(st.booleans()):
            heads = draw(st.sampled_from([1, n_heads]))
            share = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
            case.shut[one] = torch.rand(n_rows, heads, count, n_keys, generator=generator) < share
        elif count and edits and draw(st.booleans()):
            case.edited.append(one)
    return case


both = pytest.mark.parametrize("implementation", BOTH)
grouped = pytest.mark.parametrize("kind", GROUPED)


@both
@grouped
@given(st.data())
@settings(max_examples=25)
def test_self_attention(kind: str, implementation: AttentionImplementation, data: st.DataObject) -> None:
    attention = layer(kind, implementation)
    assert_close(*shared(attention, data.draw(cases(n_heads=attention.n_heads))))


@both
@grouped
@given(st.data())
@settings(max_examples=25)
def test_attention_to_another_tower(kind: str, implementation: AttentionImplementation, data: st.DataObject) -> None:
    attention = layer(kind, implementation)
    assert_close(*shared(attention, data.draw(cases(n_heads=attention.n_heads, is_self=False))))


@both
@grouped
@given(st.data())
@settings(max_examples=25)
def test_knockouts(kind: str, implementation: AttentionImplementation, data: st.DataObject) -> None:
    """A query that is left nothing to read gets nothing."""
    attention = layer(kind, implementation)
    is_self = data.draw(st.booleans())
    case = data.draw(cases(n_heads=attention.n_heads, is_self=is_self, knocks_out=True))
    assert_close(*shared(attention, case))


@both
@grouped
@given(st.data())
@settings(max_examples=25)
def test_edited_scores_and_patterns(kind: str, implementation: AttentionImplementation, data: st.DataObject) -> None:
    """Of some sets; beside others that are knocked out, and others that are neither."""
    attention = layer(kind, implementation)
    case = data.draw(cases(n_heads=attention.n_heads, knocks_out=True, edits=True))
    assert_close(*shared(attention, case))


@both
def test_sets_of_many_lengths(implementation: AttentionImplementation) -> None:
    """Of nearly the same, which are padded and run together, and of very different ones."""
    size = 40
    counts = [1, 2, 3, 8, 10, 11, 13, 9, 39, 40, 40, 0, 25, 24]
    queries = np.arange(size) >= size - np.array(counts)[:, None]
    own = queries.copy()
    own[-1] = True
    for mask in (None, causal_mask(None, size, 0, torch.float32, CPU)):
        for kind in GROUPED:
            assert_close(*shared(layer(kind, implementation), Case(2, size, queries, own, mask)))


@both
def test_scores_that_are_far_apart(implementation: AttentionImplementation) -> None:
    """One softmax over both lots of keys, whichever holds the largest score, and however small the other's are."""
    attention = layer("every head its own keys", implementation)
    clean = KeyValues(*torch.zeros(2, 1, attention.n_kv_heads, 4, attention.d_head))
    assert clean.keys is not None
    assert clean.values is not None
    clean.values[:] = 1.0
    mask = np.array([[False, True, True, False]])
    layout = Layout(mask, 1, CPU)
    q = torch.ones(1, 2, attention.n_heads, attention.d_head)
    for score, expected in ((1e4, 3.0), (-1e4, 1.0), (0.0, 2.0)):
        k = torch.full((1, 2, attention.n_kv_heads, attention.d_head), score)
        z = SharedKeys(layout, layout, clean, None)(attention, q, k, torch.full_like(k, 3.0))
        torch.testing.assert_close(z, torch.full_like(z, expected))

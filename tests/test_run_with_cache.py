"""What ``run_with_cache`` and ``stop_at`` keep, and what gradients are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm import HookedVLM, HookError, HookPoint
from tests.tiny_blip import Shape, hf_blip, inputs

MLP_OUT = "question_encoder.blocks.1.hook_mlp_out"
LOGITS = "answer_decoder.hook_logits"
ONE_LAYER = Shape(text=36, text_heads=3, vision=36, vision_heads=3, text_layers=1, vision_layers=1)


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_hf(hf_blip("vqa"))


@pytest.fixture(scope="module")
def retrieval() -> HookedVLM:
    return HookedVLM.from_hf(hf_blip("retrieval"))


@pytest.fixture
def batch() -> dict[str, Any]:
    return inputs("vqa", batch=2)


# Stopping ---------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=30)
def test_stop_at_any_name(model: HookedVLM, data: st.DataObject) -> None:
    """The forward ends there: nothing later fires, and what is returned is that activation."""
    name = data.draw(st.sampled_from(model.hook_names))
    fired: list[str] = []
    torch.manual_seed(0)
    given = inputs("vqa")
    with torch.no_grad():
        expected = model.run_with_cache(given, names_filter=name)[1][name]
        stopped = model.run_with_hooks(
            given, fwd_hooks=[("*", lambda activation, hook: fired.append(hook.name))], stop_at=name
        )
        activation, cache = model.run_with_cache(given, stop_at=name)
    assert torch.equal(stopped, expected)
    assert torch.equal(activation, expected)
    assert fired == list(cache) == model.hook_names[: model.hook_names.index(name) + 1]
    assert not any(point.is_hooked for point in model.hook_points())


def test_stop_at_returns_the_edited_activation_with_its_gradient(model: HookedVLM, batch: dict) -> None:
    double = [(MLP_OUT, lambda activation, hook: activation * 2)]
    plain = model.run_with_hooks(batch, stop_at=MLP_OUT)
    edited = model.run_with_hooks(batch, fwd_hooks=double, stop_at=MLP_OUT)
    assert torch.equal(edited, plain * 2)
    (gradient,) = torch.autograd.grad(edited.sum(), model.vision_encoder.embed.cls)
    assert gradient.any()


def test_stop_at_what_cannot_be_stopped_at(model: HookedVLM, retrieval: HookedVLM, batch: dict) -> None:
    with pytest.raises(HookError, match="no hook is called 'answer_decoder.hook_logit'; nearest: .*hook_logits"):
        model.run_with_cache(batch, stop_at="answer_decoder.hook_logit")
    pair = inputs("retrieval")
    with pytest.raises(HookError, match="did not pass hook_text_embeds"):
        retrieval.run_with_hooks(pair, stop_at="hook_text_embeds")
    assert not any(point.is_hooked for one in (model, retrieval) for point in one.hook_points())


def test_a_catch_all_in_a_hook_does_not_swallow_the_stop(model: HookedVLM, batch: dict) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return self.inner(*args, **kwargs)
            except Exception:
                pytest.fail("a stop is no error")

    inner = model.question_encoder.blocks[0]
    model.question_encoder.blocks[0] = Wrapped(inner)
    try:
        name = "question_encoder.blocks.0.hook_mlp_out"
        assert model.run_with_hooks(batch, stop_at=name).shape == (2, 5, 36)
    finally:
        model.question_encoder.blocks[0] = inner


# Gradients --------------------------------------------------------------------------------------------------------


def answer(logits: Tensor) -> Tensor:
    return logits[:, -1, 7].sum() - logits[:, -1, 8].sum()


def own_gradient(model: HookedVLM, batch: dict, name: str) -> Tensor:
    """By autograd alone: of what the readers of this hook point, and nobody else, were given."""
    own: list[Tensor] = []

    def split_off(activation: Tensor, hook: HookPoint) -> Tensor:
        own.append(activation.view_as(activation))
        return own[0]

    logits = model.run_with_hooks(batch, fwd_hooks=[(name, split_off)])
    return torch.autograd.grad(answer(logits), own)[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.usefixtures("unchecked")
def test_cached_gradients_are_autograds(attention: str, batch: dict) -> None:
    """``hook_mlp_in``'s, say, is not the gradient of the residual that it is a copy of, but of the MLP's reading."""
    model = HookedVLM.from_hf(hf_blip("vqa", ONE_LAYER), attention=attention)
    own_inputs = [name for name in model.hook_names if name.endswith(("q_input", "k_input", "v_input"))]
    others = [name for name in model.hook_names if name not in own_inputs]
    gradients: dict[str, Tensor] = {}
    for names in (others, own_inputs):
        _, cache = model.run_with_cache(batch, names_filter=names, incl_bwd=answer)
        assert set(cache) == {*names, *(f"{name}_grad" for name in names)}
        gradients |= {name: cache[f"{name}_grad"] for name in names}
    expected = {name: own_gradient(model, batch, name) for name in model.hook_names}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    wrong = {name: float((gradients[name] - expected[name]).abs().max()) / largest for name in expected}
    assert not {name: strayed for name, strayed in wrong.items() if not strayed < 1e-5}


def test_where_queries_have_their_own_input_gradients_go_through_it(model: HookedVLM, batch: dict) -> None:
    """And no longer through the LayerNorm that they shared."""
    block = "vision_encoder.blocks.1."
    own = [f"{block}hook_{name}_input" for name in "qkv"]
    _, cache = model.run_with_cache(batch, names_filter=[*own, f"{block}ln1.hook_normalized"], incl_bwd=answer)
    assert all(cache[f"{name}_grad"].any() for name in own)
    assert f"{block}ln1.hook_normalized_grad" not in cache
    _, cache = model.run_with_cache(batch, names_filter=f"{block}ln1.hook_normalized", incl_bwd=answer)
    assert cache[f"{block}ln1.hook_normalized_grad"].any()
    model.zero_grad(set_to_none=True)


def test_gradients_of_a_scalar_output_need_no_function(model: HookedVLM, batch: dict) -> None:
    class Summed(type(model)):  # type: ignore[misc]
        def forward(self, inputs: Any) -> Tensor:
            return super().forward(inputs).sum()

    kind, model.__class__ = type(model), Summed
    try:
        output, cache = model.run_with_cache(batch, names_filter=LOGITS, incl_bwd=True)
    finally:
        model.__class__ = kind
        model.zero_grad(set_to_none=True)
    assert output.shape == ()
    assert torch.equal(cache[f"{LOGITS}_grad"], torch.ones_like(cache[LOGITS]))


def test_a_backward_hook_can_replace_the_gradient(model: HookedVLM, batch: dict) -> None:
    seen: dict[str, Tensor] = {}

    def note(gradient: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = gradient

    with model.hooks(
        bwd_hooks=[("vision_encoder.hook_out", lambda gradient, hook: gradient * 0), ("vision_encoder.*", note)]
    ):
        answer(model(batch)).backward()
    assert not any(gradient.any() for gradient in seen.values())
    assert len(seen) > 50
    assert model.question_encoder.embed.token.weight.grad.any()
    assert not model.vision_encoder.embed.patch.weight.grad.any()
    model.zero_grad(set_to_none=True)


def test_backward_hooks_act_while_they_are_attached(model: HookedVLM, batch: dict) -> None:
    fired: list[str] = []
    hooks = [(MLP_OUT, lambda gradient, hook: fired.append(hook.name))]
    with model.hooks(bwd_hooks=hooks):
        logits = model(batch)
        answer(logits).backward(retain_graph=True)
        assert fired == [MLP_OUT]
    answer(logits).backward()
    assert fired == [MLP_OUT]
    with pytest.warns(UserWarning, match="removed before a backward"):
        logits = model.run_with_hooks(batch, bwd_hooks=hooks)
    answer(logits).backward()
    assert fired == [MLP_OUT]
    logits = model.run_with_hooks(batch, bwd_hooks=hooks, reset_hooks_end=False)
    answer(logits).backward()
    assert fired == [MLP_OUT] * 2
    model.reset_hooks()
    model.zero_grad(set_to_none=True)


def test_a_detached_activation_passes_no_gradient(model: HookedVLM, batch: dict) -> None:
    """Beside the fused kernel too, where the pattern's value is not what the output is made from."""
    model.attention = "sdpa"
    freeze = [("*hook_pattern", lambda pattern, hook: pattern.detach())]
    answer(model.run_with_hooks(batch, fwd_hooks=freeze)).backward()
    model.attention = "eager"
    assert model.question_encoder.blocks[0].attn.q.weight.grad is None
    assert model.question_encoder.blocks[0].attn.v.weight.grad.any()
    model.zero_grad(set_to_none=True)


# What is kept -----------------------------------------------------------------------------------------------------

POSITIONS = st.one_of(
    st.integers(-3, 2),
    st.slices(3).filter(lambda positions: (positions.step or 1) > 0),  # torch has no others
    st.lists(st.integers(-3, 2), min_size=1, max_size=4),
    st.lists(st.integers(0, 2), min_size=1, max_size=4).map(torch.tensor),
    st.lists(st.booleans(), min_size=3, max_size=3).map(torch.tensor),
)


@given(positions=POSITIONS)
@settings(max_examples=30)
def test_pos_slice(model: HookedVLM, positions: Any) -> None:
    """On the position axis, or the query axis of a pattern; an int drops it."""
    names = ["answer_decoder.blocks.0.hook_mlp_out", "answer_decoder.blocks.0.attn.hook_q"]
    pattern = "answer_decoder.blocks.0.cross_attn.hook_pattern"
    torch.manual_seed(0)
    given = inputs("vqa", batch=2, answer=3)
    with torch.no_grad():
        _, whole = model.run_with_cache(given, names_filter=[*names, pattern])
        _, part = model.run_with_cache(given, names_filter=[*names, pattern], pos_slice=positions)
    for name in names:
        assert torch.equal(part[name], whole[name][:, positions])
    assert torch.equal(part[pattern], whole[pattern][:, :, positions])


@pytest.mark.parametrize("positions", [5, -6, [0, 5], torch.tensor([7])], ids=str)
def test_pos_slice_out_of_range(model: HookedVLM, batch: dict, positions: Any) -> None:
    with pytest.raises(HookError, match=r"out of range at question_encoder.blocks.1.hook_mlp_out: 5 positions"):
        model.run_with_cache(batch, names_filter=MLP_OUT, pos_slice=positions)
    assert not model.hook_dict[MLP_OUT].is_hooked


def test_pos_slice_leaves_alone_what_has_no_positions(retrieval: HookedVLM) -> None:
    _, cache = retrieval.run_with_cache(inputs("retrieval"), names_filter="hook_itm_logits", pos_slice=3)
    assert cache["hook_itm_logits"].shape == (1, 2)


def test_remove_batch_dim(model: HookedVLM, batch: dict) -> None:
    one = {name: tensor[:1] for name, tensor in batch.items()}
    logits, cache = model.run_with_cache(one, remove_batch_dim=True)
    assert logits.dim() == 3
    assert cache[LOGITS].shape == logits.shape[1:]
    assert not cache.has_batch_dim
    with pytest.raises(HookError, match=r"needs a batch of 1; .* has 2 rows"):
        model.run_with_cache(batch, remove_batch_dim=True)
    assert not any(point.is_hooked for point in model.hook_points())


def test_device_and_dtype(model: HookedVLM, batch: dict) -> None:
    with torch.no_grad():
        logits, cache = model.run_with_cache(batch, dtype=torch.float64, device="cpu")
        assert logits.dtype == torch.float32
        assert {tensor.dtype for tensor in cache.values()} == {torch.float64}
        _, plain = model.run_with_cache(batch)
        assert all(torch.equal(cache[name], plain[name].double()) for name in plain)
        logits, cache = model.run_with_cache(batch, device="meta")
    assert {tensor.device.type for tensor in cache.values()} == {"meta"}
    assert logits.device.type == "cpu"


def test_what_is_cached_holds_no_graph(model: HookedVLM, batch: dict) -> None:
    logits, cache = model.run_with_cache(batch)
    assert logits.requires_grad
    assert not any(tensor.requires_grad for tensor in cache.values())
    logits.sum().backward()
    model.zero_grad(set_to_none=True)

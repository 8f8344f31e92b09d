"""What ``hooks``, ``run_with_hooks`` and ``run_with_cache`` mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_vlm import HookedVLM, HookError, HookPoint
from tests.tiny_blip import hf_blip, inputs

MLP_OUT = "question_encoder.blocks.1.hook_mlp_out"
LOGITS = "answer_decoder.hook_logits"


class OfTheTestError(Exception):
    """Raised by a test's hook."""


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_hf(hf_blip("vqa"))


@pytest.fixture
def batch() -> dict[str, Any]:
    return inputs("vqa", batch=2)


@pytest.fixture(autouse=True)
def nothing_left(model: HookedVLM):
    yield
    left = [name for name, point in model.hook_dict.items() if point.is_hooked or point.handles]
    model.reset_hooks(including_permanent=True)
    model.zero_grad(set_to_none=True)
    assert not left


def noting(into: list[str], word: str | None = None) -> Callable[..., None]:
    def note(activation: Tensor, hook: HookPoint) -> None:
        into.append(hook.name if word is None else word)

    return note


def zero(activation: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(activation)


def fail(activation: Tensor, hook: HookPoint) -> None:
    raise OfTheTestError


# Contexts --------------------------------------------------------------------------------------------------------


def test_hooks_last_as_long_as_their_context(model: HookedVLM, batch: dict) -> None:
    plain = model(batch)
    with model.hooks([(MLP_OUT, zero)]) as inside:
        assert inside is model
        edited = model(batch)
        assert torch.equal(model(batch), edited)
    assert not torch.equal(edited, plain)
    assert torch.equal(model(batch), plain)


def test_inner_context_takes_off_its_own_alone(model: HookedVLM, batch: dict) -> None:
    fired: list[str] = []
    with model.hooks([(MLP_OUT, noting(fired, "outer"))]):
        with model.hooks([(MLP_OUT, noting(fired, "inner"))]):
            model(batch)
        assert fired == ["outer", "inner"]
        model.run_with_hooks(batch, fwd_hooks=[(MLP_OUT, noting(fired, "run"))])
        model.run_with_cache(batch, names_filter=MLP_OUT)
        fired.clear()
        model(batch)
        assert fired == ["outer"]


def test_one_function_in_two_contexts_is_two_hooks(model: HookedVLM, batch: dict) -> None:
    fired: list[str] = []
    note = noting(fired)
    with model.hooks([(MLP_OUT, note)]):
        with model.hooks([(MLP_OUT, note), (MLP_OUT, note)]):
            model(batch)
        assert fired == [MLP_OUT] * 3
        model(batch)
    assert fired == [MLP_OUT] * 4


def test_hooks_at_a_point_see_what_those_before_them_made(model: HookedVLM, batch: dict) -> None:
    seen: list[Tensor] = []
    plain = model.run_with_cache(batch, names_filter=MLP_OUT)[1][MLP_OUT]
    model.run_with_hooks(
        batch,
        fwd_hooks=[
            (MLP_OUT, lambda activation, hook: activation + 1),
            (MLP_OUT, lambda activation, hook: activation.mul_(2)),
            (MLP_OUT, lambda activation, hook: seen.append(activation.clone())),
        ],
    )
    assert torch.equal(seen[0], (plain + 1) * 2)
    with model.hooks([(MLP_OUT, zero)]):
        assert not model.run_with_cache(batch, names_filter=MLP_OUT)[1][MLP_OUT].any()
    first: list[str] = []
    model.add_hook(MLP_OUT, noting(first, "second"))
    model.add_hook(MLP_OUT, noting(first, "first"), prepend=True)
    model(batch)
    assert first == ["first", "second"]
    model.reset_hooks()


def test_hooks_may_be_left_on(model: HookedVLM, batch: dict) -> None:
    fired: list[str] = []
    model.run_with_hooks(batch, fwd_hooks=[(MLP_OUT, noting(fired))], reset_hooks_end=False)
    model(batch)
    assert fired == [MLP_OUT] * 2
    model.reset_hooks()
    model(batch)
    assert fired == [MLP_OUT] * 2


def test_permanent_hooks_outlive_contexts_and_resets(model: HookedVLM, batch: dict) -> None:
    fired: list[str] = []
    model.add_perma_hook(MLP_OUT, noting(fired))
    with model.hooks([(LOGITS, zero)]):
        model(batch)
    model.reset_hooks()
    model(batch)
    assert fired == [MLP_OUT] * 2
    model.reset_hooks(including_permanent=True)
    model(batch)
    assert fired == [MLP_OUT] * 2


def test_reset_by_direction_and_level(model: HookedVLM, batch: dict) -> None:
    fired: list[str] = []
    model.add_hook(MLP_OUT, noting(fired, "forward"), level=1)
    model.add_hook(MLP_OUT, noting(fired, "backward"), "bwd", level=2)
    model(batch).sum().backward()
    model.reset_hooks(direction="bwd")
    model(batch).sum().backward()
    assert fired == ["forward", "backward", "forward"]
    model.reset_hooks(level=2)
    model(batch)
    model.reset_hooks(level=1)
    model(batch)
    assert fired == ["forward", "backward", "forward", "forward"]


def test_contexts_of_hook_points_are_cleared_when_asked(model: HookedVLM, batch: dict) -> None:
    def keep(activation: Tensor, hook: HookPoint) -> None:
        hook.ctx["mean"] = activation.mean()

    point = model.hook_dict[MLP_OUT]
    model.run_with_hooks(batch, fwd_hooks=[(MLP_OUT, keep)])
    assert "mean" in point.ctx
    model.run_with_hooks(batch, fwd_hooks=[(MLP_OUT, keep)], clear_contexts=True)
    assert not point.ctx
    model.run_with_hooks(batch, fwd_hooks=[(MLP_OUT, keep)])
    model.reset_hooks()
    assert not point.ctx


# Whatever goes wrong, hooks come off ------------------------------------------------------------------------------


def test_removed_when_a_hook_raises(model: HookedVLM, batch: dict) -> None:
    fired: list[str] = []
    for reset in (True, False):
        with pytest.raises(OfTheTestError):
            model.run_with_hooks(batch, fwd_hooks=[("*", noting(fired)), (MLP_OUT, fail)], reset_hooks_end=reset)
    assert fired
    with model.hooks([(MLP_OUT, fail)]), pytest.raises(OfTheTestError):
        model.run_with_cache(batch)


def test_removed_when_the_body_raises(model: HookedVLM) -> None:
    with pytest.raises(OfTheTestError), model.hooks([("*", zero)]):
        raise OfTheTestError
    with pytest.raises(KeyboardInterrupt), model.hooks([("*", zero)], reset_hooks_end=False):
        raise KeyboardInterrupt


def test_removed_when_the_forward_or_the_backward_fails(model: HookedVLM, batch: dict) -> None:
    del batch["input_ids"]
    with pytest.raises(ValueError, match="input_ids"):
        model.run_with_cache(batch)
    with pytest.raises(HookError, match="one number"):
        model.run_with_cache(inputs("vqa"), incl_bwd=True)


def test_removed_when_a_later_name_is_wrong(model: HookedVLM) -> None:
    with pytest.raises(HookError), model.hooks([("*", zero), ("no.such.hook", zero)]):
        pytest.fail("the body must not run")


# Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (MLP_OUT, [MLP_OUT]),
        ("question_encoder.*.hook_mlp_out", [MLP_OUT.replace("1", "0"), MLP_OUT]),
        ("*encoder.blocks.[01].hook_mlp_out", [f"vision_encoder.blocks.{layer}.hook_mlp_out" for layer in (0, 1)]),
        ([LOGITS, MLP_OUT, "*.hook_logits"], [MLP_OUT, LOGITS]),
        (lambda name: name.endswith("hook_logits"), [LOGITS]),
    ],
)
def test_names_patterns_lists_and_predicates(model: HookedVLM, batch: dict, names: Any, expected: list[str]) -> None:
    fired: list[str] = []
    model.run_with_hooks(batch, fwd_hooks=[(names, noting(fired))])
    assert [name for name in fired if name in expected] == expected
    assert list(model.run_with_cache(batch, names_filter=names)[1]) == fired
    if not (isinstance(names, str) and "[" in names):
        assert fired == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("question_encoder.blocks.1.hook_mlpout", rf"no hook is called.*nearest:.*{MLP_OUT}"),
        ("question_encoder.blocks.7.*", "pattern matches no hook 'question_encoder.blocks.7"),
        (
            [MLP_OUT, "answer_decoder.hook_logit"],
            "no hook is called 'answer_decoder.hook_logit'; nearest: .*hook_logits",
        ),
        (lambda name: False, r"the predicate '<lambda>' matches none of \d+ hooks"),
        ("", "no hook is called ''"),
    ],
)
def test_a_name_that_selects_nothing(model: HookedVLM, batch: dict, names: Any, message: str) -> None:
    for run in (
        lambda: model.run_with_hooks(batch, fwd_hooks=[(names, zero)]),
        lambda: model.run_with_cache(batch, names_filter=names),
        lambda: model.add_hook(names, zero, "bwd"),
    ):
        with pytest.raises(HookError, match=message):
            run()


@given(data=st.data())
def test_any_names_are_cached_in_forward_order(model: HookedVLM, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(model.hook_names), min_size=1, max_size=6))
    torch.manual_seed(0)
    _, cache = model.run_with_cache(inputs("vqa"), names_filter=names)
    assert list(cache) == [name for name in model.hook_names if name in names]


# What a hook may answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda activation: activation[:1], r"hook of_this_shape at .*1.hook_mlp_out returned \(1, 5, 36\) float32; .*"
         r"\(2, 5, 36\) float32"),
        (lambda activation: activation.double(), r"returned \(2, 5, 36\) float64; the activation is .*float32"),
        (lambda activation: 0.0, "returned float; a hook returns a tensor or None"),
        (lambda activation: (activation,), "returned tuple"),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit(model: HookedVLM, batch: dict, answer: Callable, message: str) -> None:
    def of_this_shape(activation: Tensor, hook: HookPoint) -> Any:
        return answer(activation)

    with pytest.raises(HookError, match=message):
        model.run_with_hooks(batch, fwd_hooks=[(MLP_OUT, of_this_shape)])
    with pytest.raises(HookError, match=message), model.hooks(bwd_hooks=[(MLP_OUT, of_this_shape)]):
        model(batch).sum().backward()


@pytest.mark.usefixtures("unchecked")
def test_direction_is_forward_or_backward(model: HookedVLM) -> None:
    with pytest.raises(HookError, match="'fwd' or 'bwd', not 'both'"):
        model.add_hook(MLP_OUT, zero, "both")


@pytest.mark.parametrize(
    ("name", "reader", "others"),
    [
        ("vision_encoder.blocks.1.hook_attn_in", "attn.hook_q", ["hook_resid_pre"]),
        ("vision_encoder.blocks.1.hook_mlp_in", "mlp.hook_pre", ["hook_resid_mid", "hook_attn_out"]),
        ("question_encoder.blocks.1.hook_attn_in", "attn.hook_v", ["hook_resid_pre"]),
        ("question_encoder.blocks.1.hook_cross_attn_in", "cross_attn.hook_q", ["hook_normalized_resid_mid"]),
        ("question_encoder.blocks.1.hook_mlp_in", "mlp.hook_pre", ["hook_normalized_resid_mid_cross"]),
        ("question_encoder.blocks.1.hook_q_input", "attn.hook_q", ["attn.hook_k", "attn.hook_v", "hook_attn_in"]),
        ("vision_encoder.blocks.1.hook_k_input", "attn.hook_k", ["attn.hook_q", "attn.hook_v", "hook_attn_in"]),
        ("vision_encoder.blocks.1.hook_v_input", "attn.hook_v", ["attn.hook_q", "attn.hook_k", "hook_attn_in"]),
    ],
)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "returned"])
def test_a_reader_can_be_edited_alone(
    model: HookedVLM, batch: dict, name: str, reader: str, others: list[str], in_place: bool
) -> None:
    """The residual, and who else reads it, keep their values."""

    def shift(activation: Tensor, hook: HookPoint) -> Tensor | None:
        noise = torch.randn(activation.shape, generator=torch.Generator().manual_seed(3))
        if not in_place:
            return activation + noise
        activation += noise
        return None

    block = name.rpartition(".")[0] + "."
    with torch.no_grad():
        _, plain = model.run_with_cache(batch)
        with model.hooks([(name, shift)]):
            _, edited = model.run_with_cache(batch)
    for other in others:
        assert torch.equal(edited[block + other], plain[block + other])
    assert not torch.allclose(edited[name], plain[name])
    assert not torch.allclose(edited[block + reader], plain[block + reader])
    # What the sub-layer writes is added to the residual as it was.
    stream, written, total = {
        "attn": (f"{block}hook_resid_pre", f"{block}hook_attn_out", f"{block}hook_resid_mid"),
        "cross_attn": (others[0] and block + others[0], f"{block}hook_cross_attn_out", f"{block}hook_resid_mid_cross"),
        "mlp": (block + others[0], f"{block}hook_mlp_out", f"{block}hook_resid_post"),
    }[reader.split(".")[0]]
    assert torch.equal(edited[total], plain[stream] + edited[written])


def test_a_residual_edited_in_place_leaves_its_other_names_alone(model: HookedVLM, batch: dict) -> None:
    """``blocks.1.hook_resid_pre`` is the tensor that ``blocks.0.hook_resid_post`` showed."""

    def erase(activation: Tensor, hook: HookPoint) -> None:
        activation.zero_()

    before, after = "vision_encoder.blocks.0.hook_resid_post", "vision_encoder.blocks.1.hook_resid_pre"
    with torch.no_grad(), model.hooks([(after, erase)]):
        _, cache = model.run_with_cache(batch, names_filter=[before, after])
    assert cache[before].any()
    assert not cache[after].any()


def test_a_hook_point_knows_its_place(model: HookedVLM) -> None:
    point = model.hook_dict[MLP_OUT]
    assert (point.name, point.tower, point.layer()) == (MLP_OUT, "question_encoder", 1)
    assert point.axes == ("b", "p", "d_model")
    with pytest.raises(HookError, match="not inside a block"):
        model.hook_dict[LOGITS].layer()

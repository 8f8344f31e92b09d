"""The closed-form edit is the ridge regression that it says, changes one weight alone, and writes a fact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm import HookedVLM
from hooked_vlm.data import shapes
from hooked_vlm.experiments.edit_mlp import (
    edit_mlp,
    edited_mlp,
    key_of,
)

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

ASKED = {"prompt": "{question}"}
TOWERS = {"toy-llava": "language_model", "toy-blip-vqa": "question_encoder"}
LAYER = 1


@pytest.fixture(scope="module", params=TOWERS)
def toy(request):
    """A model without and one with biases, and inputs for it."""
    model = HookedVLM.from_pretrained(request.param)
    sample = shapes(1, seed=7, kinds=("color",))[0]
    inputs = model.prepare(sample.picture(), sample.question)
    return model, TOWERS[request.param], inputs


def made(model, tower, n=1, scale=1.0, seed=0):
    """Keys and values."""
    generator = torch.Generator().manual_seed(seed)
    d_model, d_mlp = model.get_submodule(tower).blocks[LAYER].mlp.down.weight.shape
    return (
        scale * torch.randn(n, d_mlp, generator=generator, dtype=torch.float64),
        torch.randn(n, d_model, generator=generator, dtype=torch.float64),
    )


def old_of(model, tower):
    down = model.get_submodule(tower).blocks[LAYER].mlp.down
    bias = 0.0 if down.bias is None else down.bias.detach().double().numpy()
    return down.weight.detach().double().numpy(), bias


def parameters_of(model):
    return {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}


# The closed form ------------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(n=st.integers(1, 5), ridge=st.sampled_from([1e-3, 0.01, 1.0, 30.0]), seed=st.integers(0, 9))
def test_it_solves_the_normal_equations(toy, n, ridge, seed):
    """``(K^T K + ridge) W^T = K^T V + ridge W_old^T``, as wide as the MLP."""
    model, tower, _ = toy
    key, value = made(model, tower, n, seed=seed)
    new = edit_mlp(model, LAYER, key, value, ridge=ridge, tower=tower)
    old, bias = old_of(model, tower)
    keys, targets = key.numpy(), value.numpy() - bias
    gram = keys.T @ keys + ridge * np.eye(keys.shape[1])
    expected = np.linalg.solve(gram, keys.T @ targets + ridge * old.T).T
    assert np.allclose(new.numpy(), expected, atol=1e-5)
    assert new.dtype == torch.float32


def test_it_is_the_least_squares_solution_that_ridge_says(toy):
    """Rows of ``sqrt(ridge) I`` and of the old weight beside the keys and values, as lstsq takes them."""
    model, tower, _ = toy
    key, value = made(model, tower, 3)
    old, bias = old_of(model, tower)
    rows = np.concatenate([key.numpy(), 0.1 * np.eye(key.shape[1])])
    targets = np.concatenate([value.numpy() - bias, 0.1 * old.T])
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    assert np.allclose(edit_mlp(model, LAYER, key, value, ridge=0.01, tower=tower).numpy(), expected, atol=1e-5)


def test_no_ridge_answers_keys_exactly_and_nothing_else(toy):
    model, tower, _ = toy
    old, bias = old_of(model, tower)
    for n in (1, 4):
        key, value = made(model, tower, n)
        new = edit_mlp(model, LAYER, key, value, ridge=0.0, tower=tower).double().numpy()
        assert np.allclose(key.numpy() @ new.T + bias, value.numpy(), atol=1e-4)
        # What is orthogonal to all keys is answered as before.
        basis, _ = np.linalg.qr(np.concatenate([key.numpy(), made(model, tower, 1, seed=5)[0].numpy()]).T)
        assert np.allclose(new @ basis[:, -1], old @ basis[:, -1], atol=1e-5)
    alone, _ = made(model, tower)
    small = edit_mlp(model, LAYER, alone, made(model, tower)[1], ridge=1e-9, tower=tower)
    exact = edit_mlp(model, LAYER, alone, made(model, tower)[1], ridge=0.0, tower=tower)
    assert torch.allclose(small, exact, atol=1e-6)


def test_an_endless_ridge_changes_nothing(toy):
    model, tower, _ = toy
    key, value = made(model, tower, 2)
    down = model.get_submodule(tower).blocks[LAYER].mlp.down.weight
    assert torch.equal(edit_mlp(model, LAYER, key, value, ridge=1e15, tower=tower), down)
    assert not torch.equal(edit_mlp(model, LAYER, key, value, ridge=1.0, tower=tower), down)


def test_a_value_that_is_answered_already_changes_nothing(toy):
    model, tower, _ = toy
    key, _ = made(model, tower, 2)
    old, bias = old_of(model, tower)
    value = torch.from_numpy(key.numpy() @ old.T + bias)
    assert np.allclose(edit_mlp(model, LAYER, key, value, ridge=0.01, tower=tower).numpy(), old, atol=1e-6)


def test_the_order_of_keys_does_not_matter_and_twice_the_same_is_one_with_half_the_ridge(toy):
    model, tower, _ = toy
    key, value = made(model, tower, 3)
    one = edit_mlp(model, LAYER, key, value, ridge=0.5, tower=tower)
    other = edit_mlp(model, LAYER, key.flip(0), value.flip(0), ridge=0.5, tower=tower)
    assert torch.allclose(one, other, atol=1e-6)
    twice = edit_mlp(model, LAYER, key[:1].repeat(2, 1), value[:1].repeat(2, 1), ridge=1.0, tower=tower)
    assert torch.allclose(twice, edit_mlp(model, LAYER, key[0], value[0], ridge=0.5, tower=tower), atol=1e-6)


def test_the_model_stays_as_it_is(toy):
    model, tower, _ = toy
    before = parameters_of(model)
    edit_mlp(model, LAYER, *made(model, tower), tower=tower)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 9}, "has . layers; there is no layer 9"),
        ({"layer": -1}, "there is no layer -1"),
        ({"tower": "decoder"}, "no tower 'decoder'"),
        ({"tower": "projector"}, "no tower 'projector'|projector has 0 layers"),
        ({"ridge": -1.0}, "a ridge is 0 or more"),
        ({"ridge": float("inf")}, "a ridge is 0 or more"),
        ({"ridge": float("nan")}, "a ridge is 0 or more"),
        ({"key": torch.ones(7)}, r"keys \(7,\)"),
        ({"value": torch.ones(2, 96)}, r"values \(2, 96\)"),
        ({"key": torch.zeros(384), "ridge": 0.0}, "0 or depend on each other"),
        ({"key": torch.full((384,), float("nan"))}, "NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_an_error(toy, change, message):
    model, tower, _ = toy
    key, value = made(model, tower)
    given_key = change.get("key", key[0])
    if given_key.shape == (384,):
        given_key = given_key[: key.shape[1]]
    arguments = {"ridge": 0.01, "tower": tower} | {name: change[name] for name in ("ridge", "tower") if name in change}
    with pytest.raises(ValueError, match=message):
        edit_mlp(model, change.get("layer", LAYER), given_key, change.get("value", value[0]), **arguments)


# In and out of the model ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_edited_mlp_writes_the_value_at_the_key(toy):
    """At the key's position it writes the value, its bias included; earlier layers and other weights are as before."""
    model, tower, inputs = toy
    place, site = 4, f"{tower}.blocks.{LAYER}.hook_mlp_out"
    key = key_of(model, inputs, LAYER, place, tower=tower)
    value = made(model, tower)[1].float()
    new = edit_mlp(model, LAYER, key, value, ridge=0.0, tower=tower)
    before, clean = parameters_of(model), model.run_with_cache(inputs)[1]
    with edited_mlp(model, LAYER, new, tower=tower) as edited:
        assert edited is model
        _, cache = model.run_with_cache(inputs)
        others = {name for name, one in model.named_parameters() if not torch.equal(one, before[name][1])}
    assert others == {f"{tower}.blocks.{LAYER}.mlp.down.weight"}
    assert torch.allclose(cache[site][:, place], value, atol=1e-4)
    names = list(clean)
    first = names.index(site)
    assert all(torch.equal(cache[name], clean[name]) for name in names[:first])
    assert not torch.equal(cache[names[first]], clean[names[first]])


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_the_old_weight_comes_back_bit_for_bit(toy, fails):
    model, tower, inputs = toy
    before, clean = parameters_of(model), model(inputs)
    new = edit_mlp(model, LAYER, *made(model, tower, scale=3.0), tower=tower)

    def use():
        with edited_mlp(model, LAYER, new, tower=tower):
            # One inside the other, too.
            with edited_mlp(model, 2, torch.zeros_like(new), tower=tower):
                pass
            assert not torch.equal(model(inputs), clean)
            if fails:
                raise KeyError("in the middle")

    if fails:
        with pytest.raises(KeyError):
            use()
    else:
        use()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert torch.equal(model(inputs), clean)


def test_a_weight_of_another_shape(toy):
    model, tower, _ = toy
    with (
        pytest.raises(ValueError, match=r"the weight is \(3, 4\)"),
        edited_mlp(model, LAYER, torch.zeros(3, 4), tower=tower),
    ):
        pass


@torch.no_grad()
def test_a_model_over_hfs_is_edited_and_restored_with_it(toy):
    """The two share each parameter, which stays the same object."""
    model, tower, _ = toy
    down = model.get_submodule(tower).blocks[LAYER].mlp.down
    shared = down.weight
    with edited_mlp(model, LAYER, torch.zeros_like(shared), tower=tower):
        assert down.weight is shared
        assert not shared.any()
    assert shared.any()


def test_half_precision_keeps_its_dtype():
    model = HookedVLM.from_pretrained("toy-llava", dtype=torch.bfloat16)
    key, value = made(model, "language_model")
    new = edit_mlp(model, LAYER, key, value)
    assert new.dtype == torch.bfloat16
    whole = edit_mlp(HookedVLM.from_pretrained("toy-llava"), LAYER, key, value)
    assert torch.allclose(new.float(), whole, atol=0.02)

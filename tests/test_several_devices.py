"""``device_map`` over several devices: wherever the parts are kept, the numbers are those of a model in one place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from hooked_vlm.placement import Offloaded
from tests.placed_models import CASES, assert_same, everything, expected, inputs_of, load, saved
from tests.pretend_devices import accelerators


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return saved(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def devices() -> Iterator[tuple[str, str]]:
    with accelerators() as names:
        yield names


SPREAD: dict[str, dict[str, str]] = {
    "towers": {"": "first", "{tower}": "second"},
    "all but a tower": {"": "second", "{tower}": "first"},
    "a block": {"": "first", "{tower}.blocks.1": "second"},
    "half a block": {"": "first", "{tower}.blocks.1.mlp": "second"},
    "every other": {"": "first", "{tower}.blocks.0": "second", "vision_encoder.blocks.1": "second"},
    "what no module computes": {"": "first", "vision_encoder.embed": "second"},
    "a tower on the CPU": {"": "first", "{tower}": "cpu"},
    "a tower on disk": {"": "first", "vision_encoder": "disk"},
    "all but a norm on the CPU": {"": "cpu", "vision_encoder.blocks.0.ln1": "first"},
    "everywhere": {"": "first", "{tower}": "disk", "{tower}.blocks.0": "second", "vision_encoder.blocks": "cpu"},
}
"""``{tower}`` is the one that edits are made in."""
OF_LLAVA = {
    "projector": {"": "first", "projector": "second"},
    "embeddings": {"": "first", "language_model.embed": "second"},
    "unembedding": {"": "first", "language_model.unembed": "second", "language_model.ln_final": "cpu"},
}


def spread(name: str, where: str, devices: tuple[str, str]) -> dict[str, str]:
    names = dict(zip(("first", "second"), devices, strict=True))
    return {
        part.format(tower=CASES[name].tower): names.get(place, place)
        for part, place in {**SPREAD, **OF_LLAVA}[where].items()
    }


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "where"),
    [
        *(("llava next", where) for where in (*SPREAD, *OF_LLAVA)),
        *(("llava, tied", where) for where in (*OF_LLAVA, "everywhere")),
        *(("blip", where) for where in ("towers", "half a block", "a tower on disk", "everywhere")),
        *((name, where) for name in ("clip", "vit") for where in ("towers", "a block", "everywhere")),
    ],
)
def test_the_numbers_of_a_model_on_one_device(
    name: str, where: str, devices: tuple[str, str], checkpoints: Mapping[str, Path]
) -> None:
    """Equal to the bit; every activation is where its part is, and logits are where the inputs go."""
    model = load(checkpoints[name], device_map=spread(name, where, devices))
    assert str(model.device) in devices
    logits = model(inputs_of(name))
    assert logits.device == model.device
    assert_same(everything(model, name), expected(checkpoints, name, device=devices[0]))


def test_a_part_runs_where_it_is_kept(devices: tuple[str, str], checkpoints: Mapping[str, Path]) -> None:
    first, second = devices
    where = {"": first, "language_model.blocks.1": second, "language_model.blocks.2": "cpu", "projector.up": second}
    model = load(checkpoints["llava"], device_map=where)
    _, seen = model.run_with_cache(inputs_of("llava"))
    places = {name: str(activation.device) for name, activation in seen.items()}
    assert {name for name, place in places.items() if place != first} == {
        name for name in places if name.startswith("language_model.blocks.1.")
    }
    assert {str(parameter.device) for parameter in model.language_model.blocks[1].parameters()} == {second}
    offloaded = [name for name, parameter in model.named_parameters() if isinstance(parameter, Offloaded)]
    assert offloaded == [name for name, _ in model.named_parameters() if name.startswith("language_model.blocks.2.")]
    assert "cpu" in repr(model.language_model.blocks[2].ln1.weight)


def test_home_is_the_first_accelerator_of_the_map(devices: tuple[str, str], checkpoints: Mapping[str, Path]) -> None:
    first, second = devices
    for where, home in (
        ({"": first, "vision_encoder": second}, first),
        ({"vision_encoder": "cpu", "projector": second, "language_model": first}, second),
    ):
        assert str(load(checkpoints["llava"], device_map=where).device) == home


def test_one_device_is_no_spread(devices: tuple[str, str], checkpoints: Mapping[str, Path]) -> None:
    """A map of one place gives a model like any other: no hooks, nothing to fetch, free to move."""
    model = load(checkpoints["llava, tied"], device_map=devices[1])
    assert not any(isinstance(parameter, Offloaded) for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.language_model.unembed.weight is model.language_model.embed.token.weight


@pytest.mark.parametrize("name", CASES)
def test_what_is_spread_is_saved_from_where_it_is_kept(
    name: str,
    devices: tuple[str, str],
    checkpoints: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A model that does not fit into an accelerator's memory is not fetched there to be saved."""
    written: list[dict[str, Tensor]] = []
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", lambda state, _: written.append(dict(state)))
    load(checkpoints[name], device_map=spread(name, "everywhere", devices)).save_hf(tmp_path / "saved")
    load(checkpoints[name]).save_hf(tmp_path / "plain")
    ours, theirs = written
    assert not any(isinstance(tensor, Offloaded) for tensor in ours.values())
    assert len({tensor.device for tensor in ours.values()}) == 3
    assert_same({key: tensor.to("cpu") for key, tensor in ours.items()}, theirs)


def test_views_of_weights_that_are_elsewhere(devices: tuple[str, str], checkpoints: Mapping[str, Path]) -> None:
    model = load(checkpoints["llava"], device_map={"": devices[0], "language_model": "cpu"})
    plain = load(checkpoints["llava"])
    for tower in ("vision_encoder", "language_model"):
        ours, theirs = (each.get_submodule(tower).blocks[1] for each in (model, plain))
        for view in ("W_Q", "W_K", "W_V", "W_O"):
            assert torch.equal(getattr(ours.attn, view).to("cpu"), getattr(theirs.attn, view))
        for view in ("W_in", "W_out"):
            assert torch.equal(getattr(ours.mlp, view).to("cpu"), getattr(theirs.mlp, view))
    assert torch.equal(model.language_model.W_U.to("cpu"), plain.language_model.W_U)
    assert model.language_model.W_U.device == model.device


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.cpu, lambda model: model.to(torch.float64)])
def test_what_is_spread_is_not_moved(
    change: Callable[[nn.Module], Any], devices: tuple[str, str], checkpoints: Mapping[str, Path]
) -> None:
    for where in ({"": devices[0], "language_model": "cpu"}, {"": devices[0], "projector": devices[1]}):
        model = load(checkpoints["llava"], device_map=where)
        with pytest.raises(RuntimeError, match="spread over devices is neither moved nor converted"):
            change(model)
        assert model.dtype == torch.float32


def test_pretended_devices_do_not_mix(devices: tuple[str, str]) -> None:
    """Else the tests above could not fail."""
    here, there = (torch.ones(2, 2, device=device) for device in devices)
    for other in (there, torch.ones(2, 2)):
        with pytest.raises(RuntimeError, match="aten.mm.default of tensors on|same device"):
            here @ other


# A weight that is kept elsewhere --------------------------------------------------------------------------------------


def offloaded(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(Offloaded(tensor, torch.device("cpu")))


def test_an_offloaded_weight_is_a_parameter_like_any_other() -> None:
    """Values, gradients, views and dtype are the plain parameter's, in and out of inference mode."""
    plain, other = nn.Linear(4, 6), nn.Linear(4, 6)
    other.weight, other.bias = offloaded(plain.weight.detach()), offloaded(plain.bias.detach())
    x, y = (torch.linspace(-1, 1, 8).view(2, 4).requires_grad_() for _ in range(2))
    for layer, inputs in ((plain, x), (other, y)):
        (layer(inputs).square().sum() + layer.weight[2:4].T.sum()).backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(plain.weight.grad, other.weight.grad)
    assert torch.equal(plain.bias.grad, other.bias.grad)
    assert (other.weight.shape, other.weight.dtype) == (plain.weight.shape, plain.weight.dtype)
    with torch.inference_mode():
        assert torch.equal(plain(x), other(x))
    assert isinstance(other.weight, nn.Parameter)


def test_an_offloaded_weight_is_copied_but_not_written_to() -> None:
    tensor = torch.arange(6.0)
    weight = offloaded(tensor)
    copied = copy.deepcopy(weight)
    assert isinstance(copied, nn.Parameter)
    assert isinstance(copied.detach(), Offloaded)
    assert torch.equal(copied + 0, tensor)
    for write in (lambda: weight.mul_(2), lambda: weight.data.zero_()):
        with torch.no_grad(), pytest.raises(RuntimeError, match="offloaded weight cannot be written to"):
            write()
    assert torch.equal(tensor, torch.arange(6.0))

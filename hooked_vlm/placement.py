"""Where a model's parameters are kept, and where they are used: what ``device_map`` does.

A model has a home: the first accelerator that its map names, or the CPU. A part that is kept on another accelerator
runs there; it fetches its inputs and brings its output home, so that between parts every tensor is at home. What is
kept on the CPU or on disk is used at home and fetched at each use, wherever in the code that is: a part may read
another's weights (``W_O`` for ``hook_result``, LayerNorm for ``hook_q_input``), and nothing of a model that is no
module of its own (a class token, LLaVA-NeXT's newline) is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hooked_vlm.components import Block, Mask
from hooked_vlm.files import whole_folder

DeviceMap = str | Mapping[str, int | str | torch.device]
"""``"auto"`` or its like, a device, or a device (``"disk"`` too) for each part by name; the longest name counts."""

Keep = Callable[[str, Tensor], Tensor]
"""A parameter's name and its tensor as the checkpoint has it, to the tensor as it is kept."""

INFERRED = ("auto", "balanced", "balanced_low_0", "sequential")
DISK: Literal["disk"] = "disk"
Place = torch.device | Literal["disk"]


class Offloaded(Tensor):
    """A weight that is kept elsewhere than on its ``device``, and is fetched there each time it is used; read-only."""

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor, device: torch.device) -> Offloaded:
        self = Tensor._make_wrapper_subclass(cls, stored.shape, dtype=stored.dtype, device=device)
        self.stored = stored
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored, args[0].device)
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError("an offloaded weight cannot be written to: load the model without device_map for that")
        args, kwargs = tree_map_only(cls, lambda weight: weight.stored.to(weight.device), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.detach(), self.requires_grad)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Offloaded({tuple(self.shape)}, dtype={self.dtype}, device={self.device}, kept={self.stored.device})"


def kept(parameter: Tensor) -> Tensor:
    """A parameter's tensor where it is kept, without fetching it."""
    return parameter.stored if isinstance(parameter, Offloaded) else parameter.detach()


def fill_and_place(
    model: nn.Module,
    device_map: DeviceMap,
    fill: Callable[[Keep], None],
    *,
    dtype: torch.dtype | None,
    offload_folder: str | Path | None,
) -> None:
    """Let ``fill`` give a model its parameters, one by one, and put each where the map says.

    Raises:
        ImportError: accelerate is needed and not installed.
        ValueError: an unknown device; parts that the model does not have, or that the map leaves out; parts to be
            written to disk without a folder.
    """
    if isinstance(device_map, str):
        device_map = _inferred(model, device_map, dtype) if device_map in INFERRED else {"": device_map}
    named = {name: _place(value) for name, value in device_map.items()}
    accelerators = [place for place in named.values() if isinstance(place, torch.device) and place.type != "cpu"]
    home = accelerators[0] if accelerators else torch.device("cpu")
    places = _places(model, named)
    written: dict[str, torch.dtype] = {}
    with ExitStack() as stack:
        folder: Path | None = None

        def keep(name: str, tensor: Tensor) -> Tensor:
            nonlocal folder
            place = places[name]
            if isinstance(place, torch.device):
                return tensor.to(device=place, dtype=dtype)
            converted = tensor.to(dtype=dtype)
            if converted is tensor:  # It is memory-mapped.
                return tensor
            if offload_folder is None:
                raise ValueError(
                    f"{name} is to be kept on disk as {dtype}, and the checkpoint holds it as {tensor.dtype}: say with "
                    "offload_folder= where to write it, or leave dtype as it is"
                )
            folder = folder or stack.enter_context(whole_folder(offload_folder))
            _write(converted, _file(folder, name))
            written[name] = converted.dtype
            return converted.to("meta")

        fill(keep)
    if offload_folder is not None:
        _read_back(model, written, Path(offload_folder))
    _settle(model, home)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.dat"


def _write(tensor: Tensor, path: Path) -> None:
    """The bytes alone: mapped from a file's beginning, a tensor is aligned as in memory, which can decide last bits."""
    tensor.contiguous().flatten().view(torch.uint8).numpy().tofile(path)


def _read_back(model: nn.Module, written: Mapping[str, torch.dtype], folder: Path) -> None:
    """Give parameters that were written to a folder their tensors, memory-mapped."""
    mapped: dict[int, nn.Parameter] = {}
    for name, dtype in written.items():
        parameter = model.get_parameter(name)
        stored = torch.from_file(str(_file(folder, name)), size=parameter.numel(), dtype=dtype)
        mapped[id(parameter)] = nn.Parameter(stored.view(parameter.shape))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in mapped:
            _set(model, name, mapped[id(parameter)])


def _places(model: nn.Module, named: Mapping[str, Place]) -> dict[str, Place]:
    """Where each parameter is to be kept: where the map says of it, or of the smallest part that it is in."""
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known = {*parameters, *(name for name, _ in model.named_modules())}
    unknown = [name for name in named if name not in known]
    if unknown:
        towers = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"device_map names parts that the model does not have: {', '.join(unknown)}. Its parts are {towers}, and "
            "theirs, such as language_model.blocks.0"
        )
    found = {name: next((part for part in _wholes(name) if part in named), None) for name in parameters}
    missing = [name for name, part in found.items() if part is None]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(f"device_map says nothing of {', '.join(missing[:4])}{more}; '' stands for all the rest")
    return {name: named[part] for name, part in found.items() if part is not None}


def _wholes(name: str) -> Iterator[str]:
    """A name, and what it is a part of, up to the whole model."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _place(value: int | str | torch.device) -> Place:
    if value == DISK:
        return DISK
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        expected = f"{', '.join(INFERRED)} for the whole; disk, a device or its number for a part"
        reason = str(error).splitlines()[0]
        raise ValueError(f"device_map has {value!r} ({reason}); it may have {expected}") from error
    # With its number, as a tensor's device has it.
    return device if device.type == "cpu" else torch.empty(0, device=device).device


def _inferred(model: nn.Module, kind: str, dtype: torch.dtype | None) -> dict[str, int | str | torch.device]:
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise ImportError(f"device_map={kind!r} needs accelerate: pip install 'hooked-vlm[accelerate]'") from error
    whole = sorted({type(module).__name__ for module in model.modules() if isinstance(module, Block)})
    memory = None
    if kind != "sequential":
        is_low = kind == "balanced_low_0"
        memory = get_balanced_memory(model, dtype=dtype, low_zero=is_low, no_split_module_classes=whole)
    return dict(infer_auto_device_map(model, memory, no_split_module_classes=whole, dtype=dtype))


def _settle(model: nn.Module, home: torch.device) -> None:
    """Parts kept on another accelerator run there; all other parameters that are not at home are fetched."""
    is_spread = False
    fetched: dict[int, nn.Parameter] = {}
    for part, names in _parts(model):
        devices = {model.get_parameter(name).device for name in names}
        runs = next(iter(devices)) if part is not None and len(devices) == 1 else home
        if part is not None and runs.type != "cpu" and runs != home:
            _send(part, runs, home)
            is_spread = True
            continue
        for name in names:
            parameter = model.get_parameter(name)
            if parameter.device != home:
                # Tied parameters stay one.
                weight = Offloaded(parameter.detach(), home)
                _set(model, name, fetched.setdefault(id(parameter), nn.Parameter(weight, parameter.requires_grad)))
                is_spread = True
    if is_spread:
        model.__dict__["_apply"] = _refuse


def _parts(module: nn.Module, name: str = "") -> Iterator[tuple[nn.Module | None, list[str]]]:
    """What runs whole: blocks, and modules outside them that have no parts; and None, with what is in neither."""
    parts = [(child, own) for own, child in module.named_children() if any(True for _ in child.parameters())]
    prefix = f"{name}." if name else ""
    if isinstance(module, Block) or not parts:
        yield module, [prefix + own for own, _ in module.named_parameters(remove_duplicate=False)]
        return
    yield None, [prefix + own for own, _ in module.named_parameters(recurse=False)]
    for child, own in parts:
        yield from _parts(child, prefix + own)


def _send(part: nn.Module, device: torch.device, home: torch.device) -> None:
    def fetch_inputs(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return _at(args, device), _at(kwargs, device)

    part.register_forward_pre_hook(fetch_inputs, with_kwargs=True)
    part.register_forward_hook(lambda _part, _args, output: _at(output, home))


def _at(value: Any, device: torch.device) -> Any:
    """A part's arguments on a device; but the keys and values that a layer knows stay where the layer is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mask):
        return replace(value, keep=value.keep.to(device))
    if isinstance(value, tuple):
        return tuple(_at(element, device) for element in value)
    if isinstance(value, dict):
        return {name: _at(element, device) for name, element in value.items()}
    return value


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "a model that is spread over devices is neither moved nor converted as a whole: load it again with another "
        "device_map, device or dtype"
    )

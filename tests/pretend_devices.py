"""Accelerators for a machine that has none: tensors that say they are on one, and are not on the CPU or on another.

``lazy`` is a device type that every build of torch knows and none of ours uses. Values are computed on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ACCELERATORS = ("lazy:0", "lazy:1")


class Pretended(Tensor):
    """A tensor on an accelerator that is not there."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> Pretended:
        self = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=device
        )
        self.values = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None:
            device, kwargs["device"] = torch.device(device), "cpu"
            device = torch.device(device.type, 0) if device.type == "lazy" and device.index is None else device
        else:
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            # As in torch, a number goes with everything.
            devices = {each.device for each in tensors if each.ndim} or {each.device for each in tensors}
            if len(devices) > 1:
                raise RuntimeError(f"{func} of tensors on {' and '.join(sorted(map(str, devices)))}")
            device = devices.pop()
        values, named = tree_map_only(cls, lambda tensor: tensor.values, (args, kwargs))
        result = func(*values, **named)
        if func._schema.is_mutable:
            return args[0]
        return result if device.type == "cpu" else tree_map_only(Tensor, lambda tensor: cls(tensor, device), result)

    def tolist(self) -> Any:
        return self.values.tolist()


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for other in set(types) - {Pretended, Tensor, nn.Parameter}:
            with self:
                return other.__torch_dispatch__(func, types, args, kwargs)
        made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "lazy"
        if made_there or Pretended in types:
            return Pretended.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


class _Constructors(TorchFunctionMode):
    """Those that fill a tensor before modes see it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


@contextmanager
def accelerators() -> Iterator[tuple[str, str]]:
    """Two of them, without gradients; real ones where there are two."""
    with torch.no_grad():
        if torch.cuda.device_count() > 1:
            yield "cuda:0", "cuda:1"
        else:
            with _Operations(), _Constructors():
                yield ACCELERATORS

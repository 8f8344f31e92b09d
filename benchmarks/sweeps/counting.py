"""What a call costs whatever the machine does besides: arithmetic, and memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hooked_vlm.sweep.explain import FUSED_ON_CPU

Result = TypeVar("Result")


def flops(call: Callable[[], Result]) -> tuple[Result, int]:
    """What a call gives, and the floating-point operations of its matrix products."""
    counter = FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU)
    with counter:
        result = call()
    return result, counter.get_total_flops()


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes of tensors that are alive together at a call's worst, beyond those there before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with _Living() as living:
        call()
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the bytes of every storage that operations make, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and id(storage := made.untyped_storage()) not in given | self.sizes.keys():
                self._count(storage)
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.sizes[id(storage)] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._freed, id(storage)).atexit = False

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def matmul_rate(device: str, dtype: torch.dtype, repeats: int = 8) -> float:
    """Floating-point operations a second of a large matrix product: what the machine gives at best."""
    width = 8192 if device.startswith("cuda") else 1024
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * width**3 / min(times[1:])


def synchronize(device: str) -> None:
    """Wait for what was asked of a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()

"""A hook point: the identity, with a name and named axes, that whatever may be looked at or changed passes through.

Axes: b batch, p position, h head, q query, k key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HookFunction = Callable[..., Tensor | None]
"""``fn(activation, hook=hook_point)``: returns a replacement of the same shape and dtype, or None."""

PositionSlice = int | slice | Sequence[int] | Tensor | None

Direction = Literal["fwd", "bwd"]


class HookError(ValueError):
    """A hook was asked for, or answered, something that its hook point cannot do."""


@dataclass
class HookHandle:
    """One function on one hook point, and how to take it off."""

    point: HookPoint
    function: HookFunction
    handle: Any
    direction: Direction
    is_permanent: bool = False
    level: int | None = None
    reads: bool = False

    def remove(self) -> None:
        self.handle.remove()
        if self in self.point.handles:
            self.point.handles.remove(self)


class HookPoint(nn.Module):
    """The identity, observable and editable.

    ``axes`` names the dimensions, e.g. ``"b p h d_head"``. With ``aliased=True`` the activation has other readers
    than this point's own (the residual that a sub-layer reads is also the one it adds to; a softmax's output is what
    its gradient is made from), so a hook that may write gets a copy, and in-place edits stay where they were made.
    """

    def __init__(self, axes: str, *, aliased: bool = False) -> None:
        super().__init__()
        self.axes = tuple(axes.split())
        self.aliased = aliased
        self.name = ""
        self.ctx: dict[str, Any] = {}
        self.handles: list[HookHandle] = []
        self._gradient_hooks: OrderedDict[int, HookFunction] = OrderedDict()

    def __call__(self, activation: Tensor) -> Tensor:
        if not self._forward_hooks and not self._gradient_hooks and not self._backward_hooks:
            return activation
        return self._with_gradient_hooks(super().__call__(self._own(activation)))

    def forward(self, activation: Tensor) -> Tensor:
        return activation

    @property
    def is_hooked(self) -> bool:
        """Whether anything, reader or writer, forward or backward, is attached."""
        return bool(self._forward_hooks or self._gradient_hooks or self._backward_hooks)

    @property
    def is_edited(self) -> bool:
        """Whether a hook that may write is attached."""
        attached = len(self._forward_hooks) + len(self._gradient_hooks) + len(self._backward_hooks)
        return attached > sum(handle.reads for handle in self.handles)

    def show(self, activation: Tensor) -> tuple[Tensor, bool]:
        """Show an activation that was computed beside the main path; tell whether a hook has changed it.

        A returned tensor and an in-place write (the version counter tells) both count as a change; a write through
        ``.data`` or NumPy goes unseen, as it does by autograd.
        """
        if not self.is_hooked:
            return activation, False
        activation = self._own(activation)
        # Inference tensors carry no version counter; a copy tells instead.
        before = activation.clone() if activation.is_inference() else activation._version
        shown = super().__call__(activation)
        if isinstance(before, Tensor):
            return shown, not torch.equal(shown, before)
        return self._with_gradient_hooks(shown), shown is not activation or shown._version != before

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        *,
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        reads: bool = False,
    ) -> HookHandle:
        """Attach ``hook(activation, hook=self)``. ``reads=True`` promises that it never writes."""
        if dir == "fwd":
            registered = self.register_forward_hook(partial(self._run_forward, hook), prepend=prepend)
        elif dir == "bwd":
            registered = RemovableHandle(self._gradient_hooks)
            self._gradient_hooks[registered.id] = hook
            if prepend:
                self._gradient_hooks.move_to_end(registered.id, last=False)
        else:
            raise HookError(f"dir must be 'fwd' or 'bwd', not {dir!r}")
        handle = HookHandle(self, hook, registered, dir, is_permanent, level, reads)
        self.handles.append(handle)
        return handle

    def _own(self, activation: Tensor) -> Tensor:
        return activation.clone() if self.aliased and self.is_edited else activation

    def _run_forward(
        self, hook: HookFunction, _module: nn.Module, _inputs: tuple[Tensor, ...], activation: Tensor
    ) -> Tensor | None:
        return self._checked(hook(activation, hook=self), activation, hook)

    def _with_gradient_hooks(self, activation: Tensor) -> Tensor:
        if not self._gradient_hooks or not activation.requires_grad:
            return activation
        # A tensor of its own, for the gradient of this point's readers alone.
        activation = activation.view_as(activation)
        for key, hook in self._gradient_hooks.items():
            activation.register_hook(partial(self._run_backward, key, hook))
        return activation

    def _run_backward(self, key: int, hook: HookFunction, gradient: Tensor) -> Tensor | None:
        if key not in self._gradient_hooks:
            return None  # removed since the forward
        return self._checked(hook(gradient, hook=self), gradient, hook)

    def _checked(self, replacement: Any, activation: Tensor, hook: HookFunction) -> Tensor | None:
        if replacement is None or replacement is activation:
            return None
        function = getattr(hook, "__name__", type(hook).__name__)
        if not isinstance(replacement, Tensor):
            raise HookError(
                f"hook {function} at {self.name} returned {type(replacement).__name__}; a hook returns a tensor or None"
            )
        if replacement.shape != activation.shape or replacement.dtype != activation.dtype:
            raise HookError(
                f"hook {function} at {self.name} returned {_describe(replacement)}; "
                f"the activation is {_describe(activation)}"
            )
        return replacement

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "both",
        *,
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        for handle in list(self.handles):
            if dir not in ("both", handle.direction) or (level is not None and handle.level != level):
                continue
            if including_permanent or not handle.is_permanent:
                handle.remove()

    def clear_context(self) -> None:
        self.ctx.clear()

    @property
    def tower(self) -> str:
        return self.name.split(".")[0]

    def layer(self) -> int:
        """The block index, for names such as ``answer_decoder.blocks.3.hook_mlp_out``."""
        parts = self.name.split(".")
        if "blocks" not in parts:
            raise HookError(f"{self.name} is not inside a block")
        return int(parts[parts.index("blocks") + 1])

    def slice_positions(self, activation: Tensor, positions: PositionSlice) -> Tensor:
        """``activation`` at some positions of its position (or query) axis; an int drops the axis."""
        if positions is None:
            return activation
        axis = next((self.axes.index(name) for name in ("p", "q") if name in self.axes), None)
        if axis is None:
            return activation
        if isinstance(positions, Sequence):
            positions = torch.as_tensor(positions, device=activation.device)
        try:
            return activation[(slice(None),) * axis + (positions,)]
        except IndexError as error:
            raise HookError(
                f"pos_slice {positions} is out of range at {self.name}: {activation.shape[axis]} positions"
            ) from error

    def extra_repr(self) -> str:
        return " ".join(self.axes)


def follow(main: Tensor, edited: bool, path: Callable[[], Tensor], shown: Tensor) -> Tensor:
    """``main``, unless what was shown beside it was edited: then what ``path`` makes of the edited activation.

    Where gradients are wanted, the value is still ``main``'s, to the bit, and the gradient flows along ``path``, so
    that what was shown receives one.
    """
    if edited:
        return path()
    if torch.is_grad_enabled() and shown.requires_grad:
        value = path()
        return main.detach() + (value - value.detach())
    return main


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

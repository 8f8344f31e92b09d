"""Hook points, and the modules that carry them.

A :class:`HookPoint` is the identity, with a name and named axes; whatever a researcher may look at or change passes
through one. A :class:`HookedModule` finds the hook points below it and runs itself with hooks or with a cache.
The words and their meaning are TransformerLens's: ``hooks``, ``run_with_hooks``, ``run_with_cache``, ``add_hook``,
``reset_hooks``; a hook is ``fn(activation, hook=hook_point)`` and returns a replacement or nothing.

Axes: b batch, p position, h head, q query, k key.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hooked_vlm.cache import ActivationCache

HookFunction = Callable[..., Tensor | None]
"""``fn(activation, hook=hook_point)``: returns a replacement of the same shape and dtype, or None."""

Names = str | Sequence[str] | Callable[[str], bool]
"""A hook name, a shell-style pattern (``"*.hook_resid_post"``), a list of them, or a predicate on names."""

PositionSlice = int | slice | Sequence[int] | Tensor | None

Direction = Literal["fwd", "bwd"]


class HookError(ValueError):
    """A hook was asked for, or answered, something that its hook point cannot do."""


class StopForward(BaseException):  # a signal, like StopIteration; no `except Exception` may swallow it
    """Ends a forward at the hook point that was named as ``stop_at``."""

    def __init__(self, activation: Tensor) -> None:
        self.activation = activation


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
        function = getattr(hook, "__name__", repr(hook))
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


def _without_batch(activation: Tensor, name: str) -> Tensor:
    if activation.shape[0] != 1:
        raise HookError(f"remove_batch_dim needs a batch of 1; {name} has {activation.shape[0]} rows")
    return activation[0]


def _one_number(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.numel() != 1:
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise HookError(f"incl_bwd needs one number to differentiate, not {what}: incl_bwd=lambda logits: ...")
    return output


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def is_pattern(name: str) -> bool:
    """Whether a name is a shell-style pattern of names."""
    return any(character in name for character in "*?[")


def match_names(names: Names | None, known: Sequence[str]) -> list[str]:
    """The known names that ``names`` selects, in their own order.

    Raises:
        HookError: a name, pattern or predicate that selects nothing; says the nearest names.
    """
    if names is None:
        return list(known)
    if callable(names):
        selected = [name for name in known if names(name)]
        if not selected:
            raise HookError(f"the predicate {getattr(names, '__name__', names)!r} matches none of {len(known)} hooks")
        return selected
    if isinstance(names, str):
        names = [names]
    every = set(known)
    wanted: set[str] = set()
    for name in names:
        matches = [name] if name in every else fnmatch.filter(known, name) if is_pattern(name) else []
        if not matches:
            raise HookError(_no_such_name(name, known))
        wanted.update(matches)
    return [name for name in known if name in wanted]


def _no_such_name(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
    what = "pattern matches no hook" if is_pattern(name) else "no hook is called"
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return f"{what} {name!r}{hint}"


class HookedModule(nn.Module):
    """A module whose hook points have names, and that runs with hooks or with a cache.

    Call :meth:`setup` once all sub-modules exist.
    """

    hook_dict: dict[str, HookPoint]

    def setup(self) -> None:
        """Give every hook point its name; ``hook_dict`` lists them in forward order."""
        self.hook_dict = {name: module for name, module in self.named_modules() if isinstance(module, HookPoint)}
        for name, point in self.hook_dict.items():
            point.name = name
        self._level = 0

    @property
    def hook_names(self) -> list[str]:
        """Every hook point's name, in forward order."""
        return list(self.hook_dict)

    def hook_points(self) -> Iterable[HookPoint]:
        return self.hook_dict.values()

    def add_hook(
        self,
        names: Names,
        hook: HookFunction,
        dir: Direction = "fwd",
        *,
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        reads: bool = False,
    ) -> list[HookHandle]:
        """Attach a hook to every hook point that ``names`` selects."""
        return [
            self.hook_dict[name].add_hook(
                hook, dir, is_permanent=is_permanent, level=level, prepend=prepend, reads=reads
            )
            for name in match_names(names, self.hook_names)
        ]

    def add_perma_hook(self, names: Names, hook: HookFunction, dir: Direction = "fwd") -> list[HookHandle]:
        """Attach a hook that outlives ``reset_hooks`` and every context."""
        return self.add_hook(names, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove all hooks that are not permanent."""
        for point in self.hook_points():
            if clear_contexts:
                point.clear_context()
            point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
        bwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedModule]:
        """Hooks for the length of a ``with`` block; contexts nest, and each takes off only its own.

        An exception, in a hook or elsewhere, takes them off too. ``reset_hooks_end=False`` leaves them on.
        """
        self._level += 1
        added: list[HookHandle] = []
        try:
            for names, hook in fwd_hooks:
                added += self.add_hook(names, hook, "fwd", level=self._level)
            for names, hook in bwd_hooks:
                added += self.add_hook(names, hook, "bwd", level=self._level)
            yield self
        except BaseException:
            reset_hooks_end = True
            raise
        finally:
            self._level -= 1
            if reset_hooks_end:
                for handle in added:
                    handle.remove()
            if clear_contexts:
                for point in self.hook_points():
                    point.clear_context()

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
        bwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        stop_at: str | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """One forward with hooks. ``stop_at`` names a hook where the forward ends; its activation is returned.

        Backward hooks must outlive the forward: pass ``reset_hooks_end=False``, or use :meth:`hooks`.
        """
        if bwd_hooks and reset_hooks_end:
            warnings.warn("backward hooks are removed before a backward can reach them", stacklevel=2)
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self._run(model_args, model_kwargs, stop_at)

    def _run(self, model_args: tuple, model_kwargs: Mapping[str, Any], stop_at: str | None) -> Any:
        if stop_at is None:
            return self(*model_args, **model_kwargs)
        if stop_at not in self.hook_dict:
            raise HookError(_no_such_name(stop_at, self.hook_names))

        def stop(activation: Tensor, hook: HookPoint) -> None:
            raise StopForward(activation)

        handle = self.hook_dict[stop_at].add_hook(stop, reads=True)
        try:
            self(*model_args, **model_kwargs)
        except StopForward as stopped:
            return stopped.activation
        finally:
            handle.remove()
        raise HookError(f"the forward did not pass {stop_at}, so it could not stop there")

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: Names | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stop_at: str | None = None,
        incl_bwd: bool | Callable[[Any], Tensor] = False,
        pos_slice: PositionSlice = None,
        remove_batch_dim: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """One forward, and the activations at the hooks that ``names_filter`` selects (all by default).

        Args:
            device: where activations are kept; by default where they were made.
            dtype: what floating activations are kept in; by default as they were made.
            stop_at: a hook name; the forward ends there and its activation is returned in place of the output.
            incl_bwd: keep gradients too, as ``name + "_grad"``: of the number that this function makes of the output,
                or with True of the output itself, which must then be one number.
            pos_slice: positions to keep, on the position (or query) axis; an int drops the axis.
            remove_batch_dim: drop the batch axis; the batch must be 1.

        Raises:
            HookError: ``names_filter`` or ``stop_at`` selects nothing; ``incl_bwd`` without one number.
        """
        activations: dict[str, Tensor] = {}

        def caching(suffix: str) -> HookFunction:
            def save(activation: Tensor, hook: HookPoint) -> None:
                kept = hook.slice_positions(activation.detach(), pos_slice)
                kept = kept.to(device=device, dtype=dtype if kept.is_floating_point() else None)
                activations[hook.name + suffix] = _without_batch(kept, hook.name) if remove_batch_dim else kept

            return save

        handles = self.add_hook(match_names(names_filter, self.hook_names), caching(""), reads=True)
        try:
            if incl_bwd:
                names = [handle.point.name for handle in handles]
                handles += self.add_hook(names, caching("_grad"), "bwd", reads=True)
            output = self._run(model_args, model_kwargs, stop_at)
            if incl_bwd:
                _one_number(incl_bwd(output) if callable(incl_bwd) else output).backward()
        finally:
            if reset_hooks_end:
                for handle in handles:
                    handle.remove()
            if clear_contexts:
                for point in self.hook_points():
                    point.clear_context()
        return output, ActivationCache(activations, model=self, has_batch_dim=not remove_batch_dim)

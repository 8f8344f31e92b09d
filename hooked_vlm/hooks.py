"""Modules that carry hook points, and run with hooks or with a cache.

A :class:`HookedModule` finds the hook points below it by name. The words and their meaning are TransformerLens's:
``hooks``, ``run_with_hooks``, ``run_with_cache``, ``add_hook``, ``reset_hooks``; a hook is
``fn(activation, hook=hook_point)`` and returns a replacement or nothing.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooked_vlm.cache import ActivationCache
from hooked_vlm.hook_point import Direction, HookError, HookFunction, HookHandle, HookPoint, PositionSlice

Names = str | Sequence[str] | Callable[[str], bool]
"""A hook name, a shell-style pattern (``"*.hook_resid_post"``), a list of them, or a predicate on names."""


class StopForward(BaseException):  # a signal, like StopIteration; no `except Exception` may swallow it
    """Ends a forward at the hook point that was named as ``stop_at``."""

    def __init__(self, activation: Tensor) -> None:
        self.activation = activation


def _without_batch(activation: Tensor, name: str) -> Tensor:
    if activation.shape[0] != 1:
        raise HookError(f"remove_batch_dim needs a batch of 1; {name} has {activation.shape[0]} rows")
    return activation[0]


def _one_number(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.numel() != 1:
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise HookError(f"incl_bwd needs one number to differentiate, not {what}: incl_bwd=lambda logits: ...")
    return output


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
        for module in self.modules():
            # Found without nn.Module's slow lookup: as many hook points as there are cost time in every forward.
            # Assigning another module to the name takes this entry away, as nn.Module does with any.
            module.__dict__.update(module._modules)
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

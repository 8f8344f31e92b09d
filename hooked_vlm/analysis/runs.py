"""A clean and a corrupted run of the same rows, what is measured of them, and the derivatives of the measure.

Axes: b rows that the user gave; rows, those times the corruption's draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.cache import ActivationCache
from hooked_vlm.corruptions import Corrupted, Corruption
from hooked_vlm.edits import edit_hooks
from hooked_vlm.hook_point import HookFunction, HookPoint
from hooked_vlm.hooks import Names
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import Metric
from hooked_vlm.models import HookedVLM

Direction = Literal["noising", "denoising"]

ROOTS = ("hook_patch_embed", "hook_cls_embed", "hook_embed", "hook_pos_embed")
"""Where a tower's stream comes from: derivatives go back this far."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Both runs, with as many rows; a corruption of several draws has so many copies of a row beside each other."""

    model: HookedVLM
    clean: Corrupted
    corrupted: Corrupted
    metric: Metric

    @classmethod
    def of(cls, model: HookedVLM, clean: VLMInputs, corruption: Corruption, metric: Metric) -> Runs:
        """Raises ValueError for several draws of a model in which rows meet."""
        clean = clean.to(model.device)
        corrupted = corruption(model, clean)
        if corrupted.draws > 1 and not model.pairs_rows:
            raise ValueError(
                f"{type(model).__name__} compares every image with every text, so that draws would meet: give a "
                "corruption of one draw"
            )
        return cls(model, Corrupted(clean.repeat(corrupted.draws), draws=corrupted.draws), corrupted, metric)

    def __repr__(self) -> str:
        return f"Runs({type(self.model).__name__}, {len(self.clean.inputs)} rows, {type(self.metric).__name__})"

    @property
    def draws(self) -> int:
        return self.corrupted.draws

    def directed(self, direction: Direction) -> tuple[Corrupted, Corrupted]:
        """The run that is patched, and the run that activations are taken from.

        Raises:
            ValueError: neither ``"noising"`` nor ``"denoising"``.
        """
        if direction not in ("noising", "denoising"):
            raise ValueError(f"direction must be 'noising' or 'denoising', not {direction!r}")
        return (self.clean, self.corrupted) if direction == "noising" else (self.corrupted, self.clean)

    def measure(self, logits: Float[Tensor, "rows ..."]) -> Float[Tensor, " rows"]:
        """The metric of each row; it sees the rows of one draw at a time, as many as the user's own.

        Raises:
            ValueError: a metric that is not one number a row.
        """
        draws = self.draws
        values = torch.stack([self.metric(logits[draw::draws]) for draw in range(draws)], dim=1)
        if values.shape != (len(logits) // draws, draws):
            raise ValueError(
                f"the metric should be one number a row, [{len(logits) // draws}]; it is {list(values[:, 0].shape)}"
            )
        return values.flatten()

    def mean_of_draws(self, values: Float[Tensor, "rows ..."]) -> Float[Tensor, "b ..."]:
        return reduce(values, "(b draws) ... -> b ...", "mean", draws=self.draws)

    @torch.no_grad()
    def activations(self, run: Corrupted, names: Names | None) -> tuple[Float[Tensor, " rows"], ActivationCache]:
        """One forward: the metric, and what was found at some hook points, or at all."""
        with self.model.hooks(edit_hooks(self.model, run.inputs, run.edits)):
            logits, cache = self.model.run_with_cache(run.inputs, names_filter=names)
        return self.measure(logits), cache

    @contextmanager
    def tape(
        self,
        run: Corrupted,
        activations: Sequence[str],
        gradients: Sequence[str],
        fwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
        bwd_hooks: Sequence[tuple[Names, HookFunction]] = (),
    ) -> Iterator[Tape]:
        """One forward that can be differentiated, for the length of a ``with`` block.

        ``activations`` and ``gradients`` name hook points of which they are kept; ``fwd_hooks`` and ``bwd_hooks`` come
        before. The model's parameters take no part:
        nothing is kept for their gradients, and their ``.grad`` is as before.

        Raises:
            ValueError: a metric that cannot be differentiated; inside ``torch.inference_mode``, where nothing can.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError("attributions are made of gradients, and torch.inference_mode() forbids them")
        values: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        roots: list[Tensor] = []

        def root(activation: Tensor, hook: HookPoint) -> Tensor:
            roots.append(activation.detach().requires_grad_())
            return roots[-1]

        def record(into: dict[str, Tensor]) -> HookFunction:
            def save(activation: Tensor, hook: HookPoint) -> None:
                into[hook.name] = activation.detach()

            return save

        model = self.model
        starts = [name for name in model.hook_names if name.endswith(ROOTS) and ".blocks." not in name]
        edits = edit_hooks(model, run.inputs, run.edits)
        with (
            without_parameters(model),
            torch.enable_grad(),
            model.hooks([*edits, (starts, root), *fwd_hooks], bwd_hooks),
        ):
            handles = model.add_hook(activations, record(values), reads=True)
            handles += model.add_hook(gradients, record(found), "bwd", reads=True)
            try:
                measured = self.measure(model(run.inputs))
                if not measured.requires_grad:
                    raise ValueError("the metric cannot be differentiated: it should be made of the logits by torch")

                def backward() -> Mapping[str, Tensor]:
                    found.clear()
                    torch.autograd.grad(measured.sum(), roots, retain_graph=True, allow_unused=True)
                    return found

                yield Tape(measured.detach(), values, backward)
            finally:
                for handle in handles:
                    handle.remove()


@dataclass(frozen=True, eq=False)
class Tape:
    """A forward that can be differentiated."""

    measured: Float[Tensor, " rows"]
    activations: Mapping[str, Tensor]
    backward: Callable[[], Mapping[str, Tensor]]
    """One backward: gradients of the metric, summed over rows, by hook name. A row's is its own: rows are independent.
    What the metric does not depend on is not among them."""


@contextmanager
def without_parameters(model: HookedVLM) -> Iterator[None]:
    """Gradients of activations alone: the parameters take no part, and keep the ``.grad`` that they have."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def towers_of(model: HookedVLM, inputs: VLMInputs, towers: Sequence[str] | None) -> tuple[str, ...]:
    """The towers that are meant, in the model's order; by default all, but those of pictures where there are none.

    Raises:
        ValueError: an unknown tower; a vision encoder whose rows are not the batch's, but several pictures a row or
            tiles of one, or that sees no picture.
    """
    unknown = [tower for tower in towers or () if tower not in model.towers]
    if unknown:
        raise ValueError(f"no tower {unknown[0]!r}; this model has {', '.join(model.towers)}")
    pixels, one_each = inputs.pixel_values, (None, tuple(range(len(inputs))))
    if towers is None:
        towers = [tower for tower in model.towers if pixels is not None or tower not in ("vision_encoder", "projector")]
    if "vision_encoder" in towers:
        if pixels is None:
            raise ValueError("the vision encoder sees no picture in these inputs")
        if pixels.ndim > 4 or inputs.image_rows not in one_each or len(pixels) != len(inputs):
            raise ValueError(
                "the vision encoder's rows are pictures, or tiles: give one picture a row, or leave that tower out "
                "with towers=[...]"
            )
    return tuple(tower for tower in model.towers if tower in towers)

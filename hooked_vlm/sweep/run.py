"""Run n edit sets, each as if alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.edits import Edit, edit_hooks
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import Generated, Metric, narrowed, positions_read
from hooked_vlm.models import HookedVLM
from hooked_vlm.progress import track
from hooked_vlm.sweep.batches import Batcher, is_out_of_memory
from hooked_vlm.sweep.plan import Chunk, Compiler, EditSet
from hooked_vlm.sweep.trail import Trail
from hooked_vlm.sweep.wave import Wave


class Effects(Tensor):
    """The metric of each edit set. A tensor like any other, that says how exact it is.

    Whatever is computed from it (indexing, ``view``, arithmetic) is a plain tensor, without these attributes.
    """

    noise_floor: Float[Tensor, "..."]
    """How far a run without edits strayed from the base run, at most in any batch and row: rounding, in units of the
    metric. Effects below it say nothing; in bfloat16 and float16 edited runs may stray further. One number, or one for
    each number of a row's metric; 0 where every set ran alone."""
    base: Float[Tensor, "b ..."]
    """The metric of the base run, which the sets are changes of; NaN of generated answers."""
    alone: str
    """Why every set had a full forward of its own; empty if the sets shared work."""

    # What is computed from effects is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "n_sets b ..."],
        base: Float[Tensor, "b ..."],
        floors: Sequence[Tensor] = (),
        alone: str = "",
    ) -> Effects:
        effects = values.as_subclass(cls)
        effects.base = base
        effects.noise_floor = torch.stack([*floors]).amax(0) if floors else torch.zeros_like(values[0, 0])
        effects.alone = alone
        return effects

    def __deepcopy__(self, memo: dict[int, Any]) -> Effects:
        return Effects.of(self.as_subclass(Tensor).clone(), self.base.clone(), [self.noise_floor.clone()], self.alone)


torch.serialization.add_safe_globals([Effects])  # torch.save and torch.load take it for the tensor that it is


@torch.no_grad()
def sweep(
    model: HookedVLM,
    inputs: VLMInputs | Mapping[str, Any],
    edit_sets: Sequence[Sequence[Edit]],
    metric: Metric | Generated,
    *,
    base: Sequence[Edit] = (),
    batch_size: int | Literal["auto"] = "auto",
    progress: bool = True,
) -> Float[Effects, "n_sets b ..."]:
    """The metric of each edit set, as if each had been run alone by ``model.patch(inputs, base + set)``.

    Only what a set's edits can change is computed again: later layers, in causal towers later positions, and of the
    last layer no more than the metric reads; keys and values of the base run are shared. Equal to the runs alone but
    for rounding, whose size is measured on the way (:attr:`Effects.noise_floor`).

    A metric that does not say which positions it reads (:class:`~hooked_vlm.metrics.ReadsPositions`) is given all
    logits; the last layer is then computed at every position that an edit reaches.

    Args:
        base: edits carried out in every run, before the set's own; with ``inputs`` they make the run that is edited (a
            corrupted one, for denoising).
        batch_size: how many sets run together; ``"auto"``: as many as 40 % of the free memory admits, up to the size
            beyond which nothing gets faster. A batch that does not fit is halved and tried again.
        progress: show a progress bar, in a terminal.

    Returns:
        The metric of each set, in the order of ``edit_sets``.

    Raises:
        ValueError: no edit sets; a metric that does not give a number, or numbers, for each row; a batch size below 1.
        EditError, HookError: an edit that does not fit; says of which set it is.
        FloatingPointError: the base run's logits are not finite.
    """
    if batch_size != "auto" and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 or 'auto', not {batch_size}")
    inputs = model._inputs(inputs)
    reason = why_alone(model, edit_sets, base, metric)
    if reason:
        return _alone(model, inputs, edit_sets, metric, base, progress, reason)
    assert not isinstance(metric, Generated)
    compiler = Compiler(model, inputs, base)
    trail = compiler.record(edit_sets)
    sets = compiler.compile_all(edit_sets, trail)
    scorer = Scorer(compiler, trail, metric)
    batcher = Batcher(compiler, trail, scorer.n_read)
    effects: dict[int, Tensor] = {}
    floors: list[Tensor] = []
    with closing(track(range(len(sets)), "patching", shown=progress)) as done:
        for chunk in batcher.chunks(sets, None if batch_size == "auto" else batch_size):
            for index, effect, floor in _halving(scorer, inputs, batcher, chunk):
                effects[index] = effect
                floors.append(floor)
                next(done)
        next(done, None)
    return Effects.of(torch.stack([effects[index] for index in range(len(sets))]), scorer.base_effect, floors)


def why_alone(
    model: HookedVLM, edit_sets: Sequence[Sequence[Edit]], base: Sequence[Edit], metric: Metric | Generated
) -> str:
    """Why sets cannot share work, if so: then each has a forward of its own.

    Raises:
        ValueError: no sets.
    """
    if not len(edit_sets):
        raise ValueError("sweep needs at least one edit set")
    if isinstance(metric, Generated):
        return "the metric is of a generated answer"
    if any(point.is_hooked for point in model.hook_points()):
        return "the model has hooks of its own, which expect whole activations"
    own = {type(edit) for edits in (*edit_sets, base) for edit in edits if _is_custom(type(edit))}
    return f"how {', '.join(sorted(kind.__name__ for kind in own))} is carried out is not known" if own else ""


def _is_custom(kind: type[Edit]) -> bool:
    """Whether an edit is carried out by hooks that another module has written."""
    return any(
        getattr(kind, name) is not getattr(Edit, name) and not kind.__module__.startswith("hooked_vlm.")
        for name in ("hooks", "apply", "selected", "names", "places")
    )


def _alone(
    model: HookedVLM,
    inputs: VLMInputs,
    edit_sets: Sequence[Sequence[Edit]],
    metric: Metric | Generated,
    base: Sequence[Edit],
    progress: bool,
    reason: str,
) -> Effects:
    def run(edits: Sequence[Edit]) -> Tensor:
        if not isinstance(metric, Generated):
            return metric(model.patch(inputs, edits))
        with model.hooks(edit_hooks(model, inputs, edits)):
            texts = model.generate(inputs, max_new_tokens=metric.max_new_tokens, num_beams=metric.num_beams)
        return metric(list(texts))

    # Closed also by an error: the bar must not outlive it.
    with closing(track(edit_sets, "patching", shown=progress)) as runs:
        effects = [run([*base, *edits]) for edits in runs]
    _check_shape(effects[0], len(inputs))
    # Another generation would be dear, and the score may note what it is given.
    of_base = torch.full_like(effects[0], torch.nan) if isinstance(metric, Generated) else run(base)
    return Effects.of(torch.stack(effects), of_base, alone=reason)


class Scorer:
    """The metric of sets, from what their wave brings."""

    def __init__(self, compiler: Compiler, trail: Trail, metric: Metric) -> None:
        self.compiler, self.trail = compiler, trail
        tower = compiler.model.towers[-1]
        self.read = np.ones(trail.towers[tower].n_positions, dtype=bool)
        self.metric, self.logits = metric, trail.logits
        if compiler.has_token_head:
            n_positions = trail.logits.shape[1]
            positions = positions_read(metric, n_positions)
            self.read = np.isin(np.arange(n_positions), positions)
            self.metric, self.logits = narrowed(metric, positions, n_positions), trail.logits[:, positions]
        else:
            self.read[:] = compiler.read_positions(tower, trail.towers[tower].n_positions)
        if not bool(self.logits.isfinite().all()):
            what = "the base edits make" if compiler.base else "the inputs make"
            raise FloatingPointError(
                f"{what} the run's logits infinite or NaN; model.check_finite says where it begins"
            )
        self.base_effect = self.metric(self.logits)
        _check_shape(self.base_effect, len(self.logits))

    @property
    def n_read(self) -> int:
        """Positions of the logits that the metric reads."""
        return int(self.read.sum()) if self.compiler.has_token_head else 1

    def of(self, wave: Wave) -> Iterator[Tensor]:
        """The metric of each set of a wave that has passed."""
        if not self.compiler.has_token_head:
            for one in range(len(wave.chunk)):
                yield self.metric(wave.outputs_of(one))
            return
        packed = wave.logits(self.read)
        column = np.cumsum(self.read) - 1
        for one in range(len(wave.chunk)):
            count = int(packed.layout.counts[one])
            if not count:
                yield self.base_effect
                continue
            own = packed.values[0, packed.layout.tokens_of(one)].unflatten(0, (-1, count))
            if count < self.logits.shape[1]:
                columns = packed.layout.index(column[packed.layout.positions_of(one)])
                own = self.logits.index_copy(1, columns, own)
            yield self.metric(own)


def _halving(
    scorer: Scorer, inputs: VLMInputs, batcher: Batcher, sets: Sequence[EditSet]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each set's index, its effect, and how far the chunk's null set strayed; in halves where memory is too short."""
    try:
        found = _run(scorer, inputs, batcher, sets)
    except (RuntimeError, MemoryError) as error:
        if len(sets) == 1 or not is_out_of_memory(error):
            raise
        found = None
    if found is not None:
        yield from found
        return
    if scorer.logits.is_cuda:
        torch.cuda.empty_cache()
    for half in (sets[: len(sets) // 2], sets[len(sets) // 2 :]):
        yield from _halving(scorer, inputs, batcher, half)


def _run(
    scorer: Scorer, inputs: VLMInputs, batcher: Batcher, sets: Sequence[EditSet]
) -> list[tuple[int, Tensor, Tensor]]:
    wave = Wave(scorer.compiler, inputs, scorer.trail, Chunk([*sets, batcher.null(sets)], scorer.trail))
    wave.run(scorer.read)
    *effects, of_null = scorer.of(wave)
    floor = (of_null - scorer.base_effect).abs().amax(0)
    return [(one.index, effect, floor) for one, effect in zip(sets, effects, strict=True)]


def _check_shape(effect: Any, n_rows: int) -> None:
    if not isinstance(effect, Tensor) or not effect.ndim or len(effect) != n_rows:
        given = f"shape {tuple(effect.shape)}" if isinstance(effect, Tensor) else type(effect).__name__
        raise ValueError(
            f"the metric returned {given}; it should return a tensor with one entry a row, of {n_rows} rows"
        )

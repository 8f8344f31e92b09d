"""Which visual tokens are meant: an object's, those around it, registers, random ones, or those with most gradient.

After Neo et al. 2025, section 4.1. A choice is a value, and a function of a model and a sample's inputs: the same in an
ablation (:mod:`hooked_vlm.experiments.visual_tokens`) and at an end of an edge
(:func:`~hooked_vlm.experiments.information_flow`, ``spans={"random": RandomTokens()}``).
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.experiments.parts.cases import QUESTION, prepared
from hooked_vlm.experiments.parts.picture_parts import dilated, with_picture_spans
from hooked_vlm.experiments.parts.visual_gradients import integrated_gradients, visual_site
from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.metrics import at
from hooked_vlm.models import HookedVLM
from hooked_vlm.patches import NEWLINE, PatchGrid


@runtime_checkable
class TokenChoice(Protocol):
    """Chooses positions of a picture's tokens, for inputs of one row that have picture spans.

    Raises:
        SpanError: inputs that lack what is chosen by.
    """

    def __call__(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> Span: ...


def choose_tokens(
    model: HookedVLM,
    sample: Sample | VLMInputs,
    choice: TokenChoice,
    *,
    prompt: str = QUESTION,
    answer: Int[Tensor, "1"] | None = None,
) -> Span:
    """The tokens of a sample's picture that a choice means; perhaps none.

    Args:
        answer: the token whose logit gradients are taken of; by default the likeliest.

    Raises:
        SampleError: a sample that cannot be used, or lacks what is chosen by.
    """
    if isinstance(sample, VLMInputs):
        return choice(model, with_picture(sample.to(model.device)), answer)
    try:
        return choice(model, with_picture(prepared(model, sample, prompt=prompt).to(model.device)), answer)
    except SpanError as error:
        raise SampleError(f"{sample.id}: {error}", "no tokens to choose by") from error


def with_picture(inputs: VLMInputs) -> VLMInputs:
    """Inputs with picture spans.

    Raises:
        SpanError: inputs without a picture.
    """
    inputs = with_picture_spans(inputs)
    if "image" not in inputs.spans or not all(inputs.spans["image"].rows):
        raise SpanError("there is no picture in these inputs, or not known where: make them with model.prepare")
    return inputs


@dataclass(frozen=True)
class AllTokens:
    """All that the picture is read from, padding, newlines and class token too."""

    def __call__(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> Span:
        return inputs.positions("image")


@dataclass(frozen=True)
class ObjectTokens:
    """The patches that a region overlaps at all, and those up to ``dilate`` patches around it."""

    region: str = "object"
    dilate: int = 0

    def __call__(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> Span:
        return dilated(inputs, _region(inputs, self.region), self.dilate)


@dataclass(frozen=True)
class SurroundingTokens:
    """The patches around a region, up to ``dilate`` patches far, without its own."""

    region: str = "object"
    dilate: int = 1

    def __call__(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> Span:
        own = _region(inputs, self.region)
        return _without(dilated(inputs, own, self.dilate), own)


@dataclass(frozen=True)
class OtherTokens:
    """The patches that see the picture, but for a region's and those up to ``dilate`` patches around it."""

    region: str = "object"
    dilate: int = 0

    def __call__(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> Span:
        own = dilated(inputs, _region(inputs, self.region), self.dilate)
        return _without(inputs.positions("image.seen"), own)


@dataclass(frozen=True)
class LastRowTokens:
    """The last row of patches, which in a causal tower have read all others: 24 in LLaVA-1.5.

    Where a picture is seen in tiles (LLaVA-NeXT), the last row of them put together.
    """

    def __call__(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> Span:
        grid = _grid(inputs)
        patches = [index for index, place in enumerate(grid.places) if place.column >= 0]
        newlines = [index for index, place in enumerate(grid.places) if place.tile == NEWLINE]
        if newlines:
            tiles = [index for index in patches if grid.places[index].tile > 0]
            before = newlines[-2] if len(newlines) > 1 else -1
            last = [index for index in tiles if index > before]
        else:
            last = [index for index in patches if grid.places[index].row == grid.places[patches[-1]].row]
        return Span(grid.tower, (tuple(grid.positions[index] for index in last),))


@dataclass(frozen=True)
class RegisterTokens:
    """Tokens of unusual length: those whose norm is over the mean by more than so many standard deviations.

    Attributes:
        deviations: of the norms of one picture's tokens, all that see it.
    """

    deviations: float = 2.0

    def __call__(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> Span:
        seen = inputs.positions("image.seen")
        norms = visual_tokens_of(model, inputs, seen).float().norm(dim=-1)
        is_long = norms > norms.mean() + self.deviations * norms.std()
        return Span(seen.tower, (tuple(np.array(seen[0])[is_long.cpu().numpy()].tolist()),))


@dataclass(frozen=True)
class RandomTokens:
    """Patches that see the picture, drawn at random: others for another picture, the same for another question.

    Attributes:
        n: how many; by default as many as ``region`` has patches.
        avoid: leave out the region's own, so that chance cannot hit it. Neo et al. draw from all.
    """

    n: int | None = None
    region: str = "object"
    avoid: bool = False
    seed: int = 0

    def __call__(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> Span:
        seen, n = inputs.positions("image.seen"), _how_many(inputs, self.n, self.region)
        drawn_from = _without(seen, _region(inputs, self.region)) if self.avoid else seen
        _check_enough(n, drawn_from)
        pixels = inputs.pixel_values
        assert pixels is not None
        key = zlib.crc32(pixels.float().cpu().numpy().tobytes(), self.seed)
        chosen = np.random.default_rng(key).choice(drawn_from[0], size=n, replace=False)
        return Span(seen.tower, (tuple(sorted(chosen.tolist())),))


@dataclass(frozen=True, eq=False)
class GradientTokens:
    """The tokens with most integrated gradient of the answer's logit, absolute and summed over features.

    Attributes:
        n: how many; by default as many as ``region`` has patches.
        baseline: ``"own mean"``, of the picture's own tokens; ``"zero"``; or an embedding. Neo et al. take the mean
            over a dataset: :func:`~hooked_vlm.experiments.visual_tokens.mean_visual_embedding`. LLaVA's normalisation
            jumps at zero, so that from there gradients do not sum to the change of the logit, however small the steps.
        steps: of the integral.
    """

    n: int | None = None
    region: str = "object"
    baseline: Literal["own mean", "zero"] | Float[Tensor, " d_model"] = "own mean"
    steps: int = 50

    def __call__(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> Span:
        return self.most(inputs, self.ranking(model, inputs, answer))

    @property
    def way(self) -> tuple[Hashable, ...]:
        """What a ranking depends on: choices that differ in ``n`` alone can share one."""
        return self.steps, self.baseline if isinstance(self.baseline, str) else id(self.baseline)

    def ranking(self, model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None = None) -> list[int]:
        """Positions that see the picture, that with most gradient first."""
        if answer is None:
            with torch.no_grad():
                answer = at(model(inputs), -1).argmax(-1)
        image, baseline = inputs.positions("image"), self._baseline(model, inputs)
        found = integrated_gradients(model, inputs, image, answer, baseline=baseline, steps=self.steps)
        weights = dict(zip(image[0], found.values.abs().sum(-1).tolist(), strict=True))
        return sorted(inputs.positions("image.seen")[0], key=lambda position: -weights[position])

    def most(self, inputs: VLMInputs, ranking: Sequence[int]) -> Span:
        """The first of a ranking."""
        n, seen = _how_many(inputs, self.n, self.region), inputs.positions("image.seen")
        _check_enough(n, seen)
        return Span(seen.tower, (tuple(sorted(ranking[:n])),))

    def _baseline(self, model: HookedVLM, inputs: VLMInputs) -> Float[Tensor, " d_model"] | None:
        if isinstance(self.baseline, Tensor):
            return self.baseline
        if self.baseline not in ("own mean", "zero"):
            raise ValueError(f"a baseline is 'own mean', 'zero' or an embedding, not {self.baseline!r}")
        if self.baseline == "zero":
            return None
        return visual_tokens_of(model, inputs, inputs.positions("image.seen")).mean(0)


@torch.no_grad()
def visual_tokens_of(model: HookedVLM, inputs: VLMInputs, span: Span) -> Float[Tensor, "n d_model"]:
    """The visual tokens of one row, where they enter what reads them."""
    return model.run_with_hooks(inputs, stop_at=visual_site(model))[0, list(span[0])]


def _region(inputs: VLMInputs, name: str) -> Span:
    span = inputs.spans.get(f"image.{name}")
    if span is None:
        raise SpanError(f"there is no region {name!r}; there are spans {', '.join(inputs.spans)}")
    return span


def _how_many(inputs: VLMInputs, n: int | None, region: str) -> int:
    if n is not None and n < 1:
        raise ValueError(f"at least 1 token is chosen, not {n}")
    return len(_region(inputs, region)[0]) if n is None else n


def _check_enough(n: int, span: Span) -> None:
    if n > len(span[0]):
        raise SpanError(f"{n} tokens are to be chosen of {len(span[0])}")


def _grid(inputs: VLMInputs) -> PatchGrid:
    if len(inputs.patch_grid) != 1:
        raise SpanError(f"tokens are chosen of one picture, and these inputs have {len(inputs.patch_grid)}")
    return inputs.patch_grid[0]


def _without(span: Span, other: Span) -> Span:
    return Span(span.tower, (tuple(sorted(set(span[0]) - set(other[0]))),))

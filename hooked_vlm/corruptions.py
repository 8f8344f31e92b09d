"""Ways to make a corrupted run: the other inputs, or edits that spoil the image embeddings.

A corruption is a frozen value; called with a model and clean inputs it gives a :class:`Corrupted` run. Whatever is
random is drawn once, from a seed, and held: every cell of a grid sees the same corruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.edits import Add, Edit, Scale, gaussian
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM

IMAGE_EMBEDDINGS = "vision_encoder.hook_out"


@dataclass(frozen=True, eq=False)
class Corrupted:
    """A corrupted run: inputs and the edits that corrupt it.

    With several ``draws`` each clean row stands ``draws`` times, copies beside each other.
    """

    inputs: VLMInputs
    edits: tuple[Edit, ...] = ()
    draws: int = 1


@runtime_checkable
class Corruption(Protocol):
    """Makes a corrupted run of clean inputs."""

    @property
    def draws(self) -> int:
        """How many times the random part is drawn; 1 where nothing is random."""
        ...

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted: ...


@dataclass(frozen=True)
class AdditiveGaussian:
    """N(0, std) added to an activation, by default the image embeddings (Meng et al. 2022 on embeddings).

    ``std`` is in units of the standard deviation of each row's activation.
    """

    std: float = 3.0
    draws: int = 10
    seed: int = 0
    site: str = IMAGE_EMBEDDINGS

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        activation = _activation(model, clean, self.site)
        noise = self.std * _unit(activation) * _draws(self, activation)
        owners = _owners(model, clean, self.site, len(activation))
        return Corrupted(clean.repeat(self.draws), (Add(self.site, _in_order(noise, owners)),), self.draws)


@dataclass(frozen=True)
class MultiplicativeGaussian:
    """An activation multiplied, element by element, by N(mean, std) (the code of Palit et al. 2023, mean 1, std 5)."""

    mean: float = 1.0
    std: float = 5.0
    draws: int = 10
    seed: int = 0
    site: str = IMAGE_EMBEDDINGS

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        activation = _activation(model, clean, self.site)
        factors = self.mean + self.std * _draws(self, activation)
        owners = _owners(model, clean, self.site, len(activation))
        return Corrupted(clean.repeat(self.draws), (Scale(self.site, _in_order(factors, owners)),), self.draws)


@dataclass(frozen=True)
class Scaled:
    """An activation times a constant; 0.7691 gives the average figures of Palit et al. 2023."""

    factor: float = 0.7691
    site: str = IMAGE_EMBEDDINGS

    @property
    def draws(self) -> int:
        return 1

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        return Corrupted(clean, (Scale(self.site, self.factor),))


@dataclass(frozen=True)
class PixelNoise:
    """N(0, std) added to the pixels, in units of each picture's own standard deviation."""

    std: float = 1.0
    draws: int = 10
    seed: int = 0

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        pixels = _pixels(clean)
        units = torch.cat([_unit(_without_empty_tiles(picture)[None]).flatten() for picture in pixels])
        unit = units.view(-1, *[1] * pixels.ndim)
        noisy = pixels[:, None] + (self.std * unit * _draws(self, pixels)).to(pixels)
        noisy = _in_order(noisy, _image_owners(clean))
        return Corrupted(clean.repeat(self.draws).with_pixels(noisy), draws=self.draws)


@dataclass(frozen=True, eq=False)
class CounterfactualImage:
    """Another picture with the same question: a semantic image pair, SIP (Golovanevsky et al. 2025).

    ``images``: what ``prepare`` takes, one a row.
    """

    images: Any

    @property
    def draws(self) -> int:
        return 1

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        if clean.texts is None and clean.input_ids is not None:
            raise ValueError("a counterfactual image needs inputs that model.prepare made")
        options = {"interpolate_pos_encoding": True} if clean.interpolate_pos_encoding else {}
        texts = None if clean.texts is None else [piece.text for piece in clean.texts]
        other = model.prepare(self.images, texts, **options)
        if _pixels(other).shape != _pixels(clean).shape or other.image_rows != clean.image_rows:
            raise ValueError(
                f"the counterfactual pixels are {tuple(_pixels(other).shape)}, the clean {tuple(_pixels(clean).shape)}"
            )
        if [grid.places for grid in other.patch_grid] != [grid.places for grid in clean.patch_grid]:
            raise ValueError("the counterfactual picture is tiled otherwise than the clean one; give one of its size")
        return Corrupted(replace(clean, pixel_values=other.pixel_values, image_sizes=other.image_sizes))


@dataclass(frozen=True)
class CounterfactualQuestion:
    """Another question about the same picture, as many tokens long: symmetric token replacement, STR.

    ``questions``: one a row.
    """

    questions: str | tuple[str, ...]

    @property
    def draws(self) -> int:
        return 1

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        questions = [self.questions] if isinstance(self.questions, str) else list(self.questions)
        if len(questions) != len(clean):
            raise ValueError(f"{len(questions)} counterfactual questions for {len(clean)} rows")
        if clean.texts is None:
            raise ValueError("a counterfactual question needs inputs that model.prepare made, with their texts")
        other = model.reword(clean, questions)
        for piece, other_piece in zip(clean.texts, other.texts or (), strict=True):
            n_clean, n_other = len(piece.offsets), len(other_piece.offsets)
            if n_other != n_clean:
                raise ValueError(
                    f"{other_piece.text!r} has {n_other} tokens, {piece.text!r} has {n_clean}: positions would not "
                    "align; replace each word by one of as many tokens"
                )
        return Corrupted(other)


def describe(corruption: Corruption) -> dict[str, Any]:
    """A corruption's kind and parameters, for a result's provenance; of pictures, where they lie."""
    names: list[str] = [field.name for field in fields(corruption)] if is_dataclass(corruption) else []
    parameters = {name: getattr(corruption, name) for name in names}
    if isinstance(corruption, CounterfactualImage):
        listed = corruption.images if isinstance(corruption.images, (list, tuple)) else [corruption.images]
        parameters["images"] = [str(image) if isinstance(image, (str, Path)) else "given" for image in listed]
    return {"corruption": type(corruption).__name__, **parameters}


def _activation(model: HookedVLM, clean: VLMInputs, site: str) -> Float[Tensor, "b ..."]:
    with torch.no_grad():
        return model.run_with_hooks(clean, stop_at=site)


def _unit(activation: Float[Tensor, "b ..."]) -> Float[Tensor, "b 1 ..."]:
    """Each row's standard deviation, shaped to go with draws of it."""
    return activation.flatten(1).float().std(dim=1).view(-1, *[1] * activation.ndim)


def _draws(
    corruption: AdditiveGaussian | MultiplicativeGaussian | PixelNoise, like: Tensor
) -> Float[Tensor, "b d ..."]:
    """Standard normal numbers for every row and draw, the same however many others there are."""
    if corruption.draws < 1:
        raise ValueError(f"{type(corruption).__name__} needs at least one draw, not {corruption.draws}")
    noise = [
        torch.stack([gaussian(like.shape[1:], corruption.seed, row, draw) for draw in range(corruption.draws)])
        for row in range(len(like))
    ]
    return torch.stack(noise).to(like.device)


def _owners(model: HookedVLM, clean: VLMInputs, site: str, count: int) -> Sequence[int]:
    """The row that each entry of an activation belongs to: where images are seen it has one an image, or a tile."""
    if clean.pixel_values is None or site.startswith(f"{model.towers[-1]}."):
        return range(count)
    images = _image_owners(clean)
    if len(images) == count:
        return images
    tiles = {row: len(_activation(model, clean.rows([row]), site)) for row in dict.fromkeys(images)}
    return [row for row, own in tiles.items() for _ in range(own)]


def _image_owners(clean: VLMInputs) -> Sequence[int]:
    """The row that each image belongs to."""
    return range(len(_pixels(clean))) if clean.image_rows is None else clean.image_rows


def _in_order(drawn: Float[Tensor, "n d ..."], owners: Sequence[int]) -> Float[Tensor, "_ ..."]:
    """Draws in the order of ``clean.repeat(d)``: a row's images stay together, draw after draw."""
    groups = [[place for place, own in enumerate(owners) if own == row] for row in dict.fromkeys(owners)]
    order = [(place, draw) for own in groups for draw in range(drawn.shape[1]) for place in own]
    return torch.stack([drawn[place, draw] for place, draw in order])


def _without_empty_tiles(picture: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A picture without the zeros that make it as many tiles as the batch's largest has."""
    return picture if picture.ndim == 3 else picture[picture.flatten(1).any(1)]


def _pixels(inputs: VLMInputs) -> Tensor:
    if inputs.pixel_values is None:
        raise ValueError("these inputs have no pixel_values to corrupt")
    return inputs.pixel_values

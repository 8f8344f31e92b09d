"""Noise on the image embeddings, on another activation, or on the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.corruptions.corrupted import Corrupted, DrawnOnce, pixels_of
from hooked_vlm.edits import Add, Scale, gaussian
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import HookedVLM

IMAGE_EMBEDDINGS = "vision_encoder.hook_out"


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
class Scaled(DrawnOnce):
    """An activation times a constant; 0.7691 gives the average figures of Palit et al. 2023."""

    factor: float = 0.7691
    site: str = IMAGE_EMBEDDINGS

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        return Corrupted(clean, (Scale(self.site, self.factor),))


@dataclass(frozen=True)
class PixelNoise:
    """N(0, std) added to the pixels, in units of each picture's own standard deviation."""

    std: float = 1.0
    draws: int = 10
    seed: int = 0

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        pixels = pixels_of(clean)
        units = torch.cat([_unit(_without_empty_tiles(picture)[None]).flatten() for picture in pixels])
        unit = units.view(-1, *[1] * pixels.ndim)
        noisy = pixels[:, None] + (self.std * unit * _draws(self, pixels)).to(pixels)
        noisy = _in_order(noisy, _image_owners(clean))
        return Corrupted(clean.repeat(self.draws).with_pixels(noisy), draws=self.draws)


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
    return range(len(pixels_of(clean))) if clean.image_rows is None else clean.image_rows


def _in_order(drawn: Float[Tensor, "n d ..."], owners: Sequence[int]) -> Float[Tensor, "_ ..."]:
    """Draws in the order of ``clean.repeat(d)``: a row's images stay together, draw after draw."""
    groups = [[place for place, own in enumerate(owners) if own == row] for row in dict.fromkeys(owners)]
    order = [(place, draw) for own in groups for draw in range(drawn.shape[1]) for place in own]
    return torch.stack([drawn[place, draw] for place, draw in order])


def _without_empty_tiles(picture: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A picture without the zeros that make it as many tiles as the batch's largest has."""
    return picture if picture.ndim == 3 else picture[picture.flatten(1).any(1)]

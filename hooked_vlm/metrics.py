"""Logits to one number a row. A metric is a frozen value: ``metric(logits) -> [b]``.

Notation of Zhang & Nanda (2024): clean, corrupted and patched runs; the normalised effect is 0 where the patched run
is as the corrupted one and 1 where it is as the clean one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Metric = Callable[[Tensor], Tensor]
"""``[b p d_vocab] -> [b ...]``"""


@dataclass(frozen=True, eq=False)
class Probability:
    """Probability of each row's answer token at one position."""

    answer: Int[Tensor, " b"]
    position: int = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        return at(logits, self.position).softmax(-1).gather(1, self.answer[:, None].to(logits.device))[:, 0]


@dataclass(frozen=True, eq=False)
class LogProbability:
    """Log-probability, in nats, of each row's answer token at one position."""

    answer: Int[Tensor, " b"]
    position: int = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        return at(logits, self.position).log_softmax(-1).gather(1, self.answer[:, None].to(logits.device))[:, 0]


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """Logit of the answer token less the foil's, at one position."""

    answer: Int[Tensor, " b"]
    foil: Int[Tensor, " b"]
    position: int = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        both = torch.stack([self.answer, self.foil], dim=1).to(logits.device)
        answer, foil = at(logits, self.position).gather(1, both).unbind(1)
        return answer - foil


@dataclass(frozen=True, eq=False)
class SequenceLogProbability:
    """Log-probability, in nats, of whole answers: the sum over ``targets``, where ``mask`` is true.

    ``targets[b, p]`` is what should follow position p of the decoder's input.
    """

    targets: Int[Tensor, "b p"]
    mask: Tensor

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        log_probabilities = logits.float().log_softmax(-1).gather(2, self.targets[..., None].to(logits.device))[..., 0]
        return (log_probabilities * self.mask.to(logits.device)).sum(1)


@dataclass(frozen=True, eq=False)
class KLDivergence:
    """``KL(reference || run)`` over the vocabulary, in nats, at one position."""

    reference: Float[Tensor, "b p d_vocab"]
    position: int = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        reference = at(self.reference, self.position).to(logits.device).log_softmax(-1)
        return (reference.exp() * (reference - at(logits, self.position).log_softmax(-1))).sum(-1)


@dataclass(frozen=True, eq=False)
class Together:
    """Several metrics of one run, stacked on a last axis."""

    metrics: tuple[Metric, ...]

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, "b n_metrics"]:
        return torch.stack([metric(logits) for metric in self.metrics], dim=-1)


def at(logits: Float[Tensor, "b p d_vocab"], position: int) -> Float[Tensor, "b d_vocab"]:
    """Logits of one position, in fp32 whatever the model's dtype."""
    return logits[:, position].float()


def normalized(
    patched: Float[Tensor, "... b"], clean: Float[Tensor, " b"], corrupted: Float[Tensor, " b"]
) -> Float[Tensor, "... b"]:
    """``(patched - corrupted) / (clean - corrupted)``; NaN where clean and corrupted do not differ.

    Below 1e-6 of the larger of the two, a difference is rounding, and dividing by it is noise.
    """
    total = clean - corrupted
    undefined = total.abs() <= 1e-6 * torch.maximum(clean.abs(), corrupted.abs())
    return torch.where(undefined, torch.nan, (patched - corrupted) / total)

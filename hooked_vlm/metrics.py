"""Logits to one number a row. A metric is a frozen value: ``metric(logits) -> [b]``.

Notation of Zhang & Nanda (2024): clean, corrupted and patched runs; the normalised effect is 0 where the patched run
is as the corrupted one and 1 where it is as the clean one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Metric = Callable[[Tensor], Tensor]
"""``[b p d_vocab] -> [b ...]``"""

Position = int | Int[Tensor, " #b"]
"""One for all rows, or one for each."""


@dataclass(frozen=True, eq=False)
class Probability:
    """Probability of each row's answer token at one position."""

    answer: Int[Tensor, " #b"]
    position: Position = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        return _of(self.answer, at(logits, self.position).softmax(-1))


@dataclass(frozen=True, eq=False)
class LogProbability:
    """Log-probability, in nats, of each row's answer token at one position."""

    answer: Int[Tensor, " #b"]
    position: Position = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        return _of(self.answer, at(logits, self.position).log_softmax(-1))


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """Logit of the answer token less the foil's, at one position."""

    answer: Int[Tensor, " #b"]
    foil: Int[Tensor, " #b"]
    position: Position = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        last = at(logits, self.position)
        return _of(self.answer, last) - _of(self.foil, last)


@dataclass(frozen=True, eq=False)
class SequenceLogProbability:
    """Log-probability, in nats, of whole answers: the sum over ``targets``, where ``mask`` is true.

    ``targets[b, p]`` is what should follow position p of the decoder's input; where ``mask`` is false it may be
    anything, -100 say.
    """

    targets: Int[Tensor, "b p"]
    mask: Shaped[Tensor, "b p"]

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        if self.targets.shape != logits.shape[:2]:
            raise ValueError(f"targets {tuple(self.targets.shape)} for logits {tuple(logits.shape)}")
        mask = self.mask.to(logits.device).bool()
        targets = self.targets.to(logits.device).masked_fill(~mask, 0)
        log_probabilities = logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0]
        return log_probabilities.masked_fill(~mask, 0).sum(1)


@dataclass(frozen=True, eq=False)
class KLDivergence:
    """``KL(reference || run)`` over the vocabulary, in nats, at one position."""

    reference: Float[Tensor, "b p d_vocab"]
    position: Position = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        _check_rows(self.reference, logits)
        reference = at(self.reference, self.position).to(logits.device).log_softmax(-1)
        terms = reference.exp() * (reference - at(logits, self.position).log_softmax(-1))
        return terms.masked_fill(reference == -torch.inf, 0).sum(-1)


@dataclass(frozen=True, eq=False)
class Together:
    """Several metrics of one run, stacked on a last axis."""

    metrics: tuple[Metric, ...]

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, "b n_metrics"]:
        return torch.stack([metric(logits) for metric in self.metrics], dim=-1)


def at(logits: Float[Tensor, "rows p d_vocab"], position: Position) -> Float[Tensor, "rows d_vocab"]:
    """Logits of one position of each row, in fp32 whatever the model's dtype."""
    if isinstance(position, int):
        return logits[:, position].float()
    _check_rows(position, logits)
    return logits[torch.arange(len(logits), device=logits.device), position.to(logits.device)].float()


def _of(tokens: Int[Tensor, " b"], scores: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, " rows"]:
    """Each row's score of its token; one token serves every row."""
    _check_rows(tokens, scores)
    return scores.gather(1, tokens.to(scores.device).expand(len(scores))[:, None])[:, 0]


def _check_rows(own: Tensor, logits: Tensor) -> None:
    if len(own) not in (1, len(logits)):
        raise ValueError(f"a metric of {len(own)} rows for logits of {len(logits)}")


def normalized(
    patched: Float[Tensor, "..."], clean: Float[Tensor, "..."], corrupted: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """``(patched - corrupted) / (clean - corrupted)``, broadcast; NaN where clean and corrupted do not differ.

    Below 1e-6 of the larger of the two, a difference is rounding, and dividing by it is noise.
    """
    total = clean - corrupted
    undefined = total.abs() <= 1e-6 * torch.maximum(clean.abs(), corrupted.abs())
    return torch.where(undefined, torch.nan, (patched - corrupted) / total)

"""Logits to one number a row. A metric is a frozen value: ``metric(logits) -> [b]``.

Notation of Zhang & Nanda (2024): clean, corrupted and patched runs; the normalised effect is 0 where the patched run
is as the corrupted one and 1 where it is as the clean one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Metric = Callable[[Tensor], Tensor]
"""``[b p d_vocab] -> [b ...]``"""

Position = int | Int[Tensor, " #b"]
"""One for all rows, or one for each."""


@runtime_checkable
class ReadsPositions(Protocol):
    """A metric that says which positions it reads, so that a sweep need not compute the others."""

    def __call__(self, logits: Tensor) -> Tensor: ...

    def reads(self, n_positions: int) -> list[int]:
        """Of logits with so many positions, those that the metric reads, in ascending order."""
        ...

    def narrowed(self, positions: Sequence[int], n_positions: int) -> Metric:
        """The same metric, of logits that hold only ``positions``, in that order, of what were ``n_positions``.

        They may be more than it reads.
        """
        ...


class ReadsOne:
    """A metric that reads each row's logits at ``position``."""

    position: Position

    def reads(self, n_positions: int) -> list[int]:
        return _places(self.position, n_positions).unique().tolist()

    def narrowed(self, positions: Sequence[int], n_positions: int) -> Metric:
        kept = torch.tensor(list(positions))
        places = torch.searchsorted(kept, _places(self.position, n_positions).cpu())
        return replace(self, position=int(places) if isinstance(self.position, int) else places)  # type: ignore[type-var, return-value]


@dataclass(frozen=True, eq=False)
class Probability(ReadsOne):
    """Probability of each row's answer token at one position."""

    answer: Int[Tensor, " #b"]
    position: Position = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        return _of(self.answer, at(logits, self.position).softmax(-1))


@dataclass(frozen=True, eq=False)
class LogProbability(ReadsOne):
    """Log-probability, in nats, of each row's answer token at one position."""

    answer: Int[Tensor, " #b"]
    position: Position = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        return _of(self.answer, at(logits, self.position).log_softmax(-1))


@dataclass(frozen=True, eq=False)
class LogitDifference(ReadsOne):
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

    def reads(self, n_positions: int) -> list[int]:
        if self.targets.shape[1] != n_positions:
            raise ValueError(f"targets of {self.targets.shape[1]} positions for logits of {n_positions}")
        return self.mask.bool().any(0).nonzero()[:, 0].tolist()

    def narrowed(self, positions: Sequence[int], n_positions: int) -> Metric:
        return SequenceLogProbability(self.targets[:, list(positions)], self.mask[:, list(positions)])


@dataclass(frozen=True, eq=False)
class KLDivergence(ReadsOne):
    """``KL(reference || run)`` over the vocabulary, in nats, at one position."""

    reference: Float[Tensor, "b p d_vocab"]
    position: Position = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        _check_rows(self.reference, logits)
        reference = at(self.reference, self.position).to(logits.device).log_softmax(-1)
        terms = reference.exp() * (reference - at(logits, self.position).log_softmax(-1))
        return terms.masked_fill(reference == -torch.inf, 0).sum(-1)

    def narrowed(self, positions: Sequence[int], n_positions: int) -> Metric:
        # Its own position counts in the reference, which may be of another length.
        own = at(self.reference, self.position)[:, None].expand(-1, len(positions), -1)
        return replace(super().narrowed(positions, n_positions), reference=own)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Together:
    """Several metrics of one run, stacked on a last axis."""

    metrics: tuple[Metric, ...]

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, "b n_metrics"]:
        return torch.stack([metric(logits) for metric in self.metrics], dim=-1)

    def reads(self, n_positions: int) -> list[int]:
        return sorted({position for metric in self.metrics for position in positions_read(metric, n_positions)})

    def narrowed(self, positions: Sequence[int], n_positions: int) -> Metric:
        return Together(tuple(narrowed(metric, positions, n_positions) for metric in self.metrics))


@dataclass(frozen=True, eq=False)
class Generated:
    """A number of the answers that are generated, for :func:`hooked_vlm.sweep.sweep`: not of logits, but of texts.

    ``score`` is given one text a row, as ``model.generate`` returns them.
    """

    score: Callable[[list[str]], Sequence[float] | Tensor]
    max_new_tokens: int = 20
    num_beams: int = 1

    def __call__(self, texts: list[str]) -> Float[Tensor, " b"]:
        return torch.as_tensor(self.score(texts), dtype=torch.float32)


def positions_read(metric: Metric, n_positions: int) -> list[int]:
    """The positions of the logits that a metric reads: all, unless it says which."""
    read = metric.reads(n_positions) if isinstance(metric, ReadsPositions) else []
    return read or list(range(n_positions))


def narrowed(metric: Metric, positions: Sequence[int], n_positions: int) -> Metric:
    """A metric of logits that have only some positions, which are all that it reads."""
    return metric.narrowed(positions, n_positions) if len(positions) < n_positions else metric  # type: ignore[attr-defined]


def at(logits: Float[Tensor, "rows p d_vocab"], position: Position) -> Float[Tensor, "rows d_vocab"]:
    """Logits of one position of each row, in fp32 whatever the model's dtype."""
    if isinstance(position, int):
        return logits[:, position].float()
    _check_rows(position, logits)
    return logits[torch.arange(len(logits), device=logits.device), position.to(logits.device)].float()


def _places(position: Position, n_positions: int) -> Int[Tensor, " n"]:
    """Positions counted from the first.

    Raises:
        ValueError: there is no such position.
    """
    places = torch.as_tensor(position).reshape(-1)
    wrong = places[(places < -n_positions) | (places >= n_positions)].tolist()
    if wrong:
        raise ValueError(f"a metric reads positions {wrong}, and the logits have {n_positions}")
    return places % n_positions


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

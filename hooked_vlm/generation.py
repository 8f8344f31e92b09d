"""Greedy and beam search, for anything that can say what comes next.

A search sees a model only as a :class:`Decoding`: feed tokens, get the logits after the last one, shuffle the rows.
What it finds is what ``generate`` of HF transformers 5 finds, token for token. That is why the constants and the order
of the additions are HF's too: in fp32 they settle ties.

Axes: batch prompts, width sequences held side by side for one prompt, length tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

RULED_OUT = -1.0e9
"""Added to the score of what must not be chosen. Finite, so that what is ruled out keeps an order of its own."""


@runtime_checkable
class Decoding(Protocol):
    """One running generation: what the search needs of a model."""

    def step(self, token_ids: Int[Tensor, "rows new"]) -> Float[Tensor, "rows vocab"]:
        """Feed new tokens (the whole prompt at first, then one a row) and return the logits after the last one.

        The keys and values of all earlier tokens are the implementation's to keep.
        """
        ...

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        """Row i of the state becomes what row ``rows[i]`` was (beams that changed parents)."""
        ...


class Ending:
    """When a sequence ends: at an eos token, which may not come too early, or at ``max_new_tokens``."""

    def __init__(
        self, eos_token_ids: Sequence[int], min_new_tokens: int, max_new_tokens: int, device: torch.device
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise ValueError(f"min_new_tokens must be from 0 to max_new_tokens={max_new_tokens}, got {min_new_tokens}.")
        self.eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
        self.min_new_tokens = min_new_tokens
        self.max_new_tokens = max_new_tokens

    def reached_by(self, tokens: Int[Tensor, "*shape"], generated: int) -> Bool[Tensor, "*shape"]:
        """Which of these tokens, the ``generated``-th of their sequences, are the last."""
        return torch.isin(tokens, self.eos) | (generated == self.max_new_tokens)

    def forbid_early(self, scores: Float[Tensor, "rows vocab"], generated: int) -> Float[Tensor, "rows vocab"]:
        """The scores of the ``generated``-th token, without eos tokens where it is too early for them."""
        if generated > self.min_new_tokens:
            return scores
        vocab = torch.arange(scores.shape[-1], device=scores.device)
        return scores.masked_fill(torch.isin(vocab, self.eos), -torch.inf)


def greedy_search(
    decoding: Decoding,
    prompt: Int[Tensor, "batch prompt"],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    min_new_tokens: int = 0,
) -> Int[Tensor, "batch length"]:
    """Take the likeliest token until every row has ended; return the prompt and what follows it, padded."""
    tokens = greedy_tokens(
        decoding,
        prompt,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        min_new_tokens=min_new_tokens,
    )
    return torch.cat([prompt, torch.stack(list(tokens), dim=1)], dim=1)


def greedy_tokens(
    decoding: Decoding,
    prompt: Int[Tensor, "batch prompt"],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    min_new_tokens: int = 0,
) -> Iterator[Int[Tensor, " batch"]]:
    """The tokens of :func:`greedy_search`, one a row, each as soon as it is found."""
    ending = Ending(eos_token_ids, min_new_tokens, max_new_tokens, prompt.device)
    return _greedy_tokens(decoding, prompt, ending, pad_token_id)


def _greedy_tokens(
    decoding: Decoding, prompt: Int[Tensor, "batch prompt"], ending: Ending, pad_token_id: int
) -> Iterator[Int[Tensor, " batch"]]:
    new_tokens = prompt
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for generated in range(1, ending.max_new_tokens + 1):
        with torch.no_grad():
            logits = decoding.step(new_tokens).to(prompt.device, torch.float32)
        tokens = ending.forbid_early(logits, generated).argmax(dim=-1).masked_fill(ended, pad_token_id)
        yield tokens
        ended = ended | ending.reached_by(tokens, generated)
        if ended.all():
            return
        new_tokens = rearrange(tokens, "batch -> batch 1")


class Beams(NamedTuple):
    """Sequences held side by side for each prompt."""

    tokens: Int[Tensor, "batch width length"]
    scores: Float[Tensor, "batch width"]
    generated: Int[Tensor, "batch width"]
    """How many of the tokens are neither prompt nor padding."""
    ended: Bool[Tensor, "batch width"]
    rows: Int[Tensor, "batch width"]
    """The row of the decoding's state that holds all of the sequence but its last token."""

    @classmethod
    def start(cls, prompt: Int[Tensor, "batch prompt"], width: int) -> Beams:
        """The prompt in every beam; all but the first are ruled out, or else all would go the same way."""
        rows = rearrange(torch.arange(len(prompt) * width, device=prompt.device), "(b width) -> b width", width=width)
        scores = torch.zeros(rows.shape, dtype=torch.float32, device=prompt.device)
        scores[:, 1:] = RULED_OUT
        tokens = repeat(prompt, "b prompt -> b width prompt", width=width)
        return cls(tokens, scores, torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool), rows)

    def take(self, chosen: Int[Tensor, "batch chosen"]) -> Beams:
        batch = rearrange(torch.arange(len(chosen), device=chosen.device), "b -> b 1")
        return Beams(*(field[batch, chosen] for field in self))

    def best(self, width: int) -> Beams:
        return self.take(self.scores.topk(width).indices)

    def rule_out(self, mask: Bool[Tensor, "batch _"]) -> Beams:
        return self._replace(scores=self.scores + mask * RULED_OUT)

    def join(self, others: Beams) -> Beams:
        return Beams(*(torch.cat(pair, dim=1) for pair in zip(self, others, strict=True)))

    def pad(self, token_id: int) -> Beams:
        return self._replace(tokens=torch.nn.functional.pad(self.tokens, (0, 1), value=token_id))

    def continuations(self, log_probs: Float[Tensor, "rows vocab"], count: int) -> Beams:
        """The ``count`` likeliest sequences that are one token longer, whichever beams they continue."""
        (batch, width), vocab = self.scores.shape, log_probs.shape[-1]
        scores = rearrange(log_probs, "(b width) vocab -> b width vocab", b=batch) + self.scores[..., None]
        scores, chosen = rearrange(scores, "b width vocab -> b (width vocab)").topk(count)
        parents, token = self.take(chosen // vocab), chosen % vocab
        return parents._replace(
            tokens=torch.cat([parents.tokens, token[..., None]], dim=-1),
            scores=scores,
            generated=parents.generated + 1,
            rows=chosen // vocab + torch.arange(0, batch * width, width, device=chosen.device)[:, None],
        )

    def could_improve(self, finished: Beams, penalty: float) -> Bool[Tensor, "batch 1"]:
        """Whether the best sequence here would, had it ended, be better than the worst that has (or fill a place)."""
        return self.scores[:, :1] / penalty > finished.scores.amin(dim=1, keepdim=True)


@torch.no_grad()
def beam_search(
    decoding: Decoding,
    prompt: Int[Tensor, "batch prompt"],
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    min_new_tokens: int = 0,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> Int[Tensor, "batch length"]:
    """Follow the ``num_beams`` likeliest sequences of each row; return the best that ended, with its prompt, padded.

    The decoding sees each prompt ``num_beams`` times in a row. Sequences that ended are compared by log-probability
    over ``generated ** length_penalty``. Once ``num_beams`` of a row have ended, ``early_stopping=True`` closes it;
    False closes it when the best running one, had it ended now, would lose to all of them; ``"never"``, when it would
    lose at the length that suits it best.

    As in HF, one beam is greedy search, and beams are padded with the first eos token if ``pad_token_id`` is 0.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}.")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r}.')
    if num_beams == 1:
        return greedy_search(
            decoding,
            prompt,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            min_new_tokens=min_new_tokens,
        )
    ending = Ending(eos_token_ids, min_new_tokens, max_new_tokens, prompt.device)
    padding = eos_token_ids[0] if pad_token_id == 0 and len(eos_token_ids) > 0 else pad_token_id
    # Enough that num_beams can go on even when every beam meets every eos token.
    num_candidates = num_beams * max(2, 1 + len(eos_token_ids))
    may_end = torch.arange(num_candidates, device=prompt.device) < num_beams

    running = Beams.start(prompt, num_beams)
    finished = running._replace(scores=torch.full_like(running.scores, RULED_OUT))
    is_open = torch.ones(len(prompt), 1, dtype=torch.bool, device=prompt.device)
    new_tokens = rearrange(running.tokens, "b beam prompt -> (b beam) prompt")
    for generated in range(1, max_new_tokens + 1):
        log_probs = decoding.step(new_tokens).to(prompt.device, torch.float32).log_softmax(dim=-1)
        candidates = running.continuations(ending.forbid_early(log_probs, generated), num_candidates)
        ended = ending.reached_by(candidates.tokens[..., -1], generated)
        running = candidates.rule_out(ended).best(num_beams)

        penalized = candidates._replace(scores=candidates.scores / generated**length_penalty, ended=ended & may_end)
        newly_ended = penalized.rule_out(~is_open).rule_out(~penalized.ended)
        finished = finished.pad(padding).join(newly_ended).best(num_beams)

        horizon = max_new_tokens if early_stopping == "never" and length_penalty > 0 else generated
        is_open = is_open & running.could_improve(finished, horizon**length_penalty)
        if early_stopping is True:
            is_open = is_open & ~finished.ended.all(dim=1, keepdim=True)
        if generated == max_new_tokens or not is_open.any():
            break
        decoding.reorder(rearrange(running.rows, "b beam -> (b beam)"))
        new_tokens = rearrange(running.tokens[..., -1:], "b beam new -> (b beam) new")

    return finished.tokens[:, 0, : prompt.shape[1] + int(finished.generated[:, 0].max())]

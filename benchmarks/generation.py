"""What generating costs: tokens a second, greedy, against HF's ``generate``.

``python -m benchmarks.generation [--size llava ...] [--batch 1 4] [--padded] [--one-thread] [--repeats N]``
"""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import set_verbosity_error

from benchmarks.common import ONE_THREAD, ONE_THREAD_HELP, WALL, Comparison, parser, report, timing_note
from benchmarks.models import SIZES, LlavaSize, Size
from hooked_vlm import HookedVLM, VLMInputs

LARGE = "llava"
"""The size in which arithmetic counts."""


@dataclass(frozen=True)
class Side:
    """One way to generate; ``head`` is the layer that says the next token, once a step."""

    generate: Callable[[int], Tensor]
    head: nn.Module

    def rates(self, n_tokens: int, rows: int, clock: Callable[[], float]) -> tuple[float, float]:
        """Tokens a second: all of them, the reading of the prompt included; those after the first."""
        times: list[float] = []
        handle = self.head.register_forward_hook(lambda *_: times.append(clock()))
        gc.collect()
        start = clock()
        self.generate(n_tokens)
        end = clock()
        handle.remove()
        return rows * n_tokens / (end - start), rows * (n_tokens - 1) / (times[-1] - times[0])


def main() -> None:
    """Measure the sizes, attentions and batches asked for, and print one table."""
    options = parser("Generation, side by side.", repeats=7)
    sizes = [name for name, size in SIZES.items() if isinstance(size, LlavaSize) and size.dtype == torch.float32]
    options.add_argument("--size", nargs="+", choices=sizes, default=[LARGE, "llava-small", "llava-tiny"])
    options.add_argument("--attention", nargs="+", choices=["sdpa", "eager"], default=["sdpa", "eager"])
    options.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    options.add_argument("--padded", action="store_true", help="pad each row by one token more than the one before")
    options.add_argument("--one-thread", action="store_true", help=ONE_THREAD_HELP)
    options.add_argument("--tokens", type=int, default=64, help="new tokens (%(default)s)")
    chosen = options.parse_args()
    set_verbosity_error()
    found: list[tuple[str, Comparison]] = []
    for name in chosen.size:
        timing = WALL if name == LARGE and not chosen.one_thread else ONE_THREAD
        with timing.threaded():
            found += [(name, row) for row in comparisons(SIZES[name], chosen, timing.clock)]
    padding = ", rows padded" if chosen.padded else ""
    report(
        f"Generation, greedy, {chosen.tokens} new tokens, float32{padding}: tokens a second, more is better",
        ("size", *Comparison.columns),
        [(name, *row.row()) for name, row in found],
        [{"size": name, **row.record()} for name, row in found],
        [
            "Before anything was timed, the tokens were HF's.",
            timing_note([] if chosen.one_thread else [LARGE]),
            "All tokens: the reading of the prompt included. Later tokens: those after the first.",
        ],
        chosen.json,
    )


def comparisons(size: Size, chosen: Namespace, clock: Callable[[], float]) -> Iterator[Comparison]:
    """The rows of one size, each measured when it is asked for."""
    hf_model = size.hf_model()
    for attention in chosen.attention:
        hf_model.set_attn_implementation(attention)
        model = HookedVLM.from_hf(hf_model, attention=attention)
        for batch in chosen.batch:
            tensors = size.inputs(batch)
            if chosen.padded:
                tensors = padded(tensors, hf_model.config.pad_token_id)
            yield from in_turn(model, hf_model, tensors, chosen.tokens, chosen.repeats, clock)


def in_turn(
    model: HookedVLM,
    hf_model: Any,
    tensors: dict[str, Tensor],
    n_tokens: int,
    repeats: int,
    clock: Callable[[], float],
) -> Iterator[Comparison]:
    """The rows of one model, attention and batch, measured side by side."""
    inputs = VLMInputs.of(tensors)

    def generate(n_tokens: int) -> Tensor:
        tokens = model.generate(inputs, max_new_tokens=n_tokens, return_type="tokens")
        assert isinstance(tokens, Tensor)
        return tokens

    ours = Side(generate, model.get_submodule("language_model.unembed"))
    theirs = Side(lambda n: hf_model.generate(**tensors, max_new_tokens=n, do_sample=False), hf_model.lm_head)
    tokens, expected = ours.generate(n_tokens), theirs.generate(n_tokens)
    if not torch.equal(tokens, expected):
        raise SystemExit(f"our tokens are not HF's:\n{tokens}\n{expected}")
    rows, length = expected.shape
    if length - tensors["input_ids"].shape[1] != n_tokens:
        raise SystemExit(f"the answers end before {n_tokens} tokens, so their length is not what it seems")
    found: dict[Side, list[tuple[float, float]]] = {ours: [], theirs: []}
    for repeat in range(repeats):
        for side in (ours, theirs) if repeat % 2 else (theirs, ours):
            found[side].append(side.rates(n_tokens, rows, clock))
    for place, what in enumerate(("all tokens", "later tokens")):
        values, others = (tuple(rates[place] for rates in found[side]) for side in (ours, theirs))
        name = f"{model.attention}, batch of {rows}, {what}"
        yield Comparison(name, "HF's", values, others, 1.0, "tok/s")


def padded(tensors: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
    """The same prompts, the i-th with i tokens of padding on its left (and i less at its end)."""
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    rows = range(len(ids))
    shifted = [torch.cat([ids.new_full((row,), pad), ids[row, : ids.shape[1] - row]]) for row in rows]
    masks = [torch.cat([mask.new_zeros(row), mask[row, : mask.shape[1] - row]]) for row in rows]
    return {**tensors, "input_ids": torch.stack(shifted), "attention_mask": torch.stack(masks)}


if __name__ == "__main__":
    main()

"""What a forward costs: against HF's, with a hook, with a full cache, and with fused attention.

``python -m benchmarks.forward [--size vqa-base small tiny] [--repeats N] [--batch N] [--json FILE]``
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.common import Comparison, compare, parser, report, seconds
from benchmarks.models import SMALL, TINY, VQA_BASE, Size
from hooked_vlm import HookedVLM, HookPoint, VLMInputs

HOOKED = "question_encoder.blocks.3.hook_mlp_out"


@dataclass(frozen=True)
class Setting:
    """How a size is measured, and what is wanted of it."""

    size: Size
    threads: int | None
    clock: Callable[[], float]
    calls: int
    forward_goal: float
    cache_goal: float | None = None


SETTINGS = {
    "vqa-base": Setting(VQA_BASE, None, time.perf_counter, 1, forward_goal=1.02, cache_goal=1.3),
    # Small models are measured for their Python: a pool of threads, or who else uses the machine, is noise.
    "small": Setting(SMALL, 1, time.process_time, 8, forward_goal=1.15),
    "tiny": Setting(TINY, 1, time.process_time, 8, forward_goal=1.15),
}


def main() -> None:
    """Measure the sizes asked for, and print one table."""
    options = parser("Forward passes, side by side.", repeats=15)
    options.add_argument("--size", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options.add_argument("--batch", type=int, default=1)
    chosen = options.parse_args()
    threads = torch.get_num_threads()
    found: dict[str, list[Comparison]] = {}
    for name in chosen.size:
        setting = SETTINGS[name]
        torch.set_num_threads(setting.threads or threads)
        found[name] = list(comparisons(setting, chosen.batch, chosen.repeats))
    torch.set_num_threads(threads)
    report(
        f"Forward, batch of {chosen.batch}, float32, no gradients",
        ("size", *Comparison.columns),
        [(name, *comparison.row()) for name, rows in found.items() for comparison in rows],
        [{"size": name, **comparison.record()} for name, rows in found.items() for comparison in rows],
        [
            "Before anything was timed, logits were bit-equal to HF's, with and without a cache.",
            "vqa-base: wall time, all threads; small, tiny: CPU time, one thread.",
        ],
        chosen.json,
    )


@torch.no_grad()
def comparisons(setting: Setting, batch: int, repeats: int) -> Iterator[Comparison]:
    """The rows of one size, each measured when it is asked for."""
    hf_model, tensors = setting.size.hf_model(), setting.size.inputs(batch)
    model, inputs = HookedVLM.from_hf(hf_model), VLMInputs.of(tensors)
    check_equal(hf_model, model, tensors)
    fused = HookedVLM.from_hf(hf_model, attention="sdpa")

    def timed(call: Callable[[], object]) -> Callable[[], float]:
        return partial(seconds, call, setting.calls, setting.clock)

    plain = timed(lambda: model(inputs))
    against_plain = partial(compare, reference="forward", measure_reference=plain, repeats=repeats)
    theirs = timed(lambda: hf_model(**tensors))
    cached = model.run_with_cache(inputs)[1]
    full_cache = f"full cache ({len(cached)} names, {cached.nbytes / 2**20:.0f} MiB)"
    del cached
    yield compare("forward", plain, "HF's", theirs, repeats=repeats, goal=setting.forward_goal)
    yield against_plain("forward with one hook", timed(lambda: hooked(model, inputs)))
    yield against_plain(full_cache, timed(lambda: model.run_with_cache(inputs)), goal=setting.cache_goal)
    yield against_plain("forward, sdpa", timed(lambda: fused(inputs)))


def hooked(model: HookedVLM, inputs: VLMInputs) -> Tensor:
    """A run with one hook, which reads and returns nothing."""

    def look(activation: Tensor, hook: HookPoint) -> None:
        hook.ctx["mean"] = activation.mean()

    return model.run_with_hooks(inputs, fwd_hooks=[(HOOKED, look)])


def check_equal(hf_model: nn.Module, model: HookedVLM, tensors: dict[str, Tensor]) -> None:
    """Compare logits; HF's forward for question answering computes them and does not return them."""
    seen: list[Tensor] = []
    decoder = hf_model.get_submodule("text_decoder")
    handle = decoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.logits))
    hf_model(**tensors)
    handle.remove()
    inputs = VLMInputs.of(tensors)
    for what, logits in (("forward", model(inputs)), ("run_with_cache", model.run_with_cache(inputs)[0])):
        if not torch.equal(logits, seen[0]):
            raise SystemExit(f"{what} does not give HF's logits: off by up to {(logits - seen[0]).abs().max():.1e}")


if __name__ == "__main__":
    main()

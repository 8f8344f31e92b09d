"""What a forward costs: against HF's, with a hook, with a cache, and with fused attention.

``python -m benchmarks.forward [--size vqa-base ... llava] [--batch N] [--one-thread] [--repeats N] [--json FILE]``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    ONE_THREAD,
    ONE_THREAD_HELP,
    WALL,
    Comparison,
    Timing,
    compare,
    parser,
    report,
    seconds,
    timing_note,
)
from benchmarks.models import SIZES, BlipSize, Size
from hooked_vlm import HookedVLM, HookPoint, VLMInputs


@dataclass(frozen=True)
class Setting:
    """How a size is measured, and what is wanted of it."""

    timing: Timing
    calls: int
    forward_goal: float
    cache_goal: float | None = None


LARGE = Setting(WALL, 1, forward_goal=1.02, cache_goal=1.3)
SMALL = Setting(ONE_THREAD, 8, forward_goal=1.15)

SETTINGS = {
    "vqa-base": LARGE,
    "small": SMALL,
    "tiny": SMALL,
    "llava": LARGE,
    "llava-small": SMALL,
    "llava-tiny": SMALL,
}


def main() -> None:
    """Measure the sizes asked for, and print one table."""
    options = parser("Forward passes, side by side.", repeats=15)
    blips = [name for name in SETTINGS if isinstance(SIZES[name], BlipSize)]
    options.add_argument("--size", nargs="+", choices=list(SETTINGS), default=blips, help="by default BLIP's")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--one-thread", action="store_true", help=ONE_THREAD_HELP)
    chosen = options.parse_args()
    found: dict[str, list[Comparison]] = {}
    for name in chosen.size:
        setting, size = SETTINGS[name], SIZES[name]
        if chosen.one_thread:
            setting = replace(setting, timing=ONE_THREAD)
        rows = blip_comparisons if isinstance(size, BlipSize) else llava_comparisons
        with setting.timing.threaded():
            found[name] = list(rows(Sides(size, setting, chosen.batch, chosen.repeats)))
    report(
        f"Forward, batch of {chosen.batch}, float32, no gradients",
        ("size", *Comparison.columns),
        [(name, *comparison.row()) for name, rows in found.items() for comparison in rows],
        [{"size": name, **comparison.record()} for name, rows in found.items() for comparison in rows],
        [
            "Before anything was timed, logits were bit-equal to HF's, with and without a cache.",
            timing_note([] if chosen.one_thread else ["vqa-base", "llava"]),
        ],
        chosen.json,
    )


class Sides:
    """HF's model of a size, its inputs, and how runs of it and of ours over it are measured."""

    def __init__(self, size: Size, setting: Setting, batch: int, repeats: int) -> None:
        self.size, self.setting, self.repeats = size, setting, repeats
        self.hf_model, self.tensors = size.hf_model(), size.inputs(batch)
        self.inputs = VLMInputs.of(self.tensors)

    def against_hf(self, what: str, model: HookedVLM, cached: str | None = None) -> Comparison:
        """Our forward against HF's, once their logits are known to be equal. ``cached``: the names in the cache."""
        expected = self.size.logits(self.hf_model, self.tensors)
        for run, call in (("forward", self.plain(model)), ("run_with_cache", self.cache(model, cached))):
            if not torch.equal(logits := call(), expected):
                difference = (logits - expected).abs().max()
                raise SystemExit(f"{run} does not give HF's logits ({what}): off by up to {difference:.1e}")
        theirs = partial(self.hf_model, **self.tensors)
        return self.compare(what, self.plain(model), "HF's", theirs, self.setting.forward_goal)

    def compare(
        self,
        what: str,
        call: Callable[[], object],
        reference: str,
        reference_call: Callable[[], object],
        goal: float | None = None,
    ) -> Comparison:
        """Time two calls side by side."""
        calls, clock = self.setting.calls, self.setting.timing.clock
        measure, measure_reference = (partial(seconds, one, calls, clock) for one in (call, reference_call))
        return compare(what, measure, reference, measure_reference, repeats=self.repeats, goal=goal)

    def plain(self, model: HookedVLM) -> Callable[[], Tensor]:
        return lambda: model(self.inputs)

    def cache(self, model: HookedVLM, names: str | None = None) -> Callable[[], Tensor]:
        """A run whose cache is dropped with the call."""
        return lambda: model.run_with_cache(self.inputs, names_filter=names)[0]

    def cache_size(self, model: HookedVLM, names: str | None = None) -> str:
        cache = model.run_with_cache(self.inputs, names_filter=names)[1]
        return f"{len(cache)} names, {cache.nbytes / 2**20:.0f} MiB"

    def hooked(self, model: HookedVLM) -> Callable[[], Tensor]:
        """A run with one hook, which reads and returns nothing."""

        def look(activation: Tensor, hook: HookPoint) -> None:
            hook.ctx["mean"] = activation.mean()

        return lambda: model.run_with_hooks(self.inputs, fwd_hooks=[(self.size.hooked, look)])


@torch.no_grad()
def blip_comparisons(sides: Sides) -> Iterator[Comparison]:
    """The rows of a BLIP, each measured when it is asked for."""
    model, fused = (HookedVLM.from_hf(sides.hf_model, attention=attention) for attention in ("eager", "sdpa"))
    yield sides.against_hf("forward", model)
    yield sides.compare("forward with one hook", sides.hooked(model), "forward", sides.plain(model))
    full = f"full cache ({sides.cache_size(model)})"
    yield sides.compare(full, sides.cache(model), "forward", sides.plain(model), sides.setting.cache_goal)
    yield sides.compare("forward, sdpa", sides.plain(fused), "forward", sides.plain(model))


@torch.no_grad()
def llava_comparisons(sides: Sides) -> Iterator[Comparison]:
    """The rows of a LLaVA. HF runs CLIP's last layer, which LLaVA does not read, and ours does not."""
    config: Any = sides.hf_model.config
    residuals = "*hook_resid_*"
    models: dict[str, HookedVLM] = {}
    for attention in ("sdpa", "eager"):
        sides.hf_model.set_attn_implementation(attention)
        for layer, read in ((config.vision_feature_layer, ""), (-1, ", CLIP read at its end")):
            before, config.vision_feature_layer = config.vision_feature_layer, layer
            models[attention + read] = HookedVLM.from_hf(sides.hf_model, attention=attention)
            yield sides.against_hf(f"forward, {attention}{read}", models[attention + read], residuals)
            config.vision_feature_layer = before
    model = models["sdpa"]
    yield sides.compare("forward with one hook, sdpa", sides.hooked(model), "forward", sides.plain(model))
    for what, names in (("LLaMA's residuals", f"language_model.{residuals}"), ("all residuals", residuals)):
        cached = f"{what} cached, sdpa ({sides.cache_size(model, names)})"
        goal = sides.setting.cache_goal
        yield sides.compare(cached, sides.cache(model, names), "forward", sides.plain(model), goal)
    yield sides.compare("forward, eager", sides.plain(models["eager"]), "forward, sdpa", sides.plain(model))


if __name__ == "__main__":
    main()

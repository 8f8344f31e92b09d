"""What a forward costs: against HF's, with a hook, with a full cache, and with fused attention.

    python -m benchmarks.forward [--size vqa-base small] [--repeats N] [--batch N] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import COMPARISON_COLUMNS, Comparison, compare, parser, report
from benchmarks.models import SIZES, Size
from hooked_vlm import HookedVLM, HookPoint, VLMInputs

GOALS = {
    ("vqa-base", "forward"): 1.02,
    ("vqa-base", "cache"): 1.3,
    ("small", "forward"): 1.15,
}
CALLS = {"vqa-base": 1, "small": 8}
HOOKED = "question_encoder.blocks.3.hook_mlp_out"


def main() -> None:
    options = parser("Forward passes, side by side.", repeats=15)
    options.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    options.add_argument("--batch", type=int, default=1)
    chosen = options.parse_args()
    found: dict[str, list[Comparison]] = {}
    notes = ["Wall time; no_grad, float32; outputs were equal, bit for bit, before anything was timed."]
    for name in chosen.size:
        threads = torch.get_num_threads()
        # What is small is measured for its Python; a pool of threads would only add noise.
        torch.set_num_threads(1 if name == "small" else threads)
        found[name] = list(comparisons(name, SIZES[name], chosen.batch, chosen.repeats))
        torch.set_num_threads(threads)
    report(
        f"Forward, batch of {chosen.batch}",
        ("size", *COMPARISON_COLUMNS),
        [(name, *comparison.row()) for name, rows in found.items() for comparison in rows],
        [{"size": name, **comparison.record()} for name, rows in found.items() for comparison in rows],
        [*notes, "The small size runs on 1 thread." if "small" in found else ""],
        chosen.json,
    )


@torch.no_grad()
def comparisons(name: str, size: Size, batch: int, repeats: int) -> Iterator[Comparison]:
    """Each row of the table, measured when it is asked for."""
    hf_model, tensors = size.hf_model(), size.inputs(batch)
    model, inputs = HookedVLM.from_hf(hf_model), VLMInputs(**tensors)
    check_equal(hf_model, model, tensors)
    measure = partial(compare, repeats=repeats, calls=CALLS[name])
    plain: Callable[[], Tensor] = partial(model, inputs)

    yield measure("forward", plain, "HF's", partial(hf_model, **tensors), goal=GOALS.get((name, "forward")))
    yield measure("forward with one hook", partial(hooked, model, inputs), "forward", plain)
    yield measure(
        f"full cache ({len(model.hook_names)} names)",
        partial(model.run_with_cache, inputs),
        "forward",
        plain,
        goal=GOALS.get((name, "cache")),
    )
    fused = HookedVLM.from_hf(hf_model, attention="sdpa")
    yield measure("sdpa", partial(fused, inputs), "eager", plain)


def hooked(model: HookedVLM, inputs: VLMInputs) -> Tensor:
    """A run with one hook, which reads and returns nothing."""

    def look(activation: Tensor, hook: HookPoint) -> None:
        hook.ctx["mean"] = activation.mean()

    return model.run_with_hooks(inputs, fwd_hooks=[(HOOKED, look)], clear_contexts=True)


def check_equal(hf_model: torch.nn.Module, model: HookedVLM, tensors: dict[str, Tensor]) -> None:
    """HF's forward for question answering computes logits and does not return them."""
    seen: list[Tensor] = []
    handle = hf_model.text_decoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.logits))
    hf_model(**tensors)
    handle.remove()
    logits, cached = model(VLMInputs(**tensors)), model.run_with_cache(VLMInputs(**tensors))[0]
    for what, ours in (("forward", logits), ("run_with_cache", cached)):
        if not torch.equal(ours, seen[0]):
            raise SystemExit(f"{what} does not give HF's logits: off by up to {(ours - seen[0]).abs().max():.1e}")


if __name__ == "__main__":
    main()

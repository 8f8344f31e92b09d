"""One load, in this process alone. ``benchmarks.loading`` starts it, says when each step begins, and watches.

``python -m benchmarks.load_once (write | ours | hf) SIZE FOLDER``
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks.models import SIZES, LlavaSize, Size

Load = Callable[[str], Any]
Answer = Callable[[Any, dict[str, Tensor]], Tensor | None]


def main() -> None:
    """Write a checkpoint, or load one and run it once, each step on command."""
    action, name, folder = sys.argv[1:]
    disable_progress_bar()
    size = SIZES[name]
    if action == "write":
        size.write(Path(folder))
        return
    load, answer = {"ours": ours, "hf": theirs}[action](size)
    model = step(lambda: load(folder))
    inputs = size.inputs()
    with torch.no_grad():
        step(lambda: answer(model, inputs))


def ours(size: Size) -> tuple[Load, Answer]:
    """How we load and run; all that it needs is imported."""
    import hooked_vlm.loading  # noqa: F401
    from hooked_vlm import HookedVLM

    # Loading imports the config's classes when it is called.
    assert size.config
    return HookedVLM.from_pretrained, looked_at if isinstance(size, LlavaSize) else lambda model, inputs: model(inputs)


def looked_at(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """A run that keeps the language model's residuals at the last position."""
    logits, cache = model.run_with_cache(
        inputs,
        names_filter=lambda name: name.startswith("language_model") and name.endswith("hook_resid_post"),
        pos_slice=-1,
    )
    assert all(activation.isfinite().all() for activation in cache.values())
    return logits


def theirs(size: Size) -> tuple[Load, Answer]:
    """How HF does."""
    return size.hf_class.from_pretrained, lambda model, inputs: getattr(model(**inputs), "logits", None)


def step(call: Callable[[], Any]) -> Any:
    """Say that all is ready, wait for a line, call, and print the seconds that it took, and what shape came of it.

    Without a line there is nothing more to do.
    """
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit()
    # What was imported is not the step's to search for garbage.
    gc.collect()
    gc.freeze()
    start = time.perf_counter()
    result = call()
    taken = time.perf_counter() - start
    print(json.dumps({"seconds": taken, "shape": list(getattr(result, "shape", ()))}), flush=True)
    return result


if __name__ == "__main__":
    main()

"""One load, in this process alone. ``benchmarks.loading`` starts it, says when each step begins, and watches.

``python -m benchmarks.load_once (write | ours | hf) SIZE FOLDER``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.models import SIZES

Load = Callable[[str], Any]
Run = Callable[[Any, dict[str, Any]], Any]


def main() -> None:
    """Write a checkpoint, or load one and run it once, each step on command."""
    action, size, folder = sys.argv[1:]
    disable_progress_bar()
    if action == "write":
        SIZES[size].hf_model().save_pretrained(folder)
        return
    load, run = {"ours": ours, "hf": theirs}[action]()
    model = step(lambda: load(folder))
    inputs = SIZES[size].inputs()
    with torch.no_grad():
        step(lambda: run(model, inputs))


def ours() -> tuple[Load, Run]:
    """How we load and run; all that it needs is imported."""
    # Loading imports these when it is called.
    from transformers import BlipConfig  # noqa: F401

    import hooked_vlm.loading  # noqa: F401
    from hooked_vlm import HookedVLM

    return HookedVLM.from_pretrained, lambda model, inputs: model(inputs)


def theirs() -> tuple[Load, Run]:
    """How HF does."""
    from transformers import BlipForQuestionAnswering

    return BlipForQuestionAnswering.from_pretrained, lambda model, inputs: model(**inputs)


def step(call: Callable[[], Any]) -> Any:
    """Say that all is ready, wait for a line, call, and print the seconds that it took."""
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    result = call()
    print(time.perf_counter() - start, flush=True)
    return result


if __name__ == "__main__":
    main()

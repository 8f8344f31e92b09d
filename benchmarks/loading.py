"""What loading costs: ``HookedVLM.from_pretrained`` against HF's, time and memory, each in a fresh process.

python -m benchmarks.loading [--size vqa-base small] [--repeats N] [--json FILE]
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO

from benchmarks.common import COMPARISON_COLUMNS, Comparison, compare, milliseconds, parser, quartiles, report
from benchmarks.models import SMALL, VQA_BASE

SIZES = {"vqa-base": VQA_BASE, "small": SMALL}
SAMPLED_EVERY = 5e-4  # seconds


@dataclass(frozen=True)
class Load:
    """One load in a process of its own, everything imported before it. Memory in bytes, as growth over the start."""

    load: float
    first_forward: float
    peak_anonymous: int
    end_anonymous: int
    peak_resident: int


def main() -> None:
    options = parser("Loads of a checkpoint, side by side.", repeats=9)
    options.add_argument("--size", choices=list(SIZES), default="vqa-base")
    options.add_argument("--child", nargs=2, metavar=("WHOSE", "FOLDER"), help="(used by the benchmark itself)")
    chosen = options.parse_args()
    if chosen.child:
        child(*chosen.child, size=chosen.size)
        return
    with tempfile.TemporaryDirectory() as folder:
        in_child(write, chosen.size, Path(folder))
        n_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        loads: dict[str, list[Load]] = {"ours": [], "HF": []}
        measure(loads, chosen.repeats)

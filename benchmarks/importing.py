"""What ``import hooked_vlm`` costs, against ``import torch``, each in a fresh process.

``python -m benchmarks.importing [--repeats N] [--json FILE]``
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.common import Comparison, compare, parser, report

TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def main() -> None:
    """Measure, and print one row."""
    chosen = parser("Import times, side by side.", repeats=15).parse_args()
    import_time("hooked_vlm")  # compiles what is not compiled yet
    row = compare(
        "import hooked_vlm",
        partial(import_time, "hooked_vlm"),
        "import torch",
        partial(import_time, "torch"),
        repeats=chosen.repeats,
        goal=2.0,
    )
    report(
        "Importing, in fresh processes",
        Comparison.columns,
        [row.row()],
        [row.record()],
        ["Wall time of the import statement; hooked_vlm's includes torch's. Files are in the page cache."],
        chosen.json,
    )


def import_time(module: str) -> float:
    """Seconds that the import statement takes in a new interpreter."""
    ran = subprocess.run([sys.executable, "-c", TIMED.format(module)], check=True, capture_output=True, text=True)
    return float(ran.stdout)


if __name__ == "__main__":
    main()

"""Several processes on one run, on one machine: each with its own model, on its own GPU where there are several."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hooked_vlm.runs.experiment import Experiment
from hooked_vlm.runs.folder import Folder


@contextmanager
def helpers(folder: Folder, experiment: Experiment, workers: int, told: Callable[[str], None]) -> Iterator[None]:
    """``workers - 1`` processes that help this one along, as long as the block lasts."""
    devices = _devices(experiment.model.get("device"), workers)
    processes = [_started(folder, experiment, device) for device in devices[1:]]
    try:
        yield
        for process in processes:
            if process.poll():
                told(f"a worker ended with exit code {process.returncode}; its samples were done by others")
    finally:
        # As they may at any moment.
        for process in processes:
            process.kill()
            process.wait()


def _devices(device: str | None, workers: int) -> list[str | None]:
    import torch

    if device is None or not device.startswith("cuda"):
        return [device] * workers
    count = torch.cuda.device_count()
    first = int(device.partition(":")[2] or 0)
    return [f"cuda:{(first + worker) % count}" for worker in range(workers)]


def _started(folder: Folder, experiment: Experiment, device: str | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hooked_vlm.runs.workers", str(folder.path), str(experiment.base), device or ""]
    # Ctrl-C in a terminal is for this process alone, which then ends the others.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def main(arguments: list[str]) -> None:
    """Help the run in a folder along, while whoever started this process lives."""
    from hooked_vlm.runs.run import join

    folder, base, device = arguments
    threading.Thread(target=_end_with_parent, daemon=True).start()
    join(Folder(Path(folder)), Path(base), device or None, lambda message: print(message, file=sys.stderr))


def _end_with_parent() -> None:
    """End when standard input does, which is when the starting process ends, or no longer needs us."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])

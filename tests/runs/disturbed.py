"""A run that costs nothing and leaves a line of each turn, to be disturbed; and processes that carry it out.

The processes are forked from one that has imported everything, and has a single thread: to start one takes
milliseconds, and it may be killed as often as a test likes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hooked_vlm import HookedVLM, results
from hooked_vlm.data import Sample, SampleError
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.runs import Experiment, Method, run

PATIENCE = 60.0
"""Seconds after which a test does not wait any longer."""


def numbers(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    *,
    log: str = "",
    seconds: float = 0.0,
    crowd: int = 1,
    odd: Mapping[str, str] | None = None,
    scale: float = 1.0,
    progress: bool = False,
) -> xr.Dataset:
    """Numbers, flags, texts and gaps, of a sample's name alone.

    Args:
        log: a file that gets a line when a turn begins and when it ends.
        seconds: what a turn takes.
        crowd: processes that must have begun a turn before one ends.
        odd: what becomes of some samples, by their names: ``"dropped"``, ``"failed"``, or as ``_ODD`` has it.
    """

    def one(sample: Sample) -> xr.Dataset:
        note(log, "begins", sample.id)
        time.sleep(seconds)
        wait_until(lambda: not log or len({turn.process for turn in turns(log)}) >= crowd)
        how = (odd or {}).get(sample.id)
        if how == "dropped":
            raise SampleError(f"{sample.id} is odd", "odd samples")
        if how is not None:
            raise _ODD[how](sample.id)
        found = numbers_of(sample.id, scale)
        note(log, "ends", sample.id)
        return found

    return over_samples(model, samples, "numbers", one, progress=progress, scale=scale)


_ODD: dict[str, Callable[[str], BaseException]] = {
    "failed": lambda name: RuntimeError(f"{name} cannot be done"),
    "huge": lambda name: RuntimeError("x" * 10_000_000),
    "unwritable": lambda name: RuntimeError("half a pair: \ud83d, nothing: \0, a tag: </script>"),
    "silent": lambda name: _SilentError(),
    "interrupted": lambda name: KeyboardInterrupt(),
}


class _SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def numbers_of(name: str, scale: float = 1.0) -> xr.Dataset:
    """What is found of a sample: of positions of its own, with some of them missing."""
    drawn = np.random.default_rng(zlib.crc32(name.encode()))
    positions = np.sort(drawn.choice(6, size=drawn.integers(2, 6), replace=False))
    values = scale * drawn.normal(size=(1, len(positions), 2))
    values[drawn.random(values.shape) < 0.1] = np.nan
    dims = ("sample", "position", "side")
    return xr.Dataset(
        {
            "value": (dims, values),
            "narrow": (dims[:2], values[..., 0].astype(np.float32)),
            "flag": (dims[:2], values[..., 1] > 0),
            "count": ("sample", [int(drawn.integers(100))]),
            "noise_floor": abs(float(drawn.normal())),
        },
        {
            "sample": [name],
            "position": positions,
            "side": ["left", "right"],
            "token": (dims[:2], [[f"{name} é🟥"[: 1 + position] for position in positions]]),
        },
    )


def largest(result: xr.Dataset) -> xr.Dataset:
    """A result that is made of another."""
    return result[["value"]].max("position").assign_attrs(method="largest")


NUMBERS = Method(numbers, quantity="value", derived={"largest": largest})


# An experiment, and what it leaves -----------------------------------------------------------------------------------


def tables(log: Path | str = "", *, samples: Mapping[str, Any] | int = 60, **arguments: Any) -> dict[str, Any]:
    """An experiment of one step, ``numbers``, over so many questions about shapes, or over the samples of a table."""
    return {
        "model": "toy-blip-vqa",
        "samples": {"shapes": samples, "seed": 5, "kinds": ["color"]} if isinstance(samples, int) else samples,
        "methods": {"numbers": {"use": f"{__name__}:NUMBERS", "log": str(log), **arguments}},
        "statistics": {"resamples": 20, "permutations": 20},
    }


def values_of(folder: Path) -> dict[str, Any]:
    """All that a run says in numbers, to be compared: results to the bit with their attributes, and tables."""
    found = {path.stem: results.load(path) for path in sorted(folder.glob("results/*.nc"))}
    assert found
    said: dict[str, Any] = {f"{file}, attributes": result.attrs for file, result in found.items()}
    for file, result in found.items():
        for name, own in result.variables.items():
            assert own.dtype.kind in "biufOU"
            said[f"{file}, {name}"] = (own.dims, own.shape, own.dtype.str, *_bits(own.values))
    tables = {path.name: path.read_bytes() for path in sorted(folder.glob("tables/*.csv"))}
    return {**said, **tables, "samples": (folder / "samples.json").read_bytes()}


def _bits(values: np.ndarray) -> tuple[Any, ...]:
    return tuple(values.reshape(-1).tolist()) if values.dtype.kind in "OU" else (values.tobytes(),)


def leftovers(folder: Path) -> list[str]:
    """What a run that has ended should not leave: files half written, and claims."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / ".lock"]
    return [
        str(path) for path in paths if path.name.startswith(".") or (path.suffix == ".lock" and path.stem.isdigit())
    ]


# Lines of turns ------------------------------------------------------------------------------------------------------


class Turn(tuple):
    """What a line says: what happened, in which process, of which sample."""

    what = property(lambda self: self[0])
    process = property(lambda self: int(self[1]))
    sample = property(lambda self: self[2])


def note(log: str, what: str, name: str) -> None:
    if log:
        with open(log, "a", encoding="utf-8") as file:  # one write: whole, whoever else writes
            file.write(f"{what} {os.getpid()} {name}\n")


def turns(log: Path | str, what: str = "") -> list[Turn]:
    path = Path(log)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [turn for turn in (Turn(line.split(" ", 2)) for line in lines) if what in ("", turn.what)]


def wait_until(is_so: Callable[[], bool], pause: float = 0.002) -> None:
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < PATIENCE, "in vain"
        time.sleep(pause)


# Processes -----------------------------------------------------------------------------------------------------------


@cache
def a_model(name: str) -> HookedVLM:
    return HookedVLM.from_pretrained(name)


def carry_out(
    given: Mapping[str, Any],
    out: Path,
    *,
    before: Callable[[], None] = lambda: None,
    base: Path = Path(),
    said: Path | None = None,
    **options: Any,
) -> None:
    """A run, in a process of :func:`started`, whose model has been loaded before.

    Args:
        said: a file that gets what the run tells, and the error in which it ends.
    """
    _ready(before)
    lines: list[str] = []
    try:
        run(Experiment.of(given, base=base), out, told=lines.append, **options)
    except BaseException as error:
        lines.append(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
    finally:
        if said is not None:
            said.write_text("\n".join(lines), encoding="utf-8")


def command(arguments: Sequence[str], said: Path, before: Callable[[], None] = lambda: None) -> None:
    """``hooked-vlm`` with these arguments, which says all it says to a file."""
    from hooked_vlm.cli import app

    _ready(before)
    with said.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    app(list(arguments))


def _ready(before: Callable[[], None]) -> None:
    Experiment.load_model = lambda self, device=None: a_model(self.model["name"])  # type: ignore[method-assign]
    before()


def started(function: Callable[..., Any], *arguments: Any, **options: Any) -> ForkServerProcess:
    """A process that is at ``function``, which must be importable."""
    process = _forks().Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def ended(process: ForkServerProcess) -> int | None:
    """Its exit code, when it has ended."""
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


@cache
def _forks() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs.preloaded"])
    return context

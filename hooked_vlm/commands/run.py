"""``hooked-vlm run``: an experiment that a file describes, over its samples."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from hooked_vlm.commands.common import console

if TYPE_CHECKING:
    from hooked_vlm.runs import Experiment, Run

INTERRUPTED, TERMINATED = 130, 143
"""The exit codes of a run that was stopped, by hand and by SIGTERM, as shells have them."""

NOTHING_USED = 1
"""The exit code of a run with a step that could use no sample."""


def run(
    experiment: Annotated[
        str, typer.Argument(help="A file (.toml), or a ready one: basu, neo, notice, palit or zhang.")
    ],
    limit: Annotated[int | None, typer.Option(help="Use the first so many samples.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default the file's name, without its ending.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes, each with its own model, on its own GPU if there are.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster that has the workers: auto, local, HOST:PORT or ray://HOST:PORT."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: do failed samples again, and unreadable pictures.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the file, to make one of your own, and end.")] = False,
) -> None:
    """Carry an experiment out over its samples, or go on with it.

    Every sample's result is kept before the next begins: a run that was stopped, killed, or died with its machine is
    gone on with by --resume. The folder holds results, tables, figures, and report.html. docs/running.md has more.
    """
    from hooked_vlm.runs import Experiment

    found = Experiment.load(experiment)
    if show:
        typer.echo(found.text, nl=False)
        return
    carry_out(
        found,
        out or Path(Path(experiment).stem),
        limit=limit,
        resume=resume,
        workers=workers,
        ray=ray,
        retry_failed=retry_failed,
    )


def carry_out(
    experiment: Experiment,
    out: Path,
    *,
    limit: int | None,
    resume: bool = False,
    workers: int = 1,
    ray: str | None = None,
    retry_failed: bool = False,
) -> None:
    """Carry an experiment out and say what came of it; a run that is stopped says how to go on."""
    from hooked_vlm.runs import run as carried_out

    try:
        with _stopped_by_sigterm():
            ended = carried_out(
                experiment,
                out,
                limit=limit,
                resume=resume,
                workers=workers,
                ray=ray,
                retry_failed=retry_failed,
                progress=True,
                told=_tell,
            )
    except KeyboardInterrupt as stop:
        _tell(f"stopped; what is done is in {out}: go on with --resume")
        raise typer.Exit(TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED) from None
    _report(ended)
    if any(used == 0 for used, _, _ in ended.counts.values()):
        raise typer.Exit(NOTHING_USED)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, with which batch systems end what takes too long."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""

    def stop(*_: object) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(message: str) -> None:
    typer.echo(f"hooked-vlm: {message}", err=True)


def _report(ended: Run) -> None:
    from rich import box
    from rich.table import Table

    table = Table("step", "used", "dropped", "failed", "why", box=box.SIMPLE_HEAD, title=ended.summary["title"] or None)
    for name, step in ended.summary["steps"].items():
        why = ", ".join(f"{one['kind']}: {one['count']}" for one in step["reasons"])
        table.add_row(name, *(str(step[count]) for count in ("used", "dropped", "failed")), why or "")
    out = console()
    out.print(table)
    for step in ended.summary["steps"].values():
        for note in step["notes"]:
            out.print(note, highlight=False)
    out.print(f"{ended.summary['model']}; the report is {ended.folder / 'report.html'}", highlight=False)

"""What all commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

BAD_INPUT = 2
"""The exit code for input that cannot be used; typer's own for a wrong option."""

UNLIMITED_WIDTH = 1000


def fail_clearly(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """One line on stderr and exit code 2 in place of a traceback, for errors about what the user gave.

    These are ``ValueError`` (``HookError``, ``CheckpointError``, ``ImageError``, ``SpanError`` are such) and
    ``OSError`` (a file that is not there, a full disk).
    """

    @functools.wraps(command)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of our output has seen enough; click ends the process quietly
        except (ValueError, OSError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"hooked-vlm: {line}", err=True)
            raise typer.Exit(BAD_INPUT) from error

    return wrapped


def console() -> Console:
    """Where tables are printed: as wide as the terminal, and as wide as they like where there is none."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=UNLIMITED_WIDTH)

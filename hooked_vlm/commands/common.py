"""What all commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from hooked_vlm.models import HookedVLM

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Dtype = Literal["float32", "bfloat16", "float16"]
AttentionKind = Literal["eager", "sdpa"]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="What the weights are loaded as; by default as config.json says.")
]
AttentionOption = Annotated[
    AttentionKind | None, typer.Option(help="How attention is computed; by default as HF does for this model.")
]
DeviceOption = Annotated[str | None, typer.Option(help="Where the model runs, such as cuda:0; by default the CPU.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]

BAD_INPUT = 2
"""The exit code for input that cannot be used; typer's own for a wrong option."""

UNLIMITED_WIDTH = 1000


def fail_clearly(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """One line on stderr and exit code 2 in place of a traceback, for errors about what the user gave.

    These are ``ValueError`` (``HookError``, ``CheckpointError``, ``ImageError``, ``SpanError`` are such) and
    ``OSError`` (a file that is not there, a full disk), and an extra of this library that is not installed.
    """

    @functools.wraps(command)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of our output has seen enough; click ends the process quietly
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, ImportError) and "hooked-vlm[" not in str(error):
                raise
            line = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"hooked-vlm: {line}", err=True)
            raise typer.Exit(BAD_INPUT) from error

    return wrapped


def console() -> Console:
    """Where tables are printed: as wide as the terminal, and as wide as they like where there is none."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=UNLIMITED_WIDTH)


def torch_dtype(name: Dtype | None) -> torch.dtype | None:
    """The dtype of this name."""
    import torch

    return None if name is None else getattr(torch, name)


def load_model(
    name_or_path: str,
    dtype: Dtype | None = None,
    attention: AttentionKind | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> HookedVLM:
    """A model as the options ask for it."""
    from hooked_vlm.models import HookedVLM

    return HookedVLM.from_pretrained(
        name_or_path, dtype=torch_dtype(dtype), attention=attention, device=device, revision=revision
    )

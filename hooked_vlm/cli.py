"""The command line. Commands import what they need when they run, so that ``--help`` answers at once."""

from __future__ import annotations

import typer

from hooked_vlm.commands.answer import answer
from hooked_vlm.commands.common import fail_clearly
from hooked_vlm.commands.hooks import hooks, models
from hooked_vlm.commands.reproduce import reproduce
from hooked_vlm.commands.run import run
from hooked_vlm.commands.trace import trace
from hooked_vlm.commands.verify import verify

app = typer.Typer(
    name="hooked-vlm",
    help="Mechanistic interpretability of vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

for command in (trace, run, reproduce, answer, models, hooks, verify):
    app.command()(fail_clearly(command))


if __name__ == "__main__":
    app()

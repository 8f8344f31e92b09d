"""``hooked-vlm answer``: ask a model about a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hooked_vlm.commands.common import AttentionOption, DeviceOption, DtypeOption, RevisionOption, load_model


def answer(
    model: Annotated[str, typer.Argument(help="Embedded model, local folder in HF format, or hub id.")],
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[
        str, typer.Argument(help="The question; for a captioning model, the caption's beginning.")
    ] = "",
    beams: Annotated[int, typer.Option(help="Beams of the search; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="How long the answer may be, in tokens.")] = 20,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
) -> None:
    """Print a model's answer to a question about a picture, as it comes (from beams, when it is found)."""
    hooked = load_model(model, dtype, attention, device, revision)
    if f"{hooked.towers[-1]}.hook_logits" not in hooked.hook_dict:
        raise ValueError(f"{model} is a {type(hooked).__name__}, which answers nothing")
    inputs = hooked.prepare(image, question or None)
    if beams > 1:
        typer.echo(hooked.generate(inputs, num_beams=beams, max_new_tokens=max_new_tokens)[0])
        return
    for piece in hooked.stream(inputs, max_new_tokens=max_new_tokens):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()

"""``hooked-vlm verify``: is this checkpoint computed here as HF computes it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hooked_vlm.commands.common import AttentionOption, DtypeOption, console, torch_dtype


def verify(
    model: Annotated[str, typer.Argument(help="Embedded name, folder in HF format, or hub id.")],
    image: Annotated[Path | None, typer.Option(help="A picture; by default an embedded one.")] = None,
    question: Annotated[
        str | None, typer.Option(help="A text; by default two of different lengths, so that padding is compared.")
    ] = None,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    device: Annotated[str, typer.Option(help="Where both models run.")] = "cpu",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Keep HF's tensors in temporary files, not in memory.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest max|ours - HF| / max|HF| that passes; by default 0: every bit equal."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there too.")] = None,
) -> None:
    """Compare a checkpoint with HF, hook point by hook point.

    Both models run on the same inputs. Exit code 0: all pass; 1: some differ; 2: bad input.
    """
    from hooked_vlm.files import whole_file
    from hooked_vlm.verify import verify as verify_model

    report = verify_model(
        model,
        image,
        question,
        dtype=torch_dtype(dtype),
        device=device,
        attention=attention,
        tolerance=tolerance,
        low_memory=low_memory,
    )
    console().print(report)
    if json_file is not None:
        with whole_file(json_file) as temporary:
            temporary.write_text(report.to_json(), encoding="utf-8")
    raise typer.Exit(0 if report.passed else 1)

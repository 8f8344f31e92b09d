"""``hooked-vlm verify``: is this checkpoint computed here as HF computes it?"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from hooked_vlm.commands.common import console, fail_clearly


class DType(str, Enum):
    """What the weights are loaded as."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class AttentionKind(str, Enum):
    """How attention is computed."""

    eager = "eager"
    sdpa = "sdpa"


@fail_clearly
def verify(
    model: Annotated[str, typer.Argument(help="Embedded name, folder in HF format, or hub id.")],
    image: Annotated[Optional[Path], typer.Option(help="A picture; by default an embedded one.")] = None,
    question: Annotated[
        Optional[str], typer.Option(help="A text; by default two of different lengths, so that padding is compared.")
    ] = None,
    dtype: Annotated[Optional[DType], typer.Option(help="By default what config.json says.")] = None,
    attention: Annotated[
        Optional[AttentionKind], typer.Option(help="By default what HF uses for this model.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where both models run.")] = "cpu",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Keep HF's tensors in temporary files, not in memory.")
    ] = False,
    tolerance: Annotated[
        Optional[float],
        typer.Option(min=0, help="Largest max|ours - HF| / max|HF| that passes; by default 0: every bit equal."),
    ] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the report there too.")] = None,
) -> None:
    """Compare a checkpoint with HF, hook point by hook point.

    Both models run on the same inputs. Exit code 0: all pass; 1: some differ; 2: bad input.
    """
    import torch

    from hooked_vlm.files import whole_file
    from hooked_vlm.verify import verify as verify_model

    report = verify_model(
        model,
        image,
        question,
        dtype=None if dtype is None else getattr(torch, dtype.value),
        device=device,
        attention=None if attention is None else attention.value,
        tolerance=tolerance,
        low_memory=low_memory,
    )
    console().print(report)
    if json_file is not None:
        with whole_file(json_file) as temporary:
            temporary.write_text(report.to_json(), encoding="utf-8")
    raise typer.Exit(0 if report.passed else 1)

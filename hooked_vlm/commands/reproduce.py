"""``hooked-vlm reproduce``: the ready experiment of a paper, on an embedded model or on a checkpoint and its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hooked_vlm.commands.common import AttentionOption, DeviceOption, DtypeOption, RevisionOption
from hooked_vlm.commands.run import carry_out

if TYPE_CHECKING:
    from hooked_vlm.runs import Experiment

FORMATS = {"basu": "constraints", "neo": "object-tokens", "notice": "notice", "palit": "coco-qa", "zhang": "zhang"}
"""Of each paper's own sample files, in :data:`hooked_vlm.data.readers.READERS`."""


def reproduce(
    paper: Annotated[str, typer.Argument(help="palit, basu, notice, zhang or neo.")],
    model: Annotated[
        str | None,
        typer.Option(help="Embedded model, local folder in HF format, or hub id; by default an embedded one."),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="The paper's sample file; without one, embedded questions about shapes.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Where its pictures are: a folder, or the begin of an address.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Of the file; by default the paper's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many samples.")] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Count malformed rows, and go on.")] = False,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Wrongly answered samples too, where the paper drops them.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default ./PAPER.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
) -> None:
    """Run a paper's experiment: `hooked-vlm run` of its ready file, with another model and other samples.

    Without options on an embedded model, in a minute. For a published checkpoint give --model, --samples and --images;
    docs/reproduce.md has the commands, and what they should find. Where the model is no embedded one, the methods'
    arguments are the paper's.
    """
    from hooked_vlm.data.rows import nearest
    from hooked_vlm.runs import Experiment, ready_names

    if paper not in ready_names():
        known = ready_names()
        raise ValueError(f"no paper is called {paper!r}; there are {', '.join(known)}{nearest(paper, known)}")
    if samples is None and (images is not None or format is not None or skip_bad_rows):
        raise ValueError("--images, --format and --skip-bad-rows say how --samples is read: give that, too")
    experiment = Experiment.load(paper)
    options = {"dtype": dtype, "attention": attention, "device": device, "revision": revision}
    changes = {
        **_model(experiment, model, options),
        **({} if samples is None else _samples(samples, images, format or FORMATS[paper], skip_bad_rows)),
        **({"keep_correct": False} if keep_all else {}),
    }
    carry_out(experiment.on(**changes) if changes else experiment, out or Path(paper), limit=limit, resume=resume)


def _model(experiment: Experiment, name: str | None, options: dict[str, str | None]) -> dict[str, Any]:
    given = {key: value for key, value in {"name": name, **options}.items() if value is not None}
    return {"model": {**experiment.model, **given}} if given else {}


def _samples(file: Path, images: str | None, format: str, skip_bad_rows: bool) -> dict[str, Any]:
    options = {"images": images, "on_bad_row": "skip" if skip_bad_rows else None}
    given = {key: value for key, value in options.items() if value is not None}
    return {"samples": {"file": str(file), "format": format, **given}}

"""``hooked-vlm reproduce``: the experiment of a paper, on an embedded model or on a checkpoint and its sample files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_vlm.commands.common import AttentionOption, DeviceOption, DtypeOption, RevisionOption, console, load_model

if TYPE_CHECKING:
    import xarray as xr

    from hooked_vlm.data import Samples
    from hooked_vlm.models import HookedVLM
    from hooked_vlm.papers import Paper


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
    limit: Annotated[int, typer.Option(help="How many samples, at most.")] = 20,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Count malformed rows, and go on.")] = False,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Wrongly answered samples too, where the paper drops them.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for results and figures; by default ./PAPER.")] = None,
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
) -> None:
    """Run a paper's experiment, and draw its figures.

    Without options on an embedded model, in a minute. For a published checkpoint give --model, --samples and --images;
    docs/reproduce.md has the commands, and what they should find.
    """
    from hooked_vlm.data.rows import nearest
    from hooked_vlm.files import whole_folder
    from hooked_vlm.papers import PAPERS
    from hooked_vlm.plots import save_figure
    from hooked_vlm.results import save

    if paper not in PAPERS:
        raise ValueError(f"no paper is called {paper!r}; there are {', '.join(PAPERS)}{nearest(paper, PAPERS)}")
    chosen = PAPERS[paper]
    arguments = {**chosen.arguments, **(chosen.toy_arguments if samples is None else {})}
    if samples is None and (images is not None or format is not None):
        raise ValueError("--images and --format say how --samples is read: give that, too")
    hooked = load_model(model or chosen.toy, dtype, attention, device, revision)
    found = _samples(chosen, hooked, samples, images, format, limit, skip_bad_rows, keep_all)
    folder_name = out or Path(paper)
    # A folder that cannot be written should be known before the work is done.
    with whole_folder(folder_name) as folder:
        results = chosen.run(hooked, found, progress=True, **arguments)
        for name, result in results.items():
            save(result, folder / f"{name}.nc")
        for name, figure in chosen.draw(results).items():
            save_figure(figure, folder / f"{name}.png")
    _report(chosen, results, folder_name)


def _samples(
    paper: Paper,
    model: HookedVLM,
    file: Path | None,
    images: str | None,
    format: str | None,
    limit: int,
    skip_bad_rows: bool,
    keep_all: bool,
) -> Samples:
    from hooked_vlm.data.correct import keep_correct
    from hooked_vlm.data.readers import read_samples

    if file is None:
        return paper.toy_samples(limit)
    options = {} if images is None else {"images": images}
    found = read_samples(
        file, format or paper.format, limit=limit, on_bad_row="skip" if skip_bad_rows else "raise", **options
    )
    if not paper.keeps_correct or keep_all:
        return found
    return keep_correct(model, found, prompt=str(paper.arguments.get("prompt", "{question}")), progress=True)


def _report(paper: Paper, results: dict[str, xr.Dataset], folder: Path) -> None:
    import json
    from collections import Counter

    from rich import box
    from rich.table import Table

    table = Table("result", "samples", "dropped", box=box.SIMPLE_HEAD, title=paper.title)
    for name, result in results.items():
        kinds = Counter(one[1] for one in json.loads(result.attrs.get("dropped", "[]")))
        why = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common())
        table.add_row(name, str(result.attrs.get("samples_used", "")), why or "none")
    out = console()
    out.print(table)
    out.print(f"{next(iter(results.values())).attrs['model']}; results and figures are in {folder}", highlight=False)

"""``hooked-vlm trace``: the causal trace of one question about one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hooked_vlm.commands.common import AttentionOption, DeviceOption, DtypeOption, RevisionOption, load_model

if TYPE_CHECKING:
    import xarray as xr

    from hooked_vlm.corruptions import Corruption
    from hooked_vlm.data.shapes import ShapesSample

DEFAULT_MODEL = "toy-blip-vqa"
CORRUPT_HELP = (
    "gaussian[:STD] or multiplicative[:STD] noise on the image embeddings, scale[:FACTOR] of them, pixels[:STD] noise, "
    "image:FILE (another picture, SIP), question:TEXT (another question as long, STR); "
    "sip or str: the embedded sample's own counterfactual."
)


def trace(
    model: Annotated[str, typer.Option(help="Embedded model, local folder in HF format, or hub id.")] = DEFAULT_MODEL,
    image: Annotated[Path | None, typer.Option(help="A picture; without one, an embedded picture.")] = None,
    question: Annotated[str | None, typer.Option(help="The question; needed with --image.")] = None,
    corrupt: Annotated[str, typer.Option(help=CORRUPT_HELP)] = "gaussian",
    site: Annotated[list[str] | None, typer.Option(help="resid, attn, cross_attn or mlp; repeat for several.")] = None,
    tower: Annotated[list[str] | None, typer.Option(help="A text tower; repeat for several.")] = None,
    positions: Annotated[
        Literal["all", "text", "image"],
        typer.Option(help="Which positions of a LLaVA: the text's, each patch of the image, or all."),
    ] = "all",
    window: Annotated[int, typer.Option(help="How many layers are restored together.")] = 1,
    direction: Annotated[
        Literal["denoising", "noising"], typer.Option(help="Restore clean states, or put corrupted ones in.")
    ] = "denoising",
    metric: Annotated[Literal["probability", "logit_difference"], typer.Option(help="What the figure shows.")] = (
        "probability"
    ),
    draws: Annotated[int, typer.Option(help="How many times noise is drawn.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the result and its figures.")] = Path("trace"),
    dtype: DtypeOption = None,
    attention: AttentionOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
) -> None:
    """Causal tracing: which states, put back to their clean value, bring a corrupted answer back.

    Writes the result (trace.nc) and its figure (trace.png, trace.pdf); of a model that reads the image among its tokens
    a second one too, over the picture (patches.png, patches.pdf).
    """
    from hooked_vlm import toys
    from hooked_vlm.experiments import causal_trace
    from hooked_vlm.files import whole_folder
    from hooked_vlm.plots import causal_trace_figure, patch_trace_figure, save_figure
    from hooked_vlm.processing import load_image
    from hooked_vlm.results import save

    sample = None if image is not None else toys.demo_sample()
    if image is not None and question is None:
        raise ValueError("--image needs a --question")
    hooked = load_model(model, dtype, attention, device, revision)
    picture = load_image(image) if image is not None else toys.demo_sample().image
    text = question or toys.demo_sample().question
    corruption = _corruption(corrupt, draws, seed, sample)
    # A folder that cannot be written should be known before the work is done.
    with whole_folder(out, replacing=("patches.png", "patches.pdf")) as folder:
        result = causal_trace(
            hooked,
            hooked.prepare(picture, text),
            corruption,
            towers=tower,
            sites=site,
            width=window,
            direction=direction,
            which=positions,
            all_positions=True,
            progress=True,
        )
        save(result, folder / "trace.nc")
        figure = causal_trace_figure(
            result, metric=metric, images=_images(picture, corruption), title=_title(result, text, corruption)
        )
        save_figure(figure, folder / "trace.png")
        if "picture" in result.coords:
            over = patch_trace_figure(result, picture, metric=metric, title=_title(result, text, corruption))
            save_figure(over, folder / "patches.png")
    _report(result, text, metric, out)


def _corruption(text: str, draws: int, seed: int, sample: ShapesSample | None) -> Corruption:
    from hooked_vlm import corruptions

    kind, _, value = text.partition(":")
    if kind in ("sip", "str"):
        if sample is None:
            raise ValueError(
                f"--corrupt {kind} is for the embedded picture; with --image say image:FILE or question:TEXT"
            )
        if kind == "sip":
            return corruptions.CounterfactualImage(sample.sip.image)
        return corruptions.CounterfactualQuestion(sample.str_.question)
    if kind in ("image", "question"):
        if not value:
            raise ValueError(f"--corrupt {kind}: needs something after the colon")
        if kind == "image":
            return corruptions.CounterfactualImage(Path(value))
        return corruptions.CounterfactualQuestion(value)
    number = {"gaussian": 3.0, "multiplicative": 5.0, "scale": 0.7691, "pixels": 1.0}
    if kind not in number:
        raise ValueError(f"--corrupt {text!r} is none of: {CORRUPT_HELP}")
    try:
        amount = float(value) if value else number[kind]
    except ValueError:
        raise ValueError(f"--corrupt {text!r}: {value!r} is not a number") from None
    if kind == "scale":
        return corruptions.Scaled(amount)
    noise = {
        "gaussian": corruptions.AdditiveGaussian,
        "multiplicative": corruptions.MultiplicativeGaussian,
        "pixels": corruptions.PixelNoise,
    }[kind]
    return noise(std=amount, draws=draws, seed=seed)


def _images(picture: Any, corruption: Corruption) -> list[tuple[str, Any]]:
    from hooked_vlm.corruptions import CounterfactualImage
    from hooked_vlm.processing import load_image

    if not isinstance(corruption, CounterfactualImage):
        return [("picture", picture)]
    return [("clean", picture), ("corrupted", load_image(corruption.images))]


def _title(result: xr.Dataset, question: str, corruption: Corruption) -> str:
    clean, corrupted = (float(result[end].sel(metric="probability")[0]) for end in ("clean", "corrupted"))
    width = result.attrs["window"]
    layers = "one layer" if width == 1 else f"{width} layers"
    return (
        f"“{question}” → {result.answer.values[0]}    p clean {clean:.3f}, corrupted {corrupted:.3f}\n"
        f"{result.attrs['direction']}, {layers} at a time; {_in_words(corruption)}; {result.attrs['model']}"
    )


def _in_words(corruption: Corruption) -> str:
    from hooked_vlm import corruptions

    match corruption:
        case corruptions.AdditiveGaussian():
            return f"noise of {corruption.std:g} std on the image embeddings, {corruption.draws} draws"
        case corruptions.MultiplicativeGaussian():
            return f"image embeddings times N({corruption.mean:g}, {corruption.std:g}), {corruption.draws} draws"
        case corruptions.Scaled():
            return f"image embeddings times {corruption.factor:g}"
        case corruptions.PixelNoise():
            return f"noise of {corruption.std:g} std on the pixels, {corruption.draws} draws"
        case corruptions.CounterfactualImage():
            return "another picture (SIP)"
        case corruptions.CounterfactualQuestion():
            return f"another question (STR): “{corruption.questions}”"
    return type(corruption).__name__


def _report(result: xr.Dataset, question: str, metric: str, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Words in square brackets are tokens, not markup.
    console = Console(markup=False)
    console.print(f"question   {question}")
    console.print(f"answer     {result.answer.values[0]}")
    ends = {end: result[end].sel(metric="probability").values[0] for end in ("clean", "corrupted")}
    console.print(f"p(answer)  clean {ends['clean']:.4f}, corrupted {ends['corrupted']:.4f}")
    table = Table("tower", "site", "layer", "token", metric.replace("_", " "), "normalised", title="strongest cells")
    for cell in _strongest(result, metric):
        patched, part = float(cell.patched), float(cell.normalized)
        place = (str(cell.tower.values), str(cell.site.values), str(cell.layer.values), str(cell.token.values))
        table.add_row(*map(Text, place), f"{patched:.4f}", f"{part:.3f}")
    console.print(table)
    figures = ("trace", "patches") if "picture" in result.coords else ("trace",)
    for name in (*(f"{figure}{ending}" for figure in figures for ending in (".png", ".pdf")), "trace.nc"):
        console.print(str(out / name), soft_wrap=True, highlight=False)


def _strongest(result: xr.Dataset, metric: str, count: int = 5) -> list[xr.Dataset]:
    """The cells with the largest effect, leaving out those that are identities."""
    part = result.sel(metric=metric).isel(sample=0)
    cells = part.stack(cell=("tower", "site", "layer", "position"), create_index=False)
    size = abs(cells.effect).where(~cells.identity).fillna(-1.0)
    order = (-size).argsort().values[:count]
    return [cells.isel(cell=int(index)) for index in order]

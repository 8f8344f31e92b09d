"""``hooked-vlm hooks`` and ``hooked-vlm models``: what there is to look at, and in what."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hooked_vlm.commands.common import console, load_model

if TYPE_CHECKING:
    from hooked_vlm.hook_point import HookPoint
    from hooked_vlm.models import HookedVLM


EXAMPLES = {
    "BlipForQuestionAnswering": "Salesforce/blip-vqa-base",
    "BlipForConditionalGeneration": "Salesforce/blip-image-captioning-base",
    "BlipForImageTextRetrieval": "Salesforce/blip-itm-base-coco",
    "LlavaForConditionalGeneration": "llava-hf/llava-1.5-7b-hf",
    "LlavaNextForConditionalGeneration": "llava-hf/llava-v1.6-mistral-7b-hf",
    "CLIPModel": "openai/clip-vit-large-patch14-336",
    "ViTForImageClassification": "google/vit-base-patch16-224",
    "ViTModel": "google/vit-base-patch16-224-in21k",
}
"""A hub id of each of HF's classes that we read."""


class HookLine(NamedTuple):
    """One hook point, or the same one of every layer."""

    name: str
    axes: str
    sizes: str
    """The axes with the numbers that the config fixes; letters stay for those that the inputs decide."""
    hf: str
    """HF's module that holds the same tensor, and how it is read there; or why there is none."""
    has_counterpart: bool


def hook_table(model: HookedVLM, *, tower: str | None = None, all_layers: bool = False) -> list[HookLine]:
    """Every hook point in forward order; without ``all_layers``, one line for all blocks of a tower.

    Raises:
        ValueError: no such tower.
    """
    from weights_conversion import counterparts_of_config

    if tower is not None and tower not in model.towers:
        raise ValueError(f"no tower {tower!r}; this model has {', '.join(model.towers)}")
    counterparts = counterparts_of_config(model.config)
    lines: dict[str, HookLine] = {}
    for name, point in model.hook_dict.items():
        if tower is not None and point.tower != tower:
            continue
        shown = name if all_layers else _any_layer(name, "blocks")
        if shown in lines:
            continue
        side = counterparts.of(name)
        hf = f"none: {counterparts.reason(name)}" if side is None else str(side)
        # Outside blocks a number in HF's name is meant as it is: what the first layer reads, say.
        if not all_layers and ".blocks." in name:
            hf = _any_layer(hf, "layers?")
        lines[shown] = HookLine(shown, " ".join(point.axes), _sizes(model, point), hf, side is not None)
    return list(lines.values())


def _any_layer(name: str, container: str) -> str:
    return re.sub(rf"\b({container})\.\d+\b", r"\1.{layer}", name)


def _sizes(model: HookedVLM, point: HookPoint) -> str:
    owner: Any = model if point.tower not in model.towers else model.get_submodule(point.tower)
    config = getattr(owner, "config", model.config)
    # Several query heads may share one head of keys and values.
    shares = point.name.endswith(("hook_k", "hook_v", "hook_rot_k", "hook_k_input", "hook_v_input"))
    heads = "n_kv_heads" if shares and getattr(config, "n_kv_heads", None) else "n_heads"
    return " ".join(str(getattr(config, heads if axis == "h" else axis, None) or axis) for axis in point.axes)


def hooks(
    model: Annotated[str, typer.Argument(help="Embedded name, folder in HF format, research file, or hub id.")],
    tower: Annotated[str | None, typer.Option(help="Only this tower's, e.g. question_encoder.")] = None,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="A line for every layer.")] = False,
) -> None:
    """List every hook point: its name, its shape, and the HF module that holds the same tensor.

    Axes: b batch, p position, h head, q query, k key.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    loaded = load_model(model)
    lines = hook_table(loaded, tower=tower, all_layers=all_layers)
    table = Table(box=box.SIMPLE_HEAD, title=f"{model}: {type(loaded).__name__}")
    for title in ("hook point", "axes", "sizes", "HF"):
        table.add_column(title, overflow="fold")
    for line in lines:
        hf = Text(line.hf, style="" if line.has_counterpart else "dim")
        table.add_row(Text(line.name), Text(line.axes), Text(line.sizes), hf)
    out = console()
    out.print(table)
    deep = (name for name in loaded.towers if hasattr(loaded.get_submodule(name), "blocks"))
    towers = [f"{name} {len(loaded.get_submodule(name).blocks)}" for name in deep]  # type: ignore[arg-type]
    found = sum(line.has_counterpart for line in lines)
    out.print("Axes: b batch, p position, h head, q query, k key.")
    out.print(f"The model has {len(loaded.hook_names)} hook points; layers: {', '.join(towers)}.", highlight=False)
    out.print(f"{found} of these {len(lines)} lines have a counterpart in HF.", highlight=False)


def models() -> None:
    """List the embedded models, and the kinds of checkpoints that can be loaded."""
    from rich import box
    from rich.table import Table

    from hooked_vlm import toys
    from hooked_vlm.models import MODELS

    embedded = Table(box=box.SIMPLE_HEAD, title="Embedded models")
    embedded.add_column("name")
    embedded.add_column("size", justify="right")
    for name in toys.names():
        size = sum(file.stat().st_size for file in toys.folder(name).iterdir())
        embedded.add_row(name, f"{size / 2**20:.1f} MiB")
    supported = Table(box=box.SIMPLE_HEAD, title="Checkpoints in HF format, from a folder or the hub")
    for title in ("HF's class", "class here", "published as, for example"):
        supported.add_column(title, overflow="fold")
    for architecture, model in MODELS.items():
        supported.add_row(architecture, model.__name__, EXAMPLES[architecture])
    out = console()
    out.print(embedded, supported)
    out.print(
        "Research checkpoints are loaded too, as the same classes: BLIP's .pth files, and LLaVA's folders "
        "(liuhaotian/llava-v1.5-*, v1.6-*).",
        soft_wrap=True,
    )

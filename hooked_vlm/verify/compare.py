"""Two models, one after the other: HF's tensors are kept, and each hook point is compared the moment it fires.

Two models are never held at once, and ours comes from the same files, so that how we read checkpoints is tested too.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooked_vlm.config import AttentionImplementation, ModelConfig, ViTModelConfig
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.loading import require_device, resolve
from hooked_vlm.models import HookedVLM
from hooked_vlm.verify.report import LOGITS, OUTPUT, Padding, Report, Row, versions
from hooked_vlm.verify.sample import sample_inputs
from weights_conversion import Counterpart, counterparts_of_config, family_of_config, open_checkpoint
from weights_conversion.counterparts import PARAMETER
from weights_conversion.llava_research import LLAVA_RESEARCH

UNLIKE_ATTENTION = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""The tolerance where the two sides compute attention by different kernels, whose rounding differs."""


@dataclass(frozen=True)
class Run:
    """One way to call a model; ``options`` are the same words in HF and here."""

    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


RUNS: Mapping[str, tuple[Run, ...]] = {
    "BlipForImageTextRetrieval": (Run("ITM", {"use_itm_head": True}), Run("ITC", {"use_itm_head": False}))
}
"""By HF's class; others can be called in one way only."""


def runs_of(config: ModelConfig) -> tuple[Run, ...]:
    """Every way in which a model is called."""
    return RUNS.get(config.architecture, (Run(),))


class Kept:
    """HF's tensors by run, module and place: in memory, or one safetensors file each in a folder. None where HF's
    module ran and gave nothing."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self._kept: dict[tuple[str, str, str], Tensor | Path | None] = {}

    def put(self, run: Run, counterpart: Counterpart, tensor: Tensor | None) -> None:
        kept: Tensor | Path | None = tensor
        if tensor is not None and self._folder is not None:
            from safetensors.torch import save_file

            kept = Path(self._folder) / f"{len(self._kept)}.safetensors"
            save_file({"tensor": tensor.contiguous()}, kept)
        self._kept[run.name, counterpart.module, counterpart.place] = kept

    def get(self, run: Run, counterpart: Counterpart, device: torch.device) -> Tensor | None:
        kept = self._kept.get((run.name, counterpart.module, counterpart.place))
        if kept is None or isinstance(kept, Tensor):
            return kept
        from safetensors.torch import load_file

        return load_file(kept, device=str(device))["tensor"]

    def is_nothing(self, run: Run, counterpart: Counterpart) -> bool:
        """Whether the module ran, and gave nothing at the place."""
        return self.has(run, counterpart) and self._kept[run.name, counterpart.module, counterpart.place] is None

    def has(self, run: Run, counterpart: Counterpart) -> bool:
        return (run.name, counterpart.module, counterpart.place) in self._kept


def verify(
    name_or_path: str | Path,
    image: Any = None,
    question: str | Sequence[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: AttentionImplementation | None = None,
    tolerance: float | None = None,
    low_memory: bool = False,
    revision: str | None = None,
) -> Report:
    """Run a checkpoint in HF's model and in ours on identical inputs, and compare every tensor that HF can give.

    Args:
        image: one picture, as for :meth:`HookedVLM.prepare`; by default an embedded one.
        question: by default two texts of different lengths, so that padding is compared too. A checkpoint without a
            processor gets random pixels and tokens, always the same ones.
        dtype: by default what ``config.json`` says.
        attention: by default what HF uses for this model. HF's side uses the same kind where HF has it. A fused one
            (``"sdpa"``) gives no patterns in HF; ``"eager"`` compares them too.
        tolerance: the largest difference that passes, as a share of the largest magnitude in HF's tensor. By default 0,
            which is equality of every bit; where the attention kernels differ, what ``UNLIKE_ATTENTION`` says.
        low_memory: keep HF's tensors in temporary files.

    Raises:
        FileNotFoundError, CheckpointError: nothing there, or nothing that we read.
        ValueError: a research checkpoint, which HF cannot load; a picture or question that the model cannot take.
    """
    path = resolve(name_or_path, revision)
    if path.is_file() or _is_research(path):
        told = path.resolve().name
        raise ValueError(f"HF cannot load {told}; load it with HookedVLM, save_hf it, and verify that folder")
    require_device(device)
    model = HookedVLM.from_pretrained(path)
    inputs, described = sample_inputs(model, image, question)
    config, names, ours = model.config, model.hook_names, attention or model.attention
    del model
    counterparts = counterparts_of_config(config)
    wanted = {name: side for name in (*names, LOGITS) if (side := counterparts.of(name)) is not None}
    absent = {name: counterparts.reason(name) for name in names if name not in wanted}
    theirs = ours if ours == "eager" or _hf_class(config.architecture)._supports_sdpa else "eager"
    padded = _padded(inputs)
    runs = runs_of(config)

    with tempfile.TemporaryDirectory(prefix="hooked-vlm-") if low_memory else nullcontext() as folder:
        kept = Kept(folder)
        hf_model = load_hf(path, config.architecture, dtype=dtype, device=device, attention=theirs)
        for run in runs:
            absent |= record(hf_model, inputs, wanted, run, kept)
        del hf_model
        gc.collect()
        model = HookedVLM.from_pretrained(
            path,
            dtype=dtype,
            device=device,
            attention=ours,
            cross_attention_padding="hf" if padded else "mask",
            # HF knows no variant: like with like is the weights and config as HF reads them.
            variant="hf",
        )
        if tolerance is None:
            tolerance = 0.0 if ours == theirs else UNLIKE_ATTENTION[model.dtype]
        compared = {name: side for name, side in wanted.items() if name not in absent}
        rows = [row for run in runs for row in compare(model, inputs, compared, run, kept, tolerance=tolerance)]
    return Report(
        model=str(name_or_path),
        architecture=config.architecture,
        inputs=described,
        rows=tuple(replace(row, name=OUTPUT) if row.name == LOGITS and _has_no_logits(config) else row for row in rows),
        without_counterpart=tuple((name, absent[name]) for name in names if name in absent),
        tolerance=tolerance,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        attention=ours,
        hf_attention=theirs,
        padded=padded,
        cross_attention_padding=model.config.switches.get("cross_attention_padding", ""),
        versions=versions(),
    )


def _is_research(folder: Path) -> bool:
    """Whether a folder is in the research code's layout, and its ``config.json`` too."""
    config = open_checkpoint(folder).config
    return bool(config) and family_of_config(config) is LLAVA_RESEARCH


def _padded(inputs: VLMInputs) -> Padding:
    """At which end of its rows padding is."""
    mask = inputs.attention_mask
    if mask is None or bool(mask.all()):
        return ""
    return "left" if bool(mask[:, -1].all()) else "right"


def _has_no_logits(config: ModelConfig) -> bool:
    """Whether what the forward returns is a pooled state, or states."""
    return isinstance(config, ViTModelConfig) and not config.n_classes


def load_hf(
    path: Path,
    architecture: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: AttentionImplementation = "eager",
) -> nn.Module:
    """HF's model, in evaluation mode; ``dtype`` by default as ``config.json`` says."""
    with _quiet_hf():
        model = _hf_class(architecture).from_pretrained(
            path, dtype=dtype or "auto", attn_implementation=attention, local_files_only=True
        )
    return model.to(device or "cpu").eval()


def _hf_class(architecture: str) -> Any:
    import transformers

    return getattr(transformers, architecture)


@contextmanager
def _quiet_hf() -> Iterator[None]:
    """Without HF's progress bar and its advice. What a checkpoint lacks, our own loader says."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@torch.no_grad()
def record(
    hf_model: nn.Module, inputs: VLMInputs, wanted: Mapping[str, Counterpart], run: Run, kept: Kept
) -> dict[str, str]:
    """One forward of HF's model that keeps the tensors of all counterparts.

    Returns:
        The hook points at whose counterparts HF gave nothing, and why it need not.
    """
    modules: dict[str, set[Counterpart]] = {}
    for side in wanted.values():
        if side.place == PARAMETER:
            kept.put(run, side, hf_model.get_parameter(side.module).detach())
        else:
            modules.setdefault(side.module, set()).add(side)
    handles = [
        hf_model.get_submodule(name).register_forward_hook(partial(_keep, sides, run, kept), with_kwargs=True)
        for name, sides in modules.items()
    ]
    try:
        device = next(hf_model.parameters()).device
        hf_model(**inputs.to(device).tensors(), **run.options)
    finally:
        for handle in handles:
            handle.remove()
    return {name: side.not_given for name, side in wanted.items() if side.not_given and kept.is_nothing(run, side)}


def _keep(
    sides: set[Counterpart],
    run: Run,
    kept: Kept,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """What hangs on HF's modules. The last four arguments are those of a forward hook."""
    # HF passes many inputs by keyword.
    first_input = args[0] if args else next(iter(kwargs.values()), None)
    for side in sides:
        if kept.has(run, side):
            continue
        tensor = side.read(first_input, output)
        # HF's BLIP adds the position embeddings to the token embeddings in place.
        kept.put(run, side, tensor.clone() if isinstance(module, nn.Embedding) and tensor is not None else tensor)


@torch.no_grad()
def compare(
    model: HookedVLM,
    inputs: VLMInputs,
    wanted: Mapping[str, Counterpart],
    run: Run,
    kept: Kept,
    *,
    tolerance: float = 0.0,
) -> list[Row]:
    """One forward of our model, compared with what :func:`record` kept; a row for each hook point that fires.

    The logits are those of another forward, with no hook attached. A run that is not the first leaves out the vision
    tower, which sees the same picture in all of them.
    """
    is_first = run == runs_of(model.config)[0]
    sides = {name: side for name, side in wanted.items() if is_first or not name.startswith("vision_encoder.")}
    rows: dict[str, Row] = {}

    def look(activation: Tensor, name: str) -> None:
        theirs = kept.get(run, sides[name], activation.device)
        if theirs is None:
            why = "gave nothing there" if kept.is_nothing(run, sides[name]) else "did not run"
            rows[name] = Row.incomparable(
                run.name, name, str(sides[name]), tuple(activation.shape), f"HF's module {why}"
            )
        else:
            rows[name] = _row(run, name, sides[name], activation, theirs, tolerance)

    def look_at_hook(activation: Tensor, hook: HookPoint) -> None:
        look(activation, hook.name)

    handles = model.add_hook([name for name in sides if name != LOGITS], look_at_hook, reads=True)
    try:
        model(inputs, **run.options)
    finally:
        for handle in handles:
            handle.remove()
    look(model(inputs, **run.options), LOGITS)
    for name, side in sides.items():
        if name not in rows and kept.has(run, side):
            rows[name] = Row.incomparable(run.name, name, str(side), (), "our hook point did not fire")
    return [rows[name] for name in sides if name in rows]


def _row(run: Run, name: str, side: Counterpart, ours: Tensor, theirs: Tensor, tolerance: float) -> Row:
    shape = tuple(ours.shape)
    try:
        theirs = side.form(theirs, ours.shape)
    except RuntimeError:
        return Row.incomparable(run.name, name, str(side), shape, f"HF has {tuple(theirs.shape)}")
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return Row.incomparable(run.name, name, str(side), shape, f"HF has {tuple(theirs.shape)} {theirs.dtype}")
    is_equal = torch.equal(ours, theirs)
    if not is_equal and not bool(torch.isfinite(theirs).all()):
        return Row.incomparable(run.name, name, str(side), shape, "HF's holds NaN or infinity")
    difference, relative = (0.0, 0.0) if is_equal else _differences(ours, theirs)
    return Row(run.name, name, str(side), shape, difference, relative, is_equal, is_equal or relative <= tolerance)


def _differences(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest absolute difference, and its share of the largest magnitude in ``theirs``."""
    difference = (ours.double() - theirs.double()).abs().max().item()
    largest = theirs.abs().max().item()
    return difference, difference / largest if largest else math.inf

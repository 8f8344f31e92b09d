"""From a checkpoint, a hub id or an HF model in memory to a hooked model, and back to a folder that HF loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hooked_vlm import toys
from hooked_vlm.components.weights import is_int8
from hooked_vlm.config import BlipConfig, ModelConfig
from hooked_vlm.files import whole_folder
from hooked_vlm.models import MODELS, HookedVLM
from hooked_vlm.placement import DeviceMap, Keep, fill_and_place, kept
from hooked_vlm.processing import has_processor
from hooked_vlm.quantization import in_int8
from weights_conversion import (
    Checkpoint,
    CheckpointError,
    Rules,
    family_of_config,
    family_of_state,
    one_dtype,
    open_checkpoint,
)

PROCESSOR_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
SAFETENSORS_FILES = ["*.safetensors", "*.safetensors.index.json"]
TORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def load_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
    quantization: Literal["int8"] | None = None,
    processor: Any = None,
    vision_tower: str | Path | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **choices: Any,
) -> HookedVLM:
    """What :meth:`HookedVLM.from_pretrained` does; ``choices`` are its model options."""
    if device is not None and device_map is not None:
        raise ValueError("give device or device_map, not both")
    require_device(device)
    if quantization not in (None, "int8"):
        raise ValueError(f"quantization must be 'int8' or None, not {quantization!r}")
    if quantization is not None and device_map is not None:
        raise ValueError("a quantised model is in one place: give device, not device_map")
    path = resolve(name_or_path, revision, token, cache_dir, local_files_only)
    checkpoint = open_checkpoint(path)
    family = family_of_config(checkpoint.config) if checkpoint.config else family_of_state(checkpoint.state)
    companion = family.companion(checkpoint.config, checkpoint.state)
    if companion is not None:
        other = resolve(vision_tower or companion, None, token, cache_dir, local_files_only)
        checkpoint = checkpoint.joined(open_checkpoint(other))
    if not checkpoint.config:
        choices["variant"] = choices.get("variant") or "original"
    config = _chosen(family.config(checkpoint.config, checkpoint.state, checkpoint.generation), **choices)
    config = replace(
        config,
        # An embedded name is the same everywhere; the folder that it stands for is not.
        name_or_path=str(name_or_path),
        quantization=quantization,
        # The commit: a branch moves on.
        revision=path.name if path.parent.name == "snapshots" else "",
    )
    rules = family.rules(config)
    dtype = _checked_dtype(dtype) or _written_dtype(checkpoint, rules)

    def convert(_: str, tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype)

    model = _empty(config)
    fill = partial(_fill, model, checkpoint.state, rules, str(path))
    if device_map is not None:
        fill_and_place(model, device_map, fill, dtype=dtype, offload_folder=offload_folder)
    else:
        fill(in_int8(model, convert) if quantization else convert)
    if isinstance(processor, (str, Path)):
        processor = resolve(processor, None, token, cache_dir, local_files_only, weights=False)
    model._processor = processor or (path if path.is_dir() else None)
    return model


def require_device(device: torch.device | str | None) -> None:
    """Raise a ValueError that says so, where there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {device} here: {str(error).splitlines()[0]}") from error


def load_hf_model(hf_model: nn.Module, *, processor: Any = None, **choices: Any) -> HookedVLM:
    """What :meth:`HookedVLM.from_hf` does."""
    if not hasattr(hf_model, "config"):
        raise TypeError(f"{type(hf_model).__name__} is no HF model: it has no config")
    hf_config = {**hf_model.config.to_dict(), "architectures": [type(hf_model).__name__]}  # type: ignore[union-attr, operator]
    family = family_of_config(hf_config)
    state = hf_model.state_dict(keep_vars=True)
    generation = getattr(hf_model, "generation_config", None)
    config = _chosen(family.config(hf_config, state, generation.to_dict() if generation else {}), **choices)
    config = replace(
        config,
        name_or_path=str(getattr(hf_model, "name_or_path", "")),
        revision=getattr(hf_model.config, "_commit_hash", None) or "",
    )
    model = _empty(config)
    _fill(model, state, family.rules(config), f"the {type(hf_model).__name__} given", lambda _, tensor: tensor)
    model._processor = processor
    return model


def save_hf(model: HookedVLM, folder: Path) -> None:
    """What :meth:`HookedVLM.save_hf` does."""
    from huggingface_hub import save_torch_state_dict

    # HF's names, whichever layout was read.
    family = family_of_config(model.config.hf_config)
    rules = family.rules(model.config)
    state = {}
    for name, parameter in model.named_parameters():
        if is_int8(parameter):
            raise ValueError(
                f"{name} is in int8, which is not saved: load the model without quantization, and save that"
            )
        key = rules.key(name)
        assert key is not None, f"no rule writes {name}"
        state[key] = rules.to_key(name, kept(parameter))
    written = {**family.hf_config(model.config), "dtype": str(model.dtype).removeprefix("torch.")}
    written.pop("torch_dtype", None)
    # An older save's shards would be read with, or instead of, the new ones.
    with whole_folder(folder, replacing=["model*.safetensors", "model.safetensors.index.json"]) as temporary:
        save_torch_state_dict(state, temporary)
        (temporary / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
        if model._processor is not None and has_processor(model._processor):
            model.processor.save_pretrained(temporary)


def resolve(
    name_or_path: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    *,
    weights: bool = True,
) -> Path:
    """The folder or file behind an embedded name, a path, or a hub id (fetched unless it is in the cache).

    ``weights=False`` fetches the configuration and the processor alone.

    Raises:
        FileNotFoundError: none of these.
    """
    name = str(name_or_path)
    if name_or_path in toys.names():
        return toys.folder(name)
    path = Path(name_or_path).expanduser()
    if name and path.exists():
        return path
    if isinstance(name_or_path, Path) or not re.fullmatch(r"[\w\-.]+/[\w\-.]+", name) or name.startswith("."):
        raise FileNotFoundError(
            f"{name!r} is no embedded model ({', '.join(toys.names())}), no folder or file here, "
            "and no hub id (owner/name)"
        )
    return _fetch(name, revision, token, cache_dir, local_files_only, weights)


def _fetch(
    repository: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    weights: bool,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )
        )

    try:
        folder = fetch(PROCESSOR_FILES + SAFETENSORS_FILES * weights)
        if weights and not any(folder.glob("*.safetensors")):
            folder = fetch(PROCESSOR_FILES + TORCH_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"{repository} is no embedded model ({', '.join(toys.names())}) and no folder here, and the hub does not "
            f"give it{f' at revision {revision}' if revision else ''}: {reason}"
        ) from error
    return folder


def _chosen(
    config: ModelConfig,
    *,
    attention: str | None = None,
    cross_attention_padding: str = "mask",
    variant: str | None = None,
) -> ModelConfig:
    """The config with the user's choices. HF computes BLIP's attention eagerly, and the others' by a fused kernel."""
    default = "eager" if isinstance(config, BlipConfig) else "sdpa"
    allowed = {"attention": (attention or default, ("eager", "sdpa"))}
    if isinstance(config, BlipConfig):
        allowed["cross_attention_padding"] = (cross_attention_padding, ("mask", "hf"))
        allowed["variant"] = (variant or config.variant, ("hf", "original"))
    elif variant not in (None, "hf"):
        raise ValueError(f"variant is a choice for BLIP; {config.architecture} has only 'hf'")
    for name, (value, values) in allowed.items():
        if value not in values:
            raise ValueError(f"{name} must be one of {values}, not {value!r}")
    chosen: dict[str, Any] = {name: value for name, (value, _) in allowed.items()}
    if isinstance(config, BlipConfig) and chosen["variant"] == "original":
        chosen |= {"vision": replace(config.vision, eps=1e-6), "label_smoothing": 0.1}
    return replace(config, **chosen)


def _checked_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype, such as torch.float32, not {dtype!r}")
    return dtype


def _written_dtype(checkpoint: Checkpoint, rules: Rules) -> torch.dtype | None:
    """What ``config.json`` says; else, as HF does, the dtype of the first floating-point tensor.

    Raises:
        CheckpointError: shards of several dtypes.
    """
    shared = one_dtype(checkpoint, rules.ignores) if len(checkpoint.files) > 1 else None
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if isinstance(name, str):
        return getattr(torch, name)
    return shared or next((tensor.dtype for tensor in checkpoint.state.values() if tensor.is_floating_point()), None)


class Undrawn(TorchFunctionMode):
    """While this holds, ``nn.init`` draws nothing: every parameter is about to come from a checkpoint.

    On the meta device a draw would only cost time, but much of it: torch imports its compiler for one.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        draws = getattr(func, "__module__", None) == "torch.nn.init"
        return kwargs["tensor"] if draws else func(*args, **kwargs)


def _empty(config: ModelConfig) -> HookedVLM:
    """The model on no device."""
    with torch.device("meta"), Undrawn():
        return MODELS[config.architecture](config).eval()


def _fill(model: HookedVLM, state: Mapping[str, Tensor], rules: Rules, source: str, keep: Keep) -> None:
    """Each tensor of ``state`` in its parameter's place, as ``keep`` keeps it."""
    keys = _matched_keys(model, state, rules, source)
    parameters: dict[str, nn.Parameter] = {}
    for name, key in keys.items():
        tensor = state[key]
        if not tensor.is_floating_point():
            raise CheckpointError(f"{key} in {source} is {tensor.dtype}, not a floating-point tensor")
        tensor = keep(name, rules.to_parameter(key, tensor))
        parameters[name] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
    for name, first in _first_names(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameters[first])


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every parameter name to the first name of the same parameter: tied parameters have several."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _matched_keys(model: HookedVLM, state: Mapping[str, Tensor], rules: Rules, source: str) -> dict[str, str]:
    """For each parameter, the key that holds it.

    Raises:
        CheckpointError: keys that are missing, unexpected or misshapen, all of them.
    """
    first = _first_names(model)
    keys: dict[str, str] = {}
    unexpected = []
    # Where several keys hold one parameter, the earliest of the table's rules wins.
    for key in sorted(state, key=rules.rank, reverse=True):
        name = rules.parameter(key)
        if name in first:
            keys[first[name]] = key
        elif not rules.ignores(key):
            unexpected.append(key)
    missing = [rules.key(name) or name for name in dict.fromkeys(first.values()) if name not in keys]
    wanted = {name: rules.to_key(name, parameter).shape for name, parameter in model.named_parameters()}
    misshapen = [
        f"{key}: {tuple(state[key].shape)}, should be {tuple(wanted[name])}"
        for name, key in keys.items()
        if state[key].shape != wanted[name]
    ]
    problems = [
        f"{len(found)} {what}: {'; '.join(found[:8])}{'; ...' if len(found) > 8 else ''}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if found
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}. Keys {'. '.join(problems)}")
    return keys

"""Reading checkpoint files: memory-mapped, shard by shard, never unpickling code."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be what was asked for; the message says what is wrong and what would be right."""


class SafetensorsState(Mapping[str, Tensor]):
    """Tensors of one or several safetensors files, mapped into memory as they are asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """``files``: for each key, the file that holds it."""
        self._files = files
        self._open: dict[Path, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        path = self._files[key]
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        try:
            return self._open[path].get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{path} does not hold {key}, which its index says it does ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration (empty for a bare file), and its tensors by key."""

    path: Path
    config: dict[str, Any]
    state: Mapping[str, Tensor]


def open_checkpoint(path: Path) -> Checkpoint:
    """A folder in HF format (``config.json``, safetensors or ``.bin``, single or sharded), or one file of weights.

    Raises:
        FileNotFoundError: no such folder or file.
        CheckpointError: no weights, a missing shard, a truncated or unreadable file.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        return Checkpoint(path, _read_json(path / "config.json"), _folder_state(path))
    if path.suffix == ".safetensors":
        return Checkpoint(path, {}, _safetensors_state(path))
    if path.suffix in TORCH_SUFFIXES:
        return Checkpoint(path, {}, _torch_state(path))
    suffixes = "/".join((".safetensors", *TORCH_SUFFIXES))
    raise CheckpointError(f"{path} is neither a folder with config.json nor a {suffixes} file")


def _folder_state(folder: Path) -> Mapping[str, Tensor]:
    # In HF's order, so that a folder that holds several means the same to both.
    if (folder / SAFETENSORS).exists():
        return _safetensors_state(folder / SAFETENSORS)
    if (folder / SAFETENSORS_INDEX).exists():
        return SafetensorsState(_shards(folder, SAFETENSORS_INDEX))
    if (folder / TORCH).exists():
        return _torch_state(folder / TORCH)
    if (folder / TORCH_INDEX).exists():
        shards = sorted(set(_shards(folder, TORCH_INDEX).values()))
        return {key: tensor for shard in shards for key, tensor in _torch_state(shard).items()}
    expected = ", ".join((SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX))
    raise CheckpointError(f"no weights in {folder}: expected one of {expected}")


def _shards(folder: Path, index: str) -> dict[str, Path]:
    weight_map = _read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / index} has no weight_map: it should say which file holds each key")
    missing = sorted({name for name in weight_map.values() if not (folder / name).exists()})
    if missing:
        raise CheckpointError(f"{folder / index} names shards that are not in the folder: {', '.join(missing)}")
    return {key: folder / name for key, name in weight_map.items()}


def _safetensors_state(path: Path) -> SafetensorsState:
    return SafetensorsState(dict.fromkeys(_open_safetensors(path).keys(), path))


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error


def _torch_state(path: Path) -> dict[str, Tensor]:
    try:
        # torch before 1.6 wrote no zip files, which cannot be memory-mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a file that is no pickle at all can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise CheckpointError(
                f"{path} was not read, because it holds more than tensors, and unpickling that could run code "
                f"({code[1]}); save its tensors alone"
            ) from error
        raise CheckpointError(
            f"{path} is not a whole file of tensors ({_first_line(error)}); fetch it again"
        ) from error
    # Research checkpoints keep their weights beside the optimiser's state.
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} holds no dictionary of tensors")
    return dict(state)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{path} holds a JSON {type(read).__name__}, not an object")
    return read


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

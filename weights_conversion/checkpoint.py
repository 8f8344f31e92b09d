"""Reading checkpoint files: memory-mapped, shard by shard, never unpickling code."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What a safetensors header calls the floating-point dtypes."""

Reader = Callable[[Path], Mapping[str, Tensor]]

COMPANION = "companion"
"""Where the config of a joined checkpoint has its companion's."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be what was asked for; the message says what is wrong and what would be right."""


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file, mapped into memory as they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
        self._path, self._keys = path, dict.fromkeys(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        try:
            return self._file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{key} in {self._path} cannot be read ({error}); fetch it again") from error

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def dtype(self, key: str) -> torch.dtype | None:
        """A floating-point tensor's dtype, from the file's header alone; None for other tensors."""
        return FLOATS.get(self._file.get_slice(key).get_dtype())


class Joined(Mapping[str, Tensor]):
    """Several mappings as one. Where several have a key, the first one's tensor counts."""

    def __init__(self, *states: Mapping[str, Tensor]) -> None:
        self._holders: dict[str, Mapping[str, Tensor]] = {}
        for state in states:
            for key in state:
                self._holders.setdefault(key, state)

    def __getitem__(self, key: str) -> Tensor:
        return self._holders[key][key]

    def __contains__(self, key: object) -> bool:
        return key in self._holders

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration (empty for a bare file), and its tensors by key."""

    path: Path
    config: dict[str, Any]
    state: Mapping[str, Tensor]
    generation: dict[str, Any] = field(default_factory=dict)
    """``generation_config.json``; empty without one."""
    files: Mapping[Path, Mapping[str, Tensor]] = field(default_factory=dict)
    """What each file holds."""

    def joined(self, companion: Checkpoint) -> Checkpoint:
        """This checkpoint with a companion's tensors beside its own, and its config under :data:`COMPANION`."""
        config = {**self.config, COMPANION: companion.config}
        return replace(self, config=config, state=Joined(self.state, companion.state))


def open_checkpoint(path: Path) -> Checkpoint:
    """A folder in HF format (``config.json``, safetensors or ``.bin``, single or sharded), or one file of weights.

    Raises:
        FileNotFoundError: no such folder or file.
        CheckpointError: no weights, a missing shard, a truncated or unreadable file.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        config = _read_json(path / "config.json")
        generation = path / "generation_config.json"
        files = _folder_files(path)
        return Checkpoint(
            path, config, Joined(*files.values()), _read_json(generation) if generation.exists() else {}, files
        )
    if path.suffix == ".safetensors" or path.suffix in TORCH_SUFFIXES:
        state = _torch_state(path) if path.suffix in TORCH_SUFFIXES else SafetensorsFile(path)
        return Checkpoint(path, {}, state, files={path: state})
    suffixes = "/".join((".safetensors", *TORCH_SUFFIXES))
    raise CheckpointError(f"{path} is neither a folder with config.json nor a {suffixes} file")


def one_dtype(checkpoint: Checkpoint, ignores: Callable[[str], bool] = lambda key: False) -> torch.dtype | None:
    """The dtype of a checkpoint's floating-point tensors, a companion's and those that are ignored aside.

    None where it has none. Of safetensors files it reads the headers alone.

    Raises:
        CheckpointError: they are of several.
    """
    examples: dict[torch.dtype, list[str]] = {}
    for path, state in checkpoint.files.items():
        for key in state:
            dtype = state.dtype(key) if isinstance(state, SafetensorsFile) else state[key].dtype
            if dtype is not None and dtype.is_floating_point and not ignores(key):
                examples.setdefault(dtype, []).append(f"{key} in {path.name}")
    if len(examples) > 1:
        told = ", ".join(f"{len(keys)} of {dtype} ({keys[0]})" for dtype, keys in examples.items())
        raise CheckpointError(f"{checkpoint.path} holds tensors of several dtypes: {told}; choose one, as in dtype=...")
    return next(iter(examples), None)


def _folder_files(folder: Path) -> dict[Path, Mapping[str, Tensor]]:
    # In HF's order, so that a folder that holds several means the same to both.
    readers: tuple[tuple[str, str, Reader], ...] = (
        (SAFETENSORS, SAFETENSORS_INDEX, SafetensorsFile),
        (TORCH, TORCH_INDEX, _torch_state),
    )
    for single, index, read in readers:
        if (folder / single).exists():
            return {folder / single: read(folder / single)}
        if (folder / index).exists():
            return _shards(folder / index, read)
    expected = ", ".join((SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX))
    raise CheckpointError(f"no weights in {folder}: expected one of {expected}")


def _shards(index: Path, read: Reader) -> dict[Path, Mapping[str, Tensor]]:
    """As HF does, what the files hold, whichever of them the index says; but nothing may be missing, or there twice."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map: it should say which file holds each key")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise CheckpointError(f"{index} names shards that are not in the folder: {', '.join(missing)}")
    files = {index.parent / name: read(index.parent / name) for name in names}
    holders: dict[str, Path] = {}
    for path, state in files.items():
        for key in state:
            if key in holders:
                raise CheckpointError(f"{holders[key]} and {path.name} both hold {key}; one of them is of another save")
            holders[key] = path
    for key, name in weight_map.items():
        if key not in holders:
            raise CheckpointError(f"{index.parent / name} does not hold {key}, which its index says it does")
    return files


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
        read = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unambiguous)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{path} holds a JSON {type(read).__name__}, not an object")
    return read


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would silently keep the last of several values."""
    read: dict[str, Any] = {}
    for key, value in pairs:
        if read.setdefault(key, value) != value:
            raise CheckpointError(f"says {key} twice: {read[key]!r} and {value!r}")
    return read


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

"""``device_map`` in one place: on the CPU or on disk it is the same model, and everything can be done with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import accelerate.utils
import pytest
import torch
from torch import Tensor

from hooked_vlm import placement
from tests import tiny_llava
from tests.placed_models import CASES, assert_same, everything, expected, load, saved
from tests.test_loading_memory import files_of, linux, mapped_file
from weights_conversion import CheckpointError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return saved(tmp_path_factory.mktemp("checkpoints"))


MAPS: dict[str, Any] = {
    "one device": "cpu",
    "whatever there is": "auto",
    "in turn": "sequential",
    "all on disk": {"": "disk"},
    "a tower on disk": {"": "cpu", "vision_encoder": "disk"},
    "half a block on disk": {"": torch.device("cpu"), "vision_encoder.blocks.0.mlp": "disk"},
    "one parameter on disk": {"": "cpu", "vision_encoder.embed.cls": "disk"},
}
CONVERTED = [where for where in MAPS if "disk" in where]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "where", "dtype"),
    [
        *(("llava next", where, None) for where in MAPS),
        *((name, where, torch.bfloat16) for name in ("llava, tied", "blip") for where in CONVERTED),
    ],
)
def test_the_plain_models_numbers(
    name: str, where: str, dtype: torch.dtype | None, checkpoints: Mapping[str, Path], tmp_path: Path
) -> None:
    """Equal to the bit: logits, every activation, edited runs and generated tokens."""
    model = load(checkpoints[name], device_map=MAPS[where], dtype=dtype, offload_folder=tmp_path)
    assert model.device == torch.device("cpu")
    with torch.no_grad():
        assert_same(everything(model, name), expected(checkpoints, name, dtype=dtype))


@linux
def test_what_is_on_disk_lies_in_a_file(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    """The checkpoint's own, or where it is converted one in the folder; nothing is written twice."""
    where = {"": "cpu", "language_model": "disk"}
    model = load(checkpoints["llava, tied"], device_map=where, offload_folder=tmp_path / "unused")
    assert files_of(model) == {"model.safetensors"}
    assert not (tmp_path / "unused").exists()

    model = load(checkpoints["llava, tied"], device_map=where, offload_folder=tmp_path / "used", dtype=torch.float16)
    language_model = dict(model.language_model.named_parameters())
    assert {f"language_model.{name}.dat" for name in language_model} == {
        path.name for path in (tmp_path / "used").iterdir()
    }
    for name, parameter in language_model.items():
        assert mapped_file(parameter.data_ptr()) == str(tmp_path / "used" / f"language_model.{name}.dat")
        assert parameter.requires_grad
    assert model.language_model.unembed.weight is model.language_model.embed.token.weight


def test_a_folder_that_was_used_before_is_written_anew(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    load(checkpoints["llava next"], device_map="disk", offload_folder=tmp_path, dtype=torch.bfloat16)
    (tmp_path / "mine.txt").write_text("kept")
    model = load(checkpoints["llava"], device_map="disk", offload_folder=tmp_path, dtype=torch.bfloat16)
    plain = load(checkpoints["llava"], dtype=torch.bfloat16)
    assert_same(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_gradients_flow_through_weights_on_disk(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    unpadded = tiny_llava.prompts(CASES["llava"].hf(), [1])
    grads = []
    for options in ({}, {"device_map": "disk", "offload_folder": tmp_path}):
        model = load(checkpoints["llava"], dtype=torch.float64, **options)
        _, seen = model.run_with_cache(unpadded, incl_bwd=torch.Tensor.sum)
        grads.append({name: seen[name] for name in seen if name.endswith("_grad")})
    assert_same(*grads)


def test_memory_decides_what_auto_puts_on_disk(
    checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """accelerate counts the bytes, of the dtype that is loaded; here it is told that there are few."""
    plain = load(checkpoints["llava"], dtype=torch.bfloat16)
    size = sum(parameter.numel() * 2 for parameter in plain.parameters())
    monkeypatch.setattr(accelerate.utils, "get_balanced_memory", lambda *_, **__: {"cpu": size * 2 // 3})
    model = load(checkpoints["llava"], dtype=torch.bfloat16, device_map="auto", offload_folder=tmp_path)
    written = [path.name for path in tmp_path.iterdir()]
    assert "language_model.unembed.weight.dat" in written
    assert "vision_encoder.embed.cls.dat" not in written
    blocks = {name.partition(".mlp.")[0] for name in written if ".mlp." in name}
    assert blocks
    assert all(f"{block}.attn.q.weight.dat" in written for block in blocks), "a block was split"
    with torch.no_grad():
        assert_same(everything(model, "llava"), expected(checkpoints, "llava", dtype=torch.bfloat16))


@pytest.mark.parametrize("name", CASES)
def test_what_is_on_disk_is_saved_as_any_model(name: str, checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    load(checkpoints[name], device_map="disk").save_hf(tmp_path / "saved")
    saved, plain = load(tmp_path / "saved"), load(checkpoints[name])
    assert_same(dict(saved.named_parameters()), dict(plain.named_parameters()))


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from tests.placed_models import load
from tests.tiny_llava import TEXT, hf_llava

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
folder = Path(sys.argv[1])
hf_llava(wide).save_pretrained(folder / "checkpoint")
options = {"dtype": torch.bfloat16, "device_map": {"": "cpu", "language_model": "disk"}}
for _ in range(2):  # what the first call imports is not counted
    before = anonymous()
    model = load(folder / "checkpoint", **options, offload_folder=folder / "offloaded")
    taken = anonymous() - before
print(json.dumps({"model": sum(parameter.numel() * 2 for parameter in model.parameters()), "taken": taken}))
"""


@linux
@pytest.mark.slow
def test_what_is_converted_for_disk_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """After 80 MB were written less than a tenth of that is held; the largest tensor has 2."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    # Tensors of real size are given back to the system as they are freed; these are, too, if told so.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["model"] > 80e6
    assert sizes["taken"] < 0.1 * sizes["model"], sizes


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device_map": "cpu", "device": "cpu"}, ValueError, "give device or device_map, not both"),
        (
            {"device_map": {"": "cpu", "language_modle": "disk", "projector.hat": "cpu"}},
            ValueError,
            "does not have: language_modle, projector.hat. Its parts are vision_encoder, projector, language_m",
        ),
        (
            {"device_map": {"vision_encoder": "cpu", "language_model": "cpu"}},
            ValueError,
            "says nothing of projector.up.weight, projector.up.bias, projector.down.weight, projector.down.bias; ''",
        ),
        ({"device_map": {"language_model": "cpu"}}, ValueError, r"vision_encoder.embed.cls, .* and \d+ more; ''"),
        (
            {"device_map": "atuo"},
            ValueError,
            r"device_map has 'atuo' \(Expected one of cpu.*\); it may have auto, balanced, .* whole; disk",
        ),
        ({"device_map": {"": "dsik"}}, ValueError, r"device_map has 'dsik' \(Expected one of cpu.*\); it may"),
        (
            {"device_map": {"": "disk"}, "dtype": torch.float16},
            ValueError,
            "is to be kept on disk as torch.float16, and the checkpoint holds it as torch.float32: say with offload",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str, checkpoints: Mapping[str, Path]) -> None:
    with pytest.raises(error, match=message):
        load(checkpoints["llava"], **options)


def test_only_inferred_maps_need_accelerate(checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    load(checkpoints["llava"], device_map={"": "cpu", "language_model": "disk"})
    for kind in placement.INFERRED:
        with pytest.raises(
            ImportError, match=f"device_map='{kind}' needs accelerate: pip install 'hooked-vlm.accelera"
        ):
            load(checkpoints["llava"], device_map=kind)


def test_a_load_that_fails_leaves_no_folder(
    checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(tensor: Tensor, path: Path) -> None:
        if "blocks.1" in path.name:
            raise OSError("no space left on device")
        path.write_text("")

    monkeypatch.setattr(placement, "_write", full)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("kept")
    for folder in ("new/folder", "used"):
        with pytest.raises(OSError, match="no space left"):
            load(checkpoints["llava"], device_map="disk", dtype=torch.float16, offload_folder=tmp_path / folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "mine.txt"]


def test_a_checkpoint_that_does_not_fit_writes_nothing(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in checkpoints["llava"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing"):
        load(folder, device_map="disk", dtype=torch.float16, offload_folder=tmp_path / "offloaded")
    assert not (tmp_path / "offloaded").exists()

"""Loading copies nothing: parameters lie in the mapped file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hooked_vlm import HookedVLM, toys
from tests.checkpoints import state_of, write_folder
from tests.tiny_blip import hf_blip

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mapped_file(address: int) -> str:
    """The file that is mapped at an address of this process; empty for memory of its own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return name
    return ""


def files_of(model: HookedVLM) -> set[str]:
    return {Path(mapped_file(parameter.data_ptr())).name for parameter in model.parameters()}


@linux
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_every_parameter_lies_in_the_file(form: str, tmp_path: Path) -> None:
    hf = hf_blip("vqa")
    folder = write_folder(tmp_path, state_of(hf), hf)
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(state_of(hf), folder / "pytorch_model.bin")
    model = HookedVLM.from_pretrained(folder)
    assert files_of(model) == {"pytorch_model.bin" if form == "bin" else "model.safetensors"}
    assert files_of(HookedVLM.from_pretrained(folder, dtype=torch.float32)) == files_of(model)
    assert not files_of(HookedVLM.from_pretrained(folder, dtype=torch.bfloat16)) & files_of(model)


@linux
def test_every_parameter_of_the_embedded_model_lies_in_its_file() -> None:
    assert files_of(HookedVLM.from_pretrained("toy-blip-vqa")) == {"model.safetensors"}
    assert (toys.folder("toy-blip-vqa") / "model.safetensors").exists()


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import BlipConfig
from hooked_vlm import HookedVLM
from hooked_vlm.models import MODELS
from weights_conversion import family_of_config

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

config = BlipConfig(
    text_config={"hidden_size": 512, "num_hidden_layers": 5, "intermediate_size": 2048, "num_attention_heads": 8,
                 "vocab_size": 2000, "bos_token_id": 1998},
    vision_config={"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 2048, "num_attention_heads": 8},
).to_dict() | {"architectures": ["BlipForQuestionAnswering"], "dtype": "float32"}
folder = Path(sys.argv[1])
folder.mkdir()
(folder / "config.json").write_text(json.dumps(config))
family = family_of_config(config)
ours = family.config(config, {})
with torch.device("meta"):
    shapes = {family.rules(ours).key(name): p.shape for name, p in MODELS[ours.architecture](ours).named_parameters()}
save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, folder / "model.safetensors")
HookedVLM.from_pretrained("toy-blip-vqa")  # what is imported on the way is not counted
before = anonymous()
model = HookedVLM.from_pretrained(folder)
loaded = anonymous() - before
read = float(sum(parameter.detach().sum() for parameter in model.parameters()))
size = (folder / "model.safetensors").stat().st_size
print(json.dumps({"file": size, "loaded": loaded, "read": anonymous() - before}))
"""


@linux
def test_loading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """Of a checkpoint of 200 MB less than a twentieth is copied, when it is loaded and when all of it has been read."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["file"] > 200e6
    assert sizes["loaded"] < 0.05 * sizes["file"], sizes
    assert sizes["read"] < 0.05 * sizes["file"], sizes

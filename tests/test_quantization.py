"""``quantization="int8"``: the layers that HF quantises, in HF's numbers, and all that one does with a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM
from hooked_vlm.components.weights import is_int8
from hooked_vlm.edits import Add, BlockAttention, Replace, Zero
from tests import tiny_blip, tiny_llava
from tests.checkpoints import TASKS, hf_answer
from tests.test_loading_memory import linux

load = HookedVLM.from_pretrained
ROOT = Path(__file__).resolve().parents[1]

LLAVAS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llava.hf_llava,
    "qwen2": partial(tiny_llava.hf_llava, tiny_llava.LANGUAGE_MODELS["qwen2"]),
    "phi3": partial(tiny_llava.hf_llava, tiny_llava.LANGUAGE_MODELS["phi3"]),
    "tied": partial(tiny_llava.hf_llava, tie_word_embeddings=True),
    "next": partial(tiny_llava.hf_llava, tiles=True),
}


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao", reason="torchao is an extra")


@pytest.fixture
def llava(torchao: Any, tmp_path: Path) -> HookedVLM:
    tiny_llava.hf_llava().save_pretrained(tmp_path)
    return load(tmp_path, quantization="int8")


def batch() -> dict[str, Any]:
    return tiny_llava.prompts(tiny_llava.hf_llava(), [1, 2])


def hf_quantised(folder: Path, hf: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As HF quantises by default."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    scheme = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    return type(hf).from_pretrained(folder, dtype=dtype, quantization_config=scheme).eval()


def int8_layers(model: nn.Module) -> int:
    return sum(is_int8(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LLAVAS)
def test_llava_is_hfs_to_the_bit(name: str, dtype: torch.dtype, torchao: Any, tmp_path: Path) -> None:
    hf = LLAVAS[name]()
    hf.save_pretrained(tmp_path)
    theirs = hf_quantised(tmp_path, hf, dtype)
    inputs = tiny_llava.prompts(hf, [1, 2])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        for ours in (load(tmp_path, dtype=dtype, quantization="int8"), HookedVLM.from_hf(theirs)):
            assert int8_layers(ours) == int8_layers(theirs) > 0
            assert torch.equal(ours(inputs), expected)
        assert not torch.equal(load(tmp_path, dtype=dtype)(inputs), expected)


@pytest.mark.parametrize("task", TASKS)
def test_blip_is_hfs_to_the_bit(task: str, torchao: Any, tmp_path: Path) -> None:
    hf = tiny_blip.hf_blip(task)
    hf.save_pretrained(tmp_path)
    theirs, ours = hf_quantised(tmp_path, hf, torch.float32), load(tmp_path, quantization="int8")
    assert int8_layers(ours) == int8_layers(theirs) > 0
    inputs = tiny_blip.inputs(task, batch=2)
    with torch.no_grad():
        assert torch.equal(ours(inputs), hf_answer(theirs, task, inputs))


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_clip_and_vit_are_what_torchao_makes_of_hfs(name: str, torchao: Any, tmp_path: Path) -> None:
    """HF itself cannot load a CLIP so; every linear layer is quantised, the classifier and the projections too."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    hf = tiny_llava.MODELS[name]()
    hf.save_pretrained(tmp_path)
    quantize_(hf, Int8WeightOnlyConfig(set_inductor_config=False))
    inputs = tiny_llava.clip_inputs() if name == "clip" else {"pixel_values": tiny_blip.pixels(2, 28, 28)}
    ours = load(tmp_path, quantization="int8")
    assert int8_layers(ours) == int8_layers(hf) > 0
    with torch.no_grad():
        theirs = hf(**inputs)
        assert torch.equal(ours(inputs), theirs.logits_per_image if name == "clip" else theirs.logits)


def test_every_hook_is_passed_and_the_parts_add_up(llava: HookedVLM) -> None:
    """Up to rounding: attention's output is made from the integers, and its heads' results from their products."""
    logits, cache = llava.run_with_cache(batch())
    assert set(cache) == set(llava.hook_names)
    assert torch.equal(logits, cache["language_model.hook_logits"])
    for tower in ("vision_encoder", "language_model"):
        attention = llava.get_submodule(tower).blocks[1].attn
        whole, parts = (cache[f"{tower}.blocks.1.{name}"] for name in ("hook_attn_out", "attn.hook_result"))
        parts = parts.sum(2) if attention.b_O is None else parts.sum(2) + attention.b_O
        assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-4)
        q, of_its_own = (cache[f"{tower}.blocks.1.{name}"] for name in ("attn.hook_q", "ln1.hook_normalized"))
        of_its_own = torch.einsum("bpm,hmd->bphd", of_its_own, attention.W_Q)
        of_its_own = of_its_own if attention.b_Q is None else of_its_own + attention.b_Q
        assert torch.allclose(q, of_its_own, rtol=1e-5, atol=1e-4)


def test_views_are_multiplied_out(llava: HookedVLM, tmp_path: Path) -> None:
    """Within half a step of the weights of the checkpoint; a step is a 127th of a row's largest."""
    plain = load(tmp_path)
    for tower in ("vision_encoder", "language_model"):
        ours, theirs = (model.get_submodule(tower).blocks[0] for model in (llava, plain))
        views = ["W_in", "W_out"] + ["W_gate"] * (tower == "language_model")
        pairs = [(getattr(ours.attn, name), getattr(theirs.attn, name)) for name in ("W_Q", "W_K", "W_V", "W_O")]
        for mine, full in pairs + [(getattr(ours.mlp, name), getattr(theirs.mlp, name)) for name in views]:
            assert mine.dtype == full.dtype
            assert not torch.equal(mine, full)
            assert (mine - full).abs().max() <= 0.51 * full.abs().max() / 127
    assert torch.equal(llava.language_model.W_U, plain.language_model.W_U)


def test_edits_and_words(llava: HookedVLM) -> None:
    block, inputs = "language_model.blocks.1", batch()
    logits, cache = llava.run_with_cache(inputs)
    assert torch.equal(llava.patch(inputs, [Replace(f"{block}.hook_resid_post", cache)]), logits)
    for edit in (
        Zero(f"{block}.attn.hook_result", heads=0),
        Add(f"{block}.hook_q_input", torch.randn(48), heads=[1]),
        BlockAttention(f"{block}.attn", positions=[-1], keys=[5]),
    ):
        assert not torch.equal(llava.patch(inputs, [edit]), logits)
    tokens = llava.generate(inputs, max_new_tokens=3, return_type="tokens")
    assert torch.equal(tokens[:, -3], logits[:, -1].argmax(-1))


def test_activations_have_gradients(llava: HookedVLM) -> None:
    inputs = tiny_llava.prompts(tiny_llava.hf_llava(), [1])
    _, cache = llava.run_with_cache(inputs, incl_bwd=lambda logits: logits[:, -1].max())
    assert cache["vision_encoder.blocks.0.hook_resid_pre_grad"].abs().max() > 0


def test_it_is_not_saved(llava: HookedVLM, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="q.weight is in int8, which is not saved: load the model without quantization"
    ):
        llava.save_hf(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_torchs_compiler_is_left_as_it_is(torchao: Any, tmp_path: Path) -> None:
    import torch._inductor.config as compiler

    tiny_llava.hf_llava().save_pretrained(tmp_path)
    before = compiler.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    load(tmp_path, quantization="int8")
    assert (compiler.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from tests.test_quantization import load
from tests.tiny_llava import hf_llava

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

small, wide = Path(sys.argv[1]) / "small", Path(sys.argv[1]) / "wide"
hf_llava().save_pretrained(small)
sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
hf_llava(sizes).save_pretrained(wide)
load(small, quantization="int8")  # what is imported on the way is not counted
before = anonymous()
model = load(wide, quantization="int8")
taken = anonymous() - before
print(json.dumps({"file": (wide / "model.safetensors").stat().st_size, "taken": taken}))
"""


@linux
@pytest.mark.slow
def test_one_matrix_at_a_time_is_in_memory_as_it_was(torchao: Any, tmp_path: Path) -> None:
    """Of a float32 checkpoint of 180 MB a quarter is held, and little more."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    # Matrices of real size are given back to the system as they are freed; these are, too, if told so.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["file"] > 160e6
    assert sizes["taken"] < 0.35 * sizes["file"], sizes


# Errors, which need no torchao ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="quantization must be 'int8' or None, not 'int4'"):
        load("toy-blip-vqa", quantization="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a quantised model is in one place: give device, not device_map"):
        load("toy-blip-vqa", quantization="int8", device_map="cpu")
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"quantization='int8' needs torchao: pip install 'hooked-vlm.quantization.'"):
        load("toy-blip-vqa", quantization="int8")

"""``hooked-vlm hooks`` and ``hooked-vlm models``, and what the command line imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hooked_vlm import HookedVLM, toys
from hooked_vlm.cli import app
from hooked_vlm.commands.hooks import EXAMPLES, hook_table
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models import MODELS
from tests.tiny_blip import CLASSES, hf_blip, padded_inputs, pixels
from tests.tiny_llava import HF_CLASSES, IMAGE, clip_inputs, hf_clip, hf_llava, hf_vit, prompts
from weights_conversion import counterparts_of_config

TOY = "toy-blip-vqa"
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_one_line_for_all_layers() -> None:
    done = run("hooks", TOY)
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if "answer_decoder.blocks.{layer}.attn.hook_z " in line)
    assert "b p h d_head" in line
    assert "b p 4 24" in line
    assert "text_decoder.bert.encoder.layer.{layer}.attention.output.dense: input, heads" in line
    assert ".blocks.0." not in done.stdout


def test_all_layers_of_one_tower() -> None:
    done = run("hooks", TOY, "--all-layers", "--tower", "vision_encoder")
    assert done.exit_code == 0, done.output
    model = HookedVLM.from_pretrained(TOY)
    names = [name for name in model.hook_names if name.startswith("vision_encoder.")]
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  vision_encoder.")]
    assert listed == names
    assert "vision_model.encoder.layers.2.mlp.fc1: output" in done.stdout


@pytest.mark.parametrize("task", CLASSES)
def test_the_table_is_what_a_run_shows(task: str) -> None:
    model = HookedVLM.from_hf(hf_blip(task, "narrow on wide" if task != "vqa" else "heads of 20"))
    caches = [model.run_with_cache(VLMInputs(**padded_inputs(task)))[1]]
    if task == "retrieval":
        caches.append(model.run_with_cache(VLMInputs(**padded_inputs(task)), use_itm_head=False)[1])
    activations = {name: cache[name] for cache in caches for name in cache}
    lines = {line.name: line for line in hook_table(model, all_layers=True)}
    assert list(lines) == model.hook_names
    for name, line in lines.items():
        sizes, shape = line.sizes.split(), activations[name].shape
        assert len(line.axes.split()) == len(sizes) == len(shape), name
        assert all(int(size) == found for size, found in zip(sizes, shape, strict=True) if size.isdigit()), name
        assert set(sizes) <= {"b", "p", "q", "k", "match"} | {size for size in sizes if size.isdigit()}, name


LLAVAS = {
    "LLaVA-1.5, shared keys": lambda: hf_llava(),
    "LLaVA-1.5, several streams": lambda: hf_llava(vision_feature_layer=[-2, 1], text={"num_key_value_heads": 1}),
    "LLaVA-NeXT": lambda: hf_llava({"model_type": "mistral", "sliding_window": None, "head_dim": 20}, tiles=True),
    "CLIP": lambda: hf_clip(eos=95),
    "ViT": hf_vit,
}


@pytest.mark.parametrize("name", LLAVAS)
def test_the_table_is_what_a_run_shows_of_other_families(name: str) -> None:
    """Sizes that are numbers are right: those of shared keys and values, and of the projector, too."""
    hf = LLAVAS[name]()
    model = HookedVLM.from_hf(hf)
    if name == "ViT":
        inputs = {"pixel_values": pixels(2, IMAGE, IMAGE)}
    else:
        inputs = clip_inputs(eos=95) if name == "CLIP" else prompts(hf, [1, 2])
    _, cache = model.run_with_cache(VLMInputs(**inputs))
    lines = {line.name: line for line in hook_table(model, all_layers=True)}
    assert list(lines) == model.hook_names
    letters = {"b", "p", "q", "k", "b_image", "b_text"}
    for hook, line in lines.items():
        sizes, shape = line.sizes.split(), cache[hook].shape
        assert len(line.axes.split()) == len(sizes) == len(shape), hook
        assert all(int(size) == found for size, found in zip(sizes, shape, strict=True) if size.isdigit()), hook
        assert set(sizes) <= letters | {size for size in sizes if size.isdigit()}, hook


def test_a_llava() -> None:
    """Its projector has hook points, and no layers."""
    done = run("hooks", "toy-llava")
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ") and "." in line}
    for hook in ("projector.hook_in", "projector.hook_pre", "projector.hook_post", "projector.hook_out"):
        assert "model.multi_modal_projector.linear_" in lines[hook]
    assert "b p 4 24" in lines["language_model.blocks.{layer}.attn.hook_rot_k"]
    assert "model.language_model.layers.{layer}.mlp.gate_proj" in lines["language_model.blocks.{layer}.mlp.hook_pre"]
    model = HookedVLM.from_pretrained("toy-llava")
    expected = f"The model has {len(model.hook_names)} hook points; layers: vision_encoder 4, language_model 5."
    assert expected in done.stdout.splitlines()


def test_one_tower_of_a_llava() -> None:
    done = run("hooks", "toy-llava", "--tower", "projector", "--all-layers")
    assert done.exit_code == 0, done.output
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  projector.")]
    assert listed == [f"projector.hook_{point}" for point in ("in", "pre", "post", "out")]
    assert "4 of these 4 lines have a counterpart in HF." in done.stdout


@pytest.mark.parametrize("toy", [TOY, "toy-llava"])
def test_lines_say_what_verify_compares(toy: str) -> None:
    model = HookedVLM.from_pretrained(toy)
    table = counterparts_of_config(model.config)
    for line in hook_table(model, all_layers=True):
        side = table.of(line.name)
        assert line.hf == (f"none: {table.reason(line.name)}" if side is None else str(side))
        assert line.has_counterpart == (side is not None)


@pytest.mark.parametrize("toy", [TOY, "toy-llava"])
def test_a_line_for_all_layers_stands_for_all_of_them(toy: str) -> None:
    model = HookedVLM.from_pretrained(toy)
    short = {line.name: line for line in hook_table(model)}
    for line in hook_table(model, all_layers=True):
        layer = next((part for part in line.name.split(".") if part.isdigit()), None)
        general = short[line.name if layer is None else line.name.replace(f".{layer}.", ".{layer}.", 1)]
        assert general._replace(name="", hf="") == line._replace(name="", hf="")
        assert general.hf.replace("{layer}", layer or "") == line.hf


def test_models() -> None:
    done = run("models")
    assert done.exit_code == 0, done.output
    assert toys.names() == (TOY, "toy-llava")
    families = (hf_class.__name__ for hf_class in (*CLASSES.values(), *HF_CLASSES.values()))
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    for name in (*toys.names(), *families):
        assert [name] in [line[:1] for line in lines], name
    rows = {line[0]: line[1:] for line in lines if len(line) == 3 and "/" in line[2]}
    assert rows == {hf_class: [model.__name__, EXAMPLES[hf_class]] for hf_class, model in MODELS.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hooks", TOY, "--tower", "text_encoder"], "no tower 'text_encoder'; this model has vision_encoder, "),
        (
            ["hooks", "toy-llava", "--tower", "answer_decoder"],
            "this model has vision_encoder, projector, language_model",
        ),
        (["hooks", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_command_line_imports_nothing_heavy_of_its_own() -> None:
    """What the package imports is another matter; here an empty one takes its place."""
    program = (
        "import sys, types; package = types.ModuleType('hooked_vlm'); package.__path__ = ['hooked_vlm'];"
        "sys.modules['hooked_vlm'] = package; import hooked_vlm.cli; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert not {"torch", "transformers", "matplotlib", "xarray", "numpy"} & set(done.stdout.split())


def test_help_imports_no_transformers() -> None:
    program = (
        "import sys\ntry:\n from hooked_vlm.cli import app; app(['--help'])\n"
        "except SystemExit:\n print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert {"trace", "answer", "models", "hooks", "verify"} <= set(done.stdout.split())
    assert not {"transformers", "matplotlib", "xarray"} & set(done.stderr.split())

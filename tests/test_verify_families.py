"""The comparison with HF for LLaVA-1.5 and NeXT, CLIP and ViT: every hook point, each kind of attention, each dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, ViTModel

from hooked_vlm import HookedVLM, toys
from hooked_vlm.verify import Report, compare, verify
from hooked_vlm.verify.report import LOGITS, OUTPUT
from hooked_vlm.verify.sample import sample_inputs
from tests import llava_processors
from tests.tiny_llava import IMAGE, IMAGE_ID, LANGUAGE_MODELS, N_PATCHES, VISION, hf_clip, hf_llava, hf_vit
from tests.weights_conversion.layouts import RESEARCH_CONFIG

MISTRAL = LANGUAGE_MODELS["mistral, sliding"]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "LLaVA": hf_llava,
    "LLaVA, class token too": partial(hf_llava, vision_feature_select_strategy="full"),
    "LLaVA, several streams": partial(hf_llava, vision_feature_layer=[-2, 1]),
    "LLaVA, Phi-3": partial(hf_llava, LANGUAGE_MODELS["phi3"]),
    "LLaVA-NeXT": partial(hf_llava, tiles=True),
    "LLaVA-NeXT, Mistral": partial(hf_llava, MISTRAL, tiles=True),
    "CLIP": partial(hf_clip, eos=90),
    "CLIP, read at the highest id": hf_clip,
    "ViT": hf_vit,
    "ViT with a pooler": partial(hf_vit, ViTModel),
    "ViT with neither": lambda: hf_vit(lambda config: ViTModel(config, add_pooling_layer=False)),
}
LAYERS = {"LLaVA": 4 + 3, "CLIP": 4 + 3, "ViT": 3}
"""Each has one pattern."""
COMPARED = {"LLaVA, several streams": 154, "LLaVA": 155, "CLIP": 151, "ViT with neither": 64, "ViT": 65}
"""With eager attention; the first that a name begins with."""
ABSENT = {"hook_scale", "hook_attn_scores", "hook_result", "hook_rot_q", "hook_rot_k"}

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random checkpoints without a processor, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            MODELS[name]().save_pretrained(root / name)
        return root / name

    return folder


def of_family(figures: dict[str, int], name: str) -> int:
    return next(figure for family, figure in figures.items() if name.startswith(family))


@every_model
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("unchecked")
def test_all_is_equal_to_the_bit(folders: Any, name: str, dtype: torch.dtype, attention: Any) -> None:
    report = verify(folders(name), dtype=dtype, attention=attention)
    assert report.passed, report.first_failure
    n_compared = of_family(COMPARED, name) - (0 if attention else of_family(LAYERS, name))
    assert report.n_equal == len(report.rows) == n_compared
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.attention == report.hf_attention == (attention or "sdpa")
    assert report.tolerance == 0
    assert report.cross_attention_padding == ""


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_hook_point_is_compared_or_said_to_have_no_counterpart(folders: Any, name: str, attention: Any) -> None:
    report = verify(folders(name), attention=attention)
    assert report.passed
    names = HookedVLM.from_pretrained(folders(name)).hook_names
    absent = dict(report.without_counterpart)
    compared = [row.name for row in report.rows]
    assert compared[-1] == (OUTPUT if name in ("ViT with a pooler", "ViT with neither") else LOGITS)
    assert compared[:-1] == [name for name in names if name not in absent]
    assert [*absent] == [name for name in names if name in absent]
    assert not {reason for reason in absent.values() if not reason or "not in the table" in reason}
    patterns = {name for name in names if name.endswith("hook_pattern")}
    assert patterns
    without = {name.rpartition(".")[2] for name in absent}
    several = {"hook_out"} if "several" in name else set()
    if attention == "eager":
        assert without <= ABSENT | several
    else:
        assert without <= ABSENT | several | {"hook_pattern"}
        assert patterns <= set(absent)
        assert all("fused (sdpa)" in absent[name] for name in patterns)
        assert any("attention: sdpa on both sides" in line for line in report.lines())


def test_a_report_reads_well(folders: Any) -> None:
    lines = {name: verify(folders(name)).lines() for name in ("LLaVA", "CLIP", "ViT", "ViT with a pooler")}
    assert "padding: rows are padded on the left; padded positions are compared like all others" in lines["LLaVA"]
    assert "padding: rows are padded on the right; padded positions are compared like all others" in lines["CLIP"]
    assert "padding: none in these inputs" in lines["ViT"]
    assert not any("cross_attention_padding" in line for own in lines.values() for line in own)
    assert lines["LLaVA"][-1].startswith("PASS: logits equal; 148 of 148 are equal to the bit; float32 on cpu, ")
    assert "attention sdpa (HF sdpa), tolerance 0; torch" in lines["LLaVA"][-1]
    assert lines["ViT with a pooler"][-1].startswith("PASS: output equal; ")
    absent = next(line for line in lines["LLaVA"] if line.startswith("without a counterpart in HF: 44 hook points ("))
    assert "7 hook_pattern" in absent


def test_low_memory_gives_the_same_report(folders: Any) -> None:
    for name in ("LLaVA-NeXT", "CLIP"):
        assert verify(folders(name), low_memory=True) == verify(folders(name))


# Inputs ---------------------------------------------------------------------------------------------------------------


def sampled(folder: Path) -> tuple[Any, str]:
    return sample_inputs(HookedVLM.from_pretrained(folder), None, None)


def test_random_prompts(folders: Any) -> None:
    """Two images in a row, one image in a row that is shorter and so padded on the left; other tokens are no images."""
    inputs, described = sampled(folders("LLaVA"))
    assert inputs.pixel_values.shape == (3, 3, IMAGE, IMAGE)
    assert (inputs.input_ids == IMAGE_ID).sum(1).tolist() == [2 * N_PATCHES, N_PATCHES]
    assert inputs.attention_mask.sum(1).tolist() == [2 * N_PATCHES + 7, N_PATCHES + 4]
    assert inputs.attention_mask[1].tolist() == sorted(inputs.attention_mask[1].tolist())
    assert described.startswith("random pixels (two images in the first row) and tokens (seed 0); no processor at ")
    full, _ = sampled(folders("LLaVA, class token too"))
    assert (full.input_ids == IMAGE_ID).sum(1).tolist() == [2 * N_PATCHES + 2, N_PATCHES + 1]


def test_random_tiles(folders: Any) -> None:
    inputs, described = sampled(folders("LLaVA-NeXT"))
    sizes = inputs.image_sizes.tolist()
    assert all(height != width for height, width in sizes)
    model = HookedVLM.from_pretrained(folders("LLaVA-NeXT"))
    counts = model._tile_counts(inputs)
    assert counts[0] < counts[1] == inputs.pixel_values.shape[1]
    assert not inputs.pixel_values[0, counts[0] :].any()
    assert bool(inputs.pixel_values[0, counts[0] - 1].all())
    assert not bool(inputs.attention_mask.all())
    assert "images of 28x18 and 28x84" in described


def test_random_texts_end_where_they_are_read(folders: Any) -> None:
    for name in ("CLIP", "CLIP, read at the highest id"):
        inputs, _ = sampled(folders(name))
        model = HookedVLM.from_pretrained(folders(name))
        assert model.text_encoder.read_at(inputs.input_ids).tolist() == [6, 3]
        assert inputs.attention_mask.sum(1).tolist() == [7, 4]
        assert len(inputs.pixel_values) == 3


@pytest.fixture(scope="module")
def with_processor(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints with a processor, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("whole")

    def folder(name: str, *, chat: str | None = None) -> Path:
        path = root / f"{name}{chat is not None}"
        if path.exists():
            return path
        tiles = name == "LLaVA-NeXT"
        models = {"CLIP": llava_processors.clip_model, "ViT": llava_processors.vit_model}
        make = models.get(name, partial(llava_processors.model, "pieces", tiles=tiles, chat=chat))
        make().save_hf(path)
        return path

    return folder


@pytest.mark.parametrize("name", ["LLaVA", "LLaVA-NeXT", "CLIP", "ViT"])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_a_checkpoint_with_a_processor(with_processor: Any, name: str, attention: Any) -> None:
    report = verify(with_processor(name), attention=attention)
    assert report.passed, report.first_failure
    assert report.n_equal == len(report.rows)
    assert report.inputs.startswith("an embedded picture")
    if name == "ViT":
        assert report.inputs == "an embedded picture"
        assert report.padded == ""
        return
    assert ("cropped to" in report.inputs) == (name == "LLaVA-NeXT")
    one, other = report.inputs.partition(", ")[2].split(" / ")
    assert len(one.split()) > len(other.split())
    assert report.padded == ("right" if name == "CLIP" else "left")


def test_a_tiled_picture_is_no_square_and_its_padding_is_cut_off(with_processor: Any) -> None:
    inputs, _ = sampled(with_processor("LLaVA-NeXT"))
    height, width = inputs.image_sizes[0].tolist()
    assert height < width
    grid = inputs.patch_grid[0]
    assert len({place.row for place in grid.places if place.tile == -1}) < len(grid.views) * 4
    assert not bool(inputs.attention_mask.all())


def test_a_chat_template_is_used(with_processor: Any) -> None:
    folder = with_processor("LLaVA", chat=llava_processors.CHAT)
    inputs, _ = sampled(folder)
    assert all(piece.text.startswith("USER: <image>\n") for piece in inputs.texts)
    assert verify(folder).passed


def test_a_picture_and_a_question_of_ones_own(with_processor: Any) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    for name in ("LLaVA", "LLaVA-NeXT", "CLIP"):
        report = verify(with_processor(name), picture, "is it a red dog ?")
        assert report.passed
        assert report.inputs == "the picture given, 'is it a red dog ?'"
        assert report.padded == ""
        assert "padding: none in these inputs" in report.lines()
    assert verify(with_processor("ViT"), picture).inputs == "the picture given"
    with pytest.raises(ValueError, match="reads no text"):
        verify(with_processor("ViT"), picture, "what ?")


@pytest.mark.parametrize("name", [name for name in toys.names() if "llava" in name])
def test_the_embedded_model(name: str) -> None:
    for attention in (None, "eager"):
        report = verify(name, attention=attention)
        assert report.passed
        assert report.n_equal == len(report.rows)
        assert toys.demo_sample().question in report.inputs


# Where something is wrong ---------------------------------------------------------------------------------------------


def with_changed(monkeypatch: pytest.MonkeyPatch, parameter: str, change: float = 1e-2) -> None:
    """From now on one number of one of HF's parameters is another than in the checkpoint."""
    load = compare.load_hf

    def load_changed(*args: Any, **options: Any) -> torch.nn.Module:
        model = load(*args, **options)
        with torch.no_grad():
            model.get_parameter(parameter).flatten()[0] += change
        return model

    monkeypatch.setattr(compare, "load_hf", load_changed)


@pytest.mark.parametrize(
    ("name", "parameter", "first"),
    [
        ("LLaVA", "model.vision_tower.encoder.layers.1.self_attn.k_proj.bias", "vision_encoder.blocks.1.attn.hook_k"),
        ("LLaVA", "model.vision_tower.encoder.layers.3.mlp.fc2.bias", "vision_encoder.blocks.3.hook_mlp_out"),
        ("LLaVA", "model.multi_modal_projector.linear_2.weight", "projector.hook_out"),
        ("LLaVA", "model.language_model.layers.2.mlp.up_proj.weight", "language_model.blocks.2.mlp.hook_pre_linear"),
        ("LLaVA-NeXT", "model.image_newline", "language_model.hook_merged_embed"),
        ("LLaVA-NeXT", "lm_head.weight", "language_model.hook_logits"),
        ("CLIP", "text_model.embeddings.position_embedding.weight", "text_encoder.hook_pos_embed"),
        ("CLIP", "visual_projection.weight", "hook_image_embeds"),
        ("CLIP", "logit_scale", "hook_logits"),
        ("ViT", "vit.layers.0.layernorm_after.weight", "vision_encoder.blocks.0.ln2.hook_normalized"),
        ("ViT", "classifier.bias", "hook_logits"),
        ("ViT with a pooler", "pooler.dense.bias", "hook_pooled"),
    ],
)
def test_one_changed_number_fails_where_it_is_first_felt(
    folders: Any, monkeypatch: pytest.MonkeyPatch, name: str, parameter: str, first: str
) -> None:
    with_changed(monkeypatch, parameter)
    report = verify(folders(name))
    assert not report.passed
    assert report.first_failure is not None
    assert report.first_failure.name == first
    assert f"first difference: {first} (" in "\n".join(report.lines())
    if "layers.3" in parameter:
        # The stream that LLaVA reads comes before its vision tower's last layer.
        assert report.rows[-1].equal
    else:
        assert report.lines()[-1].startswith(f"FAIL: {report.rows[-1].name} differ by ")


def test_padded_positions_count(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference at the padding token alone is a difference."""
    with_changed(monkeypatch, "model.language_model.embed_tokens.weight")  # of the token 0, which pads
    report = verify(folders("LLaVA"))
    assert not report.passed
    assert report.first_failure.name == "language_model.hook_embed"


def test_what_is_not_finite_in_hf_proves_nothing(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_changed(monkeypatch, "vit.layernorm.weight", float("nan"))
    report = verify(folders("ViT"), tolerance=1e9)
    failed = {row.name: row.note for row in report.rows if not row.passed}
    assert failed["vision_encoder.hook_out"] == failed["logits"] == "HF's holds NaN or infinity"
    assert "first difference: vision_encoder.ln_post.hook_normalized (HF's holds NaN or infinity)" in report.lines()


def test_a_research_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "llava-v1.5-7b").mkdir()
    (tmp_path / "llava-v1.5-7b" / "config.json").write_text(json.dumps(RESEARCH_CONFIG))
    save_file({"model.embed_tokens.weight": torch.zeros(3, 4)}, tmp_path / "llava-v1.5-7b" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"HF cannot load llava-v1\.5-7b; load it with HookedVLM, save_hf it, and verify"
    ):
        verify(tmp_path / "llava-v1.5-7b")


def test_a_report_is_json(folders: Any) -> None:
    report: Report = verify(folders("LLaVA-NeXT"))
    read = json.loads(report.to_json())
    assert read["passed"]
    assert read["architecture"] == "LlavaNextForConditionalGeneration"
    assert read["padded"] == "left"
    assert read["n_equal"] == read["n_compared"] == len(report.rows)
    assert VISION["num_hidden_layers"] == sum(
        "fused" in reason and name.startswith("vision_encoder") for name, reason in read["without_counterpart"].items()
    )

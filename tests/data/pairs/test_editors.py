"""What paints a region anew: one colour, and a pipeline of diffusers, here mostly a stand-in for one."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from hooked_vlm.data import SampleError, shapes
from hooked_vlm.data.pairs import DiffusersInpainting, FillRegion, ImageEditor, make_sip
from tests import llava_processors

PIXELS = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
IMAGE = PIL.Image.fromarray(PIXELS)
MASK = np.zeros((45, 61), dtype=bool)
MASK[10:20, 30:50] = True


def test_a_region_filled_with_a_colour() -> None:
    filled = np.asarray(FillRegion((1, 2, 3))(IMAGE, MASK, "", 0))
    assert (filled[MASK] == (1, 2, 3)).all()
    assert np.array_equal(filled[~MASK], PIXELS[~MASK])


def test_a_region_filled_with_the_mean_of_the_rest() -> None:
    halves = np.zeros((45, 61, 3), dtype=np.uint8)
    halves[~MASK] = (10, 20, 30)
    filled = np.asarray(FillRegion()(PIL.Image.fromarray(halves), MASK, "", 0))
    assert (filled == (10, 20, 30)).all()
    whole = np.asarray(FillRegion()(IMAGE, np.ones_like(MASK), "", 0))
    assert (whole == PIXELS.mean((0, 1)).round()).all()


@dataclass
class Pipeline:
    """Takes what AutoPipelineForInpainting's pipelines take, and paints noise from the generator everywhere."""

    withheld: list[bool] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self,
        prompt: str,
        image: Any,
        mask_image: Any,
        height: int,
        width: int,
        generator: torch.Generator,
        **options: Any,
    ) -> SimpleNamespace:
        self.calls.append(
            {"prompt": prompt, "image": image, "mask_image": mask_image, "size": (width, height), **options}
        )
        noise = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        return SimpleNamespace(images=[PIL.Image.fromarray(noise.numpy())], nsfw_content_detected=self.withheld)


def test_a_pipeline_gets_pictures_of_the_size_that_it_takes() -> None:
    pipeline = Pipeline()
    editor = DiffusersInpainting("model", num_inference_steps=7, negative_prompt="blurry", pipeline=pipeline)
    assert isinstance(editor, ImageEditor)
    painted = editor(IMAGE, MASK, "a blue cup", 3)
    (call,) = pipeline.calls
    assert painted.size == (61, 45)
    assert call["size"] == call["image"].size == call["mask_image"].size == (64, 48)
    assert (call["prompt"], call["num_inference_steps"], call["negative_prompt"]) == ("a blue cup", 7, "blurry")
    assert not {"strength", "guidance_scale"} & set(call), "what is not said is the pipeline's own"
    white = np.asarray(call["mask_image"].convert("L"))
    assert set(np.unique(white).tolist()) == {0, 255}
    assert white[15, 40] == 255
    assert white[30, 40] == 0
    editor = DiffusersInpainting("model", strength=0.5, guidance_scale=2.0, multiple=16, pipeline=pipeline)
    assert editor(IMAGE, MASK, "", 3).size == (61, 45)
    assert pipeline.calls[1]["size"] == (64, 48)
    assert (pipeline.calls[1]["strength"], pipeline.calls[1]["guidance_scale"]) == (0.5, 2.0)


def test_a_pipeline_paints_the_same_for_a_seed() -> None:
    editor = DiffusersInpainting("model", pipeline=Pipeline())
    first, again, other = (np.asarray(editor(IMAGE, MASK, "", seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_pairs_by_a_pipeline() -> None:
    samples = shapes(2, seed=7, kinds=("color",))
    made = make_sip(samples, editor=DiffusersInpainting("model", pipeline=Pipeline()), prompt="{foil}")
    for one in made:
        differs = (np.asarray(one.picture_cf()) != np.asarray(one.picture())).any(-1)
        assert differs.any()
        assert not differs[~np.asarray(one.regions["object"])].any()
        assert "model_id='model'" in one.meta["edit"]["editor"]


def test_a_picture_that_the_safety_checker_withheld_is_dropped() -> None:
    editor = DiffusersInpainting("model", pipeline=Pipeline(withheld=[True]))
    with pytest.raises(SampleError, match="safety checker withheld the picture"):
        editor(IMAGE, MASK, "", 0)
    made = make_sip(shapes(2, seed=7, kinds=("color",)), editor=editor, prompt="")
    assert made.report() == "2 dropped (an edited picture that was withheld: 2)"
    fine = DiffusersInpainting("model", pipeline=Pipeline(withheld=[False]))
    assert fine(IMAGE, MASK, "", 0).size == IMAGE.size


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    editor = DiffusersInpainting("model")
    with pytest.raises(ImportError, match=r"needs diffusers .*: pip install 'hooked-vlm\[diffusers\]'"):
        editor(IMAGE, MASK, "", 0)


def test_a_pipeline_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    class Loaded(Pipeline):
        def set_progress_bar_config(self, *, disable: bool) -> None:
            loaded.append(disable)

        def to(self, *where: Any) -> Loaded:
            loaded.append(where)
            return self

    def from_pretrained(name: str, **options: Any) -> Loaded:
        loaded.append((name, options))
        return Loaded()

    loader = SimpleNamespace(AutoPipelineForInpainting=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "diffusers", loader)
    editor = DiffusersInpainting("some/model", revision="main", device="cpu", dtype=torch.bfloat16)
    assert loaded == [], "it is loaded before it is called"
    assert editor(IMAGE, MASK, "", 0).size == editor(IMAGE, MASK, "", 1).size == IMAGE.size
    assert loaded == [("some/model", {"revision": "main"}), True, ("cpu", torch.bfloat16)]


@pytest.mark.slow
def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    """Untrained, saved and loaded: that the arguments are those that it takes."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1}
    tokenizer = llava_processors.clip_processor().tokenizer
    tokenizer.model_max_length = 20
    text = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=diffusers.AutoencoderKL(
            **blocks, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2
        ),
        unet=diffusers.UNet2DConditionModel(
            **{**blocks, "sample_size": 32, "in_channels": 9, "out_channels": 4, "cross_attention_dim": 32},
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, num_hidden_layers=2, max_position_embeddings=20)),
        tokenizer=tokenizer,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path)
    options: dict[str, Any] = {
        "num_inference_steps": 2,
        "strength": 1.0,
        "guidance_scale": 2.0,
        "negative_prompt": "dog",
    }
    given = DiffusersInpainting("given", pipeline=pipeline, **options)
    loaded = DiffusersInpainting(str(tmp_path), device="cpu", **options)
    first, again, other = (
        np.asarray(editor(IMAGE, MASK, "a red cat", seed)) for editor, seed in ((given, 3), (loaded, 3), (given, 4))
    )
    assert first.shape == PIXELS.shape
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)

"""At true sizes, HF's numbers to the bit: the whole of ``Salesforce/blip-vqa-base`` (ViT-B/16 at 384 pixels, 361
million parameters), and a layer of each tower of ``llava-hf/llava-1.5-7b-hf``."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import BlipConfig, BlipForQuestionAnswering, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging

from hooked_vlm import HookedVLM
from tests.parity.hf_record import disagreements, recording
from tests.parity.hf_towers import features
from tests.parity.hf_towers import recording as recording_towers
from tests.tiny_blip import randomised

DEC, CLS, SEP = 30522, 101, 102
PARAMETERS = 361_230_140


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.disable_progress_bar()
    # 12 heads as on the hub; HF's default is 8. Text sizes are HF's defaults.
    config = BlipConfig(text_config={"num_attention_heads": 12}, vision_config={"image_size": 384, "patch_size": 16})
    path = tmp_path_factory.mktemp("vqa-base")
    randomised(BlipForQuestionAnswering(config), seed=0, scale=0.04).save_pretrained(path)
    return path


def is_residual(name: str) -> bool:
    return "resid" in name or name.endswith(("hook_full_embed", "hook_out", "hook_logits"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_vqa_base_equals_hf(folder: Path, dtype: torch.dtype) -> None:
    """Two rows, one of them padded: logits and all residuals."""
    ids = torch.randint(1000, DEC, (2, 9))
    ids[:, 0], ids[0, 8], ids[1, 5:] = CLS, SEP, 0
    ids[1, 4] = SEP
    batch = {
        "pixel_values": torch.randn(2, 3, 384, 384),
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "decoder_input_ids": torch.tensor([[DEC, 2000, 3000], [DEC, 4000, 5000]]),
    }
    hf = BlipForQuestionAnswering.from_pretrained(folder, dtype=dtype).eval()
    with recording(hf, "vqa", is_residual) as record:
        hf(**batch)
    del hf
    model = HookedVLM.from_pretrained(folder, dtype=dtype, cross_attention_padding="hf")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    logits, cache = model.run_with_cache(batch, names_filter=is_residual)
    assert not disagreements(cache, record)
    assert len(record) > 12 * (3 + 2 * 6)
    assert torch.equal(logits, record["answer_decoder.hook_logits"])
    assert float(logits.float().std()) > 0.1


LLAVA_PARAMETERS = 7_063_427_072
A_LANGUAGE_LAYER, A_VISION_LAYER = 202_383_360, 12_596_224
LLAVA_VISION = {
    "model_type": "clip_vision_model",
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16},
    **{"image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
}
IMAGE_ID, N_PATCHES = 32000, 576


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LLaVA-1.5-7B, but for its number of layers: one that reads an image and words, and one of two that sees it."""
    logging.disable_progress_bar()
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1, "num_attention_heads": 32},
            **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
        },
        vision_config=LLAVA_VISION,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        pad_token_id=32001,
    )
    path = tmp_path_factory.mktemp("llava-7b")
    randomised(LlavaForConditionalGeneration(config), seed=0, scale=0.02).save_pretrained(path)
    gc.collect()
    yield path
    shutil.rmtree(path)  # two gigabytes


def exists_unless_looked_for(name: str) -> bool:
    return not name.endswith(("hook_result", "_input"))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_llava_7b_equals_hf(llava_folder: Path, dtype: torch.dtype, attention: str) -> None:
    """Two rows, one of them without an image and padded: all that can be seen."""
    ids = torch.randint(1000, 32000, (2, N_PATCHES + 20))
    ids[:, 0], ids[0, 5 : 5 + N_PATCHES] = 1, IMAGE_ID
    ids[1, :-30], ids[1, -30] = 32001, 1
    batch = {
        "pixel_values": torch.randn(1, 3, 336, 336),
        "input_ids": ids,
        "attention_mask": (ids != 32001).long(),
    }
    hf = LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype=dtype, attn_implementation=attention)
    with recording_towers(hf.eval()) as record:
        expected = hf(**batch).logits
    record["vision_encoder.hook_out"] = features(hf, record)
    del hf
    model = HookedVLM.from_pretrained(llava_folder, dtype=dtype, attention=attention)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert n_parameters + 31 * A_LANGUAGE_LAYER + 22 * A_VISION_LAYER == LLAVA_PARAMETERS
    assert torch.equal(model(batch), expected)
    logits, cache = model.run_with_cache(batch, names_filter=exists_unless_looked_for)
    assert not disagreements(cache, record)
    assert len(record) > 70
    assert torch.equal(logits, expected)
    assert float(logits.float().std()) > 0.1

"""At the size of ``Salesforce/blip-vqa-base`` (ViT-B/16 at 384 pixels, 361 million parameters): HF, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BlipConfig, BlipForQuestionAnswering
from transformers.utils import logging

from hooked_vlm import HookedVLM
from tests.parity.hf_record import disagreements, recording
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

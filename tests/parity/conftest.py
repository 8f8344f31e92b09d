"""HF models and ours over the same checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hooked_vlm import HookedVLM
from tests.tiny_blip import CLASSES, hf_blip
from tests.tiny_llava import HF_CLASSES, MODELS

Checkpoint = Callable[[str, str], Path]
"""``checkpoint(task, shape)``: a folder in HF's format, written by HF."""

Pair = Callable[..., tuple[PreTrainedModel, HookedVLM]]
"""``pair(task, shape, dtype, **choices)``: HF's model and ours, each loaded from the same folder by itself."""

Both = Callable[..., tuple[PreTrainedModel, HookedVLM]]
"""``both(name, dtype, attention)``: likewise, of one of ``tiny_llava.MODELS``. HF's is loaded in its dtype, because
``.to`` would round the frequencies of its rotary embeddings."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    logging.disable_progress_bar()

    @cache
    def written(task: str, shape: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        hf_blip(task, shape).save_pretrained(folder)
        return folder

    return written


@pytest.fixture(scope="session")
def load_hf(checkpoint: Checkpoint) -> Callable[[str, str, torch.dtype], PreTrainedModel]:
    @cache
    def loaded(task: str, shape: str, dtype: torch.dtype) -> PreTrainedModel:
        return CLASSES[task].from_pretrained(checkpoint(task, shape), dtype=dtype).eval()

    return loaded


@pytest.fixture
def pair(checkpoint: Checkpoint, load_hf: Callable[[str, str, torch.dtype], PreTrainedModel]) -> Pair:
    def loaded(
        task: str, shape: str = "heads of 12", dtype: torch.dtype = torch.float32, **choices: str
    ) -> tuple[PreTrainedModel, HookedVLM]:
        ours = HookedVLM.from_pretrained(checkpoint(task, shape), dtype=dtype, **choices)
        return load_hf(task, shape, dtype), ours

    return loaded


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    logging.disable_progress_bar()

    @cache
    def written(name: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        MODELS[name]().save_pretrained(folder)
        return folder

    return written


@pytest.fixture(scope="session")
def both(saved: Callable[[str], Path]) -> Both:
    @cache
    def loaded(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, HookedVLM]:
        ours = HookedVLM.from_pretrained(saved(name), dtype=dtype)
        return HF_CLASSES[ours.config.architecture].from_pretrained(saved(name), dtype=dtype).eval(), ours

    def set_up(
        name: str, dtype: torch.dtype = torch.float32, attention: str = "eager"
    ) -> tuple[PreTrainedModel, HookedVLM]:
        hf, ours = loaded(name, dtype)
        hf.set_attn_implementation(attention)
        ours.attention = attention
        if hasattr(hf, "lm_head"):
            tower = hf.model.language_model  # whose rotary embeddings may remember what they have seen
            tower.rotary_emb = type(tower.rotary_emb)(tower.config)
        return hf, ours

    return set_up

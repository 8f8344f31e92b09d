"""Checkpoints on disk, in every layout that we read, and what HF answers over the same weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM
from tests.tiny_blip import inputs

TASKS = ["vqa", "caption", "retrieval"]
WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions.decoder.weight"
HEAD_BIAS = "text_decoder.cls.predictions.decoder.bias"
BIAS = "text_decoder.cls.predictions.bias"


def state_of(hf: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of every tensor, tied ones too."""
    return {key: tensor.detach().clone() for key, tensor in hf.state_dict().items()}


def write_folder(folder: Path, state: Mapping[str, Tensor], hf: PreTrainedModel, **changes: Any) -> Path:
    """A folder in HF's format; ``changes`` are entries of ``config.json``."""
    folder.mkdir(exist_ok=True)
    config = {**hf.config.to_dict(), "architectures": [type(hf).__name__], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hf_answer(hf: PreTrainedModel, task: str, batch: dict[str, Any]) -> Tensor:
    """HF's logits, which a BLIP for questions keeps to itself."""
    seen = []
    watched = hf.text_decoder if task == "vqa" else hf
    handle = watched.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        with torch.no_grad():
            hf(**batch)
    finally:
        handle.remove()
    return seen[0].itm_score if task == "retrieval" else seen[0].logits


def assert_same_answer(ours: HookedVLM, hf: PreTrainedModel, task: str) -> None:
    batch = inputs(task, batch=2)
    with torch.no_grad():
        assert torch.equal(ours(batch), hf_answer(hf, task, batch))


RESEARCH_NAMES = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    ("vision_model.post_layernorm", "visual_encoder.norm"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
)


def research_state(hf: PreTrainedModel) -> dict[str, Tensor]:
    """The same weights under the research code's names, with the buffers and momentum copies that its files hold."""
    state = {}
    for key, tensor in state_of(hf).items():
        for theirs, original in RESEARCH_NAMES:
            key = key.replace(theirs, original)
        state[key] = tensor
    for prefix in {key.split("embeddings.")[0] for key in state if key.startswith("text_")} & {
        "text_encoder.",
        "text_decoder.bert.",
    }:
        state[f"{prefix}embeddings.position_ids"] = torch.arange(24)[None]
    if "itm_head.weight" in state:
        towers = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
        momentum = {key.replace(".", "_m.", 1): tensor + 1 for key, tensor in state.items() if key.startswith(towers)}
        queues = {name: torch.zeros(2, 5) for name in ("image_queue", "text_queue")}
        counts = {name: torch.zeros(1, dtype=torch.long) for name in ("ptr_queue", "queue_ptr")}
        state |= momentum | queues | counts | {"idx_queue": torch.zeros(1, 5), "temp": torch.tensor(0.07)}
    return state

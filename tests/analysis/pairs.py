"""Tiny models with clean inputs, a corruption of them, and a metric."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, VLMInputs, toys
from hooked_vlm.analysis.runs import Runs
from hooked_vlm.components.norm import LayerNorm
from hooked_vlm.corruptions import Corrupted, Corruption, CounterfactualImage
from hooked_vlm.metrics import LogitDifference
from tests.tiny_blip import hf_blip, inputs, pixels
from tests.tiny_llava import IMAGE, clip_inputs, hf_clip, hf_llava, hf_vit, prompts


@dataclass(frozen=True, eq=False)
class Given:
    """Other inputs, as they are."""

    inputs: VLMInputs
    draws: int = 1

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        return Corrupted(self.inputs.to(model.device))


@dataclass(frozen=True, eq=False)
class Pair:
    """What an attribution is made of."""

    model: HookedVLM
    clean: VLMInputs
    corruption: Corruption
    metric: Callable[[Tensor], Tensor]

    @property
    def all(self) -> tuple[HookedVLM, VLMInputs, Corruption, Callable[[Tensor], Tensor]]:
        return self.model, self.clean, self.corruption, self.metric

    @property
    def runs(self) -> Runs:
        return Runs.of(*self.all)


def first_less_second(logits: Tensor) -> Tensor:
    """The difference of two logits: at the last position, where there are positions."""
    last = logits[:, -1] if logits.ndim == 3 else logits
    return last[:, 0] - last[:, 1]


@cache
def _model(name: str) -> HookedVLM:
    made: dict[str, Callable[[], Any]] = {
        "blip": partial(hf_blip, "vqa", "heads of 12 on 20"),
        "caption": partial(hf_blip, "caption", "narrow on wide"),
        "retrieval": partial(hf_blip, "retrieval"),
        "llava": hf_llava,
        "vit": hf_vit,
        "clip": partial(hf_clip, eos=95),
    }
    return HookedVLM.from_hf(made[name]())


def _inputs(name: str, model: HookedVLM, seed: int, rows: int) -> VLMInputs:
    torch.manual_seed(seed)
    if name in ("blip", "caption", "retrieval"):
        return VLMInputs(**inputs({"blip": "vqa"}.get(name, name), rows, answer=2))
    if name == "vit":
        return VLMInputs(pixel_values=pixels(rows, IMAGE, IMAGE))
    if name == "clip":
        batch = clip_inputs(rows, [6] * rows, eos=95)
    else:
        batch = prompts(hf_llava(), [1] * rows, n_words=[6] * rows)
    torch.manual_seed(seed)
    words = torch.randint(3, 90, batch["input_ids"].shape)
    own = (batch["input_ids"] >= 90) | (batch["input_ids"] == 1)
    ids = torch.where(own, batch["input_ids"], words)
    return VLMInputs(**{**batch, "input_ids": ids, "pixel_values": pixels(rows, IMAGE, IMAGE)})


def diagonal(logits: Tensor) -> Tensor:
    """Of CLIP: each image with its own text."""
    return logits.diagonal()


def pair(name: str, rows: int = 2) -> Pair:
    """Other pictures and other words, of a model with random weights."""
    model = _model(name)
    clean, other = (_inputs(name, model, seed, rows) for seed in (0, 1))
    return Pair(model, clean, Given(other), diagonal if name == "clip" else first_less_second)


def nearby(made: Pair, step: float) -> Pair:
    """In double precision, with a corruption that is a small change of the picture."""
    model = deepcopy(made.model).double()
    assert made.clean.pixel_values is not None
    clean = made.clean.with_pixels(made.clean.pixel_values.double())
    torch.manual_seed(2)
    moved = clean.with_pixels(clean.pixel_values + step * torch.randn_like(clean.pixel_values))
    return Pair(model, clean, Given(moved), made.metric)


@cache
def toy(name: str) -> Pair:
    """A trained model, the demo's picture and question, and the counterfactual picture."""
    model, sample = HookedVLM.from_pretrained(name), toys.demo_sample()
    clean = model.prepare(sample.image, sample.question)
    corruption = CounterfactualImage(sample.sip.image)
    with torch.no_grad():
        answer, foil = (model(run)[:, -1].argmax(-1) for run in (clean, corruption(model, clean).inputs))
    return Pair(model, clean, corruption, LogitDifference(answer, foil))


def linear(name: str, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A model of the same form in which all is linear: uniform attention, no scale in LayerNorms, no activation."""
    made = pair(name)
    model = deepcopy(made.model)
    monkeypatch.setattr(LayerNorm, "normalize", lambda self, x: x * self.weight + self.bias)
    with torch.no_grad():
        for where, parameter in model.named_parameters():
            if ".attn.q" in where or ".cross_attn.q" in where:
                rows = parameter.shape[0] // 3 if "qkv" in where else parameter.shape[0]
                parameter[:rows] = 0
    for module in model.modules():
        if hasattr(module, "act"):
            module.act = lambda x: x
    return Pair(model, made.clean, made.corruption, made.metric)

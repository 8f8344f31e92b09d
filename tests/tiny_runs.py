"""Tiny hooked models, and inputs for them that know their spans and texts, for the tests of what is done to runs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.config import AttentionImplementation
from hooked_vlm.hooks import HookPoint
from hooked_vlm.inputs import Span, TextPiece, VLMInputs
from tests.tiny_blip import Shape, hf_blip, inputs

TEXT_TOWER = {"vqa": "question_encoder", "caption": "text_decoder", "retrieval": "text_encoder"}
QUESTIONS = ("red big dog", "big red dog", "dog big red")


@cache
def tiny(task: str = "vqa", attention: AttentionImplementation = "eager", *, layers: int = 2) -> HookedVLM:
    shape = Shape(text=36, text_heads=3, vision=36, vision_heads=3, text_layers=layers, vision_layers=layers)
    return HookedVLM.from_hf(hf_blip(task, shape), attention=attention)


def batch(rows: int = 3, task: str = "vqa", *, seed: int = 0, answer: int = 3) -> VLMInputs:
    """Questions of the same three words, in an order of its own for each row; 9 patches; ``answer`` decoder tokens."""
    torch.manual_seed(seed)
    texts = tuple(_piece(QUESTIONS[row % len(QUESTIONS)]) for row in range(rows))
    last = ("answer_decoder", 0) if task == "vqa" else (TEXT_TOWER[task], 4)
    spans = {
        "image": Span("vision_encoder", (tuple(range(1, 10)),) * rows),
        "question": Span(TEXT_TOWER[task], ((1, 2, 3),) * rows),
        "last": Span(last[0], ((last[1],),) * rows),
    }
    made = VLMInputs(**inputs(task, rows, length=5, answer=answer))
    return replace(made, spans=spans, texts=texts, text_tower=TEXT_TOWER[task])


def point(axes: str, name: str) -> HookPoint:
    """A hook point of no model."""
    made = HookPoint(axes)
    made.name = name
    return made


def n_hooks(model: HookedVLM) -> int:
    return sum(len(hook.handles) for hook in model.hook_points())


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _piece(text: str) -> TextPiece:
    starts = [text.index(word) for word in text.split()]
    offsets = [(start, start + len(word)) for start, word in zip(starts, text.split(), strict=True)]
    return TextPiece(text, (None, *offsets, None))

"""Towers, and the models made of them. ``MODELS`` is the registry: a task's name to the class that does it."""

from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.blip import HookedBlip, HookedBlipCaption, HookedBlipRetrieval, HookedBlipVQA, RankedAnswers

MODELS: dict[str, type[HookedBlip]] = {
    "vqa": HookedBlipVQA,
    "caption": HookedBlipCaption,
    "retrieval": HookedBlipRetrieval,
}

__all__ = [
    "MODELS",
    "HookedBlip",
    "HookedBlipCaption",
    "HookedBlipRetrieval",
    "HookedBlipVQA",
    "HookedVLM",
    "RankedAnswers",
]

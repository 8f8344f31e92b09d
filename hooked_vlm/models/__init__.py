"""Towers, and the models made of them. ``MODELS`` is the registry: HF's class to ours."""

from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.blip import HookedBlip, HookedBlipCaption, HookedBlipRetrieval, HookedBlipVQA, RankedAnswers
from hooked_vlm.models.clip import HookedClip
from hooked_vlm.models.image_classifier import HookedViT
from hooked_vlm.models.llava import HookedLlava

MODELS: dict[str, type[HookedVLM]] = {
    "BlipForQuestionAnswering": HookedBlipVQA,
    "BlipForConditionalGeneration": HookedBlipCaption,
    "BlipForImageTextRetrieval": HookedBlipRetrieval,
    "LlavaForConditionalGeneration": HookedLlava,
    "LlavaNextForConditionalGeneration": HookedLlava,
    "CLIPModel": HookedClip,
    "ViTForImageClassification": HookedViT,
    "ViTModel": HookedViT,
}

__all__ = [
    "MODELS",
    "HookedBlip",
    "HookedBlipCaption",
    "HookedBlipRetrieval",
    "HookedBlipVQA",
    "HookedClip",
    "HookedLlava",
    "HookedVLM",
    "HookedViT",
    "RankedAnswers",
]

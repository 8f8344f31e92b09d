"""Vision-language models, rewritten so that anything inside them can be looked at and changed.

Numbers are HF's, to the bit; names are TransformerLens's. Start at :meth:`HookedVLM.from_pretrained`.
"""

from hooked_vlm.cache import ActivationCache
from hooked_vlm.hook_point import HookError, HookPoint
from hooked_vlm.hooks import HookedModule
from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.models import (
    HookedBlipCaption,
    HookedBlipRetrieval,
    HookedBlipVQA,
    HookedClip,
    HookedLlava,
    HookedViT,
    HookedVLM,
)
from hooked_vlm.version import __version__

__all__ = [
    "ActivationCache",
    "HookError",
    "HookPoint",
    "HookedBlipCaption",
    "HookedBlipRetrieval",
    "HookedBlipVQA",
    "HookedClip",
    "HookedLlava",
    "HookedModule",
    "HookedVLM",
    "HookedViT",
    "Span",
    "SpanError",
    "VLMInputs",
    "__version__",
]

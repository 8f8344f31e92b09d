"""Which table reads which checkpoint. A plain dict: HF's ``model_type`` to the family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from hooked_vlm.config import BlipConfig
from weights_conversion.blip import BLIP, BLIP_RESEARCH
from weights_conversion.blip_counterparts import BLIP_COUNTERPARTS
from weights_conversion.checkpoint import CheckpointError
from weights_conversion.counterparts import Counterparts
from weights_conversion.rules import Rules


@runtime_checkable
class Family(Protocol):
    """One way of writing a kind of model to disk."""

    def config(self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor]) -> BlipConfig:
        """The model's config, from ``config.json`` and, where that is silent, from the tensors' shapes."""
        ...

    def hf_config(self, config: BlipConfig) -> dict[str, Any]:
        """The ``config.json`` that says what ``config`` says."""
        ...

    def rules(self, config: BlipConfig) -> Rules:
        """The table of names."""
        ...


FAMILIES: dict[str, Family] = {"blip": BLIP}


def family_of_config(hf_config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``.

    Raises:
        CheckpointError: a ``model_type`` that no family reads; lists those supported.
    """
    model_type = hf_config.get("model_type")
    if str(model_type) not in FAMILIES:
        raise CheckpointError(f"unsupported model_type {model_type!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[str(model_type)]


def family_of_state(keys: Iterable[str]) -> Family:
    """The family of a research checkpoint, which has no ``config.json``."""
    if any(key.startswith("visual_encoder.") for key in keys):
        return BLIP_RESEARCH
    raise CheckpointError("a checkpoint without config.json must be in BLIP's research layout (visual_encoder.*)")


def counterparts_of_config(config: BlipConfig) -> Counterparts:
    """HF's side of every hook point of a model."""
    return BLIP_COUNTERPARTS[config.task]

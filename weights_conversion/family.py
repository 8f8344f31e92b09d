"""What a checkpoint family answers: one way of writing a kind of model to disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from hooked_vlm.config import ModelConfig
from weights_conversion.rules import Rules

Config = TypeVar("Config", bound=ModelConfig)


@runtime_checkable
class Family(Protocol[Config]):
    """One way of writing a kind of model to disk."""

    def config(
        self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor], generation: Mapping[str, Any] = {}
    ) -> Config:
        """The model's config, from ``config.json`` and, where that is silent, from the tensors' shapes.

        ``generation``: what ``generation_config.json`` says.
        """
        ...

    def hf_config(self, config: Config) -> dict[str, Any]:
        """The ``config.json`` that says what ``config`` says."""
        ...

    def rules(self, config: Config) -> Rules:
        """The table of names."""
        ...

    def companion(self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str | None:
        """The other checkpoint (a hub id or a path) that holds the tensors that this one lacks; mostly None.

        Join the two (:meth:`Checkpoint.joined`) before asking for the config.
        """
        return None

"""A vision transformer on its own (Dosovitskiy et al. 2021), as in ``google/vit-*``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.components import activation
from hooked_vlm.config import ViTModelConfig
from hooked_vlm.generation import Decoding
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.vit import ViT
from hooked_vlm.processing import image_inputs, label_patches


class HookedViT(HookedVLM):
    """Pixels to the logits of classes; or, without a classifier, to the tower's states."""

    config: ViTModelConfig
    towers: ClassVar[tuple[str, ...]] = ("vision_encoder",)

    def __init__(self, config: ViTModelConfig) -> None:
        super().__init__(config)
        self.vision_encoder = ViT(config.vision, config.attention)
        if config.d_pooled:
            self.pooler = nn.Linear(config.vision.d_model, config.d_pooled)
            self.act = activation(config.pooler_act)
            self.hook_pooled = HookPoint("b d_pooled")
        if config.n_classes:
            self.classifier = nn.Linear(config.vision.d_model, config.n_classes)
            self.hook_logits = HookPoint("b n_classes")
        self.setup()

    def forward(
        self, inputs: VLMInputs | Mapping[str, Any]
    ) -> Float[Tensor, "b n_classes"] | Float[Tensor, "b d_pooled"] | Float[Tensor, "b p d_model"]:
        """``[b n_classes]``: the class token's logits; with a pooler ``[b d_pooled]``: its output; with neither
        ``[b p d_model]``: the tower's states."""
        inputs = self._inputs(inputs)
        pixels, interpolate = _pixels(inputs), inputs.interpolate_pos_encoding
        states = self.vision_encoder(pixels, interpolate_pos_encoding=interpolate)
        return self.leave({"vision_encoder": states}, inputs)

    def enter(
        self, tower: str, inputs: VLMInputs, states: Mapping[str, Float[Tensor, "_ _ d"]]
    ) -> Float[Tensor, "b p d_model"]:
        pixels, interpolate = _pixels(inputs), inputs.interpolate_pos_encoding
        return self.vision_encoder.embed_patches(pixels, interpolate_pos_encoding=interpolate)

    def leave(
        self, states: Mapping[str, Float[Tensor, "_ _ d"]], inputs: VLMInputs
    ) -> Float[Tensor, "b n_classes"] | Float[Tensor, "b d_pooled"] | Float[Tensor, "b p d_model"]:
        image = states["vision_encoder"]
        if self.config.n_classes:
            return self.hook_logits(self.classifier(image[:, 0]))
        if self.config.d_pooled:
            return self.hook_pooled(self.act(self.pooler(image[:, 0])))
        return image

    def positions_read(self, tower: str, inputs: VLMInputs) -> list[int] | None:
        return [0] if self.config.n_classes or self.config.d_pooled else None

    def prepare(self, images: Any = None, texts: str | Sequence[str] | None = None, **options: Any) -> VLMInputs:
        """Inputs from pictures. Spans: ``image`` (patches), ``last`` (the class token, which the classifier reads)."""
        if texts is not None:
            raise ValueError("a vision transformer reads no text")
        return image_inputs(self.processor, self.config.vision, images, **options).to(self.device)

    def reword(self, inputs: VLMInputs, texts: Sequence[str]) -> VLMInputs:
        raise ValueError("a vision transformer reads no text")

    def position_labels(self, inputs: VLMInputs, tower: str) -> list[list[str]]:
        self._check_tower(tower)
        return label_patches(inputs, self.config.vision)

    def _start_decoding(self, inputs: VLMInputs) -> tuple[Decoding, Int[Tensor, "b prompt"]]:
        raise TypeError("a vision transformer does not generate text")


def _pixels(inputs: VLMInputs) -> Float[Tensor, "b 3 height width"]:
    if inputs.pixel_values is None:
        raise ValueError("a vision transformer needs pixel_values")
    return inputs.pixel_values

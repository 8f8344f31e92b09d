"""LLaVA-1.5 and LLaVA-NeXT: every layout that HF has written, by its prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from hooked_vlm.config import LlavaConfig
from weights_conversion.checkpoint import CheckpointError
from weights_conversion.clip import vision_config, vision_rules
from weights_conversion.family import Family
from weights_conversion.hf_config import check_activation, may_tie, one_of, parse, token_ids
from weights_conversion.llama import language_rules, text_config
from weights_conversion.rules import Rules


class Layout(NamedTuple):
    """What stands before the same names in a checkpoint."""

    language: str
    head: str
    vision: str
    rest: str
    """Projector and newline."""

    @property
    def rules(self) -> Rules:
        return (
            vision_rules(self.vision)
            + Rules(
                (f"{self.rest}multi_modal_projector.linear_1.*", "projector.up.*"),
                (f"{self.rest}multi_modal_projector.linear_2.*", "projector.down.*"),
                (f"{self.rest}image_newline", "image_newline"),
            )
            + language_rules(self.language, self.head)
        )


LAYOUTS = (
    # The hub's; every HF reads it, so it is what we write.
    Layout("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", ""),
    # What transformers 5 saves of a model that it did not load.
    Layout("language_model.model.", "language_model.lm_head.", "vision_tower.", ""),
    # In memory: transformers 5, and 4.52 to 4.57.
    Layout("model.language_model.", "lm_head.", "model.vision_tower.", "model."),
    Layout("model.language_model.", "lm_head.", "model.vision_tower.vision_model.", "model."),
)

ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
CONFIGS = {"llava": "LlavaConfig", "llava_next": "LlavaNextConfig"}
"""HF's classes, by ``model_type``."""


class Llava(Family[LlavaConfig]):
    """``config.json`` and HF's key names."""

    def rules(self, config: LlavaConfig) -> Rules:
        return sum((layout.rules for layout in LAYOUTS), Rules())

    def config(
        self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor], generation: Mapping[str, Any] = {}
    ) -> LlavaConfig:
        kind = hf_config["model_type"]
        architecture = one_of(hf_config, (ARCHITECTURES[kind],), "LLaVA")
        full = parse(CONFIGS[kind], hf_config, "LLaVA")
        vision, text = full.vision_config, full.text_config
        if vision.model_type != "clip_vision_model":
            raise CheckpointError(
                f"vision_config.model_type is {vision.model_type!r}, which is not supported; supported: "
                "clip_vision_model"
            )
        if kind == "llava_next" and full.vision_feature_select_strategy != "default":
            raise CheckpointError(
                f"vision_feature_select_strategy is {full.vision_feature_select_strategy!r}; a LLaVA-NeXT lays patches "
                "out as an image, without the class token, so it should be 'default'"
            )
        pinpoints = _pinpoints(full.image_grid_pinpoints, vision) if kind == "llava_next" else None
        eos = token_ids(
            "eos_token_id", generation.get("eos_token_id"), text.eos_token_id, getattr(full, "eos_token_id", None)
        )
        pad = token_ids(
            "pad_token_id", generation.get("pad_token_id"), text.pad_token_id, getattr(full, "pad_token_id", None)
        )
        return LlavaConfig(
            architecture=architecture,
            lists_features=not isinstance(full.vision_feature_layer, int),
            vision=vision_config(vision, _feature_layers(full.vision_feature_layer, vision.num_hidden_layers)),
            text=text_config(text, ties_embeddings=bool(full.tie_word_embeddings) and _may_tie(state)),
            image_token_id=full.image_token_index,
            projector_act=check_activation(full.projector_hidden_act, "projector_hidden_act"),
            projector_bias=full.multimodal_projector_bias,
            select=full.vision_feature_select_strategy,
            pinpoints=pinpoints,
            d_vocab=text.vocab_size,
            eos_token_ids=eos,
            # As HF's generate does.
            pad_token_id=next(iter((*pad, *eos)), 0),
            hf_config=dict(hf_config),
        )

    def hf_config(self, config: LlavaConfig) -> dict[str, Any]:
        """The ``config.json`` of a model, as it was read."""
        return {**config.hf_config, "architectures": [config.architecture]}


def _feature_layers(said: int | list[int], n_layers: int) -> tuple[int, ...]:
    """HF's indices of hidden states, from either end, as indices from the start: 0 is what block 0 reads."""
    layers = [said] if isinstance(said, int) else list(said)
    if not layers or not all(-n_layers - 1 <= layer <= n_layers for layer in layers):
        raise CheckpointError(
            f"vision_feature_layer is {said}; a vision tower of {n_layers} layers has the hidden states 0 to "
            f"{n_layers}, or {-n_layers - 1} to -1 from the end"
        )
    return tuple(layer % (n_layers + 1) for layer in layers)


def _pinpoints(said: Any, vision: Any) -> tuple[tuple[int, int], ...]:
    size = vision.image_size
    pairs = [pair for pair in said if _is_pair(pair, size)] if isinstance(said, (list, tuple)) else []
    if not pairs or len(pairs) != len(said):
        raise CheckpointError(
            f"image_grid_pinpoints is {said!r}; it should be pairs of a height and a width, multiples of the vision "
            f"tower's image_size {size}"
        )
    return tuple((height, width) for height, width in pairs)


def _is_pair(pair: Any, size: int) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    return all(isinstance(side, int) and side > 0 and side % size == 0 for side in pair)


def _may_tie(state: Mapping[str, Tensor]) -> bool:
    endings = ("embed_tokens.weight", "lm_head.weight")
    words, head = (next((key for key in state if key.endswith(ending)), "") for ending in endings)
    return may_tie(state, words, head)


LLAVA = Llava()

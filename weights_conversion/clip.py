"""CLIP: the hub's layout, which is also what HF has in memory and saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_vlm.config import ClipConfig, ClipTextConfig, ViTConfig
from weights_conversion.checkpoint import CheckpointError
from weights_conversion.family import Family
from weights_conversion.hf_config import check_image, check_tower, one_of, parse, token_ids
from weights_conversion.rules import Leading, Rules


def block_rules(prefix: str, tower: str) -> Rules:
    """CLIP's transformer layers; the same names in both towers."""
    layer, block = f"{prefix}encoder.layers.{{l}}.", f"{tower}.blocks.{{l}}."
    return Rules(
        (f"{layer}layer_norm1.*", f"{block}ln1.*"),
        (f"{layer}self_attn.q_proj.*", f"{block}attn.q.*"),
        (f"{layer}self_attn.k_proj.*", f"{block}attn.k.*"),
        (f"{layer}self_attn.v_proj.*", f"{block}attn.v.*"),
        (f"{layer}self_attn.out_proj.*", f"{block}attn.o.*"),
        (f"{layer}layer_norm2.*", f"{block}ln2.*"),
        (f"{layer}mlp.fc1.*", f"{block}mlp.up.*"),
        (f"{layer}mlp.fc2.*", f"{block}mlp.down.*"),
        ignored=(f"{prefix}embeddings.position_ids",),
    )


def vision_rules(prefix: str) -> Rules:
    """CLIP's vision tower, under the prefix that a layout gives it."""
    return Rules(
        (f"{prefix}embeddings.class_embedding", "vision_encoder.embed.cls", Leading(2)),
        (f"{prefix}embeddings.position_embedding.weight", "vision_encoder.embed.pos", Leading(1)),
        (f"{prefix}embeddings.patch_embedding.*", "vision_encoder.embed.patch.*"),
        (f"{prefix}pre_layrnorm.*", "vision_encoder.ln_pre.*"),  # HF's spelling
        (f"{prefix}post_layernorm.*", "vision_encoder.ln_post.*"),
    ) + block_rules(prefix, "vision_encoder")


TEXT = Rules(
    ("text_model.embeddings.token_embedding.weight", "text_encoder.embed.token.weight"),
    ("text_model.embeddings.position_embedding.weight", "text_encoder.embed.pos.weight"),
    ("text_model.final_layer_norm.*", "text_encoder.ln_final.*"),
) + block_rules("text_model.", "text_encoder")

HEADS = Rules(
    ("visual_projection.weight", "vision_proj.weight"),
    ("text_projection.weight", "text_proj.weight"),
    ("logit_scale", "logit_scale"),
)


def vision_config(vision: Any, feature_layers: tuple[int, ...], *, pools: bool = False) -> ViTConfig:
    """Our config of HF's ``CLIPVisionConfig``."""
    d_head = check_tower(vision, "vision_config")
    check_image(vision)
    return ViTConfig(
        d_model=vision.hidden_size,
        n_layers=vision.num_hidden_layers,
        n_heads=vision.num_attention_heads,
        d_head=d_head,
        d_mlp=vision.intermediate_size,
        act=vision.hidden_act,
        eps=vision.layer_norm_eps,
        norm_order="pre",
        softmax_in_float32=True,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        patch_bias=False,
        has_pre_norm=True,
        feature_layers=feature_layers,
        pools=pools,
    )


class Clip(Family[ClipConfig]):
    """``config.json`` and HF's key names."""

    def rules(self, config: ClipConfig) -> Rules:
        return vision_rules("vision_model.") + TEXT + HEADS

    def config(
        self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor], generation: Mapping[str, Any] = {}
    ) -> ClipConfig:
        architecture = one_of(hf_config, ("CLIPModel",), "CLIP")
        full = parse("CLIPConfig", hf_config, "CLIP")
        vision, text = full.vision_config, full.text_config
        d_head = check_tower(text, "text_config")
        eos = token_ids("text_config.eos_token_id", text.eos_token_id)
        if len(eos) != 1:
            raise CheckpointError(f"text_config.eos_token_id is {text.eos_token_id!r}; CLIP reads a text at one token")
        return ClipConfig(
            architecture=architecture,
            vision=vision_config(vision, (vision.num_hidden_layers,), pools=True),
            text=ClipTextConfig(
                d_model=text.hidden_size,
                n_layers=text.num_hidden_layers,
                n_heads=text.num_attention_heads,
                d_head=d_head,
                d_mlp=text.intermediate_size,
                act=text.hidden_act,
                eps=text.layer_norm_eps,
                norm_order="pre",
                is_causal=True,
                softmax_in_float32=True,
                d_vocab=text.vocab_size,
                n_ctx=text.max_position_embeddings,
                eos_token_id=eos[0],
            ),
            d_projection=full.projection_dim,
            d_vocab=text.vocab_size,
            eos_token_ids=eos,
            pad_token_id=next(iter(token_ids("text_config.pad_token_id", text.pad_token_id)), eos[0]),
            hf_config=dict(hf_config),
        )

    def hf_config(self, config: ClipConfig) -> dict[str, Any]:
        """The ``config.json`` of a model, as it was read."""
        return {**config.hf_config, "architectures": [config.architecture]}


CLIP = Clip()

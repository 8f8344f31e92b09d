"""ViT: the hub's layout, which HF still saves, and the shorter names that transformers 5 has in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_vlm.config import ViTConfig, ViTModelConfig
from weights_conversion.family import Family
from weights_conversion.hf_config import check_activation, check_image, check_tower, one_of, parse
from weights_conversion.rules import Rules

CLASSIFIER, BARE = ARCHITECTURES = ("ViTForImageClassification", "ViTModel")


def vision_rules(prefix: str) -> Rules:
    """The tower, under the prefix that HF's class gives it: the hub's names, then those in memory."""
    block = "vision_encoder.blocks.{l}."
    saved, memory = f"{prefix}encoder.layer.{{l}}.", f"{prefix}layers.{{l}}."
    return Rules(
        (f"{prefix}embeddings.cls_token", "vision_encoder.embed.cls"),
        (f"{prefix}embeddings.position_embeddings", "vision_encoder.embed.pos"),
        (f"{prefix}embeddings.patch_embeddings.projection.*", "vision_encoder.embed.patch.*"),
        (f"{saved}layernorm_before.*", f"{block}ln1.*"),
        (f"{saved}attention.attention.query.*", f"{block}attn.q.*"),
        (f"{saved}attention.attention.key.*", f"{block}attn.k.*"),
        (f"{saved}attention.attention.value.*", f"{block}attn.v.*"),
        (f"{saved}attention.output.dense.*", f"{block}attn.o.*"),
        (f"{saved}layernorm_after.*", f"{block}ln2.*"),
        (f"{saved}intermediate.dense.*", f"{block}mlp.up.*"),
        (f"{saved}output.dense.*", f"{block}mlp.down.*"),
        (f"{prefix}layernorm.*", "vision_encoder.ln_post.*"),
        (f"{memory}layernorm_before.*", f"{block}ln1.*"),
        (f"{memory}attention.q_proj.*", f"{block}attn.q.*"),
        (f"{memory}attention.k_proj.*", f"{block}attn.k.*"),
        (f"{memory}attention.v_proj.*", f"{block}attn.v.*"),
        (f"{memory}attention.o_proj.*", f"{block}attn.o.*"),
        (f"{memory}layernorm_after.*", f"{block}ln2.*"),
        (f"{memory}mlp.fc1.*", f"{block}mlp.up.*"),
        (f"{memory}mlp.fc2.*", f"{block}mlp.down.*"),
        ignored=(f"{prefix}embeddings.mask_token",),
    )


class Vit(Family[ViTModelConfig]):
    """``config.json`` and HF's key names. As in HF, either class reads the other's prefix, and ignores its head."""

    def rules(self, config: ViTModelConfig) -> Rules:
        with_head = vision_rules("vit.") + Rules(("classifier.*", "classifier.*"), ignored=("vit.pooler.*",))
        bare = vision_rules("") + Rules(("pooler.dense.*", "pooler.*"), ("vit.pooler.dense.*", "pooler.*"))
        if config.architecture == CLASSIFIER:
            return with_head + vision_rules("") + Rules(ignored=("pooler.*",))
        return bare + vision_rules("vit.") + Rules(ignored=("classifier.*",))

    def config(
        self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor], generation: Mapping[str, Any] = {}
    ) -> ViTModelConfig:
        has_classifier = "classifier.weight" in state
        architecture = one_of(hf_config, ARCHITECTURES if has_classifier else ARCHITECTURES[::-1], "ViT")
        full = parse("ViTConfig", hf_config, "ViT")
        d_head = check_tower(full, "config.json", getattr(full, "head_dim", None))
        check_image(full)
        n_classes = full.num_labels if architecture == CLASSIFIER else 0
        # DINO's checkpoints say ViTModel and have no pooler; HF then draws one at random, which nobody wants.
        has_pooler = architecture == BARE and any(key.endswith("pooler.dense.weight") for key in state)
        return ViTModelConfig(
            architecture=architecture,
            vision=ViTConfig(
                d_model=full.hidden_size,
                n_layers=full.num_hidden_layers,
                n_heads=full.num_attention_heads,
                d_head=d_head,
                d_mlp=full.intermediate_size,
                act=full.hidden_act,
                eps=full.layer_norm_eps,
                norm_order="pre",
                qkv_bias=full.qkv_bias,
                softmax_in_float32=True,
                image_size=full.image_size,
                patch_size=full.patch_size,
            ),
            n_classes=n_classes,
            labels=tuple(str(full.id2label[label]) for label in range(n_classes)),
            d_pooled=full.pooler_output_size if has_pooler else 0,
            pooler_act=check_activation(full.pooler_act, "pooler_act"),
            hf_config=dict(hf_config),
        )

    def hf_config(self, config: ViTModelConfig) -> dict[str, Any]:
        """The ``config.json`` of a model, as it was read."""
        return {**config.hf_config, "architectures": [config.architecture]}


VIT = Vit()

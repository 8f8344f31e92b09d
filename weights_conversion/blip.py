"""BLIP: HF's layout, and the research code's (``model_base_vqa_capfilt_large.pth`` and its like)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hooked_vlm.config import BertConfig, BlipConfig, BlipTask, ViTConfig
from weights_conversion.checkpoint import CheckpointError
from weights_conversion.family import Family
from weights_conversion.hf_config import check_image, check_tower, may_tie, one_of, parse
from weights_conversion.rules import Rules

TASKS: dict[str, BlipTask] = {
    "BlipForQuestionAnswering": "vqa",
    "BlipForConditionalGeneration": "caption",
    "BlipForImageTextRetrieval": "retrieval",
}
"""HF's class for each task."""

VARIANT = "hooked_vlm_variant"
"""Where a ``config.json`` that we write keeps ``BlipConfig.variant``; HF has no word for it."""

WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions.decoder.weight"
"""The two keys of the decoder's embeddings, where they are tied."""

HF_VISION = Rules(
    ("vision_model.embeddings.class_embedding", "vision_encoder.embed.cls"),
    ("vision_model.embeddings.position_embedding", "vision_encoder.embed.pos"),
    ("vision_model.embeddings.patch_embedding.*", "vision_encoder.embed.patch.*"),
    ("vision_model.encoder.layers.{l}.layer_norm1.*", "vision_encoder.blocks.{l}.ln1.*"),
    ("vision_model.encoder.layers.{l}.self_attn.qkv.*", "vision_encoder.blocks.{l}.attn.qkv.*"),
    ("vision_model.encoder.layers.{l}.self_attn.projection.*", "vision_encoder.blocks.{l}.attn.o.*"),
    ("vision_model.encoder.layers.{l}.layer_norm2.*", "vision_encoder.blocks.{l}.ln2.*"),
    ("vision_model.encoder.layers.{l}.mlp.fc1.*", "vision_encoder.blocks.{l}.mlp.up.*"),
    ("vision_model.encoder.layers.{l}.mlp.fc2.*", "vision_encoder.blocks.{l}.mlp.down.*"),
    ("vision_model.post_layernorm.*", "vision_encoder.ln_post.*"),
)

RESEARCH_VISION = Rules(
    ("visual_encoder.cls_token", "vision_encoder.embed.cls"),
    ("visual_encoder.pos_embed", "vision_encoder.embed.pos"),
    ("visual_encoder.patch_embed.proj.*", "vision_encoder.embed.patch.*"),
    ("visual_encoder.blocks.{l}.norm1.*", "vision_encoder.blocks.{l}.ln1.*"),
    ("visual_encoder.blocks.{l}.attn.qkv.*", "vision_encoder.blocks.{l}.attn.qkv.*"),
    ("visual_encoder.blocks.{l}.attn.proj.*", "vision_encoder.blocks.{l}.attn.o.*"),
    ("visual_encoder.blocks.{l}.norm2.*", "vision_encoder.blocks.{l}.ln2.*"),
    ("visual_encoder.blocks.{l}.mlp.fc1.*", "vision_encoder.blocks.{l}.mlp.up.*"),
    ("visual_encoder.blocks.{l}.mlp.fc2.*", "vision_encoder.blocks.{l}.mlp.down.*"),
    ("visual_encoder.norm.*", "vision_encoder.ln_post.*"),
    # Momentum copies and queues of pre-training and retrieval.
    ignored=(
        *("visual_encoder_m.*", "text_encoder_m.*", "vision_proj_m.*", "text_proj_m.*"),
        *("image_queue", "text_queue", "idx_queue", "ptr_queue", "queue_ptr", "temp"),
    ),
)


def text_rules(prefix: str, tower: str) -> Rules:
    """A BERT tower; the same names in both layouts."""
    layer, block = f"{prefix}encoder.layer.{{l}}.", f"{tower}.blocks.{{l}}."
    return Rules(
        (f"{prefix}embeddings.word_embeddings.weight", f"{tower}.embed.token.weight"),
        (f"{prefix}embeddings.position_embeddings.weight", f"{tower}.embed.pos.weight"),
        (f"{prefix}embeddings.LayerNorm.*", f"{tower}.ln_pre.*"),
        (f"{layer}attention.self.query.*", f"{block}attn.q.*"),
        (f"{layer}attention.self.key.*", f"{block}attn.k.*"),
        (f"{layer}attention.self.value.*", f"{block}attn.v.*"),
        (f"{layer}attention.output.dense.*", f"{block}attn.o.*"),
        (f"{layer}attention.output.LayerNorm.*", f"{block}ln1.*"),
        (f"{layer}crossattention.self.query.*", f"{block}cross_attn.q.*"),
        (f"{layer}crossattention.self.key.*", f"{block}cross_attn.k.*"),
        (f"{layer}crossattention.self.value.*", f"{block}cross_attn.v.*"),
        (f"{layer}crossattention.output.dense.*", f"{block}cross_attn.o.*"),
        (f"{layer}crossattention.output.LayerNorm.*", f"{block}ln_cross.*"),
        (f"{layer}intermediate.dense.*", f"{block}mlp.up.*"),
        (f"{layer}output.dense.*", f"{block}mlp.down.*"),
        (f"{layer}output.LayerNorm.*", f"{block}ln2.*"),
        ignored=(f"{prefix}embeddings.position_ids",),
    )


def head_rules(prefix: str, tower: str) -> Rules:
    """The language-model head. Its bias is one parameter under two keys, of which HF computes with the first."""
    return Rules(
        (f"{prefix}transform.dense.*", f"{tower}.unembed.dense.*"),
        (f"{prefix}transform.LayerNorm.*", f"{tower}.ln_final.*"),
        (f"{prefix}decoder.weight", f"{tower}.unembed.decoder.weight"),
        (f"{prefix}decoder.bias", f"{tower}.unembed.decoder.bias"),
        (f"{prefix}bias", f"{tower}.unembed.decoder.bias"),
    )


def decoder_rules(tower: str) -> Rules:
    """A BERT tower with its head."""
    return text_rules("text_decoder.bert.", tower) + head_rules("text_decoder.cls.predictions.", tower)


TEXT: dict[BlipTask, Rules] = {
    "vqa": text_rules("text_encoder.", "question_encoder") + decoder_rules("answer_decoder"),
    "caption": decoder_rules("text_decoder"),
    "retrieval": text_rules("text_encoder.", "text_encoder")
    + Rules(("vision_proj.*", "vision_proj.*"), ("text_proj.*", "text_proj.*"), ("itm_head.*", "itm_head.*")),
}


class HFBlip(Family[BlipConfig]):
    """``config.json`` and HF's key names."""

    def rules(self, config: BlipConfig) -> Rules:
        return HF_VISION + TEXT[config.task]

    def config(
        self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor], generation: Mapping[str, Any] = {}
    ) -> BlipConfig:
        architecture = _architecture(hf_config, state)
        full = _full_config(hf_config)
        vision, text = full.vision_config, full.text_config
        return BlipConfig(
            architecture=architecture,
            task=TASKS[architecture],
            vision=ViTConfig(
                d_model=vision.hidden_size,
                n_layers=vision.num_hidden_layers,
                n_heads=vision.num_attention_heads,
                d_head=vision.hidden_size // vision.num_attention_heads,
                d_mlp=vision.intermediate_size,
                act=vision.hidden_act,
                eps=vision.layer_norm_eps,
                norm_order="pre",
                fused_qkv=True,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
            ),
            text=BertConfig(
                d_model=text.hidden_size,
                n_layers=text.num_hidden_layers,
                n_heads=text.num_attention_heads,
                d_head=text.hidden_size // text.num_attention_heads,
                d_mlp=text.intermediate_size,
                act=text.hidden_act,
                eps=text.layer_norm_eps,
                norm_order="post",
                scale_by="divide",
                d_cross=text.encoder_hidden_size,
                d_vocab=text.vocab_size,
                n_ctx=text.max_position_embeddings,
                ties_embeddings=(full.tie_word_embeddings or text.tie_word_embeddings) and may_tie(state, WORDS, HEAD),
            ),
            d_projection=full.image_text_hidden_size,
            bos_token_id=text.bos_token_id,
            d_vocab=text.vocab_size,
            eos_token_ids=(text.sep_token_id,),
            pad_token_id=text.pad_token_id,
            enc_token_id=text.bos_token_id + 1,
            variant=hf_config.get(VARIANT, "hf"),
            label_smoothing=text.label_smoothing,
            hf_config=dict(hf_config),
        )

    def hf_config(self, config: BlipConfig) -> dict[str, Any]:
        """The ``config.json`` of a model: as it was read, with what was chosen since."""
        read = config.hf_config
        vision = {**(read.get("vision_config") or {}), "layer_norm_eps": config.vision.eps}
        text = {**(read.get("text_config") or {}), "label_smoothing": config.label_smoothing}
        kept = {name: value for name, value in read.items() if name != VARIANT}
        chosen = {} if config.variant == "hf" else {VARIANT: config.variant}
        return {**kept, "vision_config": vision, "text_config": text, **chosen}


class ResearchBlip(HFBlip):
    """The research code's ``.pth``: no config, so sizes come from shapes, and the rest is what that code fixes."""

    def rules(self, config: BlipConfig) -> Rules:
        return RESEARCH_VISION + TEXT[config.task]

    def config(
        self, hf_config: Mapping[str, Any], state: Mapping[str, Tensor], generation: Mapping[str, Any] = {}
    ) -> BlipConfig:
        architecture = _architecture({}, state)
        prefix = "text_decoder.bert." if TASKS[architecture] == "caption" else "text_encoder."
        _require(
            state,
            "visual_encoder.patch_embed.proj.weight",
            "visual_encoder.pos_embed",
            "visual_encoder.blocks.0.mlp.fc1.weight",
            f"{prefix}embeddings.word_embeddings.weight",
            f"{prefix}embeddings.position_embeddings.weight",
            f"{prefix}encoder.layer.0.intermediate.dense.weight",
        )
        patch = state["visual_encoder.patch_embed.proj.weight"]
        words = state[f"{prefix}embeddings.word_embeddings.weight"]
        grid = round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        vision_config = {
            "hidden_size": patch.shape[0],
            "intermediate_size": state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": _count_layers(state, "visual_encoder.blocks."),
            "num_attention_heads": patch.shape[0] // 64,
            "image_size": grid * patch.shape[-1],
            "patch_size": patch.shape[-1],
        }
        text_config = {
            "hidden_size": words.shape[1],
            "vocab_size": words.shape[0],
            # That code appends [DEC] and then [ENC] to BERT's vocabulary.
            "bos_token_id": words.shape[0] - 2,
            "intermediate_size": state[f"{prefix}encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": _count_layers(state, f"{prefix}encoder.layer."),
            "num_attention_heads": words.shape[1] // 64,
            "max_position_embeddings": state[f"{prefix}embeddings.position_embeddings.weight"].shape[0],
            "encoder_hidden_size": patch.shape[0],
        }
        written: dict[str, Any] = {
            "model_type": "blip",
            "architectures": [architecture],
            "vision_config": vision_config,
            "text_config": text_config,
        }
        if "vision_proj.weight" in state:
            written["image_text_hidden_size"] = state["vision_proj.weight"].shape[0]
        return super().config(written, state)


def _architecture(hf_config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """What the config says; where it is silent, what the keys say."""
    if hf_config.get("architectures"):
        return one_of(hf_config, tuple(TASKS), "BLIP")
    if "itm_head.weight" in state:
        return "BlipForImageTextRetrieval"
    is_vqa = any(key.startswith("text_encoder.") for key in state)
    return "BlipForQuestionAnswering" if is_vqa else "BlipForConditionalGeneration"


def _full_config(hf_config: Mapping[str, Any]) -> Any:
    """HF's config object, with the sizes in it checked."""
    full = parse("BlipConfig", hf_config, "BLIP")
    vision, text = full.vision_config, full.text_config
    check_tower(vision, "vision_config")
    check_tower(text, "text_config")
    check_image(vision)
    if not text.is_decoder:
        raise CheckpointError("text_config.is_decoder is false: such a BLIP has no cross-attention")
    for name in ("bos_token_id", "sep_token_id", "pad_token_id"):
        if not isinstance(getattr(text, name), int):
            raise CheckpointError(f"text_config.{name} is {getattr(text, name)!r}, not a token id")
    return full


def _require(state: Mapping[str, Tensor], *keys: str) -> None:
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f"a checkpoint in BLIP's research layout needs {', '.join(missing)}")


def _count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


BLIP = HFBlip()
BLIP_RESEARCH = ResearchBlip()

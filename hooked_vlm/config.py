"""What a tower and a model are made of, as frozen data. Sizes are counts; images are square, in pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

AttentionImplementation = Literal["eager", "sdpa"]
NormOrder = Literal["pre", "post"]
RotaryKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
BlipTask = Literal["vqa", "caption", "retrieval"]


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary position embeddings (Su et al. 2021), and how they are stretched over a longer context.

    ``kind``: ``"default"``; ``"linear"`` (positions divided by ``factor``); ``"dynamic"`` (NTK-aware, the base grows
    with the sequence); ``"llama3"`` (low frequencies divided, high ones kept); ``"yarn"`` (Peng et al. 2023).
    """

    d_rotary: int
    """How many of a head's dimensions turn; the rest pass by (Phi-3)."""
    theta: float = 10000.0
    kind: RotaryKind = "default"
    factor: float = 1.0
    n_ctx: int = 4096
    """The longest sequence of the config."""
    original_n_ctx: int | None = None
    """The longest sequence that the model was first trained on."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """What cosines and sines are multiplied by; None for what ``kind`` says."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: whether the bounds of its ramp are whole numbers."""


@dataclass(frozen=True)
class TowerConfig:
    """One stack of transformer blocks."""

    d_model: int
    n_layers: int
    n_heads: int
    d_head: int
    d_mlp: int
    act: str
    eps: float
    norm_order: NormOrder
    fused_qkv: bool = False
    scale_by: Literal["multiply", "divide"] = "multiply"
    is_causal: bool = False
    d_cross: int | None = None
    """Width of the states that cross-attention reads; None without cross-attention."""
    norm: Literal["layer", "rms"] = "layer"
    n_kv_heads: int | None = None
    """Heads of keys and values, where several query heads share one; None for as many as ``n_heads``."""
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    softmax_in_float32: bool = False
    """Whether scores go to float32 for the softmax, and the pattern back."""
    gated_mlp: bool = False
    fused_gate: bool = False
    """Whether gate and up are one matrix (Phi-3)."""
    rotary: RotaryConfig | None = None
    windows: tuple[int | None, ...] = ()
    """For each layer, how many positions a query reads at most, itself included; empty where all read all."""

    @property
    def packs_keys(self) -> bool:
        """Whether keys and values are laid out head by head before they are used, as HF's decoders do, which put them
        through a cache; products over another layout differ in the last bit."""
        return self.is_causal


@dataclass(frozen=True)
class ViTConfig(TowerConfig):
    """A vision transformer (Dosovitskiy et al. 2021; CLIP's: Radford et al. 2021)."""

    image_size: int = 384
    patch_size: int = 16
    patch_bias: bool = True
    has_pre_norm: bool = False
    """CLIP: a LayerNorm between the embeddings and the first block."""
    feature_layers: tuple[int, ...] | None = None
    """Which streams are read, side by side: 0 for what block 0 reads, n for what block n - 1 writes. None: what the
    last block writes, through a LayerNorm."""
    pools: bool = False
    """CLIP on its own: the model reads the last stream's class token, through a LayerNorm."""

    @property
    def d_features(self) -> int:
        """Width of what is read."""
        return self.d_model * len(self.feature_layers or (0,))


@dataclass(frozen=True)
class BertConfig(TowerConfig):
    """A BERT (Devlin et al. 2019), as BLIP's MED uses it: without token types, with cross-attention."""

    d_vocab: int = 30524
    n_ctx: int = 512
    has_head: bool = False
    """Whether it predicts tokens."""
    ties_embeddings: bool = True


@dataclass(frozen=True)
class ClipTextConfig(TowerConfig):
    """CLIP's text tower: causal, read at the end-of-text token."""

    d_vocab: int = 49408
    n_ctx: int = 77
    eos_token_id: int = 49407
    """Where the text is read; 2 stands for the highest token id of a row, as in OpenAI's checkpoints."""

    @property
    def packs_keys(self) -> bool:
        """Causal, but it generates nothing, so HF gives it no cache."""
        return False


@dataclass(frozen=True)
class LlamaConfig(TowerConfig):
    """A LLaMA (Touvron et al. 2023), or one of its kin: Vicuna, Mistral, Qwen2, Phi-3."""

    d_vocab: int = 32064
    n_ctx: int = 4096
    ties_embeddings: bool = False
    has_head_bias: bool = False

    @property
    def stretches(self) -> bool:
        """Whether positions beyond ``n_ctx`` have embeddings made for them."""
        return self.rotary is not None and self.rotary.kind == "dynamic"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every model's config says."""

    architecture: str
    """HF's class."""
    attention: AttentionImplementation = "eager"
    quantization: Literal["int8"] | None = None
    name_or_path: str = ""
    revision: str = ""
    hf_config: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The checkpoint's ``config.json``, kept to write it back."""
    d_vocab: int = 0
    """Token ids go below this; 0 for a model that reads no text."""
    eos_token_ids: tuple[int, ...] = ()
    """Any of these ends a generated text."""
    pad_token_id: int = 0

    @property
    def switches(self) -> dict[str, str]:
        """Choices that change what is computed, for a result's provenance."""
        return {} if self.quantization is None else {"quantization": self.quantization}


@dataclass(frozen=True, kw_only=True)
class BlipConfig(ModelConfig):
    """A BLIP model (Li et al. 2022).

    ``cross_attention_padding``: ``"mask"`` keeps cross-attention off padded positions, so that a padded row gives
    what it gives alone; ``"hf"`` reads them, as transformers 4.54 and later do.
    ``variant``: ``"hf"``, or ``"original"`` for the research code's choices (layer-norm eps 1e-6 in the vision
    tower, ``[ENC]`` as the question's first token, label smoothing 0.1 in ranking).
    """

    task: BlipTask
    vision: ViTConfig
    text: BertConfig
    d_projection: int
    bos_token_id: int
    """The decoder's first token, ``[DEC]``."""
    enc_token_id: int
    cross_attention_padding: Literal["mask", "hf"] = "mask"
    variant: Literal["hf", "original"] = "hf"
    label_smoothing: float = 0.0
    """Used by ``rank_answers``."""

    @property
    def eos_token_id(self) -> int:
        """Ends an answer: ``[SEP]``."""
        return self.eos_token_ids[0]

    @property
    def switches(self) -> dict[str, str]:
        return {
            **super().switches,
            "cross_attention_padding": self.cross_attention_padding,
            "variant": self.variant,
        }


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(ModelConfig):
    """A LLaVA-1.5 (Liu et al. 2023), or with ``pinpoints`` a LLaVA-NeXT (v1.6), which sees an image in tiles."""

    vision: ViTConfig
    text: LlamaConfig
    image_token_id: int
    projector_act: str = "gelu"
    projector_bias: bool = True
    select: Literal["default", "full"] = "default"
    """``"default"`` leaves out the class token."""
    lists_features: bool = False
    """Whether the checkpoint lists its feature layers, be it one: HF then packs what the projector reads."""
    pinpoints: tuple[tuple[int, int], ...] | None = None
    """LLaVA-NeXT: the resolutions (height, width) that an image may be tiled at."""

    @property
    def d_features(self) -> int:
        """What the projector reads."""
        return self.vision.d_features

    @property
    def d_model(self) -> int:
        """What the projector writes."""
        return self.text.d_model


@dataclass(frozen=True, kw_only=True)
class ClipConfig(ModelConfig):
    """A CLIP (Radford et al. 2021): both towers and their projections."""

    vision: ViTConfig
    text: ClipTextConfig
    d_projection: int


@dataclass(frozen=True, kw_only=True)
class ViTModelConfig(ModelConfig):
    """A vision transformer on its own, with a classifier or with a pooler or with neither."""

    vision: ViTConfig
    n_classes: int = 0
    labels: tuple[str, ...] = ()
    d_pooled: int = 0
    """Width of the pooler's output; 0 without one."""
    pooler_act: str = "tanh"

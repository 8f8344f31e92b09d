"""What a tower and a model are made of, as frozen data. Sizes are counts; images are square, in pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

AttentionImplementation = Literal["eager", "sdpa"]
NormOrder = Literal["pre", "post"]
BlipTask = Literal["vqa", "caption", "retrieval"]


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


@dataclass(frozen=True)
class ViTConfig(TowerConfig):
    """A vision transformer (Dosovitskiy et al. 2021)."""

    image_size: int = 384
    patch_size: int = 16


@dataclass(frozen=True)
class BertConfig(TowerConfig):
    """A BERT (Devlin et al. 2019), as BLIP's MED uses it: without token types, with cross-attention."""

    d_vocab: int = 30524
    n_ctx: int = 512
    has_head: bool = False
    """Whether it predicts tokens."""
    ties_embeddings: bool = True


@dataclass(frozen=True)
class BlipConfig:
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
    eos_token_id: int
    """Ends an answer: ``[SEP]``."""
    pad_token_id: int
    enc_token_id: int
    attention: AttentionImplementation = "eager"
    cross_attention_padding: Literal["mask", "hf"] = "mask"
    variant: Literal["hf", "original"] = "hf"
    label_smoothing: float = 0.0
    """Used by ``rank_answers``."""
    name_or_path: str = ""
    revision: str = ""
    hf_config: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The checkpoint's ``config.json``, kept to write it back."""

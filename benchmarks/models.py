"""The models that are measured: HF's BLIP for question answering, with random weights, of three sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BlipConfig, BlipForQuestionAnswering

CLS = 101


@dataclass(frozen=True)
class Size:
    """Both towers alike; a question of ``question`` tokens, an answer of ``answer``."""

    d_model: int
    n_layers: int
    n_heads: int
    image: int
    vocabulary: int
    question: int
    answer: int = 1
    patch: int = 16

    @property
    def config(self) -> BlipConfig:
        from transformers import BlipConfig

        tower = {
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "intermediate_size": 4 * self.d_model,
        }
        return BlipConfig(
            vision_config={**tower, "image_size": self.image, "patch_size": self.patch},
            text_config={
                **tower,
                "vocab_size": self.vocabulary,
                "encoder_hidden_size": self.d_model,
                "bos_token_id": self.vocabulary - 2,
            },
        )

    def hf_model(self) -> BlipForQuestionAnswering:
        """With weights in which a mistake would show: no bias is 0, no LayerNorm does nothing."""
        from transformers import BlipForQuestionAnswering

        torch.manual_seed(0)
        model = BlipForQuestionAnswering(self.config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.normal_(std=self.d_model**-0.5 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1 and "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
        return model

    def inputs(self, batch: int = 1) -> dict[str, Tensor]:
        """As HF's processor makes them, and the answer's tokens."""
        generator = torch.Generator().manual_seed(0)
        question = torch.randint(1000, self.vocabulary - 2, (batch, self.question), generator=generator)
        question[:, 0] = CLS
        answer = torch.full((batch, self.answer), self.vocabulary - 2)
        return {
            "pixel_values": torch.randn(batch, 3, self.image, self.image, generator=generator),
            "input_ids": question,
            "attention_mask": torch.ones_like(question),
            "decoder_input_ids": answer,
        }


VQA_BASE = Size(d_model=768, n_layers=12, n_heads=12, image=384, vocabulary=30524, question=9)
"""``Salesforce/blip-vqa-base``: 361 million parameters, ViT-B/16 at 384 pixels, 577 image positions."""

SMALL = Size(d_model=256, n_layers=12, n_heads=4, image=48, vocabulary=2048, question=16, answer=16)
"""As many layers, but so narrow and short that only Python counts: 10 image positions, 16 tokens."""

TINY = Size(d_model=32, n_layers=12, n_heads=2, image=48, vocabulary=2048, question=16, answer=16)
"""Narrower still: arithmetic is all but free, and what is left is Python and the dispatch of kernels."""

SIZES = {"vqa-base": VQA_BASE, "small": SMALL, "tiny": TINY}

"""What a trained toy depends on, and the weights that it starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Everything that a checkpoint depends on, apart from the code.

    Attributes:
        primers: questions about each picture besides those of its sample.
        advance_at: the share of right answers, in the worst kind over 50 steps, that ends a stage.
        float32_steps: how many steps at the end are not computed in bfloat16.
        naming_steps: LLaVA: how many steps the image tokens are taught to name what they show, before any question.
    """

    seed: int = 0
    steps: int = 3500
    samples_per_step: int = 32
    learning_rate: float = 7e-4
    warmup: int = 300
    weight_decay: float = 0.02
    gradient_norm: float = 1.0
    primers: int = 2
    advance_at: float = 0.96
    float32_steps: int = 300
    naming_steps: int = 0
    d_model: int = 96
    d_head: int = 24
    vision_layers: int = 3
    text_layers: int = 4

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new AdamW for all of the model's weights."""
        return torch.optim.AdamW(
            model.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=self.weight_decay
        )

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a share of its highest: a linear rise, then half a cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def initialise(model: nn.Module, recipe: Recipe, tables: Sequence[nn.Parameter]) -> None:
    """Draw every weight at the scale of ``1 / sqrt(fan in)``, in place; norms and biases stay as they are.

    Args:
        tables: embeddings that are no ``nn.Embedding``, in the order in which they are drawn.
    """
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # After the Linears, because the last one of BLIP's decoder shares its weight with the word embeddings.
        embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        for table in (*embeddings, *tables):
            nn.init.normal_(table, std=recipe.d_model**-0.5)

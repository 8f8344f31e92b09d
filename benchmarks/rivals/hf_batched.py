"""HF's model with forward hooks, best effort: image embeddings computed once, cells as rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import BlipSize
from benchmarks.rivals.hf_sites import edited, noised, sources
from benchmarks.sweeps.cells import Cell
from benchmarks.sweeps.grids import Grid


class Batched:
    """The text towers run on copies of one row; each has its own cell."""

    def __init__(self, grid: Grid, batch: int) -> None:
        self.grid, self.at_once, self.clean = grid, batch, sources(grid)
        self.hf_model: Any = grid.subject.hf_model
        self.is_blip = isinstance(grid.subject.size, BlipSize)

    @torch.no_grad()
    def prepare(self) -> None:
        """The image embeddings; of LLaVA, among those of its tokens."""
        pixels, ids = self.grid.corrupted["pixel_values"], self.grid.corrupted["input_ids"]
        if self.is_blip:
            with noised(self.grid):
                self.embeddings = self.hf_model.vision_model(pixel_values=pixels).last_hidden_state
            return
        image = torch.cat(list(self.hf_model.get_image_features(pixel_values=pixels).pooler_output))
        tokens = self.hf_model.get_input_embeddings()(ids)
        is_image = (ids == self.hf_model.config.image_token_id)[..., None]
        self.embeddings = tokens.masked_scatter(is_image, image.to(tokens))

    @torch.no_grad()
    def scores(self, cells: Sequence[Cell]) -> Tensor:
        batches = [cells[start : start + self.at_once] for start in range(0, len(cells), self.at_once)]
        return torch.cat([self._scores(batch) for batch in batches])

    def _scores(self, batch: Sequence[Cell]) -> Tensor:
        rows = {name: tensor.expand(len(batch), *tensor.shape[1:]) for name, tensor in self.grid.corrupted.items()}
        embeddings = self.embeddings.expand(len(batch), -1, -1)
        with edited(self.grid, dict(enumerate(batch)), len(batch), self.clean):
            logits = self._blip(rows, embeddings) if self.is_blip else self._llava(rows, embeddings)
        return self.grid.subject.metric(logits)

    def _blip(self, rows: dict[str, Tensor], embeddings: Tensor) -> Tensor:
        question = self.hf_model.text_encoder(
            input_ids=rows["input_ids"],
            attention_mask=rows["attention_mask"],
            encoder_hidden_states=embeddings,
            encoder_attention_mask=torch.ones(embeddings.shape[:-1], dtype=torch.long, device=embeddings.device),
        )
        answer = self.hf_model.text_decoder(
            input_ids=rows["decoder_input_ids"],
            encoder_hidden_states=question[0],
            encoder_attention_mask=rows["attention_mask"],
        )
        return answer.logits[:, -1:]

    def _llava(self, rows: dict[str, Tensor], embeddings: Tensor) -> Tensor:
        out = self.hf_model(
            inputs_embeds=embeddings, attention_mask=rows["attention_mask"], use_cache=False, logits_to_keep=1
        )
        return out.logits

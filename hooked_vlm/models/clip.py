"""CLIP (Radford et al. 2021): an image and a text, embedded in one space.

Axes: b_image images, b_text texts; the two need not be as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.components import TokenEmbedding, build_norm, causal_mask
from hooked_vlm.config import AttentionImplementation, ClipConfig, ClipTextConfig
from hooked_vlm.generation import Decoding
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.tower import Tower, shown
from hooked_vlm.models.vit import ViT
from hooked_vlm.processing import clip_inputs, label_patches, label_tokens


class ClipText(Tower):
    """CLIP's text tower: causal, pre-LN, read at the end-of-text token."""

    config: ClipTextConfig

    def __init__(self, config: ClipTextConfig, attention: AttentionImplementation) -> None:
        super().__init__(config)
        self.embed = TokenEmbedding(config.d_vocab, config.d_model, config.n_ctx)
        self.hook_embed = HookPoint("b p d_model")
        self.hook_pos_embed = HookPoint("b p d_model")
        self.hook_full_embed = HookPoint("b p d_model", aliased=True)
        self._build_blocks(attention)
        self.ln_final = build_norm(config)
        self.hook_out = HookPoint("b p d_model", aliased=True)
        self.hook_pooled = HookPoint("b d_model")

    def forward(
        self, input_ids: Int[Tensor, "b p"], attention_mask: Int[Tensor, "b p"] | None = None
    ) -> Float[Tensor, "b p d_model"]:
        """States ``[b p d_model]`` after the last LayerNorm."""
        resid = self.embed_tokens(input_ids)
        mask = causal_mask(attention_mask, input_ids.shape[1], 0, resid.dtype, resid.device)
        return self.read_out(self.run_blocks(resid, mask=mask))

    def embed_tokens(self, input_ids: Int[Tensor, "b p"]) -> Float[Tensor, "b p d_model"]:
        """What block 0 reads."""
        batch, n_tokens = input_ids.shape
        tokens = self.hook_embed(self.embed.token(input_ids))
        return self.hook_full_embed(tokens + shown(self.hook_pos_embed, self.embed.positions(0, n_tokens), batch))

    def read_out(self, resid: Float[Tensor, "b p d_model"]) -> Float[Tensor, "b p d_model"]:
        return self.hook_out(self.ln_final(resid))

    def pooled(self, states: Float[Tensor, "b p d_model"], input_ids: Int[Tensor, "b p"]) -> Float[Tensor, "b d_model"]:
        """The states at the end-of-text tokens."""
        return self.hook_pooled(states[torch.arange(len(states), device=states.device), self.read_at(input_ids)])

    def read_at(self, input_ids: Int[Tensor, "b p"]) -> Int[Tensor, " b"]:
        """Where each text is read: its first end-of-text token."""
        # OpenAI's configs say 2, which is no end-of-text token; theirs has the highest id of all.
        is_end = input_ids if self.config.eos_token_id == 2 else (input_ids == self.config.eos_token_id)
        return is_end.int().argmax(dim=-1)


class HookedClip(HookedVLM):
    """Images and texts to logits: how well each image goes with each text."""

    config: ClipConfig
    towers: ClassVar[tuple[str, ...]] = ("vision_encoder", "text_encoder")
    pairs_rows: ClassVar[bool] = False

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        self.vision_encoder = ViT(config.vision, config.attention)
        self.vision_proj = nn.Linear(config.vision.d_model, config.d_projection, bias=False)
        self.hook_image_embeds = HookPoint("b_image d_projection")
        self.text_encoder = ClipText(config.text, config.attention)
        self.text_proj = nn.Linear(config.text.d_model, config.d_projection, bias=False)
        self.hook_text_embeds = HookPoint("b_text d_projection")
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.hook_logits = HookPoint("b_image b_text")
        self.setup()

    def forward(self, inputs: VLMInputs | Mapping[str, Any]) -> Float[Tensor, "b_image b_text"]:
        """Cosines of image and text embeddings, times the learned scale: HF's ``logits_per_image``."""
        inputs = self._inputs(inputs)
        return self._compared(self.encode_image(inputs), self.encode_text(inputs))

    def enter(
        self, tower: str, inputs: VLMInputs, states: Mapping[str, Float[Tensor, "_ _ d"]]
    ) -> Float[Tensor, "_ p d_model"]:
        if tower == "text_encoder":
            return self.text_encoder.embed_tokens(_ids(inputs))
        return self.vision_encoder.embed_patches(
            _pixels(inputs), interpolate_pos_encoding=inputs.interpolate_pos_encoding
        )

    def leave(self, states: Mapping[str, Float[Tensor, "_ _ d"]], inputs: VLMInputs) -> Float[Tensor, "b_image b_text"]:
        image, text = (
            self._embed_image(states["vision_encoder"]),
            self._embed_text(states["text_encoder"], _ids(inputs)),
        )
        return self._compared(image, text)

    def positions_read(self, tower: str, inputs: VLMInputs) -> list[int] | None:
        return [0] if tower == "vision_encoder" else self.text_encoder.read_at(_ids(inputs)).unique().tolist()

    def _compared(
        self, image: Float[Tensor, "b_image d_projection"], text: Float[Tensor, "b_text d_projection"]
    ) -> Float[Tensor, "b_image b_text"]:
        return self.hook_logits((text @ image.T * self.logit_scale.exp()).T)

    def encode_image(self, inputs: VLMInputs | Mapping[str, Any]) -> Float[Tensor, "b_image d_projection"]:
        """Each image's embedding, of length 1."""
        inputs = self._inputs(inputs)
        pixels = _pixels(inputs)
        return self._embed_image(self.vision_encoder(pixels, interpolate_pos_encoding=inputs.interpolate_pos_encoding))

    def _embed_image(self, states: Float[Tensor, "b_image p d_model"]) -> Float[Tensor, "b_image d_projection"]:
        return self.hook_image_embeds(_of_length_1(self.vision_proj(self.vision_encoder.pooled(states))))

    def encode_text(self, inputs: VLMInputs | Mapping[str, Any]) -> Float[Tensor, "b_text d_projection"]:
        """Each text's embedding, of length 1."""
        inputs = self._inputs(inputs)
        ids = _ids(inputs)
        return self._embed_text(self.text_encoder(ids, inputs.attention_mask), ids)

    def _embed_text(
        self, states: Float[Tensor, "b_text p d_model"], ids: Int[Tensor, "b_text p"]
    ) -> Float[Tensor, "b_text d_projection"]:
        return self.hook_text_embeds(_of_length_1(self.text_proj(self.text_encoder.pooled(states, ids))))

    def prepare(self, images: Any = None, texts: str | Sequence[str] | None = None, **options: Any) -> VLMInputs:
        """Inputs from pictures, texts or both, each as many as there are; texts pad on the right.

        Spans: ``image`` (patches in ``vision_encoder``), ``text``, ``last`` (the end-of-text token that is read).
        """
        inputs = clip_inputs(self.processor, self.config, images, texts, **options)
        if inputs.input_ids is not None:
            inputs = self._with_last(inputs)
        return inputs.to(self.device)

    def reword(self, inputs: VLMInputs, texts: Sequence[str]) -> VLMInputs:
        reworded = clip_inputs(self.processor, self.config, None, list(texts))
        return self._with_last(
            replace(
                reworded,
                pixel_values=inputs.pixel_values,
                interpolate_pos_encoding=inputs.interpolate_pos_encoding,
                patch_grid=inputs.patch_grid,
                spans={**inputs.spans, **reworded.spans},
            )
        ).to(self.device)

    def _with_last(self, inputs: VLMInputs) -> VLMInputs:
        from hooked_vlm.inputs import Span

        assert inputs.input_ids is not None
        read = tuple((int(position),) for position in self.text_encoder.read_at(inputs.input_ids))
        return replace(inputs, spans={**inputs.spans, "last": Span("text_encoder", read)})

    def position_labels(self, inputs: VLMInputs, tower: str) -> list[list[str]]:
        self._check_tower(tower)
        if tower == "vision_encoder":
            return label_patches(inputs, self.config.vision)
        assert inputs.input_ids is not None
        return label_tokens(self.processor.tokenizer, inputs.input_ids, inputs.attention_mask)

    def _start_decoding(self, inputs: VLMInputs) -> tuple[Decoding, Int[Tensor, "b prompt"]]:
        raise TypeError("CLIP does not generate text")


def _pixels(inputs: VLMInputs) -> Float[Tensor, "b_image 3 height width"]:
    if inputs.pixel_values is None:
        raise ValueError("CLIP needs pixel_values")
    return inputs.pixel_values


def _ids(inputs: VLMInputs) -> Int[Tensor, "b_text p"]:
    if inputs.input_ids is None:
        raise ValueError("CLIP needs a text's input_ids")
    return inputs.input_ids


def _of_length_1(embeds: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    # HF's arithmetic, which is not F.normalize's.
    return embeds / embeds.pow(2).sum(-1, keepdim=True).pow(0.5)

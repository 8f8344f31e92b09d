"""LLaVA-1.5 (Liu et al. 2023) and LLaVA-NeXT (v1.6): a language model that reads an image as so many tokens.

Axes: b rows of the batch in ``language_model``, and images (LLaVA-NeXT: tiles, all images' one after the other) in
``vision_encoder`` and ``projector``; p positions of the tower in question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.components import activation
from hooked_vlm.config import LlavaConfig
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.llama import Llama
from hooked_vlm.models.tower import Known
from hooked_vlm.models.vit import ViT
from hooked_vlm.patches import NEWLINE, grid_shape, image_tokens, n_tiles
from hooked_vlm.processing import label_patches, label_sequence, llava_inputs, with_prompts


class Projector(nn.Module):
    """Image features to the language model's width, in two layers."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.hook_in = HookPoint("b p d_features")
        self.up = nn.Linear(config.vision.d_features, config.text.d_model, bias=config.projector_bias)
        self.hook_pre = HookPoint("b p d_model")
        self.act = activation(config.projector_act)
        self.hook_post = HookPoint("b p d_model")
        self.down = nn.Linear(config.text.d_model, config.text.d_model, bias=config.projector_bias)
        self.hook_out = HookPoint("b p d_model")

    def forward(self, features: Float[Tensor, "b p d_features"]) -> Float[Tensor, "b p d_model"]:
        pre = self.hook_pre(self.up(self.hook_in(features)))
        return self.hook_out(self.down(self.hook_post(self.act(pre))))


@dataclass
class LlavaDecoding:
    """A generation: the prompt's rows, and the keys and values so far."""

    model: HookedLlava
    inputs: VLMInputs
    known: Known
    attention_mask: Int[Tensor, "rows p_all"] | None
    """None where no row is padded."""

    def step(self, token_ids: Int[Tensor, "rows new"]) -> Float[Tensor, "rows d_vocab"]:
        if len(self.known) == 0:
            return self._read_prompt(len(token_ids))
        n_new, position_ids = token_ids.shape[1], None
        if self.attention_mask is not None:
            self.attention_mask = F.pad(self.attention_mask, (0, n_new), value=1)
            position_ids = self._positions()[:, -n_new:]
        return self._read(self.model.language_model.embed_tokens(token_ids, known=self.known), position_ids)

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        self.known.reorder(rows)

    def _read_prompt(self, rows: int) -> Float[Tensor, "rows d_vocab"]:
        """The prompt is read once a row, however many beams go on from it."""
        position_ids = None if self.attention_mask is None else self._positions()
        logits = self._read(self.model.embed(self.inputs), position_ids)
        times = rows // len(logits)
        if times > 1:
            own = torch.arange(len(logits), device=logits.device).repeat_interleave(times)
            self.known.reorder(own)
            logits = logits[own]
            self.attention_mask = None if self.attention_mask is None else self.attention_mask[own]
        return logits

    def _read(
        self, embeds: Float[Tensor, "rows new d_model"], position_ids: Int[Tensor, "rows new"] | None
    ) -> Float[Tensor, "rows d_vocab"]:
        tower = self.model.language_model
        states = tower(embeds, self.attention_mask, known=self.known, position_ids=position_ids)
        return tower.logits(states[:, -1:])[:, -1]

    def _positions(self) -> Int[Tensor, "rows p_all"]:
        assert self.attention_mask is not None
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)


class HookedLlava(HookedVLM):
    """Images and a prompt to the logits of what comes next."""

    config: LlavaConfig
    towers: ClassVar[tuple[str, ...]] = ("vision_encoder", "projector", "language_model")

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.vision_encoder = ViT(config.vision, config.attention)
        self.projector = Projector(config)
        if config.pinpoints is not None:
            self.image_newline = nn.Parameter(torch.zeros(config.text.d_model))
        self.language_model = Llama(config.text, config.attention)
        self.setup()

    def forward(self, inputs: VLMInputs | Mapping[str, Any]) -> Float[Tensor, "b p d_vocab"]:
        """Logits ``[b p d_vocab]`` after each position, those of images too."""
        inputs = self._inputs(inputs)
        states = self.language_model(self.embed(inputs), inputs.attention_mask)
        return self.leave({"language_model": states}, inputs)

    def leave(self, states: Mapping[str, Float[Tensor, "_ _ d"]], inputs: VLMInputs) -> Float[Tensor, "b p d_vocab"]:
        return self.language_model.logits(states["language_model"])

    def enter(
        self, tower: str, inputs: VLMInputs, states: Mapping[str, Float[Tensor, "_ _ d"]]
    ) -> Float[Tensor, "_ p d_model"]:
        if tower == "vision_encoder":
            return self.vision_encoder.embed_patches(self._tiles(inputs))
        return self.language_model.merged(self.embed(inputs, states.get("vision_encoder")))

    def positions_fed(self, inputs: VLMInputs) -> list[int]:
        assert inputs.input_ids is not None
        return (inputs.input_ids == self.config.image_token_id).any(0).nonzero()[:, 0].tolist()

    def embed(
        self, inputs: VLMInputs, seen: Float[Tensor, "_ p_image d_features"] | None = None
    ) -> Float[Tensor, "b p d_model"]:
        """Token embeddings, with the images' features in the places of image tokens.

        ``seen``: what the vision tower put out, where that is known.
        """
        assert inputs.input_ids is not None
        ids = inputs.input_ids
        is_image = ids == self.config.image_token_id
        if self.config.image_token_id >= self.config.text.d_vocab:
            # The research code's image token has no embedding; HF's has one that is never used.
            ids = ids.masked_fill(is_image, 0)
        # Rows without an image, taken from a batch that has some, come with pixel_values of no image.
        has_images = inputs.pixel_values is not None and len(inputs.pixel_values) > 0
        features = self.encode_images(inputs, seen) if has_images else None
        embeds = self.language_model.embed_tokens(ids)
        return embeds if features is None else embeds.masked_scatter(is_image[..., None], features.to(embeds))

    def encode_images(
        self, inputs: VLMInputs, seen: Float[Tensor, "_ p_image d_features"] | None = None
    ) -> Float[Tensor, "n_features d_model"]:
        """All images' features, one after the other, as the language model reads them."""
        states = self.vision_encoder(self._tiles(inputs)) if seen is None else seen
        if self.config.select == "default":
            states = states[:, 1:]
            if self.config.pinpoints is None and self.config.lists_features:
                # HF's LLaVA-1.5 joins several streams without their class tokens, and so packs them; in half precision
                # a product over another layout rounds differently.
                states = states.contiguous()
        features = self.projector(states)
        if self.config.pinpoints is None:
            return rearrange(features, "image p d -> (image p) d")
        return self._packed(features, inputs, self._tile_counts(inputs))

    def _tiles(self, inputs: VLMInputs) -> Float[Tensor, "_ 3 height width"]:
        """What the vision tower looks at, one after the other."""
        pixels = inputs.pixel_values
        assert pixels is not None
        if self.config.pinpoints is None:
            return pixels
        counts = self._tile_counts(inputs)
        return torch.cat([own[:count] for own, count in zip(pixels, counts, strict=True)])

    def _packed(
        self, features: Float[Tensor, "tile p d_model"], inputs: VLMInputs, counts: Sequence[int]
    ) -> Float[Tensor, "n_features d_model"]:
        """Tiles put together: the whole picture, then row by row what the tiles show of it, newlines between."""
        _, columns = grid_shape(self.config.vision.image_size, self.config.vision.patch_size)
        rows = torch.cat([features.flatten(0, 1), self.image_newline[None].to(features)])
        newline, n_patches = len(rows) - 1, features.shape[1]
        order, first = [], 0
        for size, count in zip(self._sizes(inputs), counts, strict=True):
            order += [
                newline
                if place.tile == NEWLINE
                else (first + place.tile) * n_patches + place.row * columns + place.column
                for place in self._places(size)
            ]
            first += count
        return rows[torch.tensor(order, device=rows.device)]

    # Inputs -----------------------------------------------------------------------------------------------------

    def prepare(
        self,
        images: Any = None,
        texts: str | Sequence[str] | None = None,
        *,
        template: str | None = None,
        **options: Any,
    ) -> VLMInputs:
        """Inputs from pictures and questions, or whole prompts; rows are padded on the left.

        A text that holds the image token (``<image>``) is a whole prompt and is taken as it is. Any other is a
        question, and is put into ``template``, by default the processor's chat template.

        Spans, all in ``language_model``: ``image``, and of a row's k-th picture ``image.k``; in LLaVA-NeXT its tiles
        ``image.k.tile.t`` (0 is the whole picture) and ``newline``; ``question``; ``last``, which predicts the answer.

        Args:
            images: a PIL image, a path or an array; a list of them; a list of lists, one a text; None for text alone.
            texts: one a row. One picture serves all rows; several pictures go to the rows in order, as many as each
                prompt has places for.
            template: a prompt with ``{question}`` in it, and the image token for each picture.

        Raises:
            ImageError: a picture that cannot be read.
            ValueError: pictures and image tokens that do not fit; an empty text; a prompt over the model's context.
        """
        if options:
            raise TypeError(f"LLaVA's prepare takes no {', '.join(options)}")
        return llava_inputs(self.processor, self.config, images, texts, template=template).to(self.device)

    def reword(self, inputs: VLMInputs, texts: Sequence[str]) -> VLMInputs:
        return with_prompts(self.processor, self.config, inputs, texts).to(self.device)

    def position_labels(self, inputs: VLMInputs, tower: str) -> list[list[str]]:
        self._check_tower(tower)
        if tower == "language_model":
            return label_sequence(self.processor, inputs)
        patches = label_patches(inputs, self.config.vision)
        if self.config.pinpoints is not None and patches:
            patches = patches[:1] * sum(self._tile_counts(inputs))
        return [row[1:] for row in patches] if tower == "projector" and self.config.select == "default" else patches

    def _inputs(self, inputs: VLMInputs | Mapping[str, Any]) -> VLMInputs:
        """The inputs, with images and image tokens matched.

        Raises:
            ValueError: image tokens without pictures, or another number of them than the pictures have features; a
                prompt over the context.
        """
        inputs = VLMInputs.of(inputs)
        d_vocab = max(self.config.d_vocab, self.config.image_token_id + 1)
        inputs = inputs.checked(d_vocab, is_tiled=self.config.pinpoints is not None).to(self.device)
        if inputs.input_ids is None:
            raise ValueError("LLaVA needs a prompt's input_ids")
        n_positions, n_ctx = inputs.input_ids.shape[1], self.config.text.n_ctx
        if n_positions > n_ctx and not self.config.text.stretches:
            raise ValueError(f"the prompt has {n_positions} positions, more than the model's context of {n_ctx}")
        return replace(inputs, image_rows=self._image_rows(inputs, inputs.input_ids == self.config.image_token_id))

    def _image_rows(self, inputs: VLMInputs, is_image: Bool[Tensor, "b p"]) -> tuple[int, ...] | None:
        """Which row each image is in, by counting image tokens."""
        tokens = is_image.sum(1).tolist()
        if inputs.pixel_values is None:
            if any(tokens):
                raise ValueError(
                    f"the prompt has {sum(tokens)} image tokens (id {self.config.image_token_id}), and there are no "
                    "pixel_values for them"
                )
            return None
        features = self._feature_counts(inputs)
        rows: list[int] = []
        for row, count in enumerate(tokens):
            while count > 0 and len(rows) < len(features):
                count -= features[len(rows)]
                rows.append(row)
            if count != 0:
                break
        if len(rows) != len(features) or sum(features) != sum(tokens) or count != 0:
            raise ValueError(
                f"image tokens do not match the images: the rows have {tokens} tokens of id "
                f"{self.config.image_token_id}, and the images have {features} features"
            )
        return tuple(rows)

    def _feature_counts(self, inputs: VLMInputs) -> list[int]:
        """How many image tokens each image takes."""
        assert inputs.pixel_values is not None
        if self.config.pinpoints is not None:
            self._tile_counts(inputs)
            return [len(self._places(size)) for size in self._sizes(inputs)]
        vision = self.config.vision
        rows, columns = grid_shape(vision.image_size, vision.patch_size)
        return [rows * columns + (self.config.select == "full")] * len(inputs.pixel_values)

    def _tile_counts(self, inputs: VLMInputs) -> list[int]:
        """How many tiles each image has."""
        assert inputs.pixel_values is not None
        counts = [n_tiles(size, self.config.vision.image_size, self.config.pinpoints) for size in self._sizes(inputs)]
        if counts and max(counts) > inputs.pixel_values.shape[1]:
            raise ValueError(
                f"pixel_values hold {inputs.pixel_values.shape[1]} tiles an image, and images of these sizes have "
                f"{counts}"
            )
        return counts

    def _sizes(self, inputs: VLMInputs) -> list[tuple[int, int]]:
        """Height and width of each image as it was given."""
        if inputs.image_sizes is None:
            raise ValueError("LLaVA-NeXT needs image_sizes, the (height, width) of each picture, beside pixel_values")
        return [(height, width) for height, width in inputs.image_sizes.tolist()]

    def _places(self, size: tuple[int, int]) -> tuple[Any, ...]:
        vision = self.config.vision
        return image_tokens(
            size, image_size=vision.image_size, patch_size=vision.patch_size, pinpoints=self.config.pinpoints
        )

    # Generation -------------------------------------------------------------------------------------------------

    def _start_decoding(self, inputs: VLMInputs) -> tuple[LlavaDecoding, Int[Tensor, "b prompt"]]:
        assert inputs.input_ids is not None
        mask = inputs.attention_mask
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("an answer is generated from rows that are padded on the left, and these end in padding")
        return LlavaDecoding(self, inputs, self.language_model.new_known(), mask), inputs.input_ids

    def _own_words(self, tokens: Int[Tensor, "b length"], prompt: Int[Tensor, "b prompt"]) -> Int[Tensor, "b _"]:
        return tokens[:, prompt.shape[1] :]

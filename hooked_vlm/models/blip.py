"""BLIP (Li et al. 2022): question answering, captioning, image-text retrieval.

Axes: b batch, p positions of the tower in question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.config import BlipConfig
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.bert import Bert
from hooked_vlm.models.tower import Known
from hooked_vlm.models.vit import ViT
from hooked_vlm.processing import blip_inputs, label_patches, label_tokens, with_texts


class RankedAnswers(NamedTuple):
    """Candidates of each row, the likeliest first."""

    answers: list[list[str]]
    log_likelihoods: Float[Tensor, "b n_candidates"]
    """In nats; with label smoothing where the config has it."""


@dataclass
class BertDecoding:
    """A generation with a BERT decoder: what it reads of the other tower, and the keys and values so far."""

    tower: Bert
    known: Known
    other: Float[Tensor, "b k d_other"]
    other_attention_mask: Int[Tensor, "b k"] | None
    attention_mask: Int[Tensor, "b prompt"] | None = None
    """Of the prompt, where rows are padded on the left."""

    def step(self, token_ids: Int[Tensor, "rows new"]) -> Float[Tensor, "rows d_vocab"]:
        rows, n_new = token_ids.shape
        position_ids = None
        if len(self.known) == 0:
            self._spread(rows)
        elif self.attention_mask is not None:
            self.attention_mask = F.pad(self.attention_mask, (0, n_new), value=1)
        if self.attention_mask is not None:
            position_ids = (self.attention_mask.cumsum(1) - 1).clamp(min=0)[:, -n_new:]
        states = self.tower(
            token_ids,
            self.attention_mask,
            other=self.other,
            other_attention_mask=self.other_attention_mask,
            known=self.known,
            position_ids=position_ids,
        )
        return self.tower.logits(states[:, -1:])[:, -1]

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        self.known.reorder(rows)

    def _spread(self, rows: int) -> None:
        """Several beams a row read the same states."""
        times = rows // len(self.other)
        if times > 1:
            self.other = self.other.repeat_interleave(times, dim=0)
            if self.other_attention_mask is not None:
                self.other_attention_mask = self.other_attention_mask.repeat_interleave(times, dim=0)
            if self.attention_mask is not None:
                self.attention_mask = self.attention_mask.repeat_interleave(times, dim=0)


class HookedBlip(HookedVLM):
    """What BLIP's three models share: the vision encoder."""

    config: BlipConfig
    vision_encoder: ViT

    def encode_image(self, inputs: VLMInputs) -> Float[Tensor, "b p_image d_vision"]:
        """The image embeddings, class token first."""
        return self.vision_encoder(_pixels(inputs), interpolate_pos_encoding=inputs.interpolate_pos_encoding)

    def enter(
        self, tower: str, inputs: VLMInputs, states: Mapping[str, Float[Tensor, "_ _ d"]]
    ) -> Float[Tensor, "b p d_model"]:
        if tower == "vision_encoder":
            return self.vision_encoder.embed_patches(
                _pixels(inputs), interpolate_pos_encoding=inputs.interpolate_pos_encoding
            )
        text: Any = self.get_submodule(tower)
        return text.embed_tokens(self._tower_ids(inputs, tower)[0])

    text_places: ClassVar[dict[str, Any]]
    """Which tower reads the text, what the span of its words is called, and which tower ``last`` is in."""

    def _prepare(self, images: Any, texts: str | Sequence[str] | None, **options: Any) -> VLMInputs:
        inputs = blip_inputs(self.processor, self.config, images, texts, **self.text_places, **options)
        return inputs.to(self.device)

    def reword(self, inputs: VLMInputs, texts: Sequence[str]) -> VLMInputs:
        """The same pictures with other texts, one a row."""
        return with_texts(self.processor, self.config, inputs, texts, **self.text_places).to(self.device)

    def position_labels(self, inputs: VLMInputs, tower: str) -> list[list[str]]:
        self._check_tower(tower)
        if tower == "vision_encoder":
            return label_patches(inputs, self.config.vision)
        return label_tokens(self.processor.tokenizer, *self._tower_ids(inputs, tower))

    def _tower_ids(self, inputs: VLMInputs, tower: str) -> tuple[Int[Tensor, "b p"], Int[Tensor, "b p"] | None]:
        """A text tower's token ids, and which of them are no padding."""
        if inputs.input_ids is None:
            return self._start(len(inputs)), None
        return inputs.input_ids, inputs.attention_mask

    def _start(self, batch: int) -> Int[Tensor, "b 1"]:
        """``[DEC]`` alone, for every row."""
        return torch.full((batch, 1), self.config.bos_token_id, device=self.device)

    def _first_token(self, ids: Int[Tensor, "b p"], token_id: int) -> Int[Tensor, "b p"]:
        return torch.cat([torch.full_like(ids[:, :1], token_id), ids[:, 1:]], dim=1)


class HookedBlipVQA(HookedBlip):
    """An image and a question to an answer (Li et al. 2022, section 3.1 and figure 5)."""

    towers: ClassVar[tuple[str, ...]] = ("vision_encoder", "question_encoder", "answer_decoder")
    text_places: ClassVar[dict[str, Any]] = {
        "text_tower": "question_encoder",
        "text_span": "question",
        "last_tower": "answer_decoder",
    }

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        if config.vision.d_model != config.text.d_model:
            raise ValueError(
                f"a BLIP for question answering needs towers of one width: its decoder reads text states "
                f"({config.text.d_model}) where its encoder reads image states ({config.vision.d_model})"
            )
        decoder = replace(config.text, is_causal=True, has_head=True)
        self.vision_encoder = ViT(config.vision, config.attention)
        self.question_encoder = Bert(config.text, config.attention)
        self.answer_decoder = Bert(decoder, config.attention)
        self.setup()

    def forward(self, inputs: VLMInputs | Mapping[str, Any]) -> Float[Tensor, "b p_answer d_vocab"]:
        """Logits ``[b p_answer d_vocab]`` after each of ``decoder_input_ids``, by default ``[DEC]`` alone."""
        inputs = self._inputs(inputs)
        question = self.encode_question(inputs)
        answer_ids, answer_mask = self._tower_ids(inputs, "answer_decoder")
        states = self.answer_decoder(
            answer_ids,
            answer_mask,
            other=question,
            other_attention_mask=self._question_mask(inputs),
        )
        return self.leave({"answer_decoder": states}, inputs)

    def leave(
        self, states: Mapping[str, Float[Tensor, "_ _ d"]], inputs: VLMInputs
    ) -> Float[Tensor, "b p_answer d_vocab"]:
        return self.answer_decoder.logits(states["answer_decoder"])

    def encode_question(self, inputs: VLMInputs) -> Float[Tensor, "b p_question d_model"]:
        """The question's states, the image looked at."""
        if inputs.input_ids is None:
            raise ValueError("BLIP needs a question's input_ids")
        return self.question_encoder(*self._tower_ids(inputs, "question_encoder"), other=self.encode_image(inputs))

    def prepare(self, images: Any = None, texts: str | Sequence[str] | None = None, **options: Any) -> VLMInputs:
        """Inputs from pictures and questions, through the checkpoint's own processor; questions pad on the right.

        Spans: ``image`` (patches in ``vision_encoder``), ``question`` (its words in ``question_encoder``), ``last``
        (the position in ``answer_decoder`` that predicts the next token).

        Args:
            images: a PIL image, a path, an array ``[height width 3]`` or ``[3 height width]``, or a list of them.
            texts: one question a picture; one picture for several questions will do.
            options: ``interpolate_pos_encoding=True`` for images of another size than the checkpoint's.

        Raises:
            ImageError: a picture that cannot be read.
            ValueError: an empty or over-long question; numbers of pictures and questions that do not fit.
        """
        if texts is None:
            raise ValueError("a BLIP for question answering needs a question")
        return self._prepare(images, texts, **options)

    def rank_answers(
        self,
        inputs: VLMInputs | Mapping[str, Any],
        candidates: Sequence[str],
        *,
        label_smoothing: float | None = None,
    ) -> RankedAnswers:
        """Candidates by log-likelihood, as ``inference="rank"`` of the original BLIP code (HF has none).

        Args:
            label_smoothing: by default the config's; the research code ranks with 0.1.
        """
        if not candidates:
            raise ValueError("rank_answers needs at least one candidate")
        smoothing = self.config.label_smoothing if label_smoothing is None else label_smoothing
        inputs = self._inputs(inputs)
        question, mask = self.encode_question(inputs), self._question_mask(inputs)
        encoded = self.processor.tokenizer(list(candidates), padding=True, return_tensors="pt").to(self.device)
        answer_ids = self._first_token(encoded.input_ids, self.config.bos_token_id)
        # Some at a time: their logits over the vocabulary are what takes memory.
        likelihoods = [
            self._answer_log_likelihoods(question, mask, ids, kept, smoothing)
            for ids, kept in zip(answer_ids.split(64), encoded.attention_mask.split(64), strict=True)
        ]
        scores, order = torch.cat(likelihoods, dim=1).sort(dim=1, descending=True, stable=True)
        return RankedAnswers([[candidates[i] for i in row] for row in order.tolist()], scores)

    def _answer_log_likelihoods(
        self,
        question: Float[Tensor, "b k d_model"],
        question_mask: Int[Tensor, "b k"] | None,
        answer_ids: Int[Tensor, "n p"],
        answer_mask: Int[Tensor, "n p"],
        label_smoothing: float,
    ) -> Float[Tensor, "b n"]:
        """Of every answer after every question, summed over its tokens."""
        b, n = len(question), len(answer_ids)
        states = self.answer_decoder(
            repeat(answer_ids, "n p -> (b n) p", b=b),
            repeat(answer_mask, "n p -> (b n) p", b=b),
            other=repeat(question, "b k d -> (b n) k d", n=n),
            other_attention_mask=None if question_mask is None else repeat(question_mask, "b k -> (b n) k", n=n),
        )
        logits = self.answer_decoder.logits(states)[:, :-1].float()
        targets = repeat(answer_ids.masked_fill(answer_mask == 0, -100)[:, 1:], "n p -> (b n) p", b=b)
        # Vocabulary last, as HF does: over another axis the softmax is another kernel, and rounds otherwise.
        losses = F.cross_entropy(
            rearrange(logits, "rows p vocab -> (rows p) vocab"),
            rearrange(targets, "rows p -> (rows p)"),
            reduction="none",
            label_smoothing=label_smoothing,
        ).view_as(targets)
        return rearrange(-losses.sum(1), "(b n) -> b n", b=b)

    def _tower_ids(self, inputs: VLMInputs, tower: str) -> tuple[Int[Tensor, "b p"], Int[Tensor, "b p"] | None]:
        if tower == "question_encoder":
            ids, mask = super()._tower_ids(inputs, tower)
            return (
                self._first_token(ids, self.config.enc_token_id) if self.config.variant == "original" else ids
            ), mask
        if inputs.decoder_input_ids is None:
            return self._start(len(inputs)), None
        return inputs.decoder_input_ids, inputs.decoder_attention_mask

    def _question_mask(self, inputs: VLMInputs) -> Int[Tensor, "b p_question"] | None:
        return inputs.attention_mask if self.config.cross_attention_padding == "mask" else None

    def _start_decoding(self, inputs: VLMInputs) -> tuple[BertDecoding, Int[Tensor, "b prompt"]]:
        question = self.encode_question(inputs)
        known = self.answer_decoder.new_known()
        prompt, mask = self._tower_ids(inputs, "answer_decoder")
        if mask is not None and not bool(mask.all()):
            raise ValueError("an answer is generated from decoder_input_ids without padding: give rows of one length")
        return BertDecoding(self.answer_decoder, known, question, self._question_mask(inputs)), prompt


class HookedBlipCaption(HookedBlip):
    """An image, and perhaps the beginning of a caption, to the caption."""

    towers: ClassVar[tuple[str, ...]] = ("vision_encoder", "text_decoder")
    text_places: ClassVar[dict[str, Any]] = {
        "text_tower": "text_decoder",
        "text_span": "prompt",
        "last_tower": "text_decoder",
    }

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        self.vision_encoder = ViT(config.vision, config.attention)
        self.text_decoder = Bert(replace(config.text, is_causal=True, has_head=True), config.attention)
        self.setup()

    def forward(self, inputs: VLMInputs | Mapping[str, Any]) -> Float[Tensor, "b p d_vocab"]:
        """Logits ``[b p d_vocab]`` after each of ``input_ids``, by default ``[DEC]`` alone."""
        inputs = self._inputs(inputs)
        image = self.encode_image(inputs)
        ids, mask = self._tower_ids(inputs, "text_decoder")
        return self.leave({"text_decoder": self.text_decoder(ids, mask, other=image)}, inputs)

    def leave(self, states: Mapping[str, Float[Tensor, "_ _ d"]], inputs: VLMInputs) -> Float[Tensor, "b p d_vocab"]:
        return self.text_decoder.logits(states["text_decoder"])

    def prepare(self, images: Any = None, texts: str | Sequence[str] | None = None, **options: Any) -> VLMInputs:
        """Inputs from pictures, and from the beginnings of captions where ``texts`` are given.

        A text becomes ``[DEC]`` and its tokens, which is what generation continues. Spans: ``image``, ``prompt``
        (the text's words), ``last``, as for :meth:`HookedBlipVQA.prepare`.
        """
        return self._prepare(images, texts, **options)

    def _start_decoding(self, inputs: VLMInputs) -> tuple[BertDecoding, Int[Tensor, "b prompt"]]:
        image = self.encode_image(inputs)
        known = self.text_decoder.new_known()
        if inputs.input_ids is None:
            return BertDecoding(self.text_decoder, known, image, None), self._start(len(image))
        prompt, mask = self._prompt(inputs.input_ids, inputs.attention_mask)
        return BertDecoding(self.text_decoder, known, image, None, mask), prompt

    def _prompt(
        self, ids: Int[Tensor, "b p"], attention_mask: Int[Tensor, "b p"] | None
    ) -> tuple[Int[Tensor, "b prompt"], Int[Tensor, "b prompt"] | None]:
        """``[DEC]`` in place of ``[CLS]``, no ``[SEP]`` at the end; shorter rows padded on the left, so that every row
        goes on from its own last token (HF drops the last column whatever it holds)."""
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        rows = []
        for row, keep in zip(ids, mask.bool(), strict=True):
            words = row[keep][1:]
            ended = len(words) > 0 and int(words[-1]) == self.config.eos_token_id
            rows.append(torch.cat([ids.new_tensor([self.config.bos_token_id]), words[:-1] if ended else words]))
        length = max(len(row) for row in rows)
        prompt = torch.stack([F.pad(row, (length - len(row), 0), value=self.config.pad_token_id) for row in rows])
        if all(len(row) == length for row in rows):
            return prompt, None
        positions = torch.arange(length, device=ids.device)
        starts = torch.tensor([length - len(row) for row in rows], device=ids.device)
        return prompt, (positions >= starts[:, None]).long()


class HookedBlipRetrieval(HookedBlip):
    """How well an image and a text match: by the matching head (ITM), or by the cosine of their embeddings (ITC)."""

    towers: ClassVar[tuple[str, ...]] = ("vision_encoder", "text_encoder")
    text_places: ClassVar[dict[str, Any]] = {
        "text_tower": "text_encoder",
        "text_span": "text",
        "last_tower": "text_encoder",
    }

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        self.vision_encoder = ViT(config.vision, config.attention)
        self.text_encoder = Bert(config.text, config.attention)
        self.itm_head = nn.Linear(config.text.d_model, 2)
        self.hook_itm_logits = HookPoint("b match")
        self.vision_proj = nn.Linear(config.vision.d_model, config.d_projection)
        self.hook_image_embeds = HookPoint("b d_projection")
        self.text_proj = nn.Linear(config.text.d_model, config.d_projection)
        self.hook_text_embeds = HookPoint("b d_projection")
        self.setup()

    def forward(
        self, inputs: VLMInputs | Mapping[str, Any], *, use_itm_head: bool = True
    ) -> Float[Tensor, "b match"] | Float[Tensor, "b_image b_text"]:
        """``[b 2]``: logits of no match and match. Without ``use_itm_head``, ``[b_image b_text]``: cosines."""
        inputs = self._inputs(inputs)
        if inputs.input_ids is None:
            raise ValueError("BLIP retrieval needs a text's input_ids")
        image = self.encode_image(inputs)
        if use_itm_head:
            text = self.text_encoder(*self._tower_ids(inputs, "text_encoder"), other=image)
            return self.leave({"text_encoder": text}, inputs)
        text = self.text_encoder(inputs.input_ids, inputs.attention_mask)
        image_embeds = self.hook_image_embeds(F.normalize(self.vision_proj(image[:, 0]), dim=-1))
        text_embeds = self.hook_text_embeds(F.normalize(self.text_proj(text[:, 0]), dim=-1))
        return image_embeds @ text_embeds.T

    def leave(self, states: Mapping[str, Float[Tensor, "_ _ d"]], inputs: VLMInputs) -> Float[Tensor, "b match"]:
        """By the matching head."""
        return self.hook_itm_logits(self.itm_head(states["text_encoder"][:, 0]))

    def positions_read(self, tower: str, inputs: VLMInputs) -> list[int] | None:
        return [0] if tower == "text_encoder" else None

    def _tower_ids(self, inputs: VLMInputs, tower: str) -> tuple[Int[Tensor, "b p"], Int[Tensor, "b p"] | None]:
        ids, mask = super()._tower_ids(inputs, tower)
        return self._first_token(ids, self.config.enc_token_id) if self.config.variant == "original" else ids, mask

    def prepare(self, images: Any = None, texts: str | Sequence[str] | None = None, **options: Any) -> VLMInputs:
        """Inputs from pictures and texts. Spans: ``image``, ``text``, ``last`` (where the heads read: ``[CLS]``)."""
        if texts is None:
            raise ValueError("retrieval needs a text")
        return self._prepare(images, texts, **options)

    def _start_decoding(self, inputs: VLMInputs) -> tuple[BertDecoding, Int[Tensor, "b prompt"]]:
        raise TypeError("a retrieval model does not generate text")


def _pixels(inputs: VLMInputs) -> Float[Tensor, "b 3 height width"]:
    if inputs.pixel_values is None:
        raise ValueError("BLIP needs pixel_values")
    return inputs.pixel_values

"""How a BLIP for visual question answering becomes ``toy-blip-vqa``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)

from hooked_vlm.data.scene import CELL, IMAGE_SIZE
from hooked_vlm.toys.lessons import Batch, vocabulary
from hooked_vlm.toys.recipe import Recipe, initialise

FOLDER = "toy-blip-vqa"
RECIPE = Recipe()
END = "[SEP]"
CONTINUES_PROMPT = False
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", END, "[MASK]", "[DEC]", "[ENC]")


def build_processor() -> BlipProcessor:
    """HF's processor, for pictures of the toy's own size: they pass through it unresized."""
    tokenizer = BertTokenizer(
        vocab=vocabulary(SPECIAL_TOKENS), additional_special_tokens=["[DEC]", "[ENC]"], model_max_length=32
    )
    return BlipProcessor(BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}), tokenizer)


def build_model(recipe: Recipe) -> BlipForQuestionAnswering:
    """HF's model, freshly initialised."""
    words = vocabulary(SPECIAL_TOKENS)
    width = {"hidden_size": recipe.d_model, "intermediate_size": 4 * recipe.d_model}
    heads = {"num_attention_heads": recipe.d_model // recipe.d_head}
    text = {
        **width,
        **heads,
        "encoder_hidden_size": recipe.d_model,
        "vocab_size": len(words),
        "max_position_embeddings": 32,
        "bos_token_id": words["[DEC]"],
        "sep_token_id": words[END],
        "eos_token_id": words[END],
        "pad_token_id": words["[PAD]"],
        "is_decoder": True,
    }
    vision = {**width, **heads, "image_size": IMAGE_SIZE, "patch_size": CELL}
    vision["num_hidden_layers"] = recipe.vision_layers
    config = BlipConfig(
        text_config=BlipTextConfig(**text, num_hidden_layers=recipe.text_layers).to_dict(),
        vision_config=BlipVisionConfig(**vision).to_dict(),
        projection_dim=recipe.d_model,
        image_text_hidden_size=recipe.d_model,
    )
    model = BlipForQuestionAnswering(config)
    patches = model.vision_model.embeddings
    initialise(model, recipe, [patches.class_embedding, patches.position_embedding])
    return model


def prompt(question: str) -> str:
    """What the processor is given: the question alone."""
    return question


def before_questions(
    model: BlipForQuestionAnswering, processor: BlipProcessor, recipe: Recipe, log: Callable[[str], None]
) -> None:
    """Nothing: here the questions alone teach the vision encoder."""


def parts(batch: Batch, step: int) -> list[Batch]:
    """The batch as it is, or, every other step, without padding.

    HF's decoder looks at padded question positions. Trained on padded rows alone, it would come to need them, and a
    question asked alone, or with its padding masked as it should be, would be answered worse.
    """
    return [batch] if step % 2 else batch.by_length()


def answer_logits(
    model: BlipForQuestionAnswering, tokenizer: BertTokenizer, batch: Batch
) -> Float[torch.Tensor, "row 2 vocabulary"]:
    """Logits after ``[DEC]`` and after ``[DEC] answer``.

    HF's own loss takes the labels for the decoder's inputs, whose first token is [CLS]; generation starts at [DEC].
    """
    images = model.vision_model(batch.pixel_values).last_hidden_state[batch.pictures]
    asked = tokenizer([question.text for question in batch.questions], padding=True, return_tensors="pt")
    states = model.text_encoder(
        asked.input_ids, attention_mask=asked.attention_mask, encoder_hidden_states=images
    ).last_hidden_state
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(batch.answers))
    prompt = torch.stack([torch.full_like(answers, model.decoder_start_token_id), answers], 1)
    return model.text_decoder(prompt, encoder_hidden_states=states).logits

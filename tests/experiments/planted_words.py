"""The planted LLaVA as samples: a processor made without any file, whose words are the circuit's."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from hooked_vlm import HookedLlava
from hooked_vlm.data import Sample
from tests.experiments import planted_llava as planted

CHAT = """\
word {% for part in messages[0]['content'] %}
{{- '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} last"""
WORDS = {
    "<pad>": planted.PAD,
    "<s>": planted.BOS,
    "</s>": planted.EOS,
    "<image>": planted.IMAGE_TOKEN,
    "asking": planted.ASKING_TOKEN,
    "word": planted.WORD_TOKEN,
    "last": planted.LAST_TOKEN,
    "red": planted.RED_TOKEN,
    "blue": planted.BLUE_TOKEN,
}


def planted_model() -> HookedLlava:
    model = planted.planted_model()
    model._processor = _processor()
    return model


def planted_sample(color: str, *, id: str = "", **fields: Any) -> Sample:
    """One object, in patch ``OBJECT_PATCH``."""
    pixels = np.zeros((planted.IMAGE, planted.IMAGE, 3), np.uint8)
    row, column = (planted.PATCH * place for place in divmod(planted.OBJECT_PATCH, planted.IMAGE // planted.PATCH))
    box = (column, row, column + planted.PATCH, row + planted.PATCH)
    pixels[box[1] : box[3], box[0] : box[2], {"red": 0, "blue": 2}[color]] = 255
    settings: dict[str, Any] = {
        "foil": {"red": "blue", "blue": "red"}[color],
        "regions": {"object": box},
        "spans": {"asking": (5, 11)},
        **fields,
    }
    return Sample(id or color, Image.fromarray(pixels), "word asking word", color, **settings)


def _processor() -> LlavaProcessor:
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", planted.BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"},
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    pixels = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False)
    return LlavaProcessor(
        *(pixels, tokenizer),
        patch_size=planted.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT,
    )

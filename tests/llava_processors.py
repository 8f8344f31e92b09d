"""Small processors for LLaVA-1.5 and NeXT, CLIP and ViT, made without any file, and models to go with them.

Three kinds of tokenizer, because they say differently where a token lies: ``words`` (one token a word), ``pieces``
(LLaMA's: spaces are part of the next token, unknown characters fall into bytes, a space before every piece of text)
and ``bytes`` (Qwen2's).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BatchFeature,
    CLIPImageProcessor,
    CLIPProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from hooked_vlm import HookedVLM, VLMInputs
from tests.tiny_llava import IMAGE, PATCH, PINPOINTS, hf_clip, hf_llava, hf_vit

VOCAB, IMAGE_ID, N_CTX = 512, 511, 600
BEGIN, END, PAD, UNKNOWN, MARKER = "<s>", "</s>", "<pad>", "<unk>", "<image>"
WORDS = (
    "what color is the red circle left of square ? , . ! : ' \n a an cat dog and this now answer me in one word "
    "USER: ASSISTANT: [INST] [/INST] tag is: it there photo"
).split(" ")

CHAT = """\
{%- for message in messages -%}
{{ message['role'] | upper + ': ' }}
{%- for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}"""
"""LLaVA-1.5's, in short."""

CHAT_WITH_BEGIN = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '[INST] ' }}
{%- for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] | trim }}{% endfor -%}
{{ ' [/INST]' }}
{%- endfor -%}"""
"""One that writes the first token itself, and takes off the spaces around a question."""


def _special(names: list[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def _filled(vocabulary: dict[str, int]) -> dict[str, int]:
    """Up to the image token, which a tokenizer numbers next."""
    unused = {f"unused{number}": number for number in range(len(vocabulary), IMAGE_ID)}
    return {**vocabulary, **unused}


def _by_words() -> Tokenizer:
    vocabulary = _special([PAD, BEGIN, UNKNOWN, END])
    for word in WORDS:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(_filled(vocabulary), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), behavior="removed"),
            pre_tokenizers.Split(Regex(r"[\n?!.,]"), behavior="isolated"),
        ]
    )
    return tokenizer


def _merged(vocabulary: dict[str, int], words: list[str]) -> list[tuple[str, str]]:
    """Each word is put together from the left; its pieces go into ``vocabulary``."""
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    return merges


def _by_pieces() -> Tokenizer:
    vocabulary = _special([PAD, BEGIN, UNKNOWN, END]) | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    for character in "▁abcdefghijklmnopqrstuvwxyzABCDEIMNOPQRSTU?!.,:'[/]":
        vocabulary[character] = len(vocabulary)
    merges = _merged(vocabulary, [f"▁{word}" for word in WORDS if word.isalpha() or word.isupper()])
    tokenizer = Tokenizer(models.BPE(_filled(vocabulary), merges, byte_fallback=True, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _by_bytes() -> Tokenizer:
    vocabulary = _special([PAD, BEGIN, UNKNOWN, END])
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    merges = _merged(vocabulary, [f"Ġ{word}" for word in WORDS if word.isalpha()])
    tokenizer = Tokenizer(models.BPE(_filled(vocabulary), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZERS = {"words": _by_words, "pieces": _by_pieces, "bytes": _by_bytes}


@cache
def tokenizer(kind: str = "words", *, padding_side: str = "left") -> PreTrainedTokenizerFast:
    """Do not change it."""
    made = TOKENIZERS[kind]()
    assert made.get_vocab_size() == IMAGE_ID
    if kind != "bytes":  # Qwen2's texts have no first token
        made.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN, "pad_token": PAD},
        extra_special_tokens={"image_token": MARKER},
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )


@cache
def processor(kind: str = "words", *, tiles: bool = False, chat: str | None = None) -> Any:
    """LLaVA-1.5's or, with ``tiles``, NeXT's, without a chat template unless one is given; do not change it."""
    settings = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": MARKER,
        "chat_template": chat,
    }
    size: dict[str, Any] = {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}}
    if tiles:
        image_processor = LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **size)
        return LlavaNextProcessor(image_processor, tokenizer(kind), **settings)
    return LlavaProcessor(CLIPImageProcessor(**size), tokenizer(kind), **settings)


@cache
def hf_model(*, tiles: bool = False) -> Any:
    """A tiny LLaVA-1.5 or NeXT that these processors fit; do not change it."""
    text = {"vocab_size": VOCAB, "max_position_embeddings": N_CTX, "eos_token_id": 3}
    return hf_llava(text, tiles=tiles, image_token_index=IMAGE_ID)


@cache
def model(kind: str = "words", *, tiles: bool = False, chat: str | None = None) -> HookedVLM:
    """One of our models over HF's, with a processor; do not change it."""
    return HookedVLM.from_hf(hf_model(tiles=tiles), processor=processor(kind, tiles=tiles, chat=chat))


@cache
def clip_processor() -> CLIPProcessor:
    """CLIP's, whose texts have a first and a last token; do not change it."""
    words = _by_words()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A $B {END}", special_tokens=[(BEGIN, 1), (END, 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN, pad_token=PAD
    )
    size: dict[str, Any] = {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}}
    return CLIPProcessor(CLIPImageProcessor(**size), tokenizer)


@cache
def clip_model() -> HookedVLM:
    """CLIP over HF's, with a processor; do not change it."""
    return HookedVLM.from_hf(hf_clip(eos=3, vocab_size=VOCAB), processor=clip_processor())


@cache
def vit_model() -> HookedVLM:
    """A classifier over HF's, with an image processor; do not change it."""
    processor = ViTImageProcessor(size={"height": IMAGE, "width": IMAGE})
    return HookedVLM.from_hf(hf_vit(), processor=processor)


# Prompts with pictures ------------------------------------------------------------------------------------------------

SIZES = ((IMAGE, IMAGE), (50, 31), (17, 90), (IMAGE, 2 * IMAGE))
NONE = "USER: what is the red square ? ASSISTANT:"
ONE = "USER: <image>\nwhat color is the red circle? ASSISTANT:"
TWO = "USER: <image>\n<image>\nis the cat left of the dog? ASSISTANT:"
APART = "a <image> and a<image>b. what? ASSISTANT: it is a dog USER: and the cat\n? ASSISTANT:"
WHOLE = "{question}"
"""The template with which a text without the image token is a whole prompt too."""


def noise(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [noise(*size) for size in SIZES]


def dealt(prompts: list[str]) -> list[list[PIL.Image.Image]]:
    """Pictures for each row, as many as it has places for."""
    left = [*PICTURES]
    return [[left.pop(0) for _ in range(prompt.count(MARKER))] for prompt in prompts]


def assert_same_batch(inputs: VLMInputs, batch: BatchFeature) -> None:
    assert inputs.tensors().keys() == batch.keys()
    for name, tensor in inputs.tensors().items():
        assert tensor.dtype == batch[name].dtype
        assert torch.equal(tensor, batch[name]), name


every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)
both = pytest.mark.parametrize("tiles", [False, True], ids=["1.5", "NeXT"])

"""A BLIP whose weights are written by hand: one cross-attention head, at one layer and token, carries the answer.

The image holds one object, red or blue. Only token ``ASKING``, only in head ``HEAD`` of layer ``LAYER`` of the question
encoder, looks at the object and copies its colour; every other query rests on the class token. The answer decoder
copies the colour from that token's state in its own layer ``DECODER_LAYER``. Everything else writes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hooked_vlm import HookedBlipVQA, VLMInputs
from hooked_vlm.components import Attention
from hooked_vlm.config import BertConfig, BlipConfig, ViTConfig

D_MODEL, N_LAYERS, N_HEADS, D_HEAD = 24, 4, 3, 8
LAYER, HEAD, DECODER_LAYER = 1, 2, 2
ASKING_POSITION = 3
# Directions of the streams.
RED, BLUE, OBJECT, REST, ASKING, START = range(6)
# Token ids.
PAD, CLS, SEP, DEC, ASKING_TOKEN, RED_TOKEN, BLUE_TOKEN = range(7)
FIRST_WORD, D_VOCAB = 7, 16
PATCH, IMAGE = 4, 12


def planted_model() -> HookedBlipVQA:
    shape = {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": N_HEADS, "d_head": D_HEAD, "d_mlp": 16, "act": "gelu"}
    config = BlipConfig(
        architecture="BlipForQuestionAnswering",
        task="vqa",
        vision=ViTConfig(**shape, eps=1e-5, norm_order="pre", fused_qkv=True, image_size=IMAGE, patch_size=PATCH),
        text=BertConfig(
            **shape, eps=1e-12, norm_order="post", d_cross=D_MODEL, d_vocab=D_VOCAB, n_ctx=16, ties_embeddings=False
        ),
        d_projection=8,
        bos_token_id=DEC,
        d_vocab=D_VOCAB,
        eos_token_ids=(SEP,),
        pad_token_id=PAD,
        enc_token_id=DEC,
    )
    model = HookedBlipVQA(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = ".ln" in name and name.endswith("weight")
            parameter.fill_(1.0 if is_norm_weight else 0.0)
        _plant_image(model)
        _plant_question(model)
        _plant_answer(model)
    return model.eval()


def _plant_image(model: HookedBlipVQA) -> None:
    embed = model.vision_encoder.embed
    for channel, color in ((0, RED), (2, BLUE)):
        embed.patch.weight[color, channel] = embed.patch.weight[OBJECT, channel] = 1 / PATCH**2
    embed.cls[0, 0, REST] = 1.0


def _plant_question(model: HookedBlipVQA) -> None:
    words = model.question_encoder.embed.token.weight
    words[ASKING_TOKEN, ASKING] = 1.0
    for token in (CLS, SEP, *range(FIRST_WORD, D_VOCAB)):
        words[token, 6 + token] = 1.0
    attention = model.question_encoder.blocks[LAYER].cross_attn
    rows = _head_rows(HEAD)
    attention.q.weight[rows[0], ASKING] = 40.0
    attention.q.bias[rows[1]] = 20.0
    attention.k.weight[rows[0], OBJECT] = attention.k.weight[rows[1], REST] = 1.0
    _copy_color(attention, rows)


def _plant_answer(model: HookedBlipVQA) -> None:
    decoder = model.answer_decoder
    decoder.embed.token.weight[DEC, START] = 1.0
    attention = decoder.blocks[DECODER_LAYER].cross_attn
    rows = _head_rows(0)
    attention.q.bias[rows[0]] = 40.0
    attention.k.weight[rows[0], ASKING] = 1.0
    _copy_color(attention, rows)
    nn.init.eye_(decoder.unembed.dense.weight)
    decoder.unembed.decoder.weight[RED_TOKEN, RED] = decoder.unembed.decoder.weight[BLUE_TOKEN, BLUE] = 2.0


def _head_rows(head: int) -> range:
    return range(head * D_HEAD, (head + 1) * D_HEAD)


def _copy_color(attention: Attention, rows: range) -> None:
    for row, color in zip(rows, (RED, BLUE), strict=False):
        attention.v.weight[row, color] = attention.o.weight[color, row] = 1.0


def planted_inputs(color: str) -> VLMInputs:
    pixels = torch.zeros(1, 3, IMAGE, IMAGE)
    pixels[0, {"red": 0, "blue": 2}[color], PATCH : 2 * PATCH, :PATCH] = 1.0
    ids = torch.tensor([[CLS, FIRST_WORD, FIRST_WORD + 1, ASKING_TOKEN, FIRST_WORD + 2, SEP]])
    return VLMInputs(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))


def answer_logits(model: HookedBlipVQA, color: str) -> Tensor:
    return model(planted_inputs(color))[0, -1]

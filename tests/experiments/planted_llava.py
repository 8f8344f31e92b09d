"""A LLaVA whose weights are written by hand: one patch knows the color, and two attention heads carry it to the answer.

The image holds one object, red or blue, in one patch. Of the language model only token ``ASKING``, only in head
``HEAD`` of layer ``TO_QUESTION``, looks at the object and copies its color; only the last token, in the same head of
layer ``TO_ANSWER``, looks at ``ASKING`` and copies what it finds there. Every other query rests on the first token.
Everything else writes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hooked_vlm import HookedLlava, Span, VLMInputs
from hooked_vlm.components import Attention
from hooked_vlm.config import LlamaConfig, LlavaConfig, RotaryConfig, ViTConfig
from hooked_vlm.patches import PatchGrid

D_MODEL, N_LAYERS, N_HEADS, D_HEAD = 16, 5, 2, 8
TO_QUESTION, TO_ANSWER, HEAD = 1, 3, 1
# Directions of the streams.
RED, BLUE, OBJECT, REST, ASKING, LAST, WORD = range(7)
# Token ids.
PAD, BOS, EOS, IMAGE_TOKEN, ASKING_TOKEN, WORD_TOKEN, LAST_TOKEN, RED_TOKEN, BLUE_TOKEN = range(9)
D_VOCAB = 9
PATCH, IMAGE = 4, 12
N_PATCHES = (IMAGE // PATCH) ** 2
OBJECT_PATCH = 5
FIRST_PATCH = 2
OBJECT_POSITION = FIRST_PATCH + OBJECT_PATCH
ASKING_POSITION = FIRST_PATCH + N_PATCHES + 1
IDS = [BOS, WORD_TOKEN, *[IMAGE_TOKEN] * N_PATCHES, WORD_TOKEN, ASKING_TOKEN, WORD_TOKEN, LAST_TOKEN]
LAST_POSITION = len(IDS) - 1
# Dimensions of a head: the first two turn with the position, the rest do not.
ROTARY, COLORS, MATCH, RESTS = 2, (2, 3), 4, 5


def planted_model() -> HookedLlava:
    shape = {"d_model": D_MODEL, "n_heads": N_HEADS, "d_head": D_HEAD, "d_mlp": 8, "eps": 1e-6, "norm_order": "pre"}
    sees = {"image_size": IMAGE, "patch_size": PATCH, "patch_bias": False, "feature_layers": (0,)}
    config = LlavaConfig(
        architecture="LlavaForConditionalGeneration",
        vision=ViTConfig(**shape, **sees, n_layers=1, act="gelu"),
        text=LlamaConfig(
            **shape,
            **{"n_layers": N_LAYERS, "act": "silu", "norm": "rms", "gated_mlp": True, "is_causal": True},
            **{"qkv_bias": False, "out_bias": False, "mlp_bias": False},
            rotary=RotaryConfig(d_rotary=ROTARY),
            d_vocab=D_VOCAB,
            n_ctx=32,
        ),
        image_token_id=IMAGE_TOKEN,
        projector_act="relu",
        d_vocab=D_VOCAB,
        eos_token_ids=(EOS,),
        pad_token_id=PAD,
    )
    model = HookedLlava(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln" in name and name.endswith("weight") else 0.0)
        _plant_image(model)
        _plant_words(model)
        _plant_head(model.language_model.blocks[TO_QUESTION].attn, reader=ASKING, read=OBJECT)
        _plant_head(model.language_model.blocks[TO_ANSWER].attn, reader=LAST, read=ASKING)
    return model.eval()


_DIRECTIONS = {BOS: REST, ASKING_TOKEN: ASKING, WORD_TOKEN: WORD, LAST_TOKEN: LAST}


def _plant_image(model: HookedLlava) -> None:
    patches = model.vision_encoder.embed.patch.weight
    for channel, color in ((0, RED), (2, BLUE)):
        patches[color, channel] = patches[OBJECT, channel] = 1 / PATCH**2
    for layer in (model.projector.up, model.projector.down):
        torch.nn.init.eye_(layer.weight)


def _plant_words(model: HookedLlava) -> None:
    for token, direction in _DIRECTIONS.items():
        model.language_model.embed.token.weight[token, direction] = 1.0
    for token, color in ((RED_TOKEN, RED), (BLUE_TOKEN, BLUE)):
        model.language_model.unembed.weight[token, color] = 2.0


def _plant_head(attention: Attention, *, reader: int, read: int) -> None:
    """Head ``HEAD`` of who has direction ``reader`` looks at what has direction ``read``; all others at the first."""
    first = HEAD * D_HEAD
    attention.q.weight[first + MATCH, reader] = 100.0
    attention.k.weight[first + MATCH, read] = 1.0
    for direction in (*_DIRECTIONS.values(), OBJECT):
        attention.q.weight[first + RESTS, direction] = 30.0
    attention.k.weight[first + RESTS, REST] = 1.0
    for row, color in zip(COLORS, (RED, BLUE), strict=True):
        attention.v.weight[first + row, color] = attention.o.weight[color, first + row] = 1.0


def planted_inputs(color: str) -> VLMInputs:
    row, column = divmod(OBJECT_PATCH, IMAGE // PATCH)
    pixels = torch.zeros(1, 3, IMAGE, IMAGE)
    place = (slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH))
    pixels[0, {"red": 0, "blue": 2}[color]][place] = 1.0
    ids = torch.tensor([IDS])
    positions = tuple(range(FIRST_PATCH, FIRST_PATCH + N_PATCHES))
    tower = "language_model"
    grid = PatchGrid.of(None, (IMAGE, IMAGE), positions, image_size=IMAGE, patch_size=PATCH, tower=tower)
    return VLMInputs(
        pixel_values=pixels,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        spans={"image": Span(tower, (positions,)), "last": Span(tower, ((LAST_POSITION,),))},
        text_tower=tower,
        patch_grid=(grid,),
    )


def answer_logits(model: HookedLlava, color: str) -> Tensor:
    return model(planted_inputs(color))[0, -1]

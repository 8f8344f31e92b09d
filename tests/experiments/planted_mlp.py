"""A LLaVA whose weights are written by hand: one MLP knows what color each shape has, and one head carries it on.

It has the words and the processor of toy-llava, but does not look at the picture. At the word for a shape, and nowhere
else, the MLP of layer ``FACT_LAYER`` writes the color of ``FACTS``: one neuron a shape. Only the last token, only in
head ``HEAD`` of layer ``TO_ANSWER``, looks at that word and copies what it finds there. Everything else writes nothing.
"""

from __future__ import annotations

import torch

from hooked_vlm import HookedLlava, HookedVLM
from hooked_vlm.components import Attention, GatedMLP
from hooked_vlm.config import LlamaConfig, LlavaConfig, RotaryConfig, ViTConfig

D_MODEL, N_LAYERS, N_HEADS, D_HEAD, D_MLP = 16, 5, 2, 8, 6
FACT_LAYER, TO_ANSWER, HEAD = 1, 3, 1
FACTS = {"circle": "red", "square": "blue", "triangle": "green", "star": "yellow"}
COLORS = ("red", "green", "blue", "yellow", "purple", "black")
# Directions of the stream.
REST, LAST, SUBJECT, WORD = range(4)
SHAPE = {shape: 4 + place for place, shape in enumerate(FACTS)}
COLOR = {color: 8 + place for place, color in enumerate(COLORS)}
# Dimensions of a head's queries and keys: the first two turn with the position. Its values are the colors.
ROTARY, MATCH, RESTS = 2, 4, 5


def planted_model() -> HookedLlava:
    processor = HookedVLM.from_pretrained("toy-llava").processor
    words = processor.tokenizer.get_vocab()
    shape = {"d_model": D_MODEL, "n_heads": N_HEADS, "d_head": D_HEAD, "norm_order": "pre"}
    sees = {"image_size": 96, "patch_size": 16, "patch_bias": False, "feature_layers": (0,)}
    config = LlavaConfig(
        architecture="LlavaForConditionalGeneration",
        vision=ViTConfig(**shape, **sees, n_layers=1, act="gelu", eps=1e-6, d_mlp=D_MLP),
        text=LlamaConfig(
            **shape,
            **{"n_layers": N_LAYERS, "act": "silu", "norm": "rms", "gated_mlp": True, "is_causal": True},
            **{"qkv_bias": False, "out_bias": False, "mlp_bias": False, "eps": 1e-6, "d_mlp": D_MLP},
            rotary=RotaryConfig(d_rotary=ROTARY),
            d_vocab=len(words),
            n_ctx=256,
        ),
        image_token_id=words["<image>"],
        projector_act="relu",
        d_vocab=len(words),
        eos_token_ids=(words["</s>"],),
        pad_token_id=words["<pad>"],
    )
    model = HookedLlava(config)
    model._processor = processor
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln" in name and name.endswith("weight") else 0.0)
        _plant_words(model, words)
        _plant_facts(model.language_model.blocks[FACT_LAYER].mlp)
        _plant_head(model.language_model.blocks[TO_ANSWER].attn)
    return model.eval()


def _plant_words(model: HookedLlava, words: dict[str, int]) -> None:
    embeddings = model.language_model.embed.token.weight
    for word, token in words.items():
        if word in SHAPE:
            embeddings[token, SUBJECT] = embeddings[token, SHAPE[word]] = 1.0
        elif word != "<image>":
            embeddings[token, {"<s>": REST, "ASSISTANT:": LAST}.get(word, WORD)] = 1.0
    for color, direction in COLOR.items():
        model.language_model.unembed.weight[words[color], direction] = 2.0


def _plant_facts(mlp: GatedMLP) -> None:
    """A neuron reads one shape, and writes its color with length 1."""
    read = (D_MODEL / 2) ** 0.5  # each of a shape's two directions, after the norm
    for neuron, (shape, color) in enumerate(FACTS.items()):
        mlp.gate.weight[neuron, SHAPE[shape]] = 10.0
        mlp.up.weight[neuron, SHAPE[shape]] = 1.0
        mlp.down.weight[COLOR[color], neuron] = 1 / (10 * read**2)


def _plant_head(attention: Attention) -> None:
    """The last token looks at a shape, all others at the first."""
    first = HEAD * D_HEAD
    attention.q.weight[first + MATCH, LAST] = 100.0
    attention.k.weight[first + MATCH, SUBJECT] = 1.0
    attention.q.weight[first + RESTS, [REST, LAST, SUBJECT, WORD]] = 30.0
    attention.k.weight[first + RESTS, REST] = 1.0
    for row, direction in enumerate(COLOR.values()):
        attention.v.weight[first + row, direction] = attention.o.weight[direction, first + row] = 1.0

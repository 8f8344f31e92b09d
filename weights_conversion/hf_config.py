"""Reading ``config.json`` as transformers does, and saying in one line what in it cannot be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from weights_conversion.checkpoint import CheckpointError

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh")
"""The values of HF's ``hidden_act`` that our towers compute."""


def parse(name: str, hf_config: Mapping[str, Any], model: str) -> Any:
    """HF's config object of this class; ``model`` is what to call the model where it is none."""
    # transformers fills in what a config.json leaves out; only it knows its defaults.
    import transformers

    try:
        return getattr(transformers, name).from_dict(copy.deepcopy(dict(hf_config)))
    except Exception as error:  # of several kinds, some of them transformers' own
        told = " ".join(str(error).split())
        raise CheckpointError(f"config.json is not one of a {model} model: {told}") from error


def one_of(hf_config: Mapping[str, Any], architectures: tuple[str, ...], model: str) -> str:
    """What the config says its HF class is; the first of ``architectures`` where it does not say."""
    for architecture in hf_config.get("architectures") or ():
        if architecture not in architectures:
            raise CheckpointError(
                f"unsupported {model} architecture {architecture}; supported: {', '.join(architectures)}"
            )
        return architecture
    return architectures[0]


def check_tower(part: Any, name: str, d_head: int | None = None) -> int:
    """The width of a head (``d_head`` where the config says it), once the tower's sizes are known to fit together."""
    heads, width = part.num_attention_heads, part.hidden_size
    if min(heads, width, part.num_hidden_layers, part.intermediate_size) < 1 or (d_head is None and width % heads):
        raise CheckpointError(f"{name} does not fit together: hidden_size {width}, num_attention_heads {heads}")
    check_activation(part.hidden_act, f"{name}.hidden_act")
    return d_head or width // heads


def check_activation(value: Any, name: str) -> str:
    """The activation that an entry names, if our towers compute it."""
    if value not in ACTIVATIONS:
        raise CheckpointError(f"{name} is {value!r}, which is not supported; supported: {', '.join(ACTIVATIONS)}")
    return value


def check_image(part: Any) -> None:
    """Square images of three colours, in square patches."""
    image, patch = part.image_size, part.patch_size
    if not isinstance(image, int) or not isinstance(patch, int):
        raise CheckpointError(
            f"only square images and patches are supported, not image_size {image} and patch_size {patch}"
        )
    if not 0 < patch <= image:
        raise CheckpointError(f"no patch of patch_size {patch} fits into an image of image_size {image}")
    if getattr(part, "num_channels", 3) != 3:
        raise CheckpointError(f"num_channels is {part.num_channels}; images have 3 here")


def token_ids(name: str, *values: Any) -> tuple[int, ...]:
    """The first of several places (generation config, text config, ...) that says a token id or a list of them."""
    said = next((value for value in values if value is not None and value != []), ())
    ids = tuple(said) if isinstance(said, (list, tuple)) else (said,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{name} is {said!r}, neither a token id nor a list of them")
    return ids


def may_tie(state: Mapping[str, Tensor], words: str, head: str) -> bool:
    """HF's rule: the head shares the embeddings, unless the checkpoint holds both and they differ.

    In a model in memory (parameters) they share only if they are one.
    """
    if words not in state or head not in state:
        return True
    embedding, unembedding = state[words], state[head]
    if embedding is unembedding or isinstance(embedding, nn.Parameter):
        return embedding is unembedding
    if embedding.equal(unembedding):
        return True
    warnings.warn(f"{head} differs from {words}, so the two are not tied", stacklevel=5)
    return False

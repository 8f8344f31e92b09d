"""Weights in int8 (``quantization="int8"``), by torchao.

A row of a linear layer's matrix becomes 8-bit integers and one factor; biases, embeddings, norms and the unembedding
stay as they are. These are the layers that HF quantises with ``TorchAoConfig(Int8WeightOnlyConfig())``, and the
arithmetic is torchao's there and here, so the numbers are the same.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from hooked_vlm.placement import Keep

UNEMBEDDING = re.compile(r"(.+\.)?unembed(\.decoder)?")


def in_int8(model: nn.Module, keep: Keep) -> Keep:
    """``keep``, and then a linear layer's weight in int8: one matrix after the other.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("quantization='int8' needs torchao: pip install 'hooked-vlm[quantization]'") from error
    # By default it also sets torch's compiler up, for the whole process.
    scheme = Int8WeightOnlyConfig(set_inductor_config=False)
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not UNEMBEDDING.fullmatch(name)
    }

    def keep_in_int8(name: str, tensor: Tensor) -> Tensor:
        tensor = keep(name, tensor)
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or owner not in layers:
            return tensor
        layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(tensor.detach(), requires_grad=False)
        quantize_(layer, scheme)
        return layer.weight

    return keep_in_int8

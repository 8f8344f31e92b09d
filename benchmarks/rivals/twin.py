"""HF's model for libraries that change the modules they wrap."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def twin(hf_model: nn.Module) -> Any:
    """Modules of its own, over the same parameters."""
    return copy.deepcopy(hf_model, {id(parameter): parameter for parameter in hf_model.parameters()})

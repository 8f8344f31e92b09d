"""A corruption in words and numbers, for a result's provenance."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vlm.corruptions.corrupted import Corruption
from hooked_vlm.corruptions.counterfactual import CounterfactualImage
from hooked_vlm.inputs import Span


def describe(corruption: Corruption) -> dict[str, Any]:
    """A corruption's kind and parameters, as JSON has them; of pictures, where they lie; masks are ``"given"``."""
    names: list[str] = [field.name for field in fields(corruption)] if is_dataclass(corruption) else []
    parameters = {name: getattr(corruption, name) for name in names}
    if isinstance(corruption, CounterfactualImage):
        listed = corruption.images if isinstance(corruption.images, (list, tuple)) else [corruption.images]
        parameters["images"] = [str(image) if isinstance(image, (str, Path)) else "given" for image in listed]
    return {"corruption": type(corruption).__name__, **{name: _plain(value) for name, value in parameters.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Span):
        return {"tower": value.tower, "rows": _plain(value.rows)}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    return "given"

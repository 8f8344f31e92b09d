"""Pictures of samples: from a file, an address, or a function; fetched once, and kept in a cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_vlm.processing import ImageError, load_image

if TYPE_CHECKING:
    from PIL.Image import Image

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+)://")
SCHEMES = ("http", "https", "hf", "file")


def is_address(source: Any) -> bool:
    """Whether a picture is given by an address (``https://...``, ``hf://...``) and not by a path."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def resolve(source: str, root: str | Path | None) -> str:
    """A picture's path or address as a file writes it; relative paths are meant from ``root``."""
    if is_address(source) or root is None or Path(source).is_absolute():
        return source
    return str(Path(root) / source)


def load_picture(source: Any, *, what: str = "image") -> Image:
    """A picture, upright and in RGB, from an address, a function without arguments, or what :func:`load_image` takes.

    What an address names is fetched once, into the cache of huggingface-hub.

    Raises:
        ImageError: it cannot be fetched or read.
    """
    if is_address(source):
        return load_image(_fetched(source, what), what=what)
    return load_image(source() if callable(source) else source, what=what)


def _fetched(address: str, what: str) -> Path:
    """Where a copy of what an address names lies."""
    import fsspec
    from huggingface_hub import constants

    match = _SCHEME.match(address)
    scheme = match[1] if match else ""
    if scheme not in SCHEMES:
        raise ImageError(f"{what} is at {address}; addresses begin with {', '.join(f'{one}://' for one in SCHEMES)}")
    try:
        cache = {"cache_storage": str(Path(constants.HF_HOME) / "hooked-vlm" / "pictures")}
        with fsspec.open(f"filecache::{address}", filecache=cache) as file:
            return Path(file.name)
    except Exception as error:  # transports raise what they like
        raise ImageError(f"{what} cannot be fetched from {address}: {type(error).__name__}: {error}") from error

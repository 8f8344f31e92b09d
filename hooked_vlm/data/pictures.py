"""Pictures of samples: from a file, an address, or a function; what is fetched is fetched once, and kept."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from hooked_vlm.data.samples import UNREADABLE, Sample, SampleError, Samples
from hooked_vlm.files import whole_file
from hooked_vlm.processing import ImageError, load_image

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMES = ("http", "https", "hf", "file")

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
_HUB = re.compile(
    r"^hf://(?:(?P<kind>model|dataset|space)s/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?/(?P<file>.+)$"
)
_CHUNK = 1 << 16


def is_address(source: Any) -> bool:
    """Whether a picture is given by an address (``https://...``, ``hf://...``) and not by a path."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def resolve(source: str, root: str | Path | None) -> str:
    """A picture's path or address as a file writes it; relative ones are meant from ``root``, a folder or address."""
    if is_address(source) or root is None or Path(source).is_absolute():
        return source
    if is_address(root):
        return f"{str(root).rstrip('/')}/{PurePosixPath(source)}"
    return str(Path(root) / source)


def load_picture(source: Any, *, what: str = "image") -> Image:
    """A picture, upright and in RGB, from an address, a function without arguments, or what :func:`load_image` takes.

    Addresses are ``file://``, ``http(s)://`` and ``hf://[datasets/]OWNER/NAME[@REVISION]/FILE``. What they name is
    fetched once: from the hub into its own cache, from elsewhere into ``hooked-vlm/pictures`` beside that cache.

    Raises:
        ImageError: it cannot be fetched or read.
    """
    if is_address(source):
        return load_image(fetched(source, what=what), what=what)
    try:
        found = source() if callable(source) else source
    except OSError as error:
        raise ImageError(f"{what} cannot be had: {type(error).__name__}: {error}") from error
    return load_image(found, what=what)


def check_pictures(samples: Samples) -> Samples:
    """The samples all of whose pictures, the counterfactual ones too, can be read; the others are dropped.

    Readers do not look at pictures, so that a list can be made where they are not. This reads (and fetches) every one.
    """

    def checked(sample: Sample) -> Sample:
        try:
            for source, load in ((sample.image, sample.picture), (sample.image_cf, sample.picture_cf)):
                if source is not None:
                    load()
        except ImageError as error:
            raise SampleError(str(error), UNREADABLE) from error
        return sample

    return samples.map(checked)


def fetched(address: str, *, what: str = "image") -> Path:
    """Where a copy of what an address names lies.

    Raises:
        ImageError: it cannot be fetched; says from where, and what would help.
    """
    match = _SCHEME.match(address)
    scheme = match[1].lower() if match else ""
    if scheme not in SCHEMES:
        raise ImageError(f"{what} is at {address}; addresses begin with {', '.join(f'{one}://' for one in SCHEMES)}")
    if scheme == "file":
        return Path(url2pathname(urlsplit(address).path))
    try:
        return _from_hub(address, what) if scheme == "hf" else _from_web(address, what)
    except ImageError:
        raise
    except Exception as error:  # transports raise what they like
        from huggingface_hub import constants

        help = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "look whether the address and the network work"
        raise ImageError(
            f"{what} cannot be fetched from {address} ({type(error).__name__}: {_first_line(error)}); {help}, or "
            "download the pictures and give their folder instead"
        ) from error


def _from_hub(address: str, what: str) -> Path:
    from huggingface_hub import hf_hub_download

    match = _HUB.match(address)
    if match is None:
        raise ImageError(f"{what} is at {address}, which is not hf://[datasets/]OWNER/NAME[@REVISION]/FILE")
    revision = match["revision"] and unquote(match["revision"])
    return Path(hf_hub_download(match["repo"], match["file"], repo_type=match["kind"] or "model", revision=revision))


def _from_web(address: str, what: str) -> Path:
    """Through huggingface-hub's client, which obeys its settings: proxies, certificates, offline mode."""
    from huggingface_hub import constants, get_session

    suffix = PurePosixPath(urlsplit(address).path).suffix
    name = hashlib.sha256(address.encode()).hexdigest()[:32] + suffix
    kept = Path(constants.HF_HOME) / "hooked-vlm" / "pictures" / name
    if kept.is_file():
        return kept
    with whole_file(kept) as temporary:
        with (
            get_session().stream("GET", address, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
            temporary.open("wb") as file,
        ):
            response.raise_for_status()
            for chunk in response.iter_bytes(_CHUNK):
                file.write(chunk)
        try:
            load_image(temporary)
        except ImageError as error:  # a page that says that there is none, which must not be kept
            kind = response.headers.get("content-type", "something")
            raise ImageError(f"{what}: what {address} gives is no picture that can be read, but {kind}") from error
    return kept


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or "no reason given"

"""Results: labelled arrays that say how they were made. Saved as netCDF, whole or not at all; ``.to_dataframe()``
makes a table of one."""

from __future__ import annotations

import io
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hooked_vlm.files import whole_file
from hooked_vlm.version import __version__

if TYPE_CHECKING:
    import xarray as xr

    from hooked_vlm.models import HookedVLM

ENGINE: Literal["h5netcdf"] = "h5netcdf"


def provenance(model: HookedVLM, method: str, **parameters: Any) -> dict[str, str | int | float]:
    """What a result's attributes say: model, arithmetic, method, parameters, versions."""
    import transformers

    facts = {
        "method": method,
        **parameters,
        "model": model.config.name_or_path,
        "model_revision": model.config.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.attention,
        **model.config.switches,
        "hooked_vlm_version": __version__,
        "torch_version": str(torch.__version__),
        "transformers_version": transformers.__version__,
        "python_version": platform.python_version(),
    }
    # netCDF keeps text and numbers; anything else goes as JSON.
    return {
        name: value if isinstance(value, (str, int, float)) and not isinstance(value, bool) else _json(value)
        for name, value in facts.items()
    }


def _json(value: Any) -> str:
    # Arrays and tensors as lists, paths and the like as text.
    return json.dumps(value, default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other))


def save(result: xr.Dataset, path: str | Path) -> None:
    """Write a result to a netCDF file.

    Raises:
        OSError: it cannot be written; a full disk, say.
    """
    import h5netcdf
    from xarray.backends import H5NetCDFStore

    # In memory first: where a disk is full, HDF5 ends the process.
    buffer = io.BytesIO()
    with h5netcdf.File(buffer, "w") as file:
        result.dump_to_store(H5NetCDFStore(file))
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: str | Path) -> xr.Dataset:
    """Read a result; equal to the one that was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind, or a damaged one.
    """
    import xarray as xr

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with xr.open_dataset(path, engine=ENGINE) as result:
            return result.load()
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(f"{path} is no result, or is damaged: {error}") from error


def tower(result: xr.Dataset, name: str, sample: int = 0) -> xr.Dataset:
    """One tower and sample of a result, without the layers, sites and positions that the tower does not have."""
    part = result.sel(tower=name).isel(sample=sample)
    for dim in ("site", "layer", "position"):
        part = part.dropna(dim, how="all", subset=["patched"])
    return part

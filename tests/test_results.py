"""Results say how they were made, load back equal, and are never half written."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray as xr

from hooked_vlm import __version__
from hooked_vlm.results import load, provenance, save, tower
from tests.tiny_runs import tiny


@pytest.fixture
def result() -> xr.Dataset:
    patched = np.arange(48.0).reshape(2, 2, 2, 2, 3)
    patched[:, 1, 1] = np.nan  # the second tower has one site,
    patched[:, 1, :, 1] = np.nan  # one layer,
    patched[:, 1, :, :, 2] = np.nan  # and two positions
    return xr.Dataset(
        {
            "patched": (("sample", "tower", "site", "layer", "position"), patched),
            "identity": (("tower", "layer"), np.array([[False, True], [True, False]])),
            "answer": ("sample", ["röd", ""]),
        },
        coords={
            "sample": [0, 1],
            "tower": ["question_encoder", "answer_decoder"],
            "site": ["resid", "mlp"],
            "layer": [0, 1],
            "position": [0, 1, 2],
            "token": (("sample", "position"), np.array([["[CLS]", "색", "##s"], ["[CLS]", "?", ""]], dtype="<U64")),
        },
        attrs=provenance(tiny(), "causal_trace", seed=3, std=0.5, questions=("a", "b"), shown=True, nothing=None),
    )


def test_a_result_loads_back_equal(result: xr.Dataset, tmp_path: Path) -> None:
    save(result, tmp_path / "deep" / "trace.nc")
    loaded = load(tmp_path / "deep" / "trace.nc")
    xr.testing.assert_identical(loaded, result)
    for name in ("patched", "identity"):
        assert loaded[name].dtype == result[name].dtype
    assert loaded.sizes == result.sizes
    (tmp_path / "deep" / "trace.nc").unlink()  # nothing holds the file, or waits to be read from it
    assert loaded.patched.sum() == result.patched.sum()


def test_a_result_becomes_a_table(result: xr.Dataset) -> None:
    table = result.to_dataframe()
    assert len(table) == result.patched.size
    assert {"patched", "identity", "answer", "token"} <= set(table.columns)


def test_provenance_says_how(result: xr.Dataset) -> None:
    model = tiny()
    facts = provenance(model, "causal_trace", seed=3, std=0.5)
    assert facts == {
        "method": "causal_trace",
        "seed": 3,
        "std": 0.5,
        "model": model.config.name_or_path,
        "model_revision": model.config.revision,
        "dtype": "float32",
        "device": "cpu",
        "attention": "eager",
        "cross_attention_padding": "mask",
        "variant": "hf",
        "hooked_vlm_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "python_version": facts["python_version"],
    }
    assert provenance(tiny("vqa", "sdpa"), "any")["attention"] == "sdpa"


def test_what_is_no_text_or_number_is_json() -> None:
    given: dict[str, Any] = {
        "flag": True,
        "none": None,
        "texts": ("a", "b"),
        "nested": {"seed": [1, 2]},
        "array": np.arange(2),
        "integer": np.int64(7),
        "tensor": torch.tensor([1.5]),
        "path": Path("image.png"),
        "dtype": "kept by the model's own",
    }
    facts = provenance(tiny(), "any", **given)
    assert all(isinstance(value, (str, int, float)) and not isinstance(value, bool) for value in facts.values())
    read = {name: json.loads(str(facts[name])) for name in given if name != "dtype"}
    assert read == {
        "flag": True,
        "none": None,
        "texts": ["a", "b"],
        "nested": {"seed": [1, 2]},
        "array": [0, 1],
        "integer": 7,
        "tensor": [1.5],
        "path": "image.png",
    }
    assert facts["dtype"] == "float32"


def test_long_provenance_is_kept_whole(result: xr.Dataset, tmp_path: Path) -> None:
    """HDF5 keeps 64 KiB of attributes in one place, and longer ones in another."""
    result.attrs["questions"] = json.dumps(["what color is the circle ?"] * 10_000)
    save(result, tmp_path / "trace.nc")
    assert load(tmp_path / "trace.nc").attrs["questions"] == result.attrs["questions"]


def half_written(path: Path, data: Any) -> None:
    with path.open("wb") as file:
        file.write(bytes(data)[: len(data) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_what_was_there(result: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(result, tmp_path / "trace.nc")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half_written)
        for name in ("trace.nc", "other.nc", "deep/other.nc"):
            with pytest.raises(OSError, match="No space left"):
                save(result, tmp_path / name)
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.nc"]
    xr.testing.assert_identical(load(tmp_path / "trace.nc"), result)


def test_a_result_that_netcdf_cannot_keep_leaves_what_was_there(result: xr.Dataset, tmp_path: Path) -> None:
    save(result, tmp_path / "trace.nc")
    with pytest.raises(TypeError):
        save(result.assign_attrs(model=object()), tmp_path / "trace.nc")
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.nc"]
    xr.testing.assert_identical(load(tmp_path / "trace.nc"), result)


def test_places_that_cannot_be_written(result: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises((FileExistsError, NotADirectoryError), match="file"):
        save(result, tmp_path / "file" / "trace.nc")
    with pytest.raises(IsADirectoryError, match="is a folder, not a file"):
        save(result, tmp_path)

    def closed(*_arguments: object, **_options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", closed)  # a superuser's tests could write anywhere
    with pytest.raises(PermissionError, match="Permission denied"):
        save(result, tmp_path / "deep" / "trace.nc")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_files_that_are_no_results(result: xr.Dataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.nc")
    save(result, tmp_path / "truncated.nc")
    (tmp_path / "truncated.nc").write_bytes((tmp_path / "truncated.nc").read_bytes()[:-1000])
    (tmp_path / "text.nc").write_text("half")
    for name in ("truncated.nc", "text.nc"):
        with pytest.raises(ValueError, match=f"{name} is no result"):
            load(tmp_path / name)


def test_one_tower_has_only_its_own_places(result: xr.Dataset) -> None:
    encoder, decoder = tower(result, "question_encoder"), tower(result, "answer_decoder", sample=1)
    assert dict(encoder.patched.sizes) == {"site": 2, "layer": 2, "position": 3}
    assert dict(decoder.patched.sizes) == {"site": 1, "layer": 1, "position": 2}
    assert decoder.patched.values.tolist() == [[[36.0, 37.0]]]
    with pytest.raises(KeyError):
        tower(result, "text_decoder")

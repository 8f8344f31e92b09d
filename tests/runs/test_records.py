"""What is kept of a sample: read as it was written, or not at all; and who may work at one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hooked_vlm.data.samples import Dropped
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Failed
from hooked_vlm.runs.records import DamagedRecordError, Kept, Records, decoded, encoded
from tests.runs.disturbed import numbers_of

FOUND = Found.of(numbers_of("a sample"))

# What is kept ---------------------------------------------------------------------------------------------------------

letters = st.characters(exclude_categories=[])  # half surrogate pairs, controls and nothing, too
shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
values = st.sampled_from(["?", "i1", "i4", "i8", "f2", "f4", "f8", "<U1", "<U9"]).flatmap(
    lambda dtype: arrays.arrays(
        dtype,
        shapes,
        elements=st.text(letters, max_size=int(dtype[2:])) if "U" in dtype else None,
    )
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=5), values, max_size=4), st.floats(0, 1e9), st.booleans())
def test_what_is_found_is_read_as_it_was(found: dict[str, np.ndarray], seconds: float, is_transposed: bool) -> None:
    """To the bit, with its type and shape, whatever the letters and however it lies in memory."""
    found = {name: own.T if is_transposed else own for name, own in found.items()}
    variables = {name: (tuple(f"{name}-{axis}" for axis in range(own.ndim)), own) for name, own in found.items()}
    kept = decoded(encoded(Kept(Found(variables, frozenset(list(found)[:2])), seconds)))
    assert kept.seconds == seconds
    assert isinstance(kept.outcome, Found)
    assert kept.outcome.coords == frozenset(list(found)[:2])
    assert list(kept.outcome.variables) == list(variables)
    for name, (dims, own) in variables.items():
        again = kept.outcome.variables[name]
        assert again[0] == dims
        assert (again[1].dtype, again[1].shape, again[1].tobytes()) == (own.dtype, own.shape, own.tobytes())


@given(st.text(letters), st.text(letters), st.text(letters), st.text(letters))
def test_why_nothing_is_found_is_read_as_it_was(id: str, reason: str, kind: str, traceback: str) -> None:
    for outcome in (Dropped(id, reason, kind), Failed(id, reason, kind, traceback)):
        again = decoded(encoded(Kept(outcome, 0.25)))
        assert again == Kept(outcome, 0.25)
        assert type(again.outcome) is type(outcome)


def test_a_record_that_is_not_what_was_written_is_known(tmp_path: Path) -> None:
    """Any byte changed, any part cut off, anything added."""
    records = Records(tmp_path)
    whole = encoded(Kept(FOUND, 1.0))
    records.write(7, whole)
    path = records.path(7)
    damaged = [
        whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in range(len(whole))
    ]
    damaged += [whole[:length] for length in range(0, len(whole), 97)]
    damaged += [whole + b"\0", b"\0" * len(whole), b"\n" + whole, whole + whole]
    for data in damaged:
        with pytest.raises(DamagedRecordError, match="000007.record is damaged: it is not what was written"):
            decoded(data, str(path))
    path.write_bytes(b"")
    with pytest.raises(DamagedRecordError, match="is damaged"):
        records.read(7)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        records.read(7)
    path.mkdir()
    (path / "something").touch()
    with pytest.raises(DamagedRecordError, match="000007.record is a folder"):
        records.read(7)
    records.forget({7, 8})
    assert not path.exists()


def test_folders_of_a_thousand_and_what_is_not_ours(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.finished() == set()
    for number in (0, 999, 1000, 1099, 1_234_567):
        records.write(number, b"")
    assert records.path(1099) == tmp_path / "001" / "001099.record"
    assert records.path(1_234_567) == tmp_path / "1234" / "1234567.record"
    others = ("notes.txt", ".DS_Store", ".nfs00000000046c0", "x.record", "-1.record", "001003.record~", "001004.lock")
    for name in (*others, ".001005-ab_c1234.record"):
        (tmp_path / "001" / name).touch()
    (tmp_path / "shared").mkdir()
    (tmp_path / "002").touch()
    assert records.finished() == {0, 999, 1000, 1099, 1_234_567}
    records.tidy()
    there = {path.name for path in (tmp_path / "001").iterdir()}
    assert there == {*others[:-1], "001000.record", "001099.record"}


# Claims ---------------------------------------------------------------------------------------------------------------


def test_a_sample_is_claimed_once(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with records.claim(3) as first, records.claim(3) as second, records.claim(4) as other:
        assert (first, second, other) == (True, False, True)
    with records.claim(3) as again:
        assert again
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_claim_ends_with_an_error(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), records.claim(3):
            raise error
    with records.claim(3) as again:
        assert again

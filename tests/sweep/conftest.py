"""What the tests of the sweep share."""

from __future__ import annotations

import jaxtyping
import pytest


@pytest.fixture
def unchecked(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for functions that are made on the way, as an edit's hooks are: to build their checks at each run takes
    longer than a tiny model's forward."""
    monkeypatch.setattr(jaxtyping, "jaxtyped", lambda **_: lambda made: made)

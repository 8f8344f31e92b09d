"""How methods go through their samples: one after another, until somebody says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hooked_vlm.data import Dropped, Sample, SampleError
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Loop, One, Outcome, current_loop, going_through, outcome

SAMPLES = [Sample(name, None, f"what is {name} ?", answer="red") for name in "abc"]


def one(sample: Sample) -> Found:
    if sample.id == "b":
        raise SampleError("b is blank", "blank")
    return Found({"value": (("sample",), np.array([1.0]))}, frozenset())


def test_one_after_another_with_their_names_and_without_what_cannot_be_used() -> None:
    found = current_loop().outcomes("", SAMPLES, one)
    assert found[1] == Dropped("b", "b is blank", "blank")
    first = found[0]
    assert isinstance(first, Found)
    labels = {name: first.variables[name][1].tolist() for name in first.coords}
    assert labels == {"sample": ["a"], "question": ["what is a ?"], "group": [""], "gold": ["red"]}


@pytest.mark.parametrize(
    "facts", [{"id": "nothing \0"}, {"question": "half \ud83d"}, {"group": "\udfff"}, {"answer": "\0"}]
)
def test_letters_that_no_file_can_hold_drop_a_sample(facts: dict[str, str]) -> None:
    """And not the whole result, when it is saved."""
    found = outcome(replace(SAMPLES[0], **facts), one)
    assert isinstance(found, Dropped)
    assert found.kind == "letters that are none"


def test_any_other_error_is_raised() -> None:
    def fails(sample: Sample) -> Found:
        raise ValueError("wrong setting")

    with pytest.raises(ValueError, match="wrong setting"):
        outcome(SAMPLES[0], fails)


class Backwards(Loop):
    """Another loop, for a block."""

    def outcomes(self, method: str, samples: Sequence[Sample], one: One, *, progress: bool = False) -> list[Outcome]:
        return [outcome(sample, one) for sample in reversed(samples)]

    def once(self, name: str, make: Any, save: Any, load: Any) -> Any:
        return "made before"


def test_another_loop_is_that_of_a_block_and_not_of_what_a_turn_itself_calls() -> None:
    plain = current_loop()

    def inner(sample: Sample) -> Found:
        assert current_loop() is plain
        return one(sample)

    with going_through(Backwards()) as _:
        assert [type(own) for own in current_loop().outcomes("", SAMPLES[1:], inner)] == [Found, Dropped]
        assert current_loop().once("", lambda: "made", lambda *_: None, lambda path: "") == "made before"
        with pytest.raises(KeyError), going_through(Loop()):
            raise KeyError
        assert isinstance(current_loop(), Backwards)
    assert current_loop() is plain
    assert plain.once("", lambda: "made", lambda *_: Path().touch(), lambda path: "") == "made"

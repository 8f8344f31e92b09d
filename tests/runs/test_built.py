"""Values of a file against the signatures of what they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pytest
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.corruptions import ReplaceTokens, Scaled
from hooked_vlm.experiments import NextToken, ObjectTokens
from hooked_vlm.runs.built import ExperimentError, build, check_keys, checked, kinds, made

if TYPE_CHECKING:
    from nowhere import Nothing


def example(
    number: int,
    pairs: Sequence[tuple[str, int]] = (),
    how: Literal["mean", "zero"] | Callable[[int], int] = "mean",
    mean: Float[Tensor, " d"] | None = None,
    unseen: Nothing | None = None,
    *rest: Any,
    **others: Any,
) -> None:
    """A signature of all kinds of types."""


def further(scale: float = 1.0, number: str = "") -> None:
    """What takes the other arguments."""


def test_values_become_what_the_signature_says() -> None:
    given = {"number": 3, "pairs": [["a", 1]], "how": "zero", "unseen": "as it is"}
    found = checked(example, given, "here")
    assert found == {**given, "pairs": [("a", 1)]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "^here needs number$"),
        (
            {"number": 3, "pair": []},
            "^here has no 'pair'; it has number, pairs, how, mean, unseen; did you mean 'pairs'?",
        ),
        ({"number": 3, "rest": []}, "^here has no 'rest'"),
        ({"number": 3, "others": {}}, "^here has no 'others'"),
        ({"number": "three"}, "^here: number = 'three' does not fit: Input should be a valid integer"),
        ({"number": 3, "pairs": [["a"]]}, r"^here: pairs = \[\['a'\]\] does not fit: "),
        ({"number": 3, "how": "median"}, "^here: how = 'median' does not fit: Input should be 'mean' or 'zero'"),
        ({"number": 3, "mean": "x"}, "^here: mean = 'x' does not fit"),
        ({"number": 3, "unseen": {"kind": "Scald"}}, "^here, unseen: no kind is called 'Scald'"),
    ],
)
def test_others_are_refused(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        checked(example, given, "here")


def test_arguments_that_a_file_does_not_give() -> None:
    assert checked(example, {"how": "mean"}, "here", without=("number",)) == {"how": "mean"}
    with pytest.raises(ExperimentError, match="here has no 'number'"):
        checked(example, {"number": 3}, "here", without=("number",))


def test_arguments_that_are_passed_on() -> None:
    assert checked(example, {"number": 3, "scale": 2}, "here", passes_to=further) == {"number": 3, "scale": 2.0}
    with pytest.raises(ExperimentError, match="here has no 'scael'; it has scale, number, .*did you mean 'scale'?"):
        checked(example, {"number": 3, "scael": 2}, "here", passes_to=further)


def test_tables_with_a_kind_become_values_wherever_they_stand() -> None:
    given = {
        "it": {"kind": "ObjectTokens", "dilate": 1},
        "all": [{"kind": "Scaled"}, 3, {"plain": {"kind": "NextToken"}}],
    }
    assert build(given, "here") == {"it": ObjectTokens(dilate=1), "all": [Scaled(), 3, {"plain": NextToken()}]}
    assert {"Scaled", "AdditiveGaussian", "Blur", "RandomTokens", "GradientTokens", "Said"} <= kinds().keys()
    assert not {"Corruption", "Corrupted"} & kinds().keys()
    assert build({"kind": "ReplaceTokens", "span": "this place", "by": "Paris"}, "here") == ReplaceTokens(
        "this place", "Paris"
    )


def test_what_is_wrong_with_a_value_is_said_with_its_place() -> None:
    def whole(number: int) -> int:
        if number < 0:
            raise ValueError(f"not {number}")
        return number

    assert made(whole, {"number": 3}, "here") == 3
    with pytest.raises(ExperimentError, match="^here: not -3$"):
        made(whole, {"number": -3}, "here")


def test_keys() -> None:
    check_keys(["a"], ["a", "b"], "here")
    with pytest.raises(ExperimentError, match="^here has no 'c'; it has a, b$"):
        check_keys(["a", "c"], ["a", "b"], "here")

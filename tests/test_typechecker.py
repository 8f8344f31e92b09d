"""Signatures are checked while the tests run: arguments, results, and the axes that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import jaxtyping
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.components.mlp import quick_gelu
from hooked_vlm.metrics import Probability
from tests.typechecker import jaxtyped, typechecker
from weights_conversion.blip import text_rules

check = jaxtyped(typechecker=typechecker)
SQUARE, ROW = torch.ones(2, 2), torch.ones(1, 3)


@check
def product(one: Float[Tensor, "a b"], other: Float[Tensor, "b c"], *, times: int = 1) -> Float[Tensor, "a c"]:
    return (one @ other)[:times] if times < 0 else one @ other * times


@check
def first_row(x: Float[Tensor, "a b"]) -> Float[Tensor, " b"]:
    return x[0] if len(x) > 1 else x


@check
def counted(*numbers: float, **names: str) -> list[int]:
    return [len(numbers), len(names)] if numbers else [0.5]


def test_what_is_true_passes() -> None:
    assert product(ROW, torch.ones(3, 5)).shape == (1, 5)
    assert product(ROW.double(), other=torch.ones(3, 5).double(), times=2).sum() == 30
    assert first_row(SQUARE).shape == (2,)
    assert counted(1, 2.5, name="a") == [2, 1]  # an int is a float, as PEP 484 has it


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: product(ROW, SQUARE), "parameters of .*product"),
        (lambda: product(ROW, ROW.flatten()), "parameters of .*product"),
        (lambda: product(SQUARE, torch.ones(2, 2, dtype=torch.int64)), "parameters of .*product"),
        (lambda: product(SQUARE, SQUARE, times=1.5), "parameters of .*product"),
        (lambda: product(SQUARE, SQUARE, times=-1), "product.* return .*the size of dimension a is 1 .* of 2"),
        (lambda: product(SQUARE), "missing a required argument: 'other'"),
        (lambda: product(SQUARE, SQUARE, 3), "too many positional arguments"),
        (lambda: first_row(ROW), "first_row.* return"),
        (lambda: counted("a"), "parameters of .*counted"),
        (lambda: counted(1, name=2), "parameters of .*counted"),
        (lambda: counted(), "counted.* return"),
    ],
)
def test_what_is_not_true_raises(call: Callable[[], object], what: str) -> None:
    with pytest.raises(TypeError, match=f"(?s){what}"):
        call()


def test_axes_are_those_of_one_call() -> None:
    """Neither of the call before, nor of the one within which another is made, nor of one that failed."""

    @check
    def outer(x: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
        assert first_row(torch.ones(4, 5)).shape == (5,)
        with pytest.raises(TypeError):
            product(torch.ones(7, 8), torch.ones(7, 8))
        return x[:, :1] if len(x) == 3 else x

    assert outer(SQUARE).shape == (2, 2)
    assert outer(ROW).shape == (1, 3)
    with pytest.raises(TypeError, match="outer.* return"):
        outer(torch.ones(3, 2))


def made(factor: int) -> Callable[..., Tensor]:
    if factor > 9:

        @check
        def inner(x: Int[Tensor, " a"]) -> Int[Tensor, " a"]:
            return x * factor
    else:

        @check
        def inner(x: Float[Tensor, " a"], add: int = factor) -> Float[Tensor, " a"]:
            return x * factor + add

    return inner


def test_functions_within_functions_are_checked_each_as_itself() -> None:
    ones = torch.ones(2)
    assert made(2)(ones).tolist() == [4, 4]
    assert made(3)(ones).tolist() == [6, 6]
    assert made(10)(ones.long()).tolist() == [10, 10]
    for factor, wrong in ((3, ones.long()), (10, ones), (2, SQUARE)):
        with pytest.raises(TypeError, match="parameters of .*inner"):
            made(factor)(wrong)


def test_the_same_code_in_two_files_has_two_signatures() -> None:
    for hint, right, wrong in ((int, 1, "a"), (str, "a", 1)):
        space = {"hint": hint}
        exec(compile("def same(x: hint) -> hint: return x", f"{hint.__name__}.py", "exec"), space)
        same = check(space["same"])
        assert same(right) == right
        with pytest.raises(TypeError, match="parameters of .*same"):
            same(wrong)


def test_generators_methods_and_dataclasses() -> None:
    @check
    def numbers(n: int) -> Iterator[int]:
        yield from range(n)

    @check
    def fails() -> NoReturn:
        raise KeyError("this")

    @check
    @dataclass
    class Holder:
        value: Float[Tensor, "a a"]

        @property
        @check
        def width(self) -> int:
            return len(self.value) if len(self.value) < 3 else 0.5

    assert list(numbers(3)) == [0, 1, 2]
    with pytest.raises(TypeError, match="parameters of .*numbers"):
        numbers("three")
    with pytest.raises(KeyError, match="this"):
        fails()
    assert Holder(SQUARE).width == 2
    with pytest.raises(TypeError, match="parameters of .*Holder"):
        Holder(ROW)
    with pytest.raises(TypeError, match="width.* return"):
        _ = Holder(torch.ones(3, 3)).width


def test_nothing_is_checked_where_checks_are_disabled(unchecked: None) -> None:
    assert first_row(ROW).shape == (1, 3)
    assert counted() == [0.5]


def test_the_package_is_checked() -> None:
    assert not jaxtyping.config.jaxtyping_disable
    for call in (lambda: quick_gelu(SQUARE.long()), lambda: Probability(0.5), lambda: text_rules(3, "a")):
        with pytest.raises(TypeError, match="parameters of"):
            call()

"""What checks the signatures while the tests run: beartype, which takes an int for a float as PEP 484 does.

jaxtyping's own decorator takes longer than a tiny model's forward: it checks the arguments once more with the result,
and makes the checks of a function within a function anew at each call of the outer one. This one checks the same, once.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
jaxtypings_own = jaxtyping.jaxtyped
same_axes = jaxtypings_own("context")
checks: dict[Any, tuple[Callable, Callable]] = {}
"""Of a function, by where its code is: what takes its arguments and what takes its result, and nothing else."""


def jaxtyped(*, typechecker: Callable) -> Callable:
    """What jaxtyping's import hook puts before every function, and behind the other decorators of a class."""

    def decorate(made: Any) -> Any:
        # Of a class it decorates the `__init__` that `dataclass` has made.
        return checked(made) if isinstance(made, FunctionType) else jaxtypings_own(made, typechecker=typechecker)

    return decorate


def checked(function: FunctionType) -> Callable:
    """``function``, its arguments and its result checked at each call, unless jaxtyping is disabled then."""
    place = (function.__code__.co_filename, function.__code__)
    if place not in checks:
        checks[place] = checks_of(function)
    take_arguments, take_result = checks[place]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with same_axes:
            try:
                take_arguments(*args, **kwargs)
            except Exception:
                jaxtypings_own(function, typechecker=typechecker)(*args, **kwargs)  # raises, and says more
                raise
            return take_result(function(*args, **kwargs))

    return call


def checks_of(function: FunctionType) -> tuple[Callable, Callable]:
    """Made of what jaxtyping makes for its own: a function of the same arguments and result, one of the arguments."""
    signatures: list[Callable] = []

    def keep(signature: Callable) -> Callable:
        signatures.append(signature)
        return signature

    jaxtypings_own(function, typechecker=keep)
    whole, arguments = signatures

    def result(value: Any) -> Any:
        return value

    result.__module__ = function.__module__
    result.__qualname__ = function.__qualname__
    result.__annotations__ = {"return": whole.__annotations__.get("return", Any)}
    return typechecker(arguments), typechecker(result)

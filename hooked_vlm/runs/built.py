"""What a file says of an experiment, checked: its keys by their names, its values by the types in the signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from hooked_vlm.data.rows import nearest

Made = TypeVar("Made")

_VARIED = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class ExperimentError(ValueError):
    """A file of an experiment that says something that cannot be done."""


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """That all keys of a table are known.

    Raises:
        ExperimentError: one is not; with the names that are most like it.
    """
    known = list(known)
    for key in given:
        if key not in known:
            raise ExperimentError(f"{where} has no {key!r}; it has {', '.join(known)}{nearest(key, known)}")


def checked(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    where: str,
    *,
    without: Iterable[str] = (),
    passes_to: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a function, of the types in its signature.

    Tables with a ``kind`` become values of that class (:func:`kinds`).

    Args:
        without: parameters that a file does not give.
        passes_to: the function whose other keyword arguments it takes, too.

    Raises:
        ExperimentError: an unknown argument, or one of another type; one that is missing.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    parameters = {**(_parameters(passes_to) if passes_to else {}), **_parameters(function)}
    known = {name: hint for name, hint in parameters.items() if name not in without}
    check_keys(given, known, where)
    missing = [name for name in _needed(function) if name in known and name not in given]
    if missing:
        raise ExperimentError(f"{where} needs {', '.join(missing)}")
    arguments = {}
    for name, value in given.items():
        built = build(value, f"{where}, {name}")
        try:
            adapter = TypeAdapter(known[name], config=ConfigDict(arbitrary_types_allowed=True))
            arguments[name] = adapter.validate_python(built)
        except ValidationError as error:
            wrong = "; ".join(dict.fromkeys(one["msg"] for one in error.errors()))
            raise ExperimentError(f"{where}: {name} = {value!r} does not fit: {wrong}") from None
        except (PydanticSchemaGenerationError, PydanticUserError):
            arguments[name] = built  # a type that can only be looked at when it is used
    return arguments


def build(value: Any, where: str) -> Any:
    """A value of a file, with each table that names a ``kind`` as a value of that class."""
    if isinstance(value, Mapping):
        if "kind" not in value:
            return {name: build(one, f"{where}, {name}") for name, one in value.items()}
        fields, kind = {name: one for name, one in value.items() if name != "kind"}, value["kind"]
        if not isinstance(kind, str) or kind not in kinds():
            raise ExperimentError(
                f"{where}: no kind is called {kind!r}; there are {', '.join(kinds())}{nearest(str(kind), kinds())}"
            )
        return made(kinds()[kind], fields, f"{where}, {kind}")
    return [build(one, where) for one in value] if isinstance(value, list) else value


def made(what: Callable[..., Made], given: Mapping[str, Any], where: str, **options: Any) -> Made:
    """What a function makes of what a file gives it; raises as :func:`checked`, which has the options."""
    arguments = checked(what, given, where, **options)
    try:
        return what(**arguments)
    except ValueError as error:
        raise ExperimentError(f"{where}: {error}") from error


@cache
def kinds() -> dict[str, type]:
    """The classes of which a file may name a value: corruptions, choices of tokens, evaluations."""
    from hooked_vlm import corruptions, experiments

    named = [
        *(getattr(corruptions, name) for name in corruptions.__all__),
        *(getattr(experiments, name) for name in experiments.__all__ if name.endswith("Tokens")),
        experiments.NextToken,
        experiments.Said,
    ]
    abstract = (corruptions.Corruption, corruptions.Corrupted)
    return {one.__name__: one for one in named if inspect.isclass(one) and one not in abstract}


def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's parameters and their types; Any for those that only a type checker can see."""
    signature = inspect.signature(function)
    inner = inspect.unwrap(function)
    names = vars(inspect.getmodule(inner)) if inspect.getmodule(inner) else {}
    hints: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in _VARIED:
            continue
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, dict(names))
            except NameError:
                hint = Any
        hints[name] = Any if hint is inspect.Parameter.empty else hint
    return hints


def _needed(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.default is inspect.Parameter.empty and one.kind not in _VARIED]

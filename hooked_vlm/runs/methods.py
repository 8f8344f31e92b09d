"""The methods that a run may use, by name: what is told of their results in tables, and what is drawn."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

from hooked_vlm import experiments
from hooked_vlm.data.rows import nearest
from hooked_vlm.experiments.parts.roles import by_role
from hooked_vlm.runs.built import ExperimentError, checked

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Derived: TypeAlias = "Callable[[xr.Dataset], xr.Dataset]"
Drawn: TypeAlias = "Callable[[xr.Dataset, str], Figure]"


@dataclass(frozen=True)
class Method:
    """A method, and what a run makes of its result."""

    call: Callable[..., Any]
    """``call(model, samples, ...)``, which goes through its samples by
    :func:`~hooked_vlm.experiments.parts.over_samples.over_samples`."""
    quantity: str | None = None
    """Of its result, what tables tell, over ``sample`` and cells."""
    null: float | None = 0.0
    """What it is where nothing happens, against which it is tested; None where it is no effect."""
    cells: Derived | None = None
    """What is told of, where that is not the result as it is."""
    derived: Mapping[str, Derived] = field(default_factory=dict)
    """Further results, by name."""
    figures: Mapping[str, Drawn] = field(default_factory=dict)
    """Of the result, or of a derived one: by its name, ``""`` for the result itself."""
    passes_to: Callable[..., Any] | None = None
    """The function that takes its other arguments."""
    looks_around: Callable[[Mapping[str, Any]], bool] = lambda arguments: False
    """Whether what it finds of a sample depends on the other samples."""

    def arguments(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Its arguments, from what a file says.

        Raises:
            ExperimentError: an argument that it does not take, or of another type; one that is missing.
        """
        without = ("model", "samples", "clean", "answer", "foil", "progress")
        return checked(self.call, given, where, without=without, passes_to=self.passes_to)


def method(name: str) -> Method:
    """The method of a name; or of your own, as ``package.module:function``.

    Raises:
        ExperimentError: there is none.
    """
    if ":" in name:
        return _of_your_own(name)
    if name not in METHODS:
        raise ExperimentError(
            f"no method is called {name!r}; there are {', '.join(METHODS)}{nearest(name, METHODS)}; or say "
            "'package.module:function' for one of your own"
        )
    return METHODS[name]


def _of_your_own(name: str) -> Method:
    module, _, function = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # where a run is begun, as `python -m` has it: a console script does not
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ExperimentError(f"the method {name!r} cannot be imported: {error}") from error
    if not callable(found) and not isinstance(found, Method):
        raise ExperimentError(f"the method {name!r} is no function, but {found!r}")
    return found if isinstance(found, Method) else Method(found)


@dataclass(frozen=True)
class _Figure:
    """A figure of :mod:`hooked_vlm.plots`, which is imported when it is drawn."""

    name: str
    options: Mapping[str, Any]

    def __call__(self, result: xr.Dataset, title: str) -> Figure:
        return self._draw(result, title=title, **_of_a_metric(self._draw, result, self.options))

    @property
    def caption(self) -> str:
        """What is to be seen, as the function that draws it says."""
        told = inspect.cleandoc(self._draw.__doc__ or "").partition("\n\nArgs:")[0].partition("\n\nRaises:")[0]
        return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`|``([^`]*)``", r"\1\2", " ".join(told.split()))

    @property
    def _draw(self) -> Callable[..., Figure]:
        from hooked_vlm import plots

        return getattr(plots, self.name)


def _figure(name: str, **options: Any) -> Drawn:
    return _Figure(name, options)


def _derived(function: Callable[..., xr.Dataset], **options: Any) -> Derived:
    return lambda result: function(result, **_of_a_metric(function, result, options))


def _of_a_metric(function: Callable[..., Any], result: xr.Dataset, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with a metric that the result has: its first, where it lacks what the function shows by itself."""
    parameter = inspect.signature(function).parameters.get("metric")
    if parameter is None or "metric" not in result.dims:
        return dict(options)
    wanted, there = options.get("metric", parameter.default), result.metric.values.tolist()
    return {**options, "metric": wanted if wanted in there else there[0]}


def _over_roles(result: xr.Dataset) -> xr.Dataset:
    """Cells by token role, but for those whose effect is so by construction: they would be the strongest of all."""
    cells = by_role(result)
    for flag in ("identity", "no_op"):
        if flag in cells:
            cells = cells.assign(effect=cells.effect.where(~cells[flag]))
    return cells


_peaks = _derived(experiments.peak_by_layer)
_selected = _derived(experiments.select_heads, allow_empty=True)


def _takes_samples(arguments: Mapping[str, Any]) -> bool:
    how = arguments.get("how", "mean")
    return how in ("mean", "resample") and arguments.get("reference") is None


def _of_constraints(call: Callable[..., Any]) -> Method:
    return Method(
        call,
        quantity="effect",
        cells=_over_roles,
        derived={"peaks": _peaks},
        figures={"": _figure("constraint_trace_figure"), "peaks": _figure("window_study_figure")},
    )


METHODS: dict[str, Method] = {
    "causal_trace": Method(
        experiments.causal_trace,
        quantity="effect",
        cells=_over_roles,
        figures={"": _figure("role_figure", metric="probability", quantity="effect")},
    ),
    "notice": Method(experiments.notice, quantity="effect", cells=_over_roles, figures={"": _figure("role_figure")}),
    "patch_heads": Method(
        experiments.patch_heads,
        quantity="effect",
        derived={"selected": _selected},
        figures={"selected": _figure("head_grid_figure")},
    ),
    "constraint_trace": _of_constraints(experiments.constraint_trace),
    "window_study": _of_constraints(experiments.window_study),
    "attention_contribution": Method(
        experiments.attention_contribution,
        quantity="from_source",
        null=None,
        figures={"": _figure("contribution_figure")},
    ),
    "information_flow": Method(
        experiments.information_flow,
        quantity="change",
        figures={"": _figure("information_flow_figure")},
    ),
    "answer_by_layer": Method(
        experiments.answer_by_layer,
        quantity="probability",
        null=None,
        figures={"": _figure("answer_by_layer_figure")},
    ),
    "visual_tokens": Method(
        experiments.visual_tokens,
        quantity="lost",
        null=None,
        figures={"": _figure("visual_tokens_figure")},
        looks_around=lambda given: given.get("replace_by", "mean") in ("mean", "resample") and "mean" not in given,
    ),
    "ablate": Method(
        experiments.ablate,
        quantity="effect",
        figures={"": _figure("ablated_sets_figure")},
        looks_around=_takes_samples,
    ),
    "ablation_sweep": Method(
        experiments.ablation_sweep,
        quantity="effect",
        figures={"": _figure("ablation_grid_figure")},
        passes_to=experiments.ablate,
        looks_around=_takes_samples,
    ),
    "path_patch": Method(experiments.path_patch, quantity="effect", figures={"": _figure("path_patch_figure")}),
    "head_function": Method(
        experiments.head_function,
        quantity="cut_effect",
        derived={"summary": experiments.head_summary},
        figures={"summary": _figure("head_function_figure")},
    ),
}

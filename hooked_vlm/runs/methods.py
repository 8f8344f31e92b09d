"""The methods that a run may use, by name: what is told of their results in tables, and what is drawn."""

from __future__ import annotations

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
    """Of its result, what tables tell: over ``sample`` and cells; 0 where nothing happens."""
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
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ExperimentError(f"the method {name!r} cannot be imported: {error}") from error
    return found if isinstance(found, Method) else Method(found)


def _roles(**options: Any) -> Drawn:
    def drawn(result: xr.Dataset, title: str) -> Figure:
        from hooked_vlm.plots import role_figure

        return role_figure(result, title=title, **options)

    return drawn


def _figure(name: str) -> Drawn:
    """A figure of :mod:`hooked_vlm.plots`, which is imported when it is drawn."""

    def drawn(result: xr.Dataset, title: str) -> Figure:
        from hooked_vlm import plots

        return getattr(plots, name)(result, title=title)

    return drawn


def _peaks(result: xr.Dataset) -> xr.Dataset:
    return experiments.peak_by_layer(result)


def _selected(result: xr.Dataset) -> xr.Dataset:
    return experiments.select_heads(result, allow_empty=True)


def _takes_samples(arguments: Mapping[str, Any]) -> bool:
    how = arguments.get("how", "mean")
    return how in ("mean", "resample") and arguments.get("reference") is None


METHODS: dict[str, Method] = {
    "causal_trace": Method(
        experiments.causal_trace,
        quantity="effect",
        cells=by_role,
        figures={"": _roles(metric="probability", quantity="effect")},
    ),
    "notice": Method(experiments.notice, quantity="effect", cells=by_role, figures={"": _roles()}),
    "patch_heads": Method(
        experiments.patch_heads,
        quantity="effect",
        derived={"selected": _selected},
        figures={"selected": _figure("head_grid_figure")},
    ),
    "constraint_trace": Method(
        experiments.constraint_trace,
        quantity="effect",
        cells=by_role,
        derived={"peaks": _peaks},
        figures={"": _figure("constraint_trace_figure"), "peaks": _figure("window_study_figure")},
    ),
    "window_study": Method(
        experiments.window_study,
        quantity="effect",
        cells=by_role,
        derived={"peaks": _peaks},
        figures={"": _figure("constraint_trace_figure"), "peaks": _figure("window_study_figure")},
    ),
    "attention_contribution": Method(
        experiments.attention_contribution,
        quantity="from_source",
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
        figures={"": _figure("answer_by_layer_figure")},
    ),
    "visual_tokens": Method(
        experiments.visual_tokens,
        quantity="lost",
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
        looks_around=lambda given: given.get("shuffles", 10) > 0,
    ),
}

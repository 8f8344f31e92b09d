"""Many edited runs of the same inputs: ``sweep(model, inputs, edit_sets, metric)``; ``explain`` says what it costs."""

from hooked_vlm.sweep.explain import Group, Plan, explain
from hooked_vlm.sweep.run import Effects, sweep

sweep.explain = explain  # type: ignore[attr-defined]

__all__ = ["Effects", "Group", "Plan", "explain", "sweep"]

"""Many edited runs of the same inputs: ``sweep(model, inputs, edit_sets, metric)``."""

from hooked_vlm.sweep.run import Effects, sweep

__all__ = ["Effects", "sweep"]

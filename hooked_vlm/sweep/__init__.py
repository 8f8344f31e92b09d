"""Many edited runs of the same inputs: ``sweep(model, inputs, edit_sets, metric)``."""

from hooked_vlm.sweep.run import sweep

__all__ = ["sweep"]

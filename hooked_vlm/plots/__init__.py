"""Every figure. Each function draws one and returns it; :func:`save_figure` writes PNG and PDF."""

from hooked_vlm.plots.style import save_figure
from hooked_vlm.plots.trace import causal_trace_figure, patch_trace_figure

__all__ = ["causal_trace_figure", "patch_trace_figure", "save_figure"]

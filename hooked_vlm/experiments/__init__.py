"""The published methods, one file each."""

from hooked_vlm.experiments.causal_trace import causal_trace

__all__ = ["causal_trace"]

"""Whether a checkpoint computes here what it computes in HF, hook point by hook point."""

from hooked_vlm.verify.compare import verify
from hooked_vlm.verify.report import Report, Row

__all__ = ["Report", "Row", "verify"]

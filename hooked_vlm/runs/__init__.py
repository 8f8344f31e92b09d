"""Runs over datasets: described in a file, gone on with at any moment, reported (docs/running.md)."""

from hooked_vlm.runs.built import ExperimentError
from hooked_vlm.runs.experiment import Experiment, ready_names
from hooked_vlm.runs.folder import ResumeError
from hooked_vlm.runs.methods import METHODS, Method
from hooked_vlm.runs.report import write_report
from hooked_vlm.runs.run import Run, run

__all__ = [
    "METHODS",
    "Experiment",
    "ExperimentError",
    "Method",
    "ResumeError",
    "Run",
    "ready_names",
    "run",
    "write_report",
]

"""What the process has from which those of ``disturbed`` are forked."""

import importlib

import torch

from tests.runs import disturbed

torch.set_num_threads(1)  # a process with one thread is safely forked

for _module in (
    "h5netcdf",
    "h5py",
    "filelock",
    "jinja2",
    "matplotlib.pyplot",
    "pydantic",
    "transformers",
    "hooked_vlm.experiments",
    "hooked_vlm.plots",
    "hooked_vlm.runs.run",
    "hooked_vlm.runs.report",
):
    importlib.import_module(_module)

for _name in ("toy-blip-vqa", "toy-llava"):
    disturbed.a_model(_name)

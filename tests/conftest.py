"""What holds for every test: offline, signatures checked, seeded, and the cores shared fairly."""

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test reaches out
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

import tests.typechecker

# Before the packages are imported: every signature of theirs is checked at each call, the shapes with them.
jaxtyping.jaxtyped = tests.typechecker.jaxtyped
jaxtyping.install_import_hook(["hooked_vlm", "weights_conversion"], "tests.typechecker.typechecker")

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

gc.disable()  # until all is imported: what is imported stays, and is much to search for garbage

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """One thread a process for the quick suite: its models are too small to share, and the processes fill the cores."""
    if config.option.markexpr == "not slow":
        torch.set_num_threads(1)


LONGEST_FILES = ("test_docs.py", "test_cluster.py", "test_interrupted.py", "test_benchmarks.py", "test_papers.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a process takes a whole file, and one that begins last would be waited for."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


def pytest_collection_finish() -> None:
    """From here on garbage is collected, but is not looked for among what was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def settled() -> Iterator[None]:
    """Nor is it looked for among what a module leaves, its cached models above all."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random numbers, and leaves the settings of torch as it found them."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack trace for every device that is not there
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures unchecked, as they are for users: to give what they forbid, or because the checks take most of the
    time of a small forward, in a test that makes thousands."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of reference data beside the checkout; not everyone has it. Mark the test `reference_data` too."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"there is no reference data in ../{folder.relative_to(ROOT.parent)}")
    return folder

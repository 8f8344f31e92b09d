"""What tests of methods share: both toys, and a sample with everything."""

import jaxtyping
import pytest

from hooked_vlm import HookedVLM
from hooked_vlm.data import shapes

TOYS = ("toy-blip-vqa", "toy-llava")


@pytest.fixture(scope="module")
def toys():
    return {name: HookedVLM.from_pretrained(name) for name in TOYS}


@pytest.fixture(params=TOYS)
def toy(request, toys):
    return toys[request.param]


@pytest.fixture(scope="module")
def shown():
    """A sample with everything."""
    return shapes(1, seed=7, kinds=("color",))[0]


@pytest.fixture
def checked(monkeypatch):
    """Signatures checked all the same."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", False)


@pytest.fixture(scope="module")
def unchecked_throughout():
    """Signatures are not checked in a module whose tests make thousands of small forwards; other tests check them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield

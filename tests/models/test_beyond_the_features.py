"""LLaVA reads no further than its feature layers: the rest of the vision tower runs for those who look, and only for
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, HookPoint
from tests.tiny_llava import VISION, hf_llava, prompts

N_LAYERS = VISION["num_hidden_layers"]
FEATURES = {"last but one": -2, "the embeddings": [0], "several": [-4, 1], "last": -1}
READ = {"last but one": N_LAYERS - 1, "the embeddings": 0, "several": 1, "last": N_LAYERS}
"""How many layers run for the features' sake."""

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(params=FEATURES)
def features(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["1.5", "next"])
def model_and_inputs(request: pytest.FixtureRequest, features: str) -> tuple[HookedVLM, dict[str, Any]]:
    hf = hf_llava(tiles=request.param, vision_feature_layer=FEATURES[features])
    return HookedVLM.from_hf(hf), prompts(hf, (1, 2))


@contextmanager
def counted(model: HookedVLM) -> Iterator[Counter[str]]:
    """How often each part of the vision tower is called."""
    calls: Counter[str] = Counter()
    parts = {f"block {layer}": block for layer, block in enumerate(model.vision_encoder.blocks)}
    parts["ln_post"] = model.vision_encoder.ln_post
    handles = [
        part.register_forward_hook(lambda _module, _inputs, _output, name=name: calls.update([name]))
        for name, part in parts.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def expected_calls(n_layers: int, *, ln_post: bool = False) -> dict[str, int]:
    return {**{f"block {layer}": 1 for layer in range(n_layers)}, **({"ln_post": 1} if ln_post else {})}


def look(activation: Tensor, hook: HookPoint) -> None:
    hook.ctx["seen"] = True


def beyond(model: HookedVLM, features: str) -> list[str]:
    blocks = tuple(f"vision_encoder.blocks.{layer}." for layer in range(READ[features], N_LAYERS))
    tower = "vision_encoder."
    return [name for name in model.hook_names if name.startswith((*blocks, f"{tower}ln_post", f"{tower}hook_pooled"))]


@torch.no_grad()
def test_nothing_beyond_runs_unless_someone_looks_there(model_and_inputs, features: str) -> None:
    model, batch = model_and_inputs
    elsewhere = [name for name in model.hook_names if name not in beyond(model, features)]
    with counted(model) as calls:
        plain = model(batch)
    assert calls == expected_calls(READ[features])
    with counted(model) as calls:
        looked_at = model.run_with_hooks(batch, fwd_hooks=[(elsewhere, look)])
        assert torch.equal(looked_at, plain)
    assert calls == expected_calls(READ[features])
    with counted(model) as calls:
        model.generate(batch, max_new_tokens=3, return_type="tokens")
    assert calls == expected_calls(READ[features])


@torch.no_grad()
def test_who_looks_beyond_sees_it_and_changes_no_answer(model_and_inputs, features: str) -> None:
    """Nor does an edit there: nothing reads it."""
    model, batch = model_and_inputs
    plain = model(batch)
    _, everything = model.run_with_cache(batch)
    for name in [*beyond(model, features)[::5], "vision_encoder.hook_pooled"]:
        with counted(model) as calls:
            logits, cache = model.run_with_cache(batch, names_filter=name)
        assert torch.equal(logits, plain)
        assert torch.equal(cache[name], everything[name])
        assert calls == expected_calls(N_LAYERS, ln_post=True)
        edited = model.run_with_hooks(batch, fwd_hooks=[(name, lambda activation, hook: activation + 1)])
        assert torch.equal(edited, plain)


@torch.no_grad()
def test_edits_before_the_features_are_felt_beyond_too(model_and_inputs, features: str) -> None:
    model, batch = model_and_inputs
    pooled = "vision_encoder.hook_pooled"
    plain = model.run_with_hooks(batch, stop_at=pooled)
    edit = [("vision_encoder.hook_full_embed", lambda states, hook: states + torch.randn_like(states))]
    assert float((model.run_with_hooks(batch, fwd_hooks=edit, stop_at=pooled) - plain).abs().max()) > 1e-3


@torch.no_grad()
def test_features_are_the_streams_that_the_config_says(model_and_inputs, features: str) -> None:
    model, batch = model_and_inputs
    _, cache = model.run_with_cache(batch)
    streams = [cache["resid_pre", layer, "vision_encoder"] for layer in range(N_LAYERS)]
    streams.append(cache["resid_post", N_LAYERS - 1, "vision_encoder"])
    said = FEATURES[features]
    expected = torch.cat([streams[layer] for layer in (said if isinstance(said, list) else [said])], dim=-1)
    assert torch.equal(cache["vision_encoder.hook_out"], expected)
    assert torch.equal(cache["projector.hook_in"], expected[:, 1:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_the_answer_are_the_same_whether_someone_looks_beyond(attention: str) -> None:
    hf = hf_llava()
    model, batch = HookedVLM.from_hf(hf, attention=attention), prompts(hf, (1, 2))

    def gradient(**hooks: Any) -> Tensor:
        with model.hooks(**hooks):
            return torch.autograd.grad(model(batch).sin().sum(), model.vision_encoder.embed.pos)[0]

    assert torch.equal(gradient(), gradient(fwd_hooks=[("vision_encoder.hook_pooled", look)]))

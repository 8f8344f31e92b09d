"""AtP*'s two fixes, against what they are defined as."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_vlm.analysis import atp
from hooked_vlm.analysis.attention_fix import key_effect, query_effect
from hooked_vlm.edits import Replace
from tests.analysis.pairs import pair, toy


@pytest.mark.parametrize("sharpness", [1.0, 30.0, 300.0])
def test_softmax_is_made_anew_for_every_query_and_key(sharpness):
    """At any saturation, and where keys are masked, even all but one."""
    gradient, change = torch.randn(2, 3, 5, 7), sharpness * torch.randn(2, 3, 5, 7)
    scores = sharpness * torch.randn(2, 3, 5, 7)
    scores[:, :, 0, 1:] = scores[:, :, 1, 3:] = torch.finfo(torch.float32).min

    def effect(patched):
        return (gradient.double() * (patched.double().softmax(-1) - scores.double().softmax(-1))).sum(-1)

    torch.testing.assert_close(
        query_effect(gradient, scores, change).double(), effect(scores + change).transpose(1, 2), atol=1e-5, rtol=1e-4
    )
    by_key = []
    for key in range(7):
        patched = scores.clone()
        patched[..., key] += change[..., key]
        by_key.append(effect(patched).sum(-1))
    expected = torch.stack(by_key, dim=1)
    torch.testing.assert_close(key_effect(gradient, scores, change).double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["llava", "blip", "toy-llava", "toy-blip-vqa"])
def test_queries_and_keys_are_recomputed_exactly(name):
    """Up to the pattern all is as when the node is patched; what follows is linear. Rotary and shared keys too."""
    made = toy(name) if name.startswith("toy") else pair(name)
    kinds = ["q", "k", *(["cross_q", "cross_k"] if "blip" in name else [])]
    scores = atp(*made.all, nodes=kinds, qk_fix=True)
    tower, layer = made.model.towers[1] if "blip" in name else "language_model", 1
    runs = made.runs
    for kind in kinds:
        attention = f"{tower}.blocks.{layer}.{'cross_attn' if 'cross' in kind else 'attn'}"
        site, pattern = f"{attention}.hook_{kind[-1]}", f"{attention}.hook_pattern"
        _, source = runs.activations(runs.corrupted, site)
        with runs.tape(runs.clean, [pattern], [pattern]) as tape:
            gradient = tape.backward()[pattern]
        own = scores[kind].sel(tower=tower, layer=layer).transpose("sample", ..., scores[kind].dims[-1])
        for dim in own.dims:
            own = own.dropna(dim, how="all")
        for position, head in ((0, 0), (1, 1), (own.shape[1] - 1, own.shape[2] - 1)):
            patched = {}

            def keep(activation, hook, patched=patched):
                patched[hook.name] = activation

            edit = Replace(site, source, positions=position, heads=head)
            with torch.no_grad(), made.model.hooks([(pattern, keep)]):
                made.model.patch(made.clean, [edit])
            expected = ((patched[pattern] - tape.activations[pattern]) * gradient).sum((1, 2, 3))
            np.testing.assert_allclose(own[:, position, head], expected, atol=2e-5 * max(1, abs(gradient).max()))


def test_the_fix_is_for_queries_and_keys_alone():
    made = pair("blip")
    plain, fixed = (atp(*made.all, nodes=["qkv", "heads"], qk_fix=fix) for fix in (False, True))
    assert all(plain[kind].equals(fixed[kind]) for kind in ("v", "z", "cross_v", "cross_z"))
    assert not any(plain[kind].equals(fixed[kind]) for kind in ("q", "k", "cross_q", "cross_k"))


@pytest.mark.parametrize("name", ["blip", "llava"])
def test_grad_drop_is_the_mean_over_layers_left_out(name):
    """Of each layer in turn, what it adds is held: no gradient passes through it."""
    made = pair(name)
    sites = {
        "z": "language_model.blocks.1.attn.hook_z" if name == "llava" else "question_encoder.blocks.0.attn.hook_z",
        "resid_post": "vision_encoder.blocks.0.hook_resid_post",
    }
    result = atp(*made.all, nodes=list(sites), grad_drop=True)
    runs = made.runs
    _, other = runs.activations(runs.corrupted, list(sites.values()))
    n_read = {"vision_encoder": 3} if name == "llava" else {}
    layers = [
        (tower, layer)
        for tower in made.model.towers
        if hasattr(made.model.get_submodule(tower), "blocks")
        for layer in range(n_read.get(tower, made.model.get_submodule(tower).config.n_layers))
    ]
    totals = dict.fromkeys(sites, 0.0)
    for tower, layer in layers:
        held = [
            n for n in made.model.hook_names if n.startswith(f"{tower}.blocks.{layer}.hook_") and n.endswith("_out")
        ]
        hooks = [(held, lambda activation, hook: activation.detach())]
        with runs.tape(runs.clean, list(sites.values()), list(sites.values()), fwd_hooks=hooks) as tape:
            gradients = tape.backward()
        for kind, site in sites.items():
            if site in gradients and not (kind == "z" and site.startswith(f"{tower}.blocks.{layer}.")):
                effect = (other[site] - tape.activations[site]) * gradients[site]
                totals[kind] = totals[kind] + effect.sum(-1).abs()
    for kind, site in sites.items():
        tower, layer = site.split(".")[0], int(site.split(".")[2])
        expected = totals[kind] / (len(layers) - (kind == "z"))
        own = result[kind].sel(tower=tower, layer=layer).values
        own = own[tuple(slice(size) for size in expected.shape)]
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)
        assert (own >= 0).all()

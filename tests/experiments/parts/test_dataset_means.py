"""Means over samples against the same by hand; what is put in, and who is dropped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.data import shapes
from hooked_vlm.experiments.ablate import ablate
from hooked_vlm.experiments.parts.cases import prepared
from hooked_vlm.experiments.parts.dataset_means import dataset_means

LD = {"metric": "logit_difference"}
COLORS = shapes(5, seed=7, kinds=("color",))
SAMPLE, MOVER = COLORS[0], "language_model.L1.attn.H1"

# The pages of the documentation run the same code with every signature checked.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


@torch.no_grad()
def test_means_by_position_role_and_all_together_and_kept_in_a_file(llava, tmp_path):
    samples = shapes(4, seed=7)
    site, lengths = "language_model.blocks.2.hook_mlp_out", []
    kept = []
    for sample in samples:
        inputs = prepared(llava, sample)
        kept.append((inputs, llava.run_with_cache(inputs, names_filter=site)[1][site][0]))
        lengths.append(len(kept[-1][1]))
    assert len(set(lengths)) > 1
    every = dataset_means(llava, samples, site, by="global")
    inputs, activation = kept[0]
    assert torch.allclose(every.of(llava, inputs, site)[0, 0], torch.cat([own for _, own in kept]).mean(0), atol=1e-5)
    roles = dataset_means(llava, samples, site, by="role")
    found = roles.of(llava, inputs, site)
    assert found.shape == (1, *activation.shape)
    subjects = torch.cat([own[list(run.spans["subject"][0])] for run, own in kept])
    images = torch.cat([own[list(run.spans["image"][0])] for run, own in kept])
    for name, mean in (("subject", subjects.mean(0)), ("image", images.mean(0))):
        for position in inputs.spans[name][0]:
            assert torch.allclose(found[0, position], mean, atol=1e-5)
    roles.save(tmp_path / "means.safetensors")
    again = type(roles).load(tmp_path / "means.safetensors")
    assert torch.equal(again.of(llava, inputs, site), found)
    assert (again.by, again.attributes) == (
        "role",
        {name: own for name, own in roles.attributes.items() if name != "by"},
    )
    assert again.attributes["samples_used"] == 4
    with pytest.raises(ValueError, match="several shapes: .* of "):
        dataset_means(llava, samples, site, by="position")
    same = [one for one, length in zip(samples, lengths, strict=True) if length == lengths[0]]
    by_position = dataset_means(llava, same, site)
    own = [part for (_, part), length in zip(kept, lengths, strict=True) if length == lengths[0]]
    assert torch.allclose(by_position.of(llava, inputs, site)[0], torch.stack(own).mean(0), atol=1e-5)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no means"):
        type(roles).load(tmp_path / "no.safetensors")


def test_means_that_were_made_before_are_taken(llava):
    means = dataset_means(llava, COLORS, "language_model.*.hook_z")
    found = ablate(llava, SAMPLE, [MOVER], reference=means)
    assert np.allclose(found.ablated, ablate(llava, SAMPLE, [MOVER], reference=COLORS).ablated, atol=1e-6)
    assert found.attrs["by"] == "position"
    assert SAMPLE.id in found.attrs["reference_samples"]
    with pytest.raises(ValueError, match="no mean of language_model.blocks.3.hook_mlp_out"):
        ablate(llava, SAMPLE, ["language_model.L3.mlp"], reference=means)


def test_samples_of_other_lengths_are_dropped_and_said(llava):
    mixed = [*COLORS[:2], *[one for one in shapes(8, seed=9) if len(one.question.split()) != 6][:2]]
    found = ablate(llava, mixed, [MOVER], reference=COLORS)
    assert found.sample.values.tolist() == [one.id for one in COLORS[:2]]
    assert found.attrs["samples_dropped"] == 2
    assert "as many positions as no sample of the mean" in found.attrs["dropped"]
    with pytest.raises(ValueError, match="several shapes"):
        ablate(llava, mixed, [MOVER])
    with pytest.raises(ValueError, match="no sample of the mean has"):
        ablate(llava, mixed[2], [MOVER], reference=COLORS, by="role")
    # A word that only one of them has would be its own mean.
    with pytest.raises(ValueError, match="1 sample of the mean has 'what' .* it takes 2 or more"):
        ablate(llava, [COLORS[0], replace(COLORS[1], question="how is it ?", spans={})], [MOVER], by="role")
    assert ablate(llava, mixed, [MOVER], by="global").attrs["samples_used"] == 4

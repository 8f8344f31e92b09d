"""Runs of one method on the same samples, side by side."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from hooked_vlm import HookedVLM
from hooked_vlm.corruptions import Scaled
from hooked_vlm.data import shapes
from hooked_vlm.experiments import causal_trace
from hooked_vlm.experiments.compare import TEXT, compare, compare_results


@pytest.fixture(scope="module")
def blip() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture(scope="module")
def samples():
    return shapes(4, seed=7, kinds=("color",))


@pytest.fixture(scope="module")
def results(blip, samples):
    towers = ["question_encoder"]
    noised = causal_trace(blip, samples, Scaled(0.0), towers=towers)
    return {"nothing seen": noised, "SIP": causal_trace(blip, samples, "sip", towers=towers)}


def test_a_result_agrees_with_itself_and_not_with_its_opposite(results):
    sip = results["SIP"]
    opposite = sip.assign(normalized=-sip.normalized, effect=-sip.effect)
    compared = compare_results({"one": sip, "same": sip, "opposite": opposite})
    np.testing.assert_allclose(compared.rank_correlation, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-12)
    np.testing.assert_allclose(compared.low.sel(run="one", other="same"), 1)
    np.testing.assert_allclose(compared.high.sel(run="one", other="opposite"), -1)


def test_removing_the_picture_and_exchanging_it_point_at_the_same_cells(results):
    compared = compare_results(results)
    found = compared.rank_correlation.sel(run="nothing seen", other="SIP")
    assert 0.2 < found < 0.999
    assert (
        compared.low.sel(run="nothing seen", other="SIP") <= found <= compared.high.sel(run="nothing seen", other="SIP")
    )
    assert compared.attrs["samples_used"] == 4
    assert compared.attrs["cells_compared"] > 50
    assert "subject" in compared.role.values


def test_one_call_equals_its_parts(blip, samples, results):
    ways = {"nothing seen": Scaled(0.0), "SIP": "sip"}
    compared = compare(blip, samples[:2], ways, towers=["question_encoder"])
    first_two = compare_results({name: result.isel(sample=[0, 1]) for name, result in results.items()})
    np.testing.assert_allclose(compared.rank_correlation, first_two.rank_correlation, atol=1e-12)
    assert compared.run.values.tolist() == ["nothing seen", "SIP"]
    assert compared.attrs["corruption"] == "Scaled | sip"


def test_only_samples_that_every_run_can_use_are_compared(blip, samples):
    lacking = [replace(samples[0], question_cf=None), samples[1], replace(samples[3], image_cf=None)]
    compared = compare(blip, lacking, {"SIP": "sip", "STR": "str"}, towers=["question_encoder"], sites=["resid"])
    assert compared.sample.values.tolist() == [samples[1].id]
    assert compared.attrs["samples_dropped"] == 2
    assert {(one[0], one[1]) for one in json.loads(compared.attrs["dropped"])} == {
        ("STR", samples[0].id),
        ("SIP", samples[3].id),
    }


def test_models_are_compared_by_relative_depth_in_the_tower_that_reads_the_question(blip, samples):
    llava = HookedVLM.from_pretrained("toy-llava")
    models = {"BLIP": blip, "again": blip, "LLaVA": llava}
    compared = compare(models, samples[:2], "str", which="text", sites=["resid", "mlp"])
    assert compared.tower.values.tolist() == [TEXT]
    assert compared.depth.values[[0, -1]].tolist() == [0, 1]
    assert compared.rank_correlation.sel(run="BLIP", other="again") == pytest.approx(1)
    assert abs(compared.rank_correlation.sel(run="BLIP", other="LLaVA")) < 1
    assert {"subject", "what"} <= set(compared.role.values)


def test_bad_input(results):
    with pytest.raises(ValueError, match="at least two runs"):
        compare_results({"SIP": results["SIP"]})
    with pytest.raises(ValueError, match="no normalized of kl_divergence"):
        compare_results(results, metric="kl_divergence")
    others = results["SIP"].assign_coords(sample=[f"other {place}" for place in range(4)])
    with pytest.raises(ValueError, match="no sample could be used in every run"):
        compare_results({**results, "others": others})

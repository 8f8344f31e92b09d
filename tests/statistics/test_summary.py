"""Statistics of labelled results, of hand and of every kind of method; and their tables."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import pytest
import xarray as xr

from hooked_vlm import HookedVLM
from hooked_vlm.data import shapes
from hooked_vlm.experiments import RandomTokens, ablate, by_role, causal_trace, information_flow, patch_heads
from hooked_vlm.experiments import visual_tokens as overwrite_tokens
from hooked_vlm.experiments.parts.identification import NextToken
from hooked_vlm.results import load, save
from hooked_vlm.statistics import estimate, paired, summarize, to_rows, write_table

FIELDS = ["n", "mean", "low", "high", "median", "median_low", "median_high", "p", "p_corrected"]


def result(n: int = 8, seed: int = 0, names: str = "abcdefghijkl") -> xr.Dataset:
    """Effects of two metrics over samples, layers and heads; one cell is missing, and one in half of the samples."""
    random = np.random.default_rng(seed)
    effect = random.normal(0.5, 1, size=(2, n, 3, 2)) * np.array([1, 100])[:, None, None, None]
    effect[:, :, 2, 1] = np.nan
    effect[:, : n // 2, 0, 1] = np.nan
    return xr.Dataset(
        {
            "effect": (("metric", "sample", "layer", "head"), effect),
            "clean": (("metric", "sample"), random.normal(size=(2, n))),
            "share": (("sample", "layer"), random.uniform(size=(n, 3))),
            "correct": ("sample", random.uniform(size=n) < 0.5),
            "said": ("sample", ["yes"] * n),
            "noise_floor": ("metric", [1e-6, 1e-6]),
        },
        {
            "metric": ["probability", "logit_difference"],
            "sample": list(names[:n]),
            "layer": [0, 1, 2],
            "head": [0, 1],
            "kind": ("layer", ["early", "early", "late"]),
            "number": (("head", "layer"), [[0, 2, 4], [1, 3, 5]]),
            "question": ("sample", [f"{name} ?" for name in names[:n]]),
        },
        {"model": "toy", "method": "patch_heads"},
    )


def test_a_summary_holds_what_arrays_give_with_the_cells_own_labels():
    values = result()
    options: dict[str, Any] = {"tested": "t", "level": 0.9, "resamples": 50, "permutations": 99, "seed": 3}
    found = summarize(values, "effect", metric="probability", **options)
    own = estimate(values.effect.sel(metric="probability").values, **options)
    assert list(found.data_vars) == FIELDS
    for name, field in own._asdict().items():
        assert found[name].dims == ("layer", "head")
        np.testing.assert_array_equal(found[name].values, field)
    assert found.kind.values.tolist() == ["early", "early", "late"]
    assert {"layer", "head", "kind", "number", "metric"} == set(found.coords)
    assert found.n.values.tolist() == [[8, 4], [8, 8], [8, 0]]
    assert found.attrs == {
        "model": "toy",
        "method": "patch_heads",
        "quantity": "effect",
        "metric": "probability",
        "against": "0",
        "test": "sign flips of the t, corrected by the maximum over cells",
        "level": 0.9,
        "resamples": 50,
        "permutations": 99,
        "statistics_seed": 3,
    }


def test_each_metric_is_a_family_of_its_own():
    values = result()
    found = summarize(values, "effect")
    assert found.p.dims == ("metric", "layer", "head")
    for metric in values.metric.values.tolist():
        xr.testing.assert_equal(found.sel(metric=metric), summarize(values, "effect", metric=metric))


def test_a_quantity_without_cells_or_metrics():
    found = summarize(result(), "correct", against=0.5)
    assert not found.dims
    assert found["mean"] == result().correct.mean()
    assert found.attrs["against"] == "0.5"
    assert summarize(result(), "share").p_corrected.dims == ("layer",)


def test_nothing_is_tested_against_nothing():
    found = summarize(result(), "share", against=None)
    assert list(found.data_vars) == FIELDS[:-2]
    assert "test" not in found.attrs
    xr.testing.assert_equal(found, summarize(result(), "share").drop_vars(["p", "p_corrected"]))


def test_pairs_of_samples_by_name():
    """Of another result, of an array and of another quantity, whatever the order of samples and cells."""
    one, other = result(), result(10, seed=1, names="cbaxhgfedz").assign_coords(kind=("layer", ["x", "y", "z"]))
    found = summarize(one, "effect", metric="probability", against=other.isel(head=[1, 0], layer=[2, 0, 1]))
    shared = list("abcdefgh")
    own, theirs = (two.effect.sel(metric="probability", sample=shared).values for two in (one, other))
    for name, field in paired(own, theirs)._asdict().items():
        np.testing.assert_array_equal(found[name].values, field)
    assert found.n.max() == 8
    assert found.attrs["against"] == "effect of patch_heads"
    assert found.kind.values.tolist() == ["early", "early", "late"]
    array = summarize(one, "effect", metric="probability", against=other.effect.rename("other"))
    xr.testing.assert_equal(array, found)
    assert array.attrs["against"] == "other"
    less = summarize(one, "effect", metric="probability", against=other.sel(sample=["h", "a", "x"]))
    assert less.n.values.tolist() == [[2, 0], [2, 2], [2, 0]]


def test_what_has_fewer_dims_is_the_counterpart_of_all_cells():
    values = result()
    found = summarize(values, "effect", metric="probability", against="clean")
    by_hand = (values.effect - values.clean).sel(metric="probability")
    np.testing.assert_allclose(found["mean"].values, by_hand.mean("sample").transpose("layer", "head").values)
    control = values.effect.sel(head=0, drop=True)
    against_one = summarize(values, "effect", against=control)
    assert (against_one["mean"].sel(head=0) == 0).all()
    assert (against_one.p.sel(head=0) == 1).all()


NO_SAMPLE = result().isel(sample=0, drop=True)


@pytest.mark.parametrize(
    ("values", "quantity", "options", "said"),
    [
        (NO_SAMPLE, "effect", {}, "no samples; its dims are metric, layer, head"),
        (result(), "efect", {}, "no numbers 'efect' over samples; it has effect, clean, share, correct"),
        (result(), "said", {}, "no numbers 'said'"),
        (result(), "noise_floor", {}, "no numbers 'noise_floor'"),
        (result(), "effect", {"metric": "loss"}, "no metric 'loss'; it has probability, logit_difference"),
        (result(), "share", {"metric": "probability"}, "share is not of any metric"),
        (result(), "effect", {"against": "nothing"}, "no numbers 'nothing'"),
        (result(), "share", {"against": "effect"}, "no dims of its own"),
        (result(), "effect", {"against": NO_SAMPLE.effect}, "that needs samples"),
        (result(), "effect", {"against": result(names="mnopqrst")}, "no sample is in both; the first of each: a and m"),
        (result(), "effect", {"against": result().isel(layer=[0, 1])}, r"other cells: layer is \[0 1 2\] and \[0 1\]"),
        (result(), "effect", {"against": result(names="aabcdefg")}, "some name is there twice"),
        (result().assign(share=np.inf * result().share), "share", {}, "infinite"),
    ],
)
def test_what_cannot_be_summarized(values, quantity, options, said):
    with pytest.raises(ValueError, match=said):
        summarize(values, quantity, **options)


def _heads(model: HookedVLM, samples: Any) -> xr.Dataset:
    return patch_heads(model, samples, "sip", positions="subject", attention=["cross_attn"])


def _tokens(model: HookedVLM, samples: Any) -> xr.Dataset:
    conditions = {"one": RandomTokens(1), "nine": RandomTokens(9)}
    return overwrite_tokens(model, samples, conditions, replace_by="zero", evaluate={"vqa": NextToken()})


METHODS: dict[str, tuple[str, Callable[..., xr.Dataset], str, tuple[str, ...]]] = {
    "causal_trace": (
        "toy-blip-vqa",
        lambda model, samples: by_role(causal_trace(model, samples, "sip", sites=["mlp"])),
        "effect",
        ("metric", "role", "tower", "site", "layer"),
    ),
    "patch_heads": ("toy-blip-vqa", _heads, "normalized", ("metric", "tower", "attention", "layer", "head")),
    "ablate": (
        "toy-blip-vqa",
        lambda model, samples: ablate(model, samples, {"one": ["question_encoder.L3.mlp"]}, "zero", controls=2),
        "effect",
        ("metric", "set"),
    ),
    "information_flow": (
        "toy-llava",
        lambda model, samples: information_flow(model, samples, [("question", "last")], prompt="{question}"),
        "relative",
        ("edge", "layer"),
    ),
    "visual_tokens": ("toy-llava", _tokens, "identified", ("evaluation", "condition")),
}


@pytest.fixture(scope="module", params=METHODS)
def of_method(request: pytest.FixtureRequest) -> tuple[xr.Dataset, xr.Dataset, tuple[str, ...]]:
    """A method's result of three samples, its summary, and the dims of that."""
    toy, method, quantity, dims = METHODS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # methods have tests of their own
        found = method(HookedVLM.from_pretrained(toy), shapes(3, seed=7, kinds=("color",)))
    return found, summarize(found, quantity), dims


def test_every_method_can_be_summarized(of_method, tmp_path):
    found, summary, dims = of_method
    values = found[summary.attrs["quantity"]]
    assert summary.n.dims == dims
    xr.testing.assert_equal(summary.n, values.notnull().sum("sample").transpose(*dims))
    xr.testing.assert_allclose(summary["mean"], values.mean("sample").transpose(*dims))
    xr.testing.assert_allclose(summary["median"], values.median("sample").transpose(*dims))
    there = summary.n.values > 0
    p, p_corrected = summary.p.values[there], summary.p_corrected.values[there]
    assert (p >= 2 / 2**3).all()
    assert (p_corrected >= p).all()
    assert (p_corrected <= 1).all()
    assert (summary.low <= summary["mean"] + 1e-12).values[there].all()
    assert summary.attrs["model"] == found.attrs["model"]
    save(summary, tmp_path / "summary.nc")
    xr.testing.assert_identical(load(tmp_path / "summary.nc"), summary)


def test_every_method_has_a_table(of_method, tmp_path):
    """A row for each cell that is there, under labels of its own; numbers are read back as they were."""
    _, summary, dims = of_method
    write_table(summary, tmp_path / "cells.csv")
    with (tmp_path / "cells.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == (summary.n > 0).sum()
    assert len({tuple(row[dim] for dim in dims) for row in read}) == len(read)
    assert set(dims) | set(FIELDS) <= set(read[0])
    labels = {dim: {str(label): label for label in summary[dim].values.tolist()} for dim in dims}
    for row in read:
        cell = summary.sel({dim: labels[dim][row[dim]] for dim in dims})
        assert [float(row[field]) for field in FIELDS] == [cell[field].item() for field in FIELDS]
        assert all(row[name] == str(label.item()) for name, label in cell.coords.items())


def test_rows_hold_labels_then_numbers():
    found = summarize(result(), "effect", metric="probability")
    rows = to_rows(found)
    assert list(rows[0]) == ["layer", "head", "metric", "kind", "number", *FIELDS]
    assert [(row["layer"], row["head"], row["kind"]) for row in rows] == [
        *((0, 0, "early"), (0, 1, "early"), (1, 0, "early"), (1, 1, "early"), (2, 0, "late"))
    ]
    assert [row["number"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[3]["mean"] == found["mean"].values[1, 1]
    assert to_rows(summarize(result(), "correct"))[0]["n"] == 8


def test_a_table_that_cannot_be_made_leaves_the_old_one(tmp_path):
    path = tmp_path / "cells.csv"
    write_table(summarize(result(), "share", against=None), path)
    before = path.read_bytes()
    assert before.splitlines()[0] == b"layer,kind,n,mean,low,high,median,median_low,median_high"
    with pytest.raises(ValueError, match="what summarize returns"):
        write_table(result(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

"""The methods that a run may use: each one's result, table and figures come out of it."""

from __future__ import annotations

import csv
import inspect
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from hooked_vlm import experiments, results
from hooked_vlm.data import Sample
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.models import HookedVLM
from hooked_vlm.runs import METHODS, Experiment, Method, run

NOT_OF_A_FILE = {
    "edit_side_effects": "it is held against an edit, which a file cannot hold",
}
"""Methods over samples that a file cannot name."""

NO_METHODS = {"dataset_means", "mean_visual_embedding"}
"""What is made of samples for methods, and is no result."""

SUBJECT = {"span": "subject", "by": "object", "prompt": "{question}"}
HEADS = [{"tower": "question_encoder", "attention": "cross_attn", "layer": 3, "number": number} for number in (0, 1)]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "causal_trace": ("blip", {"corruption": {"kind": "AdditiveGaussian", "draws": 2}, "sites": ["resid"]}),
    "notice": ("blip", {"corruption": "str", "sites": ["mlp"], "metrics": ["probability"]}),
    "patch_heads": ("blip", {"positions": "subject", "attention": ["cross_attn"], "metrics": ["probability"]}),
    "constraint_trace": ("llava", {**SUBJECT, "positions": "text", "sites": ["attn"], "metrics": ["logit_difference"]}),
    "window_study": ("llava", {**SUBJECT, "positions": "text", "sites": ["attn"], "widths": [2]}),
    "attention_contribution": ("llava", {"source": "subject", "prompt": "{question}"}),
    "information_flow": ("llava", {"edges": [["image", "last"], ["last", "last"]]}),
    "answer_by_layer": ("llava", {}),
    "visual_tokens": (
        "llava",
        {"conditions": {"it": {"kind": "ObjectTokens"}}, "evaluate": {"vqa": {"kind": "NextToken"}}},
    ),
    "ablate": ("blip", {"components": {"two": HEADS, "MLPs": ["*.mlp"]}, "how": "zero"}),
    "ablation_sweep": ("blip", {"how": "zero", "nodes": ["mlps"], "metrics": ["probability"]}),
    "path_patch": (
        "llava",
        {"corruption": "sip", "senders": ["language_model.L1.attn.H1"]},
    ),
    "head_function": ("blip", {"heads": HEADS, "query": "subject", "shuffles": 1}),
}


def test_every_method_is_in_the_table() -> None:
    """A method goes through samples by ``over_samples``, says how far it is, and gives a dataset."""
    over = set()
    for name in experiments.__all__:
        found = getattr(experiments, name)
        if inspect.isfunction(found) and "progress" in inspect.signature(found).parameters:
            over.add(name)
    # What a sweep takes beside its own arguments goes to `ablate`.
    assert over - NO_METHODS - NOT_OF_A_FILE.keys() == METHODS.keys() - {"ablation_sweep"}
    assert {name: own.call for name, own in METHODS.items()} == {name: getattr(experiments, name) for name in METHODS}
    assert CASES.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_its_result_has_a_table_and_figures(name: str, tmp_path: Path) -> None:
    toy, options = CASES[name]
    model = {"blip": "toy-blip-vqa", "llava": "toy-llava"}[toy]
    tables = {
        "model": model,
        "samples": {"shapes": 2, "seed": 7, "kinds": ["color"]},
        "methods": {"own": {"use": name, **options}},
        "statistics": {"resamples": 10, "permutations": 10},
    }
    ended = run(Experiment.of(tables), tmp_path / "run")
    own, method = ended.summary["steps"]["own"], METHODS[name]
    assert (own["used"], own["dropped"], own["failed"], own["notes"]) == (2, 0, 0, [])
    assert own["method"] == name
    assert own["results"] == ["own", *(f"own_{derived}" for derived in method.derived)]
    for result in own["results"]:
        found = results.load(tmp_path / "run" / "results" / f"{result}.nc")
        assert found.attrs["method"]
        assert found.sizes
    assert own["figures"] == [f"own_{figure}" if figure else "own" for figure in method.figures]
    for caption in own["captions"].values():
        assert caption.endswith(".")
        assert not {"`", "\n", "Args:"} & {*caption, *caption.split()}
    for figure in own["figures"]:
        assert (tmp_path / "run" / "figures" / f"{figure}.png").stat().st_size > 3000
    rows = list(csv.DictReader((tmp_path / "run" / "tables" / "own.csv").open()))
    assert rows
    assert any(float(row["mean"]) != 0 for row in rows)
    assert {row["n"] for row in rows} <= {"1", "2"}
    assert ("p_corrected" in rows[0]) == (method.null is not None)
    quantity = ended.results["own"][str(method.quantity)]
    assert "sample" in quantity.dims


def brightness(
    model: HookedVLM, samples: Sample | list[Sample], channel: int = 0, *, progress: bool = False
) -> xr.Dataset:
    """A method of one's own: how bright the pictures are that the model sees."""

    def one(sample: Sample) -> xr.Dataset:
        pixels = model.prepare(sample.picture(), sample.question).pixel_values[:, channel]
        return xr.Dataset({"brightness": (("sample", "row"), pixels.mean(-1).numpy())})

    return over_samples(model, samples, "brightness", one, progress=progress, channel=channel)


WITH_A_TABLE = Method(brightness, quantity="brightness", derived={"top": lambda result: result.isel(row=[0])})


def test_a_method_of_ones_own(tmp_path: Path) -> None:
    ended = run(
        Experiment.of(
            {
                "model": "toy-blip-vqa",
                "samples": {"shapes": 3},
                "methods": {
                    "plain": {"use": f"{__name__}:brightness", "channel": 2},
                    "told": {"use": f"{__name__}:WITH_A_TABLE"},
                },
            }
        ),
        tmp_path / "run",
    )
    assert ended.counts == {"plain": (3, 0, 0), "told": (3, 0, 0)}
    assert ended.results["plain"].attrs["channel"] == 2
    told = ended.summary["steps"]["told"]
    assert (told["results"], told["tables"], told["figures"]) == (["told", "told_top"], ["told"], [])
    xr.testing.assert_equal(ended.results["told"].isel(row=[0]), ended.results["told_top"])
    assert ended.summary["steps"]["plain"]["tables"] == []

"""Causal traces of samples: each as if traced alone, the field's identities in every one, severed variants by hand."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_vlm import HookedVLM, results
from hooked_vlm.corruptions import AdditiveGaussian, CounterfactualImage, CounterfactualQuestion, Scaled
from hooked_vlm.data import Sample, SampleError, Samples, shapes
from hooked_vlm.edits import Replace
from hooked_vlm.experiments import causal_trace
from hooked_vlm.experiments.parts.cases import prepared, ready
from hooked_vlm.experiments.parts.roles import by_role
from hooked_vlm.experiments.parts.sites import site_name
from hooked_vlm.metrics import LogitDifference, Probability

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

ALL, IMAGE = -1, -2
TOYS = {"toy-blip-vqa": "question_encoder", "toy-llava": "language_model"}


@pytest.fixture(scope="module")
def samples():
    """Questions of eight, seven and six words."""
    found = {one.group: one for one in shapes(8, seed=7, kinds=("exists", "count", "shape"))}
    return [found["shape"], found["exists"], found["count"]]


@pytest.fixture(scope="module")
def toys():
    return {name: HookedVLM.from_pretrained(name) for name in TOYS}


@pytest.fixture(scope="module", params=TOYS)
def toy(request, toys):
    return toys[request.param], TOYS[request.param]


HOW = {"which": "text", "all_positions": True}


@pytest.fixture(scope="module")
def trace_of(toys, samples):
    """Of a toy under a corruption, made once."""

    @cache
    def trace(name, corruption):
        return causal_trace(toys[name], samples[:2], corruption, sites=["resid", "attn"], **HOW)

    return trace


@pytest.fixture(params=[(name, corruption) for name in TOYS for corruption in ("sip", "str")], ids=" ".join)
def traced(request, toys, trace_of):
    """Under both pairs."""
    name, corruption = request.param
    return trace_of(name, corruption), corruption, toys[name], TOYS[name]


@pytest.fixture(params=TOYS.items(), ids=lambda one: one[0])
def traced_once(request, toys, trace_of):
    """Under the other picture."""
    name, tower = request.param
    return trace_of(name, "sip"), "sip", toys[name], tower


def close(value, to, atol=1e-5) -> bool:
    return np.allclose(np.asarray(value, float), np.asarray(to, float), atol=atol, equal_nan=True)


def assert_same(one: xr.Dataset, other: xr.Dataset) -> None:
    """Every variable and label the same; the noise floor, which is all samples', aside."""
    assert set(one.variables) == set(other.variables)
    for name in set(one.variables) - {"noise_floor"}:
        assert one[name].dims == other[name].dims, name
        values, others = one[name].values, other[name].values
        is_number = values.dtype.kind == "f"
        assert np.array_equal(values, others, equal_nan=is_number), name


# Each as if alone -----------------------------------------------------------------------------------------------------


def test_a_sample_alone_is_its_part_of_a_list(traced_once, samples):
    found, corruption, model, _ = traced_once
    for place in range(2):
        alone = causal_trace(model, samples[place], corruption, sites=["resid", "attn"], **HOW)
        part = found.isel(sample=[place]).sel(position=alone.position)
        assert_same(part, alone)
        others = found.isel(sample=place).drop_sel(position=alone.position.values)
        for name in ("patched", "effect", "normalized"):
            assert others[name].isnull().all()
        assert (others.token == "").all()
        assert (others.role == "").all()
        assert not others.identity.any()


def test_it_is_the_trace_of_its_inputs_with_its_answer_and_foil(traced, samples):
    found, corruption, model, _ = traced
    for place, sample in list(enumerate(samples))[1:2]:
        pair = (
            CounterfactualImage(sample.picture_cf())
            if corruption == "sip"
            else CounterfactualQuestion(sample.question_cf)
        )
        tokens = [
            torch.tensor([model.processor.tokenizer.convert_tokens_to_ids(one)]) for one in (sample.answer, sample.foil)
        ]
        inputs = model.prepare(sample.picture(), sample.question)
        own = causal_trace(model, inputs, pair, sites=["resid", "attn"], answer=tokens[0], foil=tokens[1], **HOW)
        part = found.isel(sample=place).sel(position=own.position)
        for name in ("patched", "effect", "normalized", "clean", "corrupted"):
            assert close(part[name], own[name].isel(sample=0).transpose(*part[name].dims)), name
        assert bool((part.identity == own.identity).all())
        assert part.token.values.tolist() == own.token.values[0].tolist()
        assert (part.answer.item(), part.foil.item()) == (sample.answer, sample.foil)


def test_the_order_of_samples_is_all_that_it_changes(toy, samples):
    """Under corruptions with parameters of each sample's own, too."""
    model, _ = toy
    how = {"sites": ["mlp"], "which": "text", "towers": [model.towers[-1]]}
    found = causal_trace(model, samples, "str", **how)
    other = causal_trace(model, samples[::-1], "str", **how)
    assert found.identical(other.isel(sample=[2, 1, 0]))


def test_lengths_are_joined_and_nothing_missing_is_a_zero(traced_once, samples):
    found, _, model, tower = traced_once
    singles = [position for position in found.position.values.tolist() if position >= 0]
    assert singles == sorted(singles)
    groups = [IMAGE, ALL] if tower == "language_model" else [ALL]
    assert found.position.values.tolist() == [*singles, *groups]
    for place, sample in enumerate(samples[:2]):
        inputs = prepared(model, sample)
        labels = model.position_labels(inputs, tower)[0]
        own = found.isel(sample=place).sel(tower=tower)
        image = set(inputs.spans["image"][0]) if tower == "language_model" else set()
        for position in singles:
            there = position < len(labels) and position not in image
            cells = own.sel(position=position)
            assert str(cells.token.values) == (labels[position] if there else "")
            assert bool(cells.patched.notnull().all()) == there
            assert bool(cells.patched.isnull().all()) == (not there)
    missing = found.patched.isnull()
    assert missing.any()
    assert (found.effect.isnull() == missing).all()
    assert (found.normalized.isnull() == missing).all()
    assert found.attrs["n_undefined"] == 0


def test_it_comes_back_from_a_file_as_it_was(traced_once, tmp_path):
    found = traced_once[0]
    results.save(found, tmp_path / "trace.nc")
    loaded = results.load(tmp_path / "trace.nc")
    assert loaded.identical(found)
    assert by_role(loaded).identical(by_role(found))


def test_over_roles_it_is_the_mean_of_positions(traced_once):
    found = traced_once[0]
    roles = by_role(found)
    assert "subject" in roles.role.values
    for place in range(2):
        own = found.isel(sample=place)
        for tower in found.tower.values:
            names = own.role.sel(tower=tower)
            for role in set(names.values.tolist()) - {""}:
                cells = own.effect.sel(tower=tower).isel(position=np.flatnonzero(names == role))
                mean = roles.effect.isel(sample=place).sel(tower=tower, role=role)
                assert close(mean, cells.mean("position").transpose(*mean.dims)), role
            absent = set(roles.role.values.tolist()) - set(names.values.tolist())
            assert roles.effect.isel(sample=place).sel(tower=tower, role=sorted(absent)).isnull().all()


# Identities -----------------------------------------------------------------------------------------------------------


def test_the_whole_stream_is_the_clean_run(traced):
    """At each layer of a tower that reads no other, or where only its own input differs; else at the last."""
    found, corruption, _, tower = traced
    whole = found.sel(tower=tower, site="resid", position=ALL)
    layers = slice(None) if tower == "language_model" or corruption == "str" else slice(-1, None)
    assert close(
        whole.patched.isel(layer=layers), whole.clean.broadcast_like(whole.patched).isel(layer=layers), atol=1e-4
    )
    assert bool(whole.identity.isel(layer=layers).all())
    if tower == "question_encoder" and corruption == "sip":
        assert not whole.identity.isel(layer=slice(None, -1)).any()
        assert float(abs(whole.patched - whole.clean).isel(layer=0).max()) > 0.01


def test_the_last_stream_where_the_answer_is_read_is_the_clean_run(traced, samples):
    """Each sample's own last position, which is another in each (in BLIP, the decoder's one)."""
    found, _, model, tower = traced
    last_tower = model.towers[-1]
    for place, sample in enumerate(samples[:2]):
        read = len(model.position_labels(prepared(model, sample), last_tower)[0]) - 1
        cell = found.isel(sample=place, layer=-1).sel(tower=last_tower, site="resid", position=read)
        assert bool(cell.identity)
        assert close(cell.patched, cell.clean, atol=1e-4)
        if tower == "language_model":
            marked = found.isel(sample=place, layer=-1).sel(tower=tower, site="resid").identity
            assert found.position.values[marked.values].tolist() == [read, ALL]
    assert float(abs(found.patched - found.clean).where(found.identity).max()) < 1e-4
    assert not found.identity.sel(site="attn").any()


def test_what_cannot_see_the_picture_does_nothing(traced, samples):
    """Text before it in a causal tower; BLIP's first self-attention, which comes before its first look."""
    found, corruption, model, tower = traced
    if tower == "question_encoder":
        cells = found.sel(tower=tower, site="attn", layer=0).effect
        assert (float(abs(cells).max()) < 1e-5) == (corruption == "sip")
        return
    for place, sample in enumerate(samples[:2]):
        inputs = prepared(model, sample)
        start = inputs.spans["image"][0][0] if corruption == "sip" else inputs.spans["subject"][0][0]
        own = found.isel(sample=place).sel(tower=tower)
        before = own.effect.isel(position=np.flatnonzero((own.position >= 0) & (own.position < start)))
        assert before.sizes["position"] > 1
        assert float(abs(before).max()) < 1e-5
        after = own.effect.isel(position=np.flatnonzero(own.position >= start))
        assert float(abs(after).max()) > 1
        if corruption == "str":  # the picture stands before the question
            assert float(abs(own.effect.sel(position=IMAGE)).max()) < 1e-5


def test_the_same_picture_or_question_changes_nothing(toy, samples):
    model, _ = toy
    same = replace(samples[0], image_cf=samples[0].image, question_cf=samples[0].question)
    for corruption, direction in (("sip", "denoising"), ("str", "noising"), (Scaled(1.0), "denoising")):
        found = causal_trace(model, same, corruption, sites=["mlp"], which="text", direction=direction)
        assert close(found.clean, found.corrupted)
        there = found.patched.notnull()
        assert close(found.effect.where(there, 0), 0)
        assert found.normalized.isnull().all()
        assert found.attrs["n_undefined"] == int(there.sum()) > 0


# Severed --------------------------------------------------------------------------------------------------------------


def severed_by_hand(model, tower, sample, corruption, *, site, layer, position, kind, direction):
    """One patch and all that is held behind it, written out."""
    case = ready(model, sample, corruption)
    runs = {"clean": case.clean, "corrupted": case.corrupted.inputs}
    source, run = ("clean", "corrupted") if direction == "denoising" else ("corrupted", "clean")
    with torch.no_grad():
        _, sources = model.run_with_cache(runs[source])
        _, own = model.run_with_cache(runs[run])
        edits = [Replace(site_name(model, tower, site, layer), sources, positions=[position])]
        n_layers = model.get_submodule(tower).config.n_layers
        for later in range(layer + 1, n_layers):
            edits.append(Replace(site_name(model, tower, kind, later), own, positions=[position]))
        logits = model.patch(runs[run], edits)
    return [Probability(case.answer)(logits).item(), LogitDifference(case.answer, case.foil)(logits).item()]


@pytest.mark.parametrize(("kind", "direction"), [("mlp", "denoising"), ("attn", "noising")])
def test_severed_is_a_patch_and_all_later_sublayers_held(toy, samples, direction, kind):
    model, tower = toy
    sample = samples[1]
    how = {"which": "text", "direction": direction, "towers": [tower], "sites": ["resid"]}
    found = causal_trace(model, sample, "sip", severed=kind, **how)
    free = causal_trace(model, sample, "sip", **how)
    place = prepared(model, sample).positions("?" if tower == "question_encoder" else "last")[0][0]
    for site, layer in (("resid", 0), ("resid", 2)):
        cell = found.isel(sample=0).sel(tower=tower, site=site, layer=layer, position=place)
        by_hand = severed_by_hand(
            *(model, tower, sample, "sip"),
            **{"site": site, "layer": layer, "position": place, "kind": kind, "direction": direction},
        )
        assert close(cell.patched, by_hand, atol=1e-4)
    # Behind the last layer there is nothing to hold; before it, there is.
    assert close(found.patched.isel(layer=-1), free.patched.isel(layer=-1))
    assert float(abs(found.patched - free.patched).sel(metric="logit_difference").max()) > 0.1
    assert found.attrs["severed"] == kind
    assert free.attrs["severed"] == "nothing"


def test_severed_at_all_positions_holds_them_all(toy, samples):
    """The whole stream of layer 0 restored, and all later MLPs held: no clean run any more."""
    model, tower = toy
    sample = samples[1]
    found = causal_trace(model, sample, "str", severed="mlp", sites=["resid"], towers=[tower], **HOW)
    case = ready(model, sample, "str")
    with torch.no_grad():
        _, clean = model.run_with_cache(case.clean)
        _, own = model.run_with_cache(case.corrupted.inputs)
        n_layers = model.get_submodule(tower).config.n_layers
        edits = [
            Replace(site_name(model, tower, "resid", 0), clean),
            *(Replace(site_name(model, tower, "mlp", later), own) for later in range(1, n_layers)),
        ]
        logits = model.patch(case.corrupted.inputs, edits)
    cell = found.isel(sample=0).sel(tower=tower, site="resid", layer=0, position=ALL)
    assert close(
        cell.patched.sel(metric="logit_difference"), LogitDifference(case.answer, case.foil)(logits).item(), 1e-4
    )


def test_only_sublayers_can_be_severed(toy, samples):
    model, tower = toy
    with pytest.raises(ValueError, match="severed is a kind of sub-layer"):
        causal_trace(model, samples[0], "sip", severed="resid", sites=["mlp"], towers=[tower])
    if tower == "language_model":
        with pytest.raises(ValueError, match="has no site 'cross_attn'"):
            causal_trace(model, samples[0], "sip", severed="cross_attn", sites=["mlp"], which="text")


def test_a_severed_cell_is_no_identity_where_it_does_not_give_the_source_run(toy, samples):
    model, tower = toy
    found = causal_trace(model, samples[1], "str", severed="mlp", sites=["resid"], towers=[tower], **HOW)
    assert float(abs(found.patched - found.clean).where(found.identity).max()) < 1e-4


# What is scored, what is dropped --------------------------------------------------------------------------------------


def test_right_and_wrong_answers_are_told_apart(toy, samples):
    model, _ = toy
    wrong = replace(samples[1], id="wrong", answer=samples[1].foil, foil=samples[1].answer)
    how = {"sites": ["mlp"], "which": "text", "towers": [model.towers[-1]]}
    given = causal_trace(model, [samples[1], wrong], "sip", **how)
    assert given.correct.values.tolist() == [True, False]
    assert given.gold.values.tolist() == [samples[1].answer, samples[1].foil]
    difference = given.sel(metric="logit_difference")
    assert close(difference.effect.isel(sample=0), -difference.effect.isel(sample=1), atol=1e-4)
    own = causal_trace(model, wrong, "sip", scored="own", **how)
    assert own.correct.item()
    assert own.answer.item() == samples[1].answer
    with pytest.raises(ValueError, match="answers"):
        causal_trace(model, samples, "sip", answer=torch.tensor([3]), **how)


def test_what_cannot_be_traced_is_dropped_by_name(toy, samples):
    model, _ = toy
    good, other = samples[0], samples[1]
    bad = {
        "no counterfactual picture": replace(other, id="a", image_cf=None),
        "a picture that cannot be read": replace(other, id="b", image="/nowhere.png"),
        "a region that does not fit": replace(other, id="c", regions={"part": (0, 0, 500, 5)}),
        "answer and foil begin with the same token": replace(other, id="d", foil=other.answer.upper()),
        "an answer that the model does not know": replace(other, id="e", answer="zeppelin"),
        "a span without tokens": replace(other, id="f", spans={"space": (2, 3)}),
    }
    how = {"sites": ["mlp"], "which": "text", "towers": [model.towers[-1]]}
    found = causal_trace(model, Samples([*list(bad.values())[:3], good, *list(bad.values())[3:]]), "sip", **how)
    assert found.sample.values.tolist() == [good.id]
    assert {kind: name for name, kind, _ in json.loads(found.attrs["dropped"])} == {
        kind: sample.id for kind, sample in bad.items()
    }
    assert (found.attrs["samples_used"], found.attrs["samples_dropped"]) == (1, len(bad))
    assert_same(found, causal_trace(model, good, "sip", **how))
    for sample in bad.values():
        with pytest.raises(SampleError):
            causal_trace(model, sample, "sip", **how)
    with pytest.raises(ValueError, match="can use none of 2 samples; the first: a has no counterfactual picture"):
        causal_trace(model, [bad["no counterfactual picture"], bad["a picture that cannot be read"]], "sip", **how)


def test_with_and_without_a_picture(toys, samples):
    """What a sample without one does not have is missing; its words stand where they stand."""
    llava = toys["toy-llava"]
    plain = Sample("plain", None, "what color is the circle ?", "red", "blue")

    def other(sample):
        return CounterfactualQuestion(sample.question.replace("is", "in"))

    how = {"sites": ["mlp"], "which": "all"}
    alone = causal_trace(llava, plain, other, **how)
    assert "box" not in alone.coords
    found = causal_trace(llava, [plain, samples[1]], other, **how)
    own = found.sel(sample="plain")
    assert own.box.isnull().all()
    assert (own.picture == -1).all()
    there = own.sel(position=alone.position)
    assert close(there.patched, alone.patched.isel(sample=0).transpose(*there.patched.dims))
    assert own.drop_sel(position=alone.position.values).patched.isnull().all()
    assert int((found.sel(sample=samples[1].id).picture == 0).sum()) == 36


@pytest.mark.parametrize("prompt", ["{question} in this picture", "is it the thing {question}"])
def test_another_prompt_moves_the_words_and_their_roles_with_them(toy, samples, prompt):
    model, tower = toy
    how = {"sites": ["resid"], "which": "text", "towers": [tower], "scored": "own"}
    found = causal_trace(model, samples[:2], "sip", prompt=prompt, **how)
    assert found.attrs["prompt"] == prompt
    for place, sample in enumerate(samples[:2]):
        subject = prepared(model, sample, prompt=prompt).spans["subject"][0]
        own = found.isel(sample=place).sel(tower=tower)
        assert own.position.values[own.role.values == "subject"].tolist() == list(subject)
        words = sample.text_of("subject").split()
        assert own.token.sel(position=list(subject)).values.tolist() == words


def test_draws_are_averaged_in_each_sample(toys, samples):
    """Noise is drawn alike for each sample alone and in a list."""
    model = toys["toy-blip-vqa"]
    how = {"sites": ["mlp"], "towers": ["answer_decoder"]}
    found = causal_trace(model, samples[:2], AdditiveGaussian(std=3.0, draws=3, seed=5), **how)
    assert (found.attrs["draws"], found.attrs["seed"], found.attrs["std"]) == (3, 5, 3.0)
    assert_same(found.isel(sample=[1]), causal_trace(model, samples[1], AdditiveGaussian(3.0, draws=3, seed=5), **how))

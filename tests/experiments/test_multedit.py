"""Keys, values and MultEdit: what is asked of an edit is found as the paper says, and writes a fact."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM, results
from hooked_vlm.data import SampleError, shapes
from hooked_vlm.edits import Add
from hooked_vlm.experiments.edit_mlp import (
    edit_mlp,
    edit_side_effects,
    find_value,
    key_of,
    multedit,
)
from tests.experiments import planted_mlp as planted

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

ASKED = {"prompt": "{question}"}
TOWERS = {"toy-llava": "language_model", "toy-blip-vqa": "question_encoder"}
LAYER = 1


@pytest.fixture(scope="module", params=TOWERS)
def toy(request):
    """A model without and one with biases, and inputs for it."""
    model = HookedVLM.from_pretrained(request.param)
    sample = shapes(1, seed=7, kinds=("color",))[0]
    inputs = model.prepare(sample.picture(), sample.question)
    return model, TOWERS[request.param], inputs


@pytest.fixture(scope="module")
def planted_model():
    return planted.planted_model()


# Keys and values ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_keys_are_what_the_projection_reads(toy):
    model, tower, inputs = toy
    site = f"{tower}.blocks.{LAYER}.mlp.hook_post"
    read = model.run_with_cache(inputs, names_filter=site)[1][site]
    assert torch.equal(key_of(model, inputs, LAYER, 3, tower=tower), read[:, 3])
    assert torch.equal(key_of(model, inputs, LAYER, -1, tower=tower), read[:, -1])
    words = inputs.positions("is the triangle")
    assert torch.equal(key_of(model, inputs, LAYER, "is the triangle", tower=tower), read[:, words[0][-1]])
    assert torch.equal(key_of(model, inputs, LAYER, words, tower=tower), read[:, words[0][-1]])
    for wrong in (99, -99):
        with pytest.raises(ValueError, match=f"{wrong} is no position of each of 1 rows"):
            key_of(model, inputs, LAYER, wrong, tower=tower)


def by_hand(model, tower, inputs, token, place, steps, lr, weight, clamp):
    """Adam, written out, over the loss written out."""
    site = f"{tower}.blocks.{LAYER}.hook_mlp_out"
    with torch.no_grad():
        old = model.run_with_cache(inputs, names_filter=site)[1][site][0, place]
    change, first, second = torch.zeros_like(old), torch.zeros_like(old), torch.zeros_like(old)
    for step in range(1, steps + 1):
        change.requires_grad_(True)
        added = torch.zeros(1, model.position_labels(inputs, tower)[0].__len__(), len(old))
        added = added.index_put((torch.tensor(0), torch.tensor(place)), change)
        logits = model.patch(inputs, [Add(site, added)])[0, -1]
        loss = -logits.log_softmax(-1)[token] + weight * change.norm() / old.norm() ** 2
        (gradient,) = torch.autograd.grad(loss, change)
        change = change.detach()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        change = change - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        if change.norm() > clamp * old.norm():
            change = change * clamp * old.norm() / change.norm()
    return old + change


@pytest.mark.parametrize("settings_", [{"clamp": 4.0}, {"clamp": 0.05}, {"clamp": 4.0, "weight": 50.0, "lr": 0.3}])
def test_values_are_found_as_the_paper_says(toy, settings_):
    model, tower, inputs = toy
    how = {"steps": 4, "lr": 0.1, "weight": 0.001} | settings_
    place = inputs.positions("triangle")[0][0]
    token = model.processor.tokenizer.convert_tokens_to_ids("purple")
    found = find_value(model, inputs, torch.tensor([token]), LAYER, "triangle", tower=tower, **how)
    assert torch.allclose(found[0], by_hand(model, tower, inputs, token, place, **how), atol=1e-4)
    assert torch.equal(found, find_value(model, inputs, "purple", LAYER, place, tower=tower, **how))
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_value_goes_no_further_than_its_clamp_and_towards_the_answer(toy):
    model, tower, inputs = toy
    site, where = f"{tower}.blocks.{LAYER}.hook_mlp_out", "triangle"
    place = inputs.positions(where)[0][0]
    with torch.no_grad():
        old = model.run_with_cache(inputs, names_filter=site)[1][site][:, place]
    token = torch.tensor([model.processor.tokenizer.convert_tokens_to_ids("purple")])
    for clamp in (1e-4, 0.1):
        found = find_value(model, inputs, token, LAYER, where, clamp=clamp, tower=tower)
        length = float((found - old).norm() / old.norm())
        assert length <= clamp * (1 + 1e-2)
        assert length > 0.9 * clamp  # ten steps of 0.1 lead further than that
    with torch.no_grad():
        far = find_value(model, inputs, token, LAYER, where, clamp=10.0, steps=8, lr=0.5, tower=tower)
        logits = [
            model.patch(inputs, [Add(site, (value - old)[:, None], positions=[place])])[0, -1].log_softmax(-1)[token]
            for value in (old, far)
        ]
    assert float(logits[1]) > float(logits[0]) + 0.5


def test_rows_of_a_batch_are_found_as_if_alone():
    model, tower = HookedVLM.from_pretrained("toy-blip-vqa"), "question_encoder"
    samples = shapes(2, seed=7, kinds=("exists", "color"))
    together = model.prepare([one.picture() for one in samples], [one.question for one in samples])
    token = torch.tensor([25, 26])
    found = find_value(model, together, token, LAYER, "?", steps=3, clamp=5.0, tower=tower)
    keys = key_of(model, together, LAYER, "?", tower=tower)
    for row, inputs in enumerate(together):
        alone = model.prepare(samples[row].picture(), samples[row].question)
        own = find_value(model, alone, token[row : row + 1], LAYER, "?", steps=3, clamp=5.0, tower=tower)
        assert torch.allclose(found[row], own[0], atol=1e-4)
        assert torch.allclose(keys[row], key_of(model, alone, LAYER, "?", tower=tower)[0], atol=1e-5)
        assert len(inputs) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps, a rate and a clamp above 0"),
        ({"lr": 0.0}, "steps, a rate and a clamp above 0"),
        ({"clamp": 0.0}, "steps, a rate and a clamp above 0"),
        ({"answer": torch.tensor([1, 2])}, "tokens for each of 1 rows"),
        ({"answer": torch.tensor([10**6])}, "an answer is one of"),
        ({"answer": "zeppelin"}, "zeppelin"),
        ({"position": "zeppelin"}, "zeppelin"),
        ({"position": 77}, "77 is no position"),
    ],
)
def test_a_value_that_cannot_be_found(toy, change, message):
    model, tower, inputs = toy
    arguments = {"answer": "purple", "position": "triangle"} | change
    with pytest.raises(ValueError, match=message):
        find_value(model, inputs, layer=LAYER, tower=tower, **arguments)


# MultEdit -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(planted_model):
    """The planted model's triangle, green, is to be purple."""
    return multedit(
        planted_model,
        shapes(1, seed=7, kinds=("color",))[0],
        "purple",
        planted.FACT_LAYER,
        "subject",
        clamp=4.0,
        **ASKED,
    )


def test_the_planted_fact_is_rewritten_and_no_other(planted_model, edit):
    """The share of others that keep their answer is that of those about other shapes: counted, not hoped."""
    samples = shapes(8, seed=7, kinds=("color",))[1:]
    about_it = [sample.text_of("subject") == "triangle" for sample in samples]
    assert edit.before < 0.01 < 0.5 < edit.after
    assert edit.answers
    assert (edit.target, edit.tower, edit.layer) == ("purple", "language_model", planted.FACT_LAYER)
    found = edit_side_effects(planted_model, samples, edit, **ASKED)
    assert 0 < sum(about_it) < len(samples)
    assert found.kept.values.tolist() == [not is_about for is_about in about_it]
    assert float(found.kept.mean()) == pytest.approx(1 - sum(about_it) / len(samples))
    assert set(found.after.values[about_it]) == {"purple"}
    assert found.before.values.tolist() == [planted.FACTS[sample.text_of("subject")] for sample in samples]
    assert found.key_overlap.values == pytest.approx(np.array(about_it, float), abs=1e-4)
    unmoved = ~np.array(about_it)
    assert np.allclose(found.probability_before[unmoved], found.probability_after[unmoved], atol=1e-5)
    assert (found.probability_after.values[about_it] < 0.5).all()


def test_the_edit_is_key_value_and_weight_put_together(planted_model, edit):
    sample = shapes(1, seed=7, kinds=("color",))[0]
    inputs = planted_model.prepare(sample.picture(), sample.question)
    place = inputs.positions("triangle")[0][-1]
    assert edit.position == place
    assert torch.equal(edit.key, key_of(planted_model, inputs, planted.FACT_LAYER, place)[0])
    weight = edit_mlp(planted_model, planted.FACT_LAYER, edit.key, edit.value)
    assert torch.equal(edit.weight, weight)
    with torch.no_grad():
        before = planted_model(inputs)[0, -1].softmax(-1)
        with edit.applied(planted_model):
            after = planted_model(inputs)[0, -1].softmax(-1)
    token = planted_model.processor.tokenizer.convert_tokens_to_ids("purple")
    assert (float(before[token]), float(after[token])) == (edit.before, edit.after)


def test_an_mlp_that_writes_nothing_has_no_value_to_change(planted_model):
    """All lengths are measured by the old value's."""
    sample = shapes(1, seed=7, kinds=("color",))[0]
    with pytest.raises(ValueError, match="the MLP of language_model's layer 3 writes nothing in row 0"):
        multedit(planted_model, sample, "purple", planted.TO_ANSWER, "subject", clamp=4.0, **ASKED)


def test_the_papers_clamp_hardly_moves_the_answer(planted_model):
    sample = shapes(1, seed=7, kinds=("color",))[0]
    edit = multedit(planted_model, sample, "purple", planted.FACT_LAYER, "subject", **ASKED)
    assert not edit.answers
    assert edit.before < edit.after < 1.01 * edit.before


def test_a_trained_model_is_edited_too():
    """toy-llava, layer 0, at the last position: the sample's answer changes, and most others' do not."""
    model, samples = HookedVLM.from_pretrained("toy-llava"), shapes(8, seed=7, kinds=("color",))
    edit = multedit(model, samples[0], "purple", 0, "last", clamp=4.0, **ASKED)
    assert edit.answers
    assert edit.after > 0.9
    found = edit_side_effects(model, samples[1:], edit, **ASKED)
    assert 0.5 <= float(found.kept.mean()) <= 1
    with edit.applied(model):
        inputs = model.prepare(samples[0].picture(), samples[0].question)
        assert model.generate(inputs, max_new_tokens=2) == ["purple"]


@pytest.mark.usefixtures("checked")
def test_samples_that_cannot_be_edited(planted_model, edit):
    sample = shapes(1, seed=7, kinds=("color",))[0]
    with pytest.raises(SampleError, match=f"{sample.id}: 'constraint' does not occur"):
        multedit(planted_model, sample, "purple", **ASKED)
    with pytest.raises(SampleError, match="zeppelin"):
        multedit(planted_model, sample, "zeppelin", 1, "subject", **ASKED)
    found = edit_side_effects(planted_model, [sample, replace(sample, id="gone", image="/gone.png")], edit, **ASKED)
    assert found.sizes["sample"] == 1
    assert "gone" in found.attrs["dropped"]


def test_side_effects_say_what_was_edited_and_load_back_equal(planted_model, edit, tmp_path):
    found = edit_side_effects(planted_model, shapes(2, seed=7), edit, **ASKED)
    facts = {"method": "edit_side_effects", "edited": "language_model.blocks.1.mlp", "target": "purple"}
    assert {name: found.attrs[name] for name in facts} == facts
    results.save(found, tmp_path / "found.nc")
    assert results.load(tmp_path / "found.nc").identical(found)

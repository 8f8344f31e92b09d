"""Identities of modules and heads that are patched, and the planted heads, which must be found and nothing else."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM, Span
from hooked_vlm.corruptions import AdditiveGaussian, Corrupted, CounterfactualImage
from hooked_vlm.data import SampleError, Samples, shapes
from hooked_vlm.edits import Replace, edit_hooks
from hooked_vlm.experiments import causal_trace
from hooked_vlm.experiments.notice import list_heads, notice, patch_heads
from hooked_vlm.experiments.parts.cases import Case, ready
from hooked_vlm.experiments.parts.heads import Head
from hooked_vlm.experiments.parts.roles import by_role
from tests.experiments import planted, planted_llava

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

module = importlib.import_module("hooked_vlm.experiments.notice")  # the package has the function of that name

LD = "logit_difference"
SAMPLES = shapes(2, seed=7, kinds=("color",))
TOWERS = {"toy-blip-vqa": "question_encoder", "toy-llava": "language_model"}


@pytest.fixture(scope="module")
def models():
    return {name: HookedVLM.from_pretrained(name) for name in TOWERS}


@pytest.fixture(scope="module", params=[*TOWERS])
def model(models, request):
    return models[request.param]


@pytest.fixture(scope="module")
def blip(models):
    return models["toy-blip-vqa"]


@pytest.fixture(scope="module")
def llava(models):
    return models["toy-llava"]


# Modules --------------------------------------------------------------------------------------------------------------


def test_notice_is_a_causal_trace_of_what_the_words_modules_add(model):
    found = notice(model, SAMPLES[:1], "sip", all_positions=False)
    tower = model.text_towers[0]
    sites = ["mlp", "attn", "cross_attn"] if tower == "question_encoder" else ["mlp", "attn"]
    assert (found.tower.values.tolist(), found.site.values.tolist()) == ([tower], sites)
    assert found.attrs["method"] == "notice"
    traced = causal_trace(model, SAMPLES[:1], "sip", towers=[tower], sites=sites, which="text")
    assert found.equals(traced)


def test_self_attention_before_the_picture_is_seen_restores_nothing(blip):
    effect = notice(blip, SAMPLES, "sip", sites=["attn"]).effect
    assert abs(effect.sel(layer=0)).max() < 1e-4 < abs(effect.sel(layer=3)).max()


def test_words_before_the_first_that_is_replaced_restore_nothing(llava):
    result = notice(llava, SAMPLES, "str")
    words = ready(llava, SAMPLES[0]).clean.spans["subject"][0]
    before = [position for position in result.position.values if 0 <= position < min(words)]
    assert len(before) > 5
    assert abs(result.effect.sel(position=[*before, -2])).max() < 1e-4 < 1 < abs(result.effect).max()


def test_a_module_is_all_of_its_heads(model):
    """Patching z of every head is patching what attention adds; and of all words, the row of all."""
    sample, tower = SAMPLES[1], model.text_towers[0]
    kinds = ["attn", "cross_attn"] if tower == "question_encoder" else ["attn"]
    rows = notice(model, sample, "sip", sites=kinds).patched.sel(metric=LD).isel(sample=0, tower=0)
    case = ready(model, sample, "sip")
    _, cache = model.run_with_cache(case.clean, names_filter=f"{tower}.blocks.*.hook_z")
    for kind in kinds:
        for position in (case.clean.spans["subject"][0][0], -1):
            where = None if position < 0 else position
            for layer in (0, 3):
                site = f"{tower}.blocks.{layer}.{kind}.hook_z"
                edits = [Replace(site, cache, positions=where, heads=head) for head in range(4)]
                with torch.no_grad():
                    logits = model.patch(case.corrupted.inputs, edits)[0, -1]
                expected = float(logits[case.answer] - logits[case.foil])
                found = float(rows.sel(site=kind, layer=layer, position=position))
                assert found == pytest.approx(expected, abs=1e-5)


# Heads ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("corruption", ["sip", "str"])
def test_each_cell_is_a_run_with_one_head_patched(model, corruption, direction):
    result = patch_heads(model, SAMPLES[:1], corruption, positions="subject", direction=direction)
    case = ready(model, SAMPLES[0], corruption)
    word, source, target = list(case.clean.spans["subject"][0]), case.clean, case.corrupted.inputs
    if direction == "noising":
        source, target = target, source
    for head in list_heads(model, model.text_towers[:1])[::5]:
        _, cache = model.run_with_cache(source, names_filter=f"{head.site}.hook_z")
        logits = model.patch(target, [Replace(f"{head.site}.hook_z", cache, positions=word, heads=head.number)])[0, -1]
        cell = result.sel(sample=SAMPLES[0].id, **dict(zip(("tower", "attention", "layer", "head"), head, strict=True)))
        assert float(cell.patched.sel(metric=LD)) == pytest.approx(
            float(logits[case.answer] - logits[case.foil]), abs=1e-5
        )
        assert float(cell.patched.sel(metric="probability")) == pytest.approx(
            float(logits.softmax(-1)[case.answer]), abs=1e-5
        )
    start = result.clean if direction == "noising" else result.corrupted
    assert np.allclose(result.effect, result.patched - start)
    assert np.allclose(result.normalized, (result.patched - result.corrupted) / (result.clean - result.corrupted))


def test_the_clean_run_itself_as_the_corrupted_one_leaves_nothing_to_restore(model):
    result = patch_heads(model, SAMPLES, lambda sample: CounterfactualImage(sample.picture()), positions="all")
    assert abs(result.effect).max() < 1e-4
    assert abs(result.patched - result.clean).max() < 1e-4
    assert bool(result.normalized.isnull().all())
    assert result.attrs["n_undefined"] == result.normalized.size


def test_the_pair_turned_round_is_the_other_direction(model):
    """Clean states in the corrupted run are, of the pair turned round, corrupted states in the clean run."""
    turned = [replace(one, image=one.image_cf, image_cf=one.image, answer=one.foil, foil=one.answer) for one in SAMPLES]
    there = patch_heads(model, SAMPLES, "sip", positions="all").sel(metric=LD)
    back = patch_heads(model, turned, "sip", positions="all", direction="noising").sel(metric=LD)
    assert np.allclose(there.patched, -back.patched, atol=1e-4)
    assert np.allclose(there.normalized, 1 - back.normalized, atol=1e-4)


def test_positions_of_a_span_together_each_alone_and_by_role(blip):
    each = patch_heads(blip, SAMPLES, "str", positions="each")
    word = patch_heads(blip, SAMPLES, "str", positions="subject")
    (place,) = {ready(blip, sample).clean.spans["subject"][0][0] for sample in SAMPLES}
    assert np.allclose(each.patched.sel(position=place), word.patched, atol=1e-5)
    assert np.allclose(by_role(each).normalized.sel(role="subject").transpose(*word.normalized.dims), word.normalized)
    assert each.token.isel(tower=0).sel(position=place).values.tolist() == ["triangle", "star"]
    assert word.token.values.tolist() == [["triangle"], ["star"]]
    together = patch_heads(blip, SAMPLES, "str", positions="question - subject")
    assert together.token.values[0, 0] == "what color is the ?"
    assert not np.allclose(together.patched, word.patched, atol=1e-3)


def test_a_decoder_of_one_position_has_all_of_it_patched(blip):
    options = {"towers": ["question_encoder", "answer_decoder"], "attention": ["cross_attn"]}
    result = patch_heads(blip, SAMPLES[:1], "sip", positions="all", **options)
    alone = patch_heads(blip, SAMPLES[:1], "sip", positions="last", towers=["answer_decoder"])
    decoder = {"tower": "answer_decoder", "attention": "cross_attn"}
    assert np.allclose(result.patched.sel(decoder), alone.patched.sel(decoder), atol=1e-5)
    assert result.attention.values.tolist() == ["cross_attn"]
    assert result.token.values.tolist() == [["(all)", "(all)"]]


def test_in_llava_the_last_position_is_the_default_and_the_picture_has_positions_too(llava):
    result = patch_heads(llava, SAMPLES[:1], "sip")
    assert result.token.values.tolist() == [["ASSISTANT:"]]
    case = ready(llava, SAMPLES[0], "sip")
    places = {
        which: [place for place, _ in module._places(llava, case, "language_model", "each", which)]
        for which in ("all", "text", "image")
    }
    assert places["image"] == list(case.clean.spans["image"][0])
    assert sorted(places["image"] + places["text"]) == places["all"] == list(range(46))
    text = patch_heads(llava, SAMPLES[:1], "sip", positions="each")
    assert text.position.values.tolist() == places["text"]
    assert np.allclose(text.patched.isel(position=-1), result.patched, atol=1e-5)


def test_noise_is_averaged_over_its_draws(blip):
    noise = AdditiveGaussian(std=2.0, draws=3, seed=1)
    head = Head("question_encoder", "cross_attn", 3, 1)
    case = ready(blip, SAMPLES[0], noise)
    for direction in ("denoising", "noising"):
        result = patch_heads(blip, SAMPLES[0], noise, positions="all", direction=direction)
        with torch.no_grad():
            clean, run = Corrupted(case.clean), case.corrupted
            source, target = (clean, run) if direction == "denoising" else (run, clean)
            with blip.hooks(edit_hooks(blip, source.inputs, source.edits)):
                _, cache = blip.run_with_cache(source.inputs, names_filter=f"{head.site}.hook_z")
            z = cache[f"{head.site}.hook_z"]
            expected = []
            for draw in range(3):
                own = z if len(z) == 1 else z[[draw]]
                edit = Replace(f"{head.site}.hook_z", own.expand(len(target.inputs), -1, -1, -1), heads=head.number)
                logits = blip.patch(target.inputs, [*target.edits, edit])[:, -1]
                expected.append((logits[:, case.answer] - logits[:, case.foil]).mean())
        found = result.patched.sel(metric=LD, attention="cross_attn", layer=3, head=1)
        assert float(found.squeeze()) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-4)


def test_samples_that_lack_something_are_dropped_by_name(blip):
    lame = [replace(SAMPLES[0], image_cf=None), replace(SAMPLES[1], spans={}, id="no-span")]
    result = patch_heads(blip, Samples([*lame, SAMPLES[1]]), "sip", positions="subject")
    assert result.sample.values.tolist() == [SAMPLES[1].id]
    assert [entry[0] for entry in json.loads(result.attrs["dropped"])] == [SAMPLES[0].id, "no-span"]
    with pytest.raises(SampleError, match="no counterfactual picture"):
        patch_heads(blip, lame[0], "sip", positions="subject")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no span 'answer': say which positions; there are .*subject"),
        (
            {"positions": "subject", "towers": ["answer_decoder"]},
            "'subject' is in question_encoder, and heads of answer",
        ),
        ({"towers": ["projector"]}, "'projector' is no tower with attention; this model has vision_encoder, question"),
        (
            {"towers": ["vision_encoder"], "attention": ["cross_attn"]},
            "vision_encoder has no 'cross_attn'; it has attn",
        ),
        ({"direction": "up"}, "'denoising' or 'noising', not 'up'"),
        ({"which": "words"}, "'all', 'text' or 'image', not 'words'"),
        ({"positions": "each", "which": "image"}, "there are no positions to patch"),
        ({"positions": "all", "metrics": ["accuracy"]}, "metrics are a list of"),
    ],
)
def test_errors_say_what_is_wrong(blip, options, message):
    with pytest.raises(ValueError, match=message):
        patch_heads(blip, SAMPLES[:1], "sip", **options)


# Planted heads --------------------------------------------------------------------------------------------------------


class _Words:
    class tokenizer:  # noqa: N801
        @staticmethod
        def convert_ids_to_tokens(ids):
            return [f"t{token_id}" for token_id in ids]


def planted_case(model, circuit, spans):
    """The red picture, and the blue one as its counterfactual."""
    clean, other = circuit.planted_inputs("red"), circuit.planted_inputs("blue")
    clean = replace(clean, spans={**clean.spans, **spans}, text_tower=next(iter(spans.values())).tower)
    model._processor = _Words()
    answer, foil = torch.tensor([circuit.RED_TOKEN]), torch.tensor([circuit.BLUE_TOKEN])
    with torch.no_grad():
        logits, cache = model.run_with_cache(clean, names_filter="*hook_z")
        return Case(SAMPLES[0], clean, None, Corrupted(other), answer, foil, logits[:, -1], cache)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("positions", ["answer", "all", "each"])
def test_of_a_blip_the_planted_head_is_found_and_no_other(monkeypatch, direction, positions):
    model = planted.planted_model()
    span = Span("question_encoder", ((planted.ASKING_POSITION,),))
    case = planted_case(model, planted, {"answer": span, "image": Span("vision_encoder", (tuple(range(1, 10)),))})
    monkeypatch.setattr(module, "ready", lambda *_, **__: case)
    result = patch_heads(model, SAMPLES[0], "sip", positions=positions, direction=direction).isel(sample=0, tower=0)
    moved = result.normalized if direction == "denoising" else 1 - result.normalized
    expected = (moved * 0).rename(None)
    place = {"attention": "cross_attn", "layer": planted.LAYER, "head": planted.HEAD}
    if positions == "each":
        place["position"] = planted.ASKING_POSITION
    expected.loc[place] = 1
    assert np.allclose(moved, expected, atol=1e-4)


@pytest.mark.parametrize("positions", [None, "asking", "each"])
def test_of_a_llava_the_planted_heads_are_found_each_at_its_word(monkeypatch, positions):
    model = planted_llava.planted_model()
    asking = Span("language_model", ((planted_llava.ASKING_POSITION,),))
    case = planted_case(model, planted_llava, {"asking": asking})
    monkeypatch.setattr(module, "ready", lambda *_, **__: case)
    moved = patch_heads(model, SAMPLES[0], "sip", positions=positions).isel(sample=0, tower=0, attention=0).normalized
    expected = (moved * 0).rename(None)
    steps = {"asking": planted_llava.TO_QUESTION, None: planted_llava.TO_ANSWER}
    places = {"asking": planted_llava.ASKING_POSITION, None: planted_llava.LAST_POSITION}
    for where, layer in steps.items():
        if positions in (where, "each"):
            at = {"position": places[where]} if positions == "each" else {}
            expected.loc[{"layer": layer, "head": planted_llava.HEAD, **at}] = 1
    assert np.allclose(moved, expected, atol=1e-4)
    assert expected.sum() == 2 * (2 if positions == "each" else 1)

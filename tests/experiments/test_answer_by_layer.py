"""Each layer's stream, read as the last: against runs in which no later layer adds anything."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.data import SampleError, shapes
from hooked_vlm.edits import Zero
from hooked_vlm.experiments.answer_by_layer import answer_by_layer, layer_logits
from hooked_vlm.experiments.parts.cases import prepared
from tests.experiments import planted_llava as planted
from tests.experiments.planted_words import planted_model, planted_sample


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def blip():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture(scope="module")
def samples():
    return shapes(3, seed=7, kinds=("color",))


@torch.no_grad()
def test_a_layer_reads_as_if_no_later_one_added_anything(llava, samples):
    inputs = prepared(llava, samples[0])
    found = layer_logits(llava, inputs)
    for layer in range(6):
        silent = [
            Zero(f"language_model.blocks.{later}.hook_{what}_out")
            for later in range(layer, 5)
            for what in ("attn", "mlp")
        ]
        assert torch.allclose(found[layer], llava.patch(inputs, silent)[:, -1], atol=1e-5), layer


@torch.no_grad()
def test_the_last_layer_is_the_models_own_answer(llava, blip, samples):
    for model in (llava, blip):
        inputs = model.prepare([one.picture() for one in samples], [one.question for one in samples])
        assert torch.equal(layer_logits(model, inputs)[-1], model(inputs)[:, -1])
        result = answer_by_layer(model, samples)
        token = model.processor.tokenizer.convert_tokens_to_ids
        own = model(inputs)[:, -1].softmax(-1)
        for row, sample in enumerate(samples):
            for target, word in (("answer", sample.answer), ("foil", sample.foil)):
                last = result.probability.sel(target=target, form="given").isel(sample=row, layer=-1)
                assert last.item() == pytest.approx(own[row, token(word)].item(), abs=1e-6)


@torch.no_grad()
def test_a_blips_layers_go_through_its_head(blip, samples):
    inputs = prepared(blip, samples[0])
    _, cache = blip.run_with_cache(inputs)
    streams = [cache["answer_decoder.hook_full_embed"], *cache.stack("normalized_resid_post", "answer_decoder")]
    found = layer_logits(blip, inputs)
    assert len(found) == 5
    for own, stream in zip(found, streams, strict=True):
        assert torch.allclose(own, blip.answer_decoder.logits(stream)[:, -1], atol=1e-5)


@torch.no_grad()
def test_without_the_norm_as_in_the_paper(llava, samples):
    inputs = prepared(llava, samples[0])
    bare, normed = layer_logits(llava, inputs, norm=False), layer_logits(llava, inputs)
    _, cache = llava.run_with_cache(inputs)
    by_hand = cache["resid_post", 2, "language_model"][:, -1] @ llava.language_model.W_U
    assert torch.allclose(bare[3], by_hand, atol=1e-5)
    assert torch.equal(bare[-1], normed[-1])
    assert not torch.allclose(bare[:-1], normed[:-1], atol=0.1)
    assert answer_by_layer(llava, samples, norm=False).attrs["norm"] == "false"


def test_the_planted_answer_arrives_with_its_layer():
    result = answer_by_layer(planted_model(), [planted_sample("red"), planted_sample("blue")])
    answer, foil = (result.probability.sel(target=target, form="given") for target in ("answer", "foil"))
    arrives = planted.TO_ANSWER + 1
    assert np.allclose(answer[:, :arrives], 1 / planted.D_VOCAB, atol=1e-3)
    assert np.allclose(foil[:, :arrives], 1 / planted.D_VOCAB, atol=1e-3)
    assert (answer[:, arrives:] > 0.95).all()
    assert (foil[:, arrives:] < 0.01).all()


def test_in_the_toys_the_answer_rises_and_the_foil_falls(llava, blip):
    many = shapes(12, seed=7, kinds=("color",))
    for model, late in ((llava, 3), (blip, 3)):
        answer, foil = answer_by_layer(model, many).probability.sel(form="given").mean("sample").values
        assert answer[1] < 0.3 < 0.75 < answer[late]
        assert answer[-1] > 0.99
        assert foil[-1] < 0.01 < foil[0]


def test_forms_of_the_answer(llava, blip, samples):
    result = answer_by_layer(blip, replace(samples[0], answer=samples[0].answer.upper()))
    # BLIP's words have no capitals.
    assert len(set(result.token.sel(target="answer").values.ravel())) == 1
    result = answer_by_layer(llava, replace(samples[0], foil=None))
    assert result.probability.sel(target="foil").isnull().all()
    assert result.probability.sel(target="answer", form="capitalised").isnull().all()  # no word of toy-llava's
    assert result.token.sel(target="answer").values.ravel().tolist() == [samples[0].answer, samples[0].answer, ""]


def test_other_positions(llava, samples):
    sample = samples[0]
    result = answer_by_layer(llava, sample, position="subject").isel(sample=0)
    inputs = prepared(llava, sample)
    with torch.no_grad():
        own = llava(inputs)[0, inputs.positions("subject")[0][-1]].softmax(-1)
    token = llava.processor.tokenizer.convert_tokens_to_ids(sample.answer)
    assert result.probability.sel(target="answer", form="given")[-1].item() == pytest.approx(
        own[token].item(), abs=1e-6
    )


def test_what_cannot_be_read_is_said(llava, blip, samples):
    with pytest.raises(ValueError, match="answer is read in answer_decoder"):
        answer_by_layer(blip, samples, position="question")
    with pytest.raises(ValueError, match="normalises its stream in every layer"):
        answer_by_layer(blip, samples, norm=False)
    with pytest.raises(SampleError, match="knows no word"):
        answer_by_layer(llava, replace(samples[0], answer="zebra"))
    bad = [replace(samples[0], answer=None), replace(samples[1], spans={})]
    result = answer_by_layer(llava, [*bad, samples[2]], position="subject")
    kinds = [kind for _, kind, _ in json.loads(result.attrs["dropped"])]
    assert kinds == ["no answer", "a position without tokens"]

"""Ranking candidates as the original BLIP code does, held against the same thing put together from HF's parts."""

from __future__ import annotations

import pytest
import torch
from transformers import BlipForQuestionAnswering

from hooked_vlm import HookedVLM, toys

CANDIDATES = ["red", "blue", "green", "yes", "a red circle", "2", "square", "the blue square of red"]
PLAIN_QUESTIONS = ["what color is the circle ?", "what color is the square ?"]


@pytest.fixture(scope="module")
def model():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@torch.no_grad()
def hf_log_likelihoods(batch, candidates, label_smoothing: float, *, through_labels: bool = True) -> torch.Tensor:
    """``[b n]``: minus HF's summed cross-entropy of each candidate, one by one, without padding.

    HF computes ``labels=`` without a cache, and so over keys in another layout than in its plain forward, which is
    what ours equals; ``through_labels=False`` takes the plain forward's logits to the same loss.
    """
    hf = BlipForQuestionAnswering.from_pretrained(toys.folder("toy-blip-vqa")).eval()
    hf.text_decoder.label_smoothing = label_smoothing
    tokenizer = HookedVLM.from_pretrained("toy-blip-vqa").processor.tokenizer
    image = hf.vision_model(batch["pixel_values"]).last_hidden_state
    question = hf.text_encoder(batch["input_ids"], encoder_hidden_states=image).last_hidden_state
    columns = []
    for candidate in candidates:
        ids = tokenizer(candidate, return_tensors="pt").input_ids
        ids[:, 0] = hf.config.text_config.bos_token_id
        ids = ids.expand(len(question), -1)
        if through_labels:
            loss = hf.text_decoder(ids, encoder_hidden_states=question, labels=ids, reduction="none").loss
        else:
            logits = hf.text_decoder(ids, encoder_hidden_states=question).logits[:, :-1]
            criterion = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=label_smoothing)
            loss = criterion(logits.flatten(0, 1), ids[:, 1:].flatten()).view(len(ids), -1).sum(1)
        columns.append(-loss)
    return torch.stack(columns, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_hf_parts(model, label_smoothing):
    images = [toys.sample(3, index).image for index in range(2)]
    inputs = model.prepare(images, PLAIN_QUESTIONS)
    ranked = model.rank_answers(inputs, CANDIDATES, label_smoothing=label_smoothing)
    reference = hf_log_likelihoods(inputs.tensors(), CANDIDATES, label_smoothing)
    for row, (answers, scores) in enumerate(zip(ranked.answers, ranked.log_likelihoods, strict=True)):
        expected = {name: float(score) for name, score in zip(CANDIDATES, reference[row], strict=True)}
        # Candidates are scored as one padded batch, so sums may differ in the last bits.
        assert [float(score) for score in scores] == pytest.approx(
            [expected[name] for name in answers], rel=1e-5, abs=2e-6
        )
        assert answers == sorted(CANDIDATES, key=lambda name: -expected[name])


@torch.no_grad()
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_one_candidate_alone_equals_hf_parts_to_the_bit(model, candidate, label_smoothing):
    """Nothing is padded, so the products have HF's shapes."""
    inputs = model.prepare([toys.sample(3, index).image for index in range(2)], PLAIN_QUESTIONS)
    ranked = model.rank_answers(inputs, [candidate], label_smoothing=label_smoothing)
    reference = hf_log_likelihoods(inputs.tensors(), [candidate], label_smoothing, through_labels=False)
    assert torch.equal(ranked.log_likelihoods, reference)


@torch.no_grad()
def test_the_right_answer_wins(model):
    samples = [toys.sample(5, index, kinds=("color", "shape")) for index in range(12)]
    inputs = model.prepare([sample.image for sample in samples], [sample.question for sample in samples])
    answers = sorted({sample.answer for sample in samples})
    ranked = model.rank_answers(inputs, answers)
    assert [row[0] for row in ranked.answers] == [sample.answer for sample in samples]
    # Without smoothing these are log-probabilities: one token and [SEP].
    assert (ranked.log_likelihoods <= 0).all()
    assert (ranked.log_likelihoods[:, 0] > -0.5).all()


@torch.no_grad()
def test_a_padded_question_ranks_as_alone(model):
    samples = [toys.sample(6, 0, kinds=("color",)), toys.sample(6, 1, kinds=("count",))]
    together = model.prepare([sample.image for sample in samples], [sample.question for sample in samples])
    assert together.attention_mask is not None
    assert not together.attention_mask.all()
    both = model.rank_answers(together, CANDIDATES)
    for row, sample in enumerate(samples):
        alone = model.rank_answers(model.prepare(sample.image, sample.question), CANDIDATES)
        assert both.answers[row] == alone.answers[0]
        assert torch.allclose(both.log_likelihoods[row], alone.log_likelihoods[0], atol=1e-4)


@torch.no_grad()
def test_many_candidates_rank_as_few(model):
    """More than are scored at a time."""
    sample = toys.demo_sample()
    inputs = model.prepare(sample.image, sample.question)
    words = [word for word in model.processor.tokenizer.get_vocab() if word.isalpha()]
    many = [f"{first} {second}" for first in words[:12] for second in words[:12]]
    ranked = model.rank_answers(inputs, [*many, sample.answer])
    assert ranked.answers[0][0] == sample.answer
    assert ranked.log_likelihoods.shape == (1, len(many) + 1)
    few = model.rank_answers(inputs, many[:3])
    scores = dict(zip(ranked.answers[0], ranked.log_likelihoods[0].tolist(), strict=True))
    assert few.log_likelihoods[0].tolist() == pytest.approx([scores[name] for name in few.answers[0]], abs=1e-4)


def test_label_smoothing_is_the_variants(model):
    original = HookedVLM.from_pretrained("toy-blip-vqa", variant="original")
    assert model.config.label_smoothing == 0.0
    assert original.config.label_smoothing == 0.1


def test_no_candidates(model):
    sample = toys.demo_sample()
    with pytest.raises(ValueError, match="at least one candidate"):
        model.rank_answers(model.prepare(sample.image, sample.question), [])

"""The embedded checkpoint: HF reads it, it is small, and it answers."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, BlipForQuestionAnswering, BlipProcessor

from hooked_vlm import HookedVLM, toys
from hooked_vlm.data import COLORS, KINDS, SHAPES, generate
from hooked_vlm.toys import train
from hooked_vlm.toys.evaluate import TOY, evaluate, table

LARGEST = 8 * 2**20


@pytest.fixture(scope="module")
def scores():
    return evaluate(HookedVLM.from_pretrained(TOY), n=300, seed=11)


def test_the_folder_is_small():
    assert toys.names() == (TOY,)
    assert sum(file.stat().st_size for file in toys.folder(TOY).rglob("*")) <= LARGEST


def test_an_unknown_name_is_refused_with_those_known():
    with pytest.raises(KeyError, match=TOY):
        toys.folder("toy-blip")


@pytest.mark.parametrize("processor_class", [BlipProcessor, AutoProcessor])
def test_hf_reads_it_and_it_answers_the_demo(processor_class):
    one = toys.demo_sample()
    processor = processor_class.from_pretrained(toys.folder(TOY))
    model, info = BlipForQuestionAnswering.from_pretrained(toys.folder(TOY), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    inputs = processor(images=one.image, text=one.question, return_tensors="pt")
    answer = processor.decode(model.generate(**inputs, max_new_tokens=4)[0], skip_special_tokens=True)
    assert (one.kind, answer) == ("color", one.answer)


def test_pictures_are_not_resized():
    processor = BlipProcessor.from_pretrained(toys.folder(TOY))
    one = toys.demo_sample()
    values = processor.image_processor(one.image, return_tensors="pt")["pixel_values"][0].numpy()
    mean, std = (np.array(part) for part in (processor.image_processor.image_mean, processor.image_processor.image_std))
    assert np.abs((one.pixels / 255 - mean) / std - values.transpose(1, 2, 0)).max() < 1e-5


def test_every_word_is_one_token():
    tokenizer = BlipProcessor.from_pretrained(toys.folder(TOY)).tokenizer
    assert tokenizer.pad_token_id == 0
    texts = [text for one in generate(100, seed=5) for text in (one.question, one.answer, one.str_.question)]
    for text in [*texts, *COLORS, *SHAPES]:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == text.split()


def test_the_answer_ends_at_sep():
    config = BlipForQuestionAnswering.from_pretrained(toys.folder(TOY)).config.text_config
    tokenizer = BlipProcessor.from_pretrained(toys.folder(TOY)).tokenizer
    assert config.bos_token_id == tokenizer.convert_tokens_to_ids("[DEC]")
    assert config.sep_token_id == tokenizer.sep_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_every_kind(scores, kind):
    assert scores[kind]["n"] > 50
    assert scores[kind]["exact"] >= 0.97
    assert scores[kind]["sip"] >= 0.95
    assert scores[kind]["str"] >= 0.95


def test_what_it_scores_is_printed_as_a_table(scores):
    view = table(scores)
    assert view.row_count == len(KINDS)


def test_a_padded_question_is_answered_like_one_alone():
    model = HookedVLM.from_pretrained(TOY)
    samples = list(generate(12, seed=12))
    together = model.generate(
        model.prepare([one.image for one in samples], [one.question for one in samples]), max_new_tokens=4
    )
    alone = [model.generate(model.prepare([one.image], [one.question]), max_new_tokens=4)[0] for one in samples]
    assert len({len(one.question.split()) for one in samples}) > 1
    assert together == alone


class AlwaysYes:
    def prepare(self, images, texts):
        assert len(images) == len(texts)
        return len(texts)

    def generate(self, inputs, *, max_new_tokens):
        return ["yes"] * inputs


def test_a_model_that_does_not_look_flips_nothing():
    scores = evaluate(AlwaysYes(), n=250, seed=13, batch_size=64)
    assert sum(row["n"] for row in scores.values()) == 250
    assert all(row["sip"] == row["str"] == 0 for row in scores.values())
    assert 0.3 < scores["exists"]["exact"] < 0.7
    assert scores["color"]["exact"] == 0


def test_training_writes_a_folder_that_hf_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda model, n, seed: {})
    lines = []
    trained = train.train(train.Recipe(steps=2, samples_per_step=2), tmp_path, log=lines.append)
    read = BlipForQuestionAnswering.from_pretrained(tmp_path)
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in trained.state_dict().items())
    assert BlipProcessor.from_pretrained(tmp_path).tokenizer.get_vocab() == train.vocabulary()
    assert lines


def test_the_recipe_describes_the_embedded_checkpoint():
    embedded = BlipForQuestionAnswering.from_pretrained(toys.folder(TOY))
    fresh = train.build_model(train.Recipe())
    shapes = {name: value.shape for name, value in fresh.state_dict().items()}
    assert shapes == {name: value.shape for name, value in embedded.state_dict().items()}
    assert BlipProcessor.from_pretrained(toys.folder(TOY)).tokenizer.get_vocab() == train.vocabulary()

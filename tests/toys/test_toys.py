"""The embedded checkpoints: HF reads them, they are small, and they answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoProcessor,
    BlipForQuestionAnswering,
    BlipProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from hooked_vlm import HookedVLM, toys
from hooked_vlm.data import COLORS, KINDS, SHAPES, generate
from hooked_vlm.toys import blip, lessons, llava, train
from hooked_vlm.toys.evaluate import TOY, evaluate, table

LARGEST = {TOY: 8 * 2**20, llava.FOLDER: 12 * 2**20}
HF_CLASSES = {TOY: BlipForQuestionAnswering, llava.FOLDER: LlavaForConditionalGeneration}
both = pytest.mark.parametrize("toy", [blip, llava], ids=["blip", "llava"])


@pytest.fixture(scope="module")
def scores():
    return evaluate(HookedVLM.from_pretrained(TOY), n=300, seed=11)


@pytest.fixture(scope="module")
def hf_llava():
    return train.HFModel(llava, LlavaForConditionalGeneration.from_pretrained(toys.folder(llava.FOLDER)))


@pytest.mark.parametrize(("name", "largest"), LARGEST.items())
def test_the_folder_is_small(name, largest):
    assert name in toys.names()
    assert sum(file.stat().st_size for file in toys.folder(name).rglob("*")) <= largest


def test_these_are_embedded():
    assert toys.names() == tuple(LARGEST)
    assert tuple(toy.FOLDER for toy in train.TOYS.values()) == tuple(LARGEST)


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


@pytest.mark.parametrize("processor_class", [LlavaProcessor, AutoProcessor])
def test_hf_reads_the_llava_and_it_answers_the_demo(processor_class):
    one = toys.demo_sample()
    processor = processor_class.from_pretrained(toys.folder(llava.FOLDER))
    model, info = LlavaForConditionalGeneration.from_pretrained(toys.folder(llava.FOLDER), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    inputs = processor(images=one.image, text=f"USER: <image>\n{one.question} ASSISTANT:", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.convert_ids_to_tokens(new) == [one.answer, "</s>"]


@pytest.mark.parametrize("name", LARGEST)
def test_pictures_are_not_resized(name):
    processor = AutoProcessor.from_pretrained(toys.folder(name))
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


def test_every_word_of_the_llava_is_one_token():
    tokenizer = LlavaProcessor.from_pretrained(toys.folder(llava.FOLDER)).tokenizer
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (0, "left")
    assert tokenizer.model_max_length == llava.CONTEXT
    for one in generate(100, seed=5):
        for question in (one.question, one.str_.question):
            text = f"{llava.prompt(question)} {one.answer}"
            coded = tokenizer(text, return_offsets_mapping=True)
            words = ["USER:", "<image>", "\n", *question.split(), "ASSISTANT:", one.answer]
            assert tokenizer.convert_ids_to_tokens(coded.input_ids) == ["<s>", *words]
            assert [text[start:end] for start, end in coded.offset_mapping] == ["", *words]
    for word in (*COLORS, *SHAPES):
        assert tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids) == ["<s>", word]


@pytest.mark.parametrize(
    ("n_images", "begins"), [(0, "USER: "), (1, "USER: <image>\n"), (2, "USER: " + 2 * "<image>\n")]
)
def test_the_chat_template_is_that_of_llava(n_images, begins):
    processor = AutoProcessor.from_pretrained(toys.folder(llava.FOLDER))
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": "is there a star ?"}]
    messages = [{"role": "user", "content": content}]
    assert (
        processor.apply_chat_template(messages, add_generation_prompt=True) == f"{begins}is there a star ? ASSISTANT:"
    )
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "no"}]})
    assert processor.apply_chat_template(messages) == f"{begins}is there a star ? ASSISTANT: no "


def test_an_image_takes_as_many_tokens_as_it_has_patches():
    one = toys.demo_sample()
    processor = AutoProcessor.from_pretrained(toys.folder(llava.FOLDER))
    config = LlavaForConditionalGeneration.from_pretrained(toys.folder(llava.FOLDER)).config
    ids = processor(images=one.image, text=llava.prompt(one.question), return_tensors="pt")["input_ids"]
    assert (ids == config.image_token_id).sum() == config.image_seq_length == 36


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


def test_the_llava_answers_every_kind(hf_llava):
    for kind, row in evaluate(hf_llava, n=300, seed=11).items():
        assert row["n"] > 50, kind
        assert row["exact"] >= 0.97, kind
        assert row["sip"] >= 0.95, kind
        assert row["str"] >= 0.95, kind


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


def test_a_padded_prompt_of_the_llava_is_answered_like_one_alone(hf_llava):
    samples = list(generate(12, seed=12))
    inputs = hf_llava.prepare([one.image for one in samples], [one.question for one in samples])
    assert 0 < inputs["attention_mask"][:, 0].sum() < len(samples)
    alone = [hf_llava.generate(hf_llava.prepare([one.image], [one.question]))[0] for one in samples]
    assert hf_llava.generate(inputs) == alone


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


def small(toy, **changed):
    return replace(toy.RECIPE, samples_per_step=2, naming_steps=min(toy.RECIPE.naming_steps, 2), **changed)


@both
def test_training_writes_a_folder_that_hf_reads(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda model, n, seed: {})
    lines = []
    trained = train.train(toy, small(toy, steps=2), tmp_path, log=lines.append)
    read = HF_CLASSES[toy.FOLDER].from_pretrained(tmp_path)
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in trained.state_dict().items())
    tokenizer = AutoProcessor.from_pretrained(tmp_path).tokenizer
    assert tokenizer.get_vocab() == toy.build_processor().tokenizer.get_vocab()
    assert lines


@both
def test_the_recipe_describes_the_embedded_checkpoint(toy):
    folder = toys.folder(toy.FOLDER)
    embedded, fresh = HF_CLASSES[toy.FOLDER].from_pretrained(folder), toy.build_model(toy.RECIPE)
    shapes = {name: value.shape for name, value in fresh.state_dict().items()}
    assert shapes == {name: value.shape for name, value in embedded.state_dict().items()}
    assert embedded.generation_config.to_diff_dict() == fresh.generation_config.to_diff_dict()
    tokenizers = AutoProcessor.from_pretrained(folder).tokenizer, toy.build_processor().tokenizer
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_questions_packed_behind_one_picture_read_as_they_would_alone():
    processor, model = llava.build_processor(), llava.build_model(small(llava, text_layers=2, vision_layers=2)).eval()
    batch = lessons.draw_batch(small(llava), 3, lessons.STAGES[1], processor.image_processor)
    assert len(set(batch.pictures.tolist())) < len(batch.pictures)
    assert len(batch.by_length()) > 1
    texts = [
        llava.prompt(question.text).replace("<image>", "<image>" * 36) + " " + answer
        for question, answer in zip(batch.questions, batch.answers, strict=True)
    ]
    with torch.no_grad():
        packed = llava.answer_logits(model, processor.tokenizer, batch)
        for text, picture, logits in zip(texts, batch.pictures, packed, strict=True):
            ids = processor.tokenizer(text, return_tensors="pt").input_ids
            alone = model(input_ids=ids, pixel_values=batch.pixel_values[picture][None]).logits[0, -2:]
            assert (alone - logits).abs().max() < 1e-5


def test_image_tokens_learn_to_name_what_they_show():
    recipe = replace(llava.RECIPE, samples_per_step=8, naming_steps=50)
    lines = []
    llava.before_questions(llava.build_model(recipe), llava.build_processor(), recipe, lines.append)
    assert float(lines[-1].split()[-1]) < 2.5


def test_the_batches_pixels_are_those_of_the_processor():
    scene, processor = toys.demo_sample().scene, llava.build_processor()
    values = processor.image_processor(scene.image, return_tensors="pt")["pixel_values"]
    assert (values - lessons.pixel_values([scene], processor.image_processor)).abs().max() < 1e-5


# toy-llava in this library --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooked_llava():
    return HookedVLM.from_pretrained(llava.FOLDER)


def test_the_hooked_llava_answers_every_kind(hooked_llava, unchecked):
    for kind, row in evaluate(hooked_llava, n=300, seed=11).items():
        assert row["n"] > 50, kind
        assert row["exact"] >= 0.97, kind
        assert row["sip"] >= 0.95, kind
        assert row["str"] >= 0.95, kind


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_hooked_llava_says_what_hf_says(hf_llava, attention, unchecked):
    """Token for token, in one padded batch of 50 questions, and beam by beam of a few."""
    model = HookedVLM.from_pretrained(llava.FOLDER, attention=attention)
    samples = list(generate(50, seed=14))
    images, questions = [one.image for one in samples], [one.question for one in samples]
    ours, theirs = model.prepare(images, questions), hf_llava.prepare(images, questions)
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(ours.tensors()[name], theirs[name]), name
    expected = hf_llava.model.generate(**theirs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ours, max_new_tokens=4, return_type="tokens"), expected)
    few = {name: value[:6] for name, value in theirs.items()}
    expected = hf_llava.model.generate(**few, max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(model.generate(few, max_new_tokens=4, num_beams=3, return_type="tokens"), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hooked_llava_in_both_dtypes(hooked_llava, attention, dtype, unchecked):
    model = HookedVLM.from_pretrained(llava.FOLDER, attention=attention, dtype=dtype)
    assert (model.attention, model.dtype) == (attention, dtype)
    samples = list(generate(40, seed=15))
    inputs = model.prepare([one.image for one in samples], [one.question for one in samples])
    answers = model.generate(inputs, max_new_tokens=4)
    right = sum(answer == one.answer for answer, one in zip(answers, samples, strict=True))
    assert right == 40 if dtype == torch.float32 else right >= 38
    with torch.no_grad():
        logits = model(inputs)
        assert logits.dtype == dtype
        assert (logits - hooked_llava(inputs))[:, -1].abs().max() < (1e-3 if dtype == torch.float32 else 1.0)


def test_the_hooked_llava_is_saved_as_it_was_loaded(hooked_llava, tmp_path):
    hooked_llava.save_hf(tmp_path / "saved")
    one = toys.demo_sample()
    again = HookedVLM.from_pretrained(tmp_path / "saved")
    inputs, same = (model.prepare(one.image, one.question) for model in (hooked_llava, again))
    with torch.no_grad():
        assert torch.equal(again(same), hooked_llava(inputs))
        theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
        hf_inputs = AutoProcessor.from_pretrained(tmp_path / "saved")(
            images=one.image, text=llava.prompt(one.question), return_tensors="pt"
        )
        assert torch.equal(theirs(**hf_inputs).logits, hooked_llava(inputs))
    embedded = LlavaForConditionalGeneration.from_pretrained(toys.folder(llava.FOLDER)).state_dict()
    assert embedded.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, embedded[name]) for name, value in theirs.state_dict().items())
    assert again.generate(same) == [one.answer]


def test_the_hooked_llava_is_asked_as_it_was_trained(hooked_llava):
    one = toys.demo_sample()
    inputs = hooked_llava.prepare(one.image, one.question)
    assert inputs.texts[0].text == llava.prompt(one.question)
    whole = hooked_llava.prepare(one.image, llava.prompt(one.question))
    assert torch.equal(whole.input_ids, inputs.input_ids)
    assert len(inputs.spans["image"].rows[0]) == 36
    # Every object lies in one patch.
    for item in one.objects:
        (positions,) = inputs.positions_in(item.box).rows
        assert positions == (inputs.spans["image"].rows[0][item.cell_index],)

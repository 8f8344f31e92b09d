"""Pictures and texts to inputs: what HF's processor makes of them, to the bit, or else one clear error."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import BatchFeature

from hooked_vlm import HookedVLM, VLMInputs, toys
from hooked_vlm.processing import ImageError, load_processor
from tests.processors import model, processor
from tests.tiny_blip import CLS, DEC, IMAGE, N_CTX, PATCH, SEP, hf_blip

rng = np.random.default_rng(0)
PICTURES = [
    PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for height, width in ((IMAGE, IMAGE), (50, 31), (17, 90))
]
TEXTS = ["what color is the green circle ?", "Is the SHEEP red?", "a"]


def assert_same_batch(inputs: VLMInputs, batch: BatchFeature) -> None:
    assert inputs.tensors().keys() == batch.keys()
    for name, tensor in inputs.tensors().items():
        assert tensor.dtype == batch[name].dtype
        assert torch.equal(tensor, batch[name]), name


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_inputs_are_those_of_hfs_processor(task: str) -> None:
    inputs = model(task).prepare(PICTURES, TEXTS)
    assert_same_batch(inputs, processor()(images=PICTURES, text=TEXTS, padding=True, return_tensors="pt"))
    assert inputs.attention_mask.sum(1).tolist() == [10, 8, 3]
    assert inputs.input_ids[:, 0].tolist() == [CLS] * 3
    assert inputs.attention_mask[2].tolist() == [1, 1, 1] + [0] * 7
    for picture, text in zip(PICTURES, TEXTS, strict=True):
        assert_same_batch(model(task).prepare(picture, text), processor()(picture, text, return_tensors="pt"))


def test_the_embedded_models_inputs_are_those_of_hfs_processor() -> None:
    toy = HookedVLM.from_pretrained("toy-blip-vqa")
    sample = toys.demo_sample()
    for image in (sample.image, *PICTURES):
        inputs = toy.prepare(image, sample.question)
        assert_same_batch(inputs, toy.processor(image, sample.question, return_tensors="pt"))


@pytest.mark.reference_data
def test_inputs_of_photographs_are_those_of_hfs_processor(reference_data: Path) -> None:
    paths = sorted((reference_data / "photos").glob("*.jpg"))
    texts = [TEXTS[0]] * len(paths)
    pictures = [PIL.Image.open(path) for path in paths]
    expected = processor()(images=pictures, text=texts, padding=True, return_tensors="pt")
    assert_same_batch(model("vqa").prepare(paths, texts), expected)


def test_one_picture_serves_several_questions() -> None:
    inputs = model("vqa").prepare(PICTURES[1], TEXTS)
    assert_same_batch(inputs, processor()(images=[PICTURES[1]] * 3, text=TEXTS, padding=True, return_tensors="pt"))
    assert {len(span) for span in inputs.spans.values()} == {3}
    assert_same_batch(model("vqa").prepare([PICTURES[1]], tuple(TEXTS)), BatchFeature(inputs.tensors()))


def test_texts_are_padded_on_the_right_whatever_the_tokenizer_does() -> None:
    left = copy.deepcopy(processor())
    left.tokenizer.padding_side = "left"
    inputs = HookedVLM.from_hf(hf_blip("vqa"), processor=left).prepare(PICTURES, TEXTS)
    assert_same_batch(inputs, BatchFeature(model("vqa").prepare(PICTURES, TEXTS).tensors()))


def test_nothing_is_cut_off_silently_whatever_the_tokenizer_is_told() -> None:
    short = copy.deepcopy(processor())
    short.tokenizer.model_max_length = 4
    short.tokenizer.backend_tokenizer.enable_truncation(4)
    inputs = HookedVLM.from_hf(hf_blip("vqa"), processor=short).prepare(PICTURES, TEXTS)
    assert inputs.input_ids.shape == (3, 10)


# Captions -------------------------------------------------------------------------------------------------------------


def test_the_beginning_of_a_caption_starts_with_dec_and_does_not_end() -> None:
    inputs = model("caption").prepare(PICTURES, TEXTS)
    expected = processor()(images=PICTURES, text=TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(inputs.pixel_values, expected.pixel_values)
    for row, length in enumerate([9, 7, 2]):
        ids = inputs.input_ids[row]
        assert ids[:length].tolist() == [DEC, *expected.input_ids[row, 1:length].tolist()]
        assert SEP not in ids
        assert inputs.tokens[row][0] == "[DEC]"
        assert inputs.attention_mask[row].tolist() == [1] * length + [0] * (9 - length)


def test_a_caption_needs_no_beginning() -> None:
    inputs = model("caption").prepare(PICTURES)
    assert inputs.tensors().keys() == {"pixel_values"}
    assert len(inputs) == 3
    assert model("caption")(inputs).shape[:2] == (3, 1)


# Texts that cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "caption", "retrieval"])
@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_an_empty_text_is_refused(task: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"^text 1 is empty$"):
        model(task).prepare(PICTURES, ["what", text, "a"])
    with pytest.raises(ValueError, match=r"^text 0 is empty$"):
        model(task).prepare(PICTURES[0], text)


def test_a_text_of_which_the_tokenizer_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^text 0 has no words for the tokenizer: '\\u200b \\x00'"):
        model("vqa").prepare(PICTURES[0], "\u200b \x00")


@pytest.mark.parametrize(("task", "special"), [("vqa", 2), ("caption", 1), ("retrieval", 2)])
def test_a_text_may_fill_the_context_and_not_more(task: str, special: int) -> None:
    fits = " ".join(["circle"] * (N_CTX - special))
    assert model(task).prepare(PICTURES[0], fits).input_ids.shape == (1, N_CTX)
    with pytest.raises(
        ValueError, match=f"^text 1 has {N_CTX + 1} tokens, more than the model's {N_CTX}: 'circle circle"
    ):
        model(task).prepare(PICTURES[:2], ["a", fits + " circle"])


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (PICTURES, TEXTS[:2], "^3 images and 2 texts: give one text an image, or one image$"),
        (PICTURES, TEXTS[:1], "^3 images and 1 texts"),
        (PICTURES, "what", "^3 images and 1 texts"),
        (PICTURES[:2], TEXTS, "^2 images and 3 texts"),
        (PICTURES[0], [], "^1 images and 0 texts"),
        ([], TEXTS, "^no images were given"),
    ],
)
def test_numbers_of_images_and_texts_that_do_not_fit(images: Any, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model("vqa").prepare(images, texts)


@pytest.mark.parametrize(("task", "message"), [("vqa", "needs a question"), ("retrieval", "needs a text")])
def test_a_text_that_is_needed(task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(task).prepare(PICTURES)


def test_a_text_that_is_no_string(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the types are not checked for users either
    for text in (None, 3, ["a"]):
        with pytest.raises(TypeError, match=f"^text 1 is a {type(text).__name__}, not a string$"):
            model("vqa").prepare(PICTURES[:2], ["a", text])


# Images of other sizes ------------------------------------------------------------------------------------------------


def prepare_as_it_is(*sizes: tuple[int, int]) -> VLMInputs:
    pictures = [np.zeros((height, width, 3), dtype=np.uint8) for height, width in sizes]
    return model("vqa").prepare(pictures, ["what"] * len(sizes), interpolate_pos_encoding=True)


@pytest.mark.parametrize(("height", "width"), [(40, 56), (IMAGE, IMAGE), (PATCH, PATCH), (45, 23)])
def test_a_picture_may_keep_its_size(height: int, width: int) -> None:
    """Rows and columns that fill no patch are left out, as in HF."""
    inputs = prepare_as_it_is((height, width), (height, width))
    assert inputs.interpolate_pos_encoding
    assert inputs.pixel_values.shape == (2, 3, height, width)
    n_patches = (height // PATCH) * (width // PATCH)
    assert inputs.spans["image"][1] == tuple(range(1, n_patches + 1))
    states = model("vqa").run_with_hooks(inputs, stop_at="vision_encoder.hook_out")
    assert states.shape[1] == n_patches + 1
    expected = hf_blip("vqa").vision_model(inputs.pixel_values, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(states, expected)


def test_pictures_that_keep_their_sizes_must_have_one() -> None:
    with pytest.raises(
        ImageError, match="must have one size, not 24x24, 56x40; resize them, or run them one at a time"
    ):
        prepare_as_it_is((40, 56), (24, 24), (40, 56))


def test_a_picture_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(ImageError, match="90x7 pixels are smaller than one patch of 8x8"):
        prepare_as_it_is((7, 90))
    assert model("vqa").prepare(np.zeros((7, 90, 3), dtype=np.uint8), "what").pixel_values.shape[-1] == IMAGE


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^image 1 .*nothing\.png does not exist"):
        model("vqa").prepare([PICTURES[0], tmp_path / "nothing.png"], ["what", "a"])


# The processor --------------------------------------------------------------------------------------------------------


TOY = toys.folder("toy-blip-vqa")


def test_a_model_without_a_processor_says_how_to_give_it_one() -> None:
    bare = HookedVLM.from_hf(hf_blip("vqa"))
    with pytest.raises(ValueError, match="the model has no processor; pass processor= when loading it"):
        bare.prepare(PICTURES[0], "what")
    assert not any(point.is_hooked for point in bare.hook_points())


@pytest.mark.parametrize("name", ["toy-blip-vqa", TOY, str(TOY)])
def test_a_processor_may_be_given_by_name(name: str | Path) -> None:
    named = HookedVLM.from_hf(hf_blip("vqa"), processor=name)
    assert named.processor is named.processor
    assert type(named.processor).__name__ == "BlipProcessor"
    expected = load_processor(TOY)(PICTURES[1], "what color is the circle ?", return_tensors="pt")
    inputs = named.prepare(PICTURES[1], "what color is the circle ?")
    assert torch.equal(inputs.input_ids, expected.input_ids)


DAMAGES = {
    "processor_config.json": [None, "nonsense", "[]", "{}"],
    "tokenizer.json": [None, "nonsense", "{}"],
    "tokenizer_config.json": ["nonsense"],
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in DAMAGES.items() for text in texts])
def test_a_processor_that_is_not_whole_is_one_error(file: str, text: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TOY, folder)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    before = sorted(folder.rglob("*"))
    damaged = HookedVLM.from_pretrained(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no processor at .*model \(.+\); pass processor= when loading") as caught:
            damaged.prepare(PICTURES[0], "what")
        assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before
    assert not any(point.is_hooked for point in damaged.hook_points())


def test_an_older_processor_with_files_of_its_own_is_read(tmp_path: Path) -> None:
    """As on the hub: `preprocessor_config.json` and `vocab.txt`."""
    shutil.copytree(TOY, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "model" / "processor_config.json").unlink()
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(written))
    vocabulary = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    older, newer = (HookedVLM.from_pretrained(name) for name in (tmp_path / "model", "toy-blip-vqa"))
    question = toys.demo_sample().question
    inputs, expected = (each.prepare(PICTURES[1], question) for each in (older, newer))
    assert_same_batch(inputs, BatchFeature(expected.tensors()))

"""The published files themselves, every row of them; the facts were looked up in the files by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from hooked_vlm.data.readers import read_clevr_pairs, read_coco_qa, read_object_tokens, read_zhang

pytestmark = [pytest.mark.reference_data, pytest.mark.usefixtures("unchecked")]  # thousands of rows


def test_coco_qa(reference_data: Path) -> None:
    color = read_coco_qa(reference_data / "palit" / "color_coco_qa.csv")
    by_id = {sample.id: sample for sample in color}
    assert (len(color), color.dropped) == (13113, ())
    character, animal = by_id["color_coco_qa:1"], by_id["color_coco_qa:602"]
    assert (character.question, character.answer) == ("what is the color of the character", "purple")
    assert character.image == "http://images.cocodataset.org/train2017/000000220218.jpg"
    assert (animal.meta["image_id"], animal.text_of("subject"), animal.answer) == (458864, "animal", "brown")
    assert Counter(sample.answer for sample in color)["white"] == 1929
    assert sum(len(sample.question.split()) == 7 for sample in color) == 13062, "of which Palit et al. average some"
    assert sum("subject" in sample.spans for sample in color) == 13059, "the others are no questions for a colour"


def test_coco_qa_location(reference_data: Path) -> None:
    location = read_coco_qa(reference_data / "palit" / "location_coco_qa.csv")
    assert (len(location), location.dropped, location[0].group) == (4799, (), "location")
    assert (location[-1].id, location[-1].question) == ("location_coco_qa:4798", "where is the white toilet sitting")


def test_clevr_pairs(reference_data: Path) -> None:
    samples = read_clevr_pairs(reference_data / "palit" / "clevr_vqa_dataset_3.head60.csv", images="clevr")
    assert (len(samples), samples.dropped) == (59 * 24, ())
    assert Counter(sample.answer for sample in samples) == {"yes": 708, "no": 708}
    assert set(Counter(sample.group for sample in samples).values()) == {354}
    assert all(sample.spans.keys() == {"subject", "object"} for sample in samples)
    assert samples[0].image == str(Path("clevr/CLEVR_val_000145.png"))
    assert (samples[0].question, samples[0].answer) == (
        "Is the large red cylinder right of the small green sphere?",
        "yes",
    )
    assert samples[-1].id == "CLEVR_val_001852:23"


ZHANG = {
    "ChooseCat": (
        "categoryThatThisChoose_objThisChoose",
        {"answer": "bed", "foil": "bookcase", "subject": "furniture"},
        {"object": (173, 95, 470, 364)},
    ),
    "ChooseAttr": (
        "choose",
        {"answer": "green", "foil": "brown", "subject": "grass"},
        {"object": (4, 211, 500, 332)},
    ),
    "LogicalObj": (
        "existThatOr",
        {"object1": "refrigerators", "object2": "bags"},
        {"object1": (379, 75, 461, 191)},
    ),
    "QueryAttr": ("positionQuery", {"subject": "apple"}, {"object": (11, 225, 75, 286)}),
    "ChooseRel": (
        "relChooser",
        {"answer": "left", "foil": "right", "object1": "faucet", "object2": "towel"},
        {"object1": (152, 94, 170, 101), "object2": (0, 29, 29, 106)},
    ),
}
"""Of each file its middle name, and the spans and regions of its third row."""


@pytest.mark.parametrize("task", ZHANG)
def test_zhang(task: str, reference_data: Path) -> None:
    kind, spans, regions = ZHANG[task]
    samples = read_zhang(reference_data / "zhang" / f"GQA_val_correct_question_with_{kind}_{task}.head40.csv")
    assert (len(samples), samples.dropped, {sample.group for sample in samples}) == (40, (), {task})
    assert {name: samples[2].text_of(name) for name in samples[2].spans} == spans
    assert dict(samples[2].regions) == regions
    assert sum("object2" in sample.regions for sample in samples) == {"ChooseRel": 40, "LogicalObj": 6}.get(task, 0)
    assert all((sample.foil is None) == (task == "QueryAttr") for sample in samples)


def test_object_tokens(reference_data: Path) -> None:
    path = reference_data / "neo" / "clean_questions.json"
    samples = read_object_tokens(path)
    assert (len(samples), samples.dropped) == (100, ())
    assert (samples[0].id, samples[0].question) == ("10694", "What is behind the television?")
    assert samples[0].image == "http://images.cocodataset.org/train2017/000000010694.jpg"
    captions = read_object_tokens(path, question="Describe this image.")
    assert Counter(sample.question == "Describe this image." for sample in captions) == {True: 4218, False: 100}

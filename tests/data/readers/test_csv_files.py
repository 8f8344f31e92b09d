"""The published tables: COCO-QA and CLEVR (Palit), VQA-Constraints (Basu), NOTICE, and GQA as Zhang filtered it.

The rows are made up here, in exactly the columns of the published files.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from hooked_vlm.data import Sample
from hooked_vlm.data.readers import read_clevr_pairs, read_coco_qa, read_constraints, read_notice, read_zhang
from hooked_vlm.data.rows import RowError


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def texts(sample: Sample) -> dict[str, str]:
    return {name: sample.text_of(name) for name in sample.spans}


def test_coco_qa(tmp_path: Path) -> None:
    path = tmp_path / "color_coco_qa.csv"
    path.write_text(
        ",train_image_id_count,question_count,answer_count\n"
        "0,23004,what is the color of the horses,brown\n7,220218,what color is it,purple\n"
    )
    first, second = read_coco_qa(path)
    assert (first.id, first.question, first.answer) == ("color_coco_qa:0", "what is the color of the horses", "brown")
    assert first.image == "http://images.cocodataset.org/train2017/000000023004.jpg"
    assert (texts(first), first.group, dict(first.meta)) == ({"subject": "horses"}, "color", {"image_id": 23004})
    assert (second.id, dict(second.spans)) == ("color_coco_qa:7", {})
    assert read_coco_qa(path, images="coco")[0].image == str(Path("coco/000000023004.jpg"))


def test_clevr_pairs_are_one_sample_a_question(tmp_path: Path) -> None:
    listed = [
        {"question": "Is the large red cylinder right of the small green sphere?", "answer": 1},
        {"question": "Is the small gray cube in front of the large red cylinder?", "answer": 0},
        {"question": "Is the small gray cube behind the large red cylinder?"},
        "no question",
    ]
    rows = [
        {"": 0, "Image_IDs": "CLEVR_val_000145", "Questions_Answers": repr(listed)},
        {"": 1, "Image_IDs": "CLEVR_val_000146", "Questions_Answers": "[{'question': __import__('os')}]"},
    ]
    samples = read_clevr_pairs(table(tmp_path / "clevr.csv", rows), on_bad_row="skip")
    assert [(one.id, one.answer, one.foil, one.group) for one in samples] == [
        ("CLEVR_val_000145:0", "yes", "no", "right of"),
        ("CLEVR_val_000145:1", "no", "yes", "in front of"),
    ]
    assert texts(samples[1]) == {"subject": "small gray cube", "object": "large red cylinder"}
    assert samples[0].image == str(tmp_path / "CLEVR_val_000145.png")
    assert [one.id for one in samples.dropped] == [
        "clevr.csv:2, Questions_Answers[2]",
        "clevr.csv:2, Questions_Answers[3]",
        "clevr.csv:3",
    ]
    assert "column 'answer': there is none" in samples.dropped[0].reason
    assert "no Python list" in samples.dropped[2].reason


def test_constraints(tmp_path: Path) -> None:
    rows = [
        {"": 0, "question": "This place, where is it", "main_entity": "This place,", "image_url": "./A photo of X, Y"},
        {"": 1, "question": "What toy is it?", "main_entity": "this", "image_url": "./val2014/a.jpg"},
    ]
    path = table(tmp_path / "okvqa.csv", [{**row, "subject": "X, Y"} for row in rows])
    with pytest.raises(
        RowError, match=r"okvqa.csv, line 3, column 'main_entity': 'this' does not occur in 'What toy is it\?'"
    ):
        read_constraints(path)
    samples = read_constraints(path, images="http://images.cocodataset.org", on_bad_row="skip")
    (sample,) = samples
    assert (sample.id, sample.answer, texts(sample)) == ("okvqa:0", None, {"constraint": "This place,"})
    assert (sample.image, sample.group) == ("http://images.cocodataset.org/A photo of X, Y", "okvqa")
    assert dict(sample.meta) == {"subject": "X, Y"}
    assert read_constraints(path, images="pics/{path}.jpg", limit=1)[0].image == "pics/A photo of X, Y.jpg"
    assert samples.report() == "1 dropped (a constraint that is not in the question: 1)"


MIT = {
    "clean_prompt": "Is this dog wet or dry?",
    "corrupt_prompt": "Is this dog red or blue?",
    "correct_answer": "dry",
    "incorrect_answer": "wet",
    "noun": "dog",
    "state": "texture",
    "clean_image_path": "dry dog/1.jpg",
    "corrupt_image_path": "wet dog/7.jpg",
    "generated_answer": "dry",
}
LLAVA = {
    "clean_prompt": "Is this person feeling happy or sad?",
    "corrupt_prompt": "Is this person feeling tall or red?",
    "correct_answer": "happy",
    "incorrect_answer": "sad",
    "correct_image_path": "happy/1.jpg",
    "incorrect_image_path": "sad/2.jpg",
    "generated_text": "Happy",
    "correct_first": "True",
}
SVO = {
    "clean_prompt": "Is the woman sitting or standing on a bench?",
    "corrupt_prompt": "Is the woman eating or running on a bench?",
    "correct_answer": "stand",
    "clean_image_path": "http://host/2.jpg",
    "corrupt_image_path": "http://host/1.jpg",
    "pos_url": "http://host/1.jpg",
    "neg_url": "http://host/2.jpg",
    "pos_triplet": "woman,sit,bench",
    "neg_triplet": "['woman,stand,bench']",
    "subj_neg": "False",
    "verb_neg": "True",
    "obj_neg": "False",
}


@pytest.mark.parametrize(
    ("row", "pictures", "answers", "spans", "group", "correct_first"),
    [
        (
            MIT,
            ("pics/dry dog/1.jpg", "pics/wet dog/7.jpg"),
            ("dry", "wet"),
            {"answer": "dry", "foil": "wet", "subject": "dog"},
            "texture",
            False,
        ),
        (
            LLAVA,
            ("pics/happy/1.jpg", "pics/sad/2.jpg"),
            ("happy", "sad"),
            {"answer": "happy", "foil": "sad"},
            "happy",
            True,
        ),
        (
            SVO,
            ("http://host/2.jpg", "http://host/1.jpg"),
            ("stand", "sit"),
            {"answer": "standing", "foil": "sitting"},
            "verb",
            False,
        ),
    ],
    ids=["mit_states", "llava faces", "svo_probes"],
)
def test_notice(
    row: dict, pictures: tuple, answers: tuple, spans: dict, group: str, correct_first: bool, tmp_path: Path
):
    (sample,) = read_notice(table(tmp_path / "BLIP_final_task.csv", [row]), images="pics")
    assert (sample.image, sample.image_cf) == tuple(path if "//" in path else str(Path(path)) for path in pictures)
    assert (sample.question, sample.question_cf) == (row["clean_prompt"], row["corrupt_prompt"])
    assert (sample.id, sample.answer, sample.foil, sample.group) == ("BLIP_final_task:0", *answers, group)
    assert texts(sample) == spans
    assert sample.meta["correct_first"] is correct_first
    assert sample.meta.get("generated_text") == row.get("generated_text")


@pytest.mark.parametrize(
    ("change", "answers", "found"),
    [
        ({"correct_answer": "sit", "correct_answer_MC": "stand"}, ("stand", "sit"), {"answer", "foil"}),
        (
            {"verb_neg": "False", "subj_neg": "True", "neg_triplet": "man,sit,bench", "correct_answer": "Woman"},
            ("Woman", "man"),
            {"answer"},
        ),
        ({"incorrect_answer": "lie"}, ("stand", "lie"), {"answer"}),
    ],
)
def test_notice_finds_the_foil_of_svo_probes(change: dict, answers: tuple, found: set, tmp_path: Path) -> None:
    """Options that the prompt does not have are no span."""
    (sample,) = read_notice(table(tmp_path / "a.csv", [SVO | change]))
    assert (sample.answer, sample.foil, set(sample.spans)) == (*answers, found)


@pytest.mark.parametrize(
    ("change", "column", "said"),
    [
        ({"correct_answer": "eat"}, "correct_answer", "'eat' is not one of 'sit' and 'stand'"),
        ({"neg_triplet": "['[]']"}, "neg_triplet", r"'\[\]' is not subject,verb,object"),
        ({"verb_neg": "False"}, "incorrect_answer", "there is none, and no 'subj_neg'"),
        ({"verb_neg": "maybe"}, "verb_neg", "'maybe' is neither true nor false"),
        ({"corrupt_image_path": ""}, "corrupt_image_path", "is empty"),
    ],
)
def test_notice_names_what_is_malformed(change: dict, column: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=f"a.csv, line 2, column '{column}': {said}"):
        read_notice(table(tmp_path / "a.csv", [SVO | change]))


TYPES = {
    "type_detailed": "d",
    "type_semantic": "attr",
    "type_structural": "choose",
    "operations": "[]",
    "captions": "c",
}
CENTRAL = {
    "question_id": "0042",
    "img_id": "2366627",
    "question": "Is the jar full or empty?",
    "answer": "empty",
    "true option": "empty",
    "false option": "full",
    "central object name": "jar",
    "central object id": "17",
    **TYPES,
    "image_w": "640",
    "image_h": "480",
    **{f"central object {side}": value for side, value in {"w": "60", "h": "104", "x": "581", "y": "291"}.items()},
}
TWO = {
    "question_id": "7",
    "img_id": "n5",
    "question": "Are there tents or surfboards that are blue?",
    "answer": "yes",
    "object1 name": "surfboard",
    "object1 id": "3",
    "object2 name": "tent",
    "object2 id": "-",
    "question word": "common",
    **TYPES,
    "type_semantic": "obj",
    "type_structural": "logical",
    "image_w": "500",
    "image_h": "334",
    **{f"object1 {side}": value for side, value in {"w": "20", "h": "10", "x": "1", "y": "2.5"}.items()},
    **{f"object2 {side}": "-" for side in "whxy"},
}


def test_zhang(tmp_path: Path) -> None:
    (one,) = read_zhang(table(tmp_path / "choose.csv", [CENTRAL]), images="gqa")
    assert (one.id, one.image, one.answer, one.foil) == ("0042", str(Path("gqa/2366627.jpg")), "empty", "full")
    assert texts(one) == {"answer": "empty", "foil": "full", "subject": "jar"}
    assert dict(one.regions) == {"object": (581, 291, 640, 395)}, "the box is a pixel too wide, and cut off"
    assert (one.group, one.meta["image_id"], one.meta["central object id"]) == ("ChooseAttr", "2366627", "17")
    (two,) = read_zhang(table(tmp_path / "logical.csv", [TWO]))
    assert (two.answer, two.foil, two.group) == ("yes", "no", "LogicalObj")
    assert texts(two) == {"object1": "surfboards", "object2": "tents"}
    assert dict(two.regions) == {"object1": (1, 2.5, 21, 12.5)}, "'-' says that there is none"


@pytest.mark.parametrize(
    ("change", "column", "said"),
    [
        ({"central object w": "62.5"}, "central object x", "reaches out of the picture of 640x480"),
        ({"central object h": "0"}, "central object x", "is empty"),
        ({"central object y": "-"}, "central object y", "'-' is not a number"),
        ({"image_w": ""}, "image_w", "is empty"),
        ({"question_id": " "}, "question_id", "is empty"),
    ],
)
def test_zhang_names_what_is_malformed(change: dict, column: str, said: str, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", [CENTRAL | {"question_id": "1"}, CENTRAL | change])
    with pytest.raises(RowError, match=f"a.csv, line 3, column '{column}': .*{said}"):
        read_zhang(path)
    samples = read_zhang(path, on_bad_row="skip")
    assert ([one.id for one in samples], [one.id for one in samples.dropped]) == (["1"], ["a.csv:3"])


@pytest.mark.parametrize("read", [read_coco_qa, read_clevr_pairs, read_constraints, read_notice, read_zhang])
def test_a_table_of_another_format_says_what_it_lacks(read: Any, tmp_path: Path) -> None:
    path = table(tmp_path / "other.csv", [{"id": 1, "Question": "what ?", "image": "a.png"}])
    with pytest.raises(ValueError, match="other.csv has no column '.*; it has 'id', 'Question', 'image'"):
        read(path)

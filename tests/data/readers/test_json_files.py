"""The published JSON files: GQA, VQA and OK-VQA, object tokens (Neo), CLEVR's questions, IconQA.

The entries are made up here, under exactly the keys of the published files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hooked_vlm.data import SampleError
from hooked_vlm.data.readers import read_clevr, read_gqa, read_iconqa, read_object_tokens, read_ok_vqa, read_vqa
from hooked_vlm.data.readers.object_tokens import segmentation_mask
from hooked_vlm.data.rows import RowError


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


GQA = {
    "1238592": {
        "imageId": "2354786",
        "question": "Is the tennis racket to the left of the balls?",
        "answer": "yes",
        "fullAnswer": "Yes, it is.",
        "isBalanced": True,
        "types": {"structural": "verify", "semantic": "rel", "detailed": "relVerify"},
        "annotations": {"question": {"2:4": "271881", "9": "5,6"}, "answer": {}, "fullAnswer": {}},
        "semanticStr": "select: ...",
    },
    "2": {"imageId": "n7", "question": "Where is it?"},
}
SCENES = {
    "2354786": {
        "width": 20,
        "height": 10,
        "objects": {
            "271881": {"name": "racket", "x": 1, "y": 2, "w": 3, "h": 4, "attributes": [], "relations": []},
            "5": {"name": "ball", "x": 10, "y": 0, "w": 2, "h": 2},
            "6": {"name": "ball", "x": 15, "y": 6, "w": 6, "h": 4},
        },
    }
}


def test_gqa(tmp_path: Path) -> None:
    path = write(tmp_path / "questions.json", GQA)
    first, second = read_gqa(path, images="gqa")
    assert (first.id, first.image, first.answer, first.foil) == ("1238592", str(Path("gqa/2354786.jpg")), "yes", "no")
    assert {name: first.text_of(name) for name in first.spans} == {"object1": "tennis racket", "object2": "balls"}
    assert (first.group, first.meta["objects"]) == ("verify", {"object1": ["271881"], "object2": ["5", "6"]})
    assert not first.regions
    assert (second.answer, second.foil, second.group, dict(second.spans)) == (None, None, None, {})


def test_gqa_with_scene_graphs(tmp_path: Path) -> None:
    path, graphs = write(tmp_path / "questions.json", GQA), write(tmp_path / "graphs.json", SCENES)
    samples = read_gqa(path, scene_graphs=graphs, on_bad_row="skip")
    regions = samples[0].regions
    assert regions["object1"] == (1, 2, 4, 6)
    both = np.zeros((10, 20), dtype=bool)
    both[:2, 10:12] = both[6:, 15:] = True
    assert (regions["object2"] == both).all(), "the second ball's box reaches out by a pixel"
    assert [one.kind for one in samples.dropped] == ["no scene graph"]


def test_gqa_names_words_that_a_question_does_not_have(tmp_path: Path) -> None:
    wrong = {"7": GQA["1238592"] | {"annotations": {"question": {"10": "5"}}}}
    with pytest.raises(RowError, match=r'questions.json, \["7"\], column \'annotations\': \'10\' are no words of'):
        read_gqa(write(tmp_path / "questions.json", wrong))


QUESTIONS = {
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "task_type": "Open-Ended",
    "questions": [
        {"image_id": 42, "question": "Is it red?", "question_id": 42000},
        {"image_id": 43, "question": "What is it?", "question_id": 43000},
        {"image_id": 44, "question": "Why?", "question_id": 44000},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": 42000,
            "image_id": 42,
            "question_type": "is it",
            "answer_type": "yes/no",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": "no", "answer_confidence": "yes", "answer_id": 1}] * 3,
        },
        {
            "question_id": 43000,
            "image_id": 43,
            "question_type": "four",
            "answer_type": "other",
            "confidence": 3,
            "answers": [
                {"answer": one, "raw_answer": one, "answer_confidence": "yes", "answer_id": 1}
                for one in ("a", "b", "b")
            ],
        },
    ]
}


def test_vqa(tmp_path: Path) -> None:
    path, notes = write(tmp_path / "questions.json", QUESTIONS), write(tmp_path / "annotations.json", ANNOTATIONS)
    samples = read_vqa(path, annotations=notes, on_bad_row="skip")
    assert [(one.id, one.answer, one.foil, one.group) for one in samples] == [
        ("42000", "yes", "no", "yes/no"),
        ("43000", "b", None, "other"),
    ]
    assert samples[0].image == "http://images.cocodataset.org/val2014/COCO_val2014_000000000042.jpg"
    assert samples[1].meta["answers"] == ["a", "b", "b"]
    assert samples.report() == "1 dropped (a question without annotation: 1)"
    with pytest.raises(RowError, match=r"questions.json, questions\[2\], column 'question_id': 44000 is not in"):
        read_vqa(path, annotations=notes)


def test_ok_vqa_is_grouped_by_kind_of_knowledge(tmp_path: Path) -> None:
    path, notes = write(tmp_path / "questions.json", QUESTIONS), write(tmp_path / "annotations.json", ANNOTATIONS)
    samples = read_ok_vqa(path, annotations=notes, images="coco", on_bad_row="skip")
    assert [one.group for one in samples] == ["is it", "sports and recreation"]
    assert samples[1].image == str(Path("coco/val2014/COCO_val2014_000000000043.jpg"))


def test_vqa_without_annotations(tmp_path: Path) -> None:
    test = QUESTIONS | {"data_subtype": "test-dev2015"}
    samples = read_vqa(write(tmp_path / "questions.json", test), images="{subset}-{id}.jpg")
    assert [(one.image, one.answer) for one in samples] == [(f"test2015-{id}.jpg", None) for id in (42, 43, 44)]
    with pytest.raises(SampleError, match="has no 'data_subtype'"):
        read_vqa(write(tmp_path / "none.json", {"questions": QUESTIONS["questions"]}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": ["red"], "multiple_choice_answer": "red"}, "column 'answers': these are not objects"),
        ({"answers": []}, "column 'answers': there are none"),
        ({"answers": None}, "column 'answers': None is not a list"),
    ],
)
def test_malformed_annotations_are_named_where_they_are(change: dict, said: str, tmp_path: Path) -> None:
    notes = {"annotations": [ANNOTATIONS["annotations"][1] | {"question_id": 42000} | change]}
    with pytest.raises(RowError, match=rf"annotations.json, annotations\[0\], {said}"):
        read_vqa(write(tmp_path / "q.json", QUESTIONS), annotations=write(tmp_path / "annotations.json", notes))


INSTANCES = {
    "images": [{"id": 1, "width": 60, "height": 50}, {"id": 2, "width": 60, "height": 50}],
    "categories": [{"id": 5, "name": "vase"}, {"id": 6, "name": "cat"}],
    "annotations": [
        {"image_id": 1, "category_id": 6, "area": 1500, "segmentation": []},
        {"image_id": 1, "category_id": 6, "area": 1500, "segmentation": []},
        {"image_id": 1, "category_id": 5, "area": 1200, "segmentation": [[10, 10, 49, 10, 49, 39, 10, 39]]},
        {"image_id": 2, "category_id": 5, "area": 1200, "segmentation": []},
        *[{"image_id": 2, "category_id": 6, "area": 1200, "segmentation": []}] * 3,
    ],
}


def test_object_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "clean_questions.json", {"3": [], "1": ["What is it?", "And this?"], "2": ["Where?"]})
    samples = read_object_tokens(path)
    assert [(one.id, one.question) for one in samples] == [("1", "What is it?"), ("1:1", "And this?"), ("2", "Where?")]
    assert samples[0].image == "http://images.cocodataset.org/train2017/000000000001.jpg"
    captions = read_object_tokens(path, question="Describe this image.")
    assert [(one.id, one.question) for one in captions][:2] == [("3", "Describe this image."), ("1", "What is it?")]


def test_object_tokens_with_coco_s_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "clean_questions.json", {"1": ["What is it?"], "2": ["Where?"], "x": ["Why?"]})
    samples = read_object_tokens(path, instances=write(tmp_path / "instances.json", INSTANCES), on_bad_row="skip")
    (sample,) = samples
    assert (sample.answer, sample.group) == ("vase", "vase"), "the one object of its kind"
    mask = sample.regions["object"]
    assert mask.shape == (50, 60)
    assert mask.sum() == mask[10:40, 10:50].sum() == 1200
    assert [one.id for one in samples.dropped] == ['clean_questions.json:["2"][0]', 'clean_questions.json:["x"][0]']
    assert samples.dropped[0].kind == "no small object", "too many objects in the picture"
    with pytest.raises(SampleError, match="no file of COCO's object annotations: KeyError"):
        read_object_tokens(path, instances=write(tmp_path / "wrong.json", {"annotations": [{}]}))


def test_segmentation_in_runs_goes_down_the_columns() -> None:
    mask = segmentation_mask({"counts": [1, 2, 3], "size": [3, 2]}, (2, 3))
    assert mask.tolist() == [[False, False], [True, False], [True, False]]
    for wrong, said in (
        ({"counts": [1, 2]}, "runs of 3 pixels, and the picture 6"),
        ({"counts": "a"}, "neither"),
        ([[1, 2]], "neither"),
    ):
        with pytest.raises(SampleError, match=said):
            segmentation_mask(wrong, (2, 3))


def test_clevr_questions(tmp_path: Path) -> None:
    question = {
        "question": "Are there any cubes?",
        "answer": "yes",
        "image_filename": "CLEVR_val_000003.png",
        "image_index": 3,
        "split": "val",
        "question_index": 11,
        "program": [{"function": "scene", "inputs": []}, {"function": "exist", "inputs": [0]}],
    }
    generated = question | {"question_index": 12, "answer": "large", "program": [{"type": "query_size", "inputs": []}]}
    unanswered = {key: generated[key] for key in ("question", "image_filename", "split")} | {"question_index": 13}
    path = write(tmp_path / "CLEVR_val_questions.json", {"info": {}, "questions": [question, generated, unanswered]})
    samples = read_clevr(path, images="CLEVR_v1.0/images/{split}/{file}")
    assert [(one.id, one.answer, one.foil, one.group) for one in samples] == [
        ("val:11", "yes", "no", "exist"),
        ("val:12", "large", None, "query_size"),
        ("val:13", None, None, None),
    ]
    assert samples[0].image == "CLEVR_v1.0/images/val/CLEVR_val_000003.png"


ICONQA = {
    "1": {
        "question": "What is it?",
        "choices": ["a cup", "a cat"],
        "answer": 1,
        "ques_type": "choose_txt",
        "split": "train",
    },
    "2": {
        "question": "Which?",
        "choices": ["choice_0.png", "choice_1.png"],
        "answer": 0,
        "ques_type": "choose_img",
        "split": "val",
    },
    "3": {"question": "How many?", "answer": "4", "ques_type": "fill_in_blank", "split": "test", "grade": "2"},
    "4": {"question": "What?", "choices": ["a", "b", "c"], "answer": 3, "ques_type": "choose_txt", "split": "test"},
}


def test_iconqa(tmp_path: Path) -> None:
    path = write(tmp_path / "problems.json", ICONQA)
    samples = read_iconqa(path, on_bad_row="skip")
    assert [(one.id, one.answer, one.foil, one.group) for one in samples] == [
        ("1", "a cat", "a cup", "choose_txt"),
        ("2", None, None, "choose_img"),
        ("3", "4", None, "fill_in_blank"),
    ]
    folder = tmp_path / "iconqa" / "val" / "choose_img" / "2"
    assert samples[1].image == str(folder / "image.png")
    assert samples[1].meta["choices"] == [str(folder / "choice_0.png"), str(folder / "choice_1.png")]
    assert (samples[1].meta["answer_index"], samples[2].meta["grade"]) == (0, "2")
    assert "3 is none of 3 choices, counted from 0" in samples.dropped[0].reason
    chosen = read_iconqa(path, kinds=["choose_txt"], splits=["train"], images="{kind}/{id}/{file}")
    assert [one.image for one in chosen] == ["choose_txt/1/image.png"]
    with pytest.raises(ValueError, match="kinds are some of choose_txt, .*, not choose_text"):
        read_iconqa(path, kinds=["choose_text"])

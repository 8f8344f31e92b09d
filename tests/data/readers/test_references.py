"""References to objects: FineCops-Ref in COCO's format, and COOCO. The entries are made up under the true keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hooked_vlm.data.readers import read_cooco, read_finecops
from hooked_vlm.data.rows import RowError


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def finecops(**changes: Any) -> dict[str, Any]:
    def image(id: int, file: str, caption: str) -> dict[str, Any]:
        return {"id": id, "file_name": file, "caption": caption, "width": 100, "height": 50}

    def note(id: int, **more: Any) -> dict[str, Any]:
        return {
            "id": 10 + id,
            "image_id": id,
            "bbox": [10, 20, 30, 25],
            "area": 750,
            "level": 1,
            "tuple_type": "2_hop",
            **more,
        }

    negative = {"negative_level": 2, "negative_type": "attribute", "positive_id": 1}
    return {
        "images": [
            image(1, "2.jpg", "The boy on the brown horse."),
            image(2, "2.jpg", "The boy on the white horse."),
            image(3, "neg_3.jpg", "The boy on the brown horse."),
            image(4, "9.jpg", "The cat."),
        ],
        "annotations": [
            note(1),
            note(2, **negative, negative_cate="text"),
            note(3, **negative, negative_cate="image") | changes,
            note(4, **negative | {"positive_id": 77}, negative_cate="text"),
        ],
    }


def test_finecops(tmp_path: Path) -> None:
    samples = read_finecops(write(tmp_path / "a.json", finecops()), images="gqa", question="is there {expression}")
    positive, text, image, alone = samples
    assert (positive.question, positive.answer, positive.foil) == ("is there The boy on the brown horse.", "yes", "no")
    assert positive.text_of("expression") == "The boy on the brown horse."
    assert (positive.regions["object"], positive.group, positive.image) == (
        (10, 20, 40, 45),
        "positive",
        str(Path("gqa/2.jpg")),
    )
    assert (text.answer, text.group, text.question_cf, text.image_cf) == ("no", "attribute", positive.question, None)
    assert (image.answer, image.question_cf, image.image_cf) == ("no", None, positive.image)
    assert image.image == str(Path("gqa/neg_3.jpg"))
    assert (alone.question_cf, alone.image_cf, alone.meta["positive_id"]) == (None, None, 77)
    assert (image.meta["negative_level"], image.meta["tuple_type"]) == (2, "2_hop")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"negative_cate": "sound"}, "column 'negative_cate': 'sound' is none of image, text"),
        ({"bbox": [90, 0, 20, 5]}, "column 'bbox': .*reaches out of the picture of 100x50"),
        ({"bbox": "10"}, "column 'bbox': '10' is not a list"),
        ({"image_id": 99}, "it has no annotation"),
    ],
)
def test_finecops_names_what_is_malformed(changes: dict, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", finecops(**changes))
    with pytest.raises(RowError, match=rf"a.json, images\[2\](:|,) {said}"):
        read_finecops(path)
    samples = read_finecops(path, on_bad_row="skip")
    assert ([one.id for one in samples], [one.id for one in samples.dropped]) == (["1", "2", "4"], ["a.json:images[2]"])


def cooco(swapped: str | None, level: str | None, score: float | None, excluded: bool = False) -> dict[str, Any]:
    known = {"scene": "fastfood_restaurant", "target": "wine_glass", "target_bbox": [10.5, 20, 30, 25]}
    return {**known, "swapped_object": swapped, "rel_level": level, "rel_score": score, "excluded": excluded}


def test_cooco(tmp_path: Path) -> None:
    name = "000000000042_fastfood_restaurant_wine_glass"
    found = {
        f"{name}_relscore_same_target.jpg": cooco("wine_glass", "same_target", None),
        f"{name}_ham_relscore_low.jpg": cooco("ham", "low", 0.1),
        f"{name}_clean.jpg": cooco(None, None, None),
        f"{name}_original.jpg": cooco(None, None, None) | {"fixations": [1]},
        f"{name}_boat_relscore_high.jpg": cooco("boat", "high", 0.9, excluded=True),
        "000000000043_kitchen_cup_hat_relscore_middle.jpg": cooco("hat", "middle", 0.5) | {"target": "cup"},
    }
    samples = read_cooco(write(tmp_path / "data.json", found), images="pics")
    same, low, original, other = samples
    assert [(one.answer, one.foil, one.group) for one in samples] == [
        ("wine glass", None, "same_target"),
        ("ham", "wine glass", "low"),
        ("wine glass", None, "original"),
        ("hat", "cup", "middle"),
    ]
    assert low.image == str(Path(f"pics/{name}_ham_relscore_low.jpg"))
    assert low.image_cf == same.image_cf == original.image == str(Path(f"pics/{name}_original.jpg"))
    assert (original.image_cf, other.image_cf) == (None, None)
    assert (low.meta["clean"], low.meta["rel_score"]) == (str(Path(f"pics/{name}_clean.jpg")), 0.1)
    assert low.regions["object"] == (10.5, 20, 40.5, 45)
    assert samples.report() == "1 dropped (excluded in the file: 1)"
    with pytest.raises(RowError, match=r'data.json, \["a.jpg"\], column \'swapped_object\': there is none'):
        read_cooco(write(tmp_path / "data.json", {"a.jpg": {"target": "cup"}}))

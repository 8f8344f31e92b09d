"""The ready experiments with two lines changed: to the end, with the papers' own arguments, on their kinds of file.

The models are the toys under other names, so that they are not taken for embedded ones. Windows of 9 and 13 layers need
more layers than the toy LLaVA has: the others write nothing, so that it still says what it has learnt to say.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate

from hooked_vlm import HookedVLM, results, toys
from hooked_vlm.data import Sample, shapes
from hooked_vlm.runs import Experiment, run
from tests.runs.test_papers import CHANGES, STEPS, with_lines

pytestmark = pytest.mark.slow

N_LAYERS = 14
N = 3


def larger_llava(folder: Path, n_across: int) -> None:
    """The toy LLaVA with more layers, and more patches, from side to side; and with the word "Paris"."""
    shutil.copytree(toys.folder("toy-llava"), folder)
    config, processor, tokenizer = (folder / f"{name}.json" for name in ("config", "processor_config", "tokenizer"))
    facts = json.loads(config.read_text())
    text, vision = facts["text_config"], facts["vision_config"]
    n_layers, n_patches = text["num_hidden_layers"], vision["image_size"] // vision["patch_size"]
    tensors = load_file(folder / "model.safetensors")

    last = f"language_model.model.layers.{n_layers - 1}."
    for name, tensor in [(name, tensor) for name, tensor in tensors.items() if name.startswith(last)]:
        writes = "o_proj" in name or "down_proj" in name
        for layer in range(n_layers, N_LAYERS):
            tensors[name.replace(last, f"language_model.model.layers.{layer}.")] = tensor.clone() * (not writes)

    name = "vision_tower.embeddings.position_embedding.weight"
    grid = rearrange(tensors[name][1:], "(y x) d -> 1 d y x", y=n_patches)
    grid = rearrange(interpolate(grid, (n_across, n_across), mode="bilinear"), "1 d y x -> (y x) d")
    tensors[name] = torch.cat([tensors[name][:1], grid])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    size = n_across * vision["patch_size"]
    text |= {"num_hidden_layers": N_LAYERS, "max_position_embeddings": 512}
    config.write_text(
        json.dumps({**facts, "image_seq_length": n_across**2, "vision_config": {**vision, "image_size": size}})
    )
    processor.write_text(processor.read_text().replace(str(vision["image_size"]), str(size)))
    tokenizer.write_text(tokenizer.read_text().replace('"things"', '"Paris"'))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def shape_of(question: str) -> str:
    return question.split()[-2]


def box_of(sample: Sample) -> tuple[int, int, int, int]:
    rows, columns = sample.regions["object"].nonzero()
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1


def coco_qa(folder: Path, samples: Sequence[Sample], model: HookedVLM) -> None:
    facts = enumerate(samples)
    columns = ("", "train_image_id_count", "question_count", "answer_count")
    rows = [
        dict(zip(columns, (i, i, f"what is the color of the {shape_of(one.question)}", one.answer), strict=True))
        for i, one in facts
    ]
    write_csv(folder / "color_coco_qa.csv", rows)


def constraints(folder: Path, samples: Sequence[Sample], model: HookedVLM) -> None:
    rows = [
        {"": i, "question": f"what color is this {shape_of(one.question)} ?", "main_entity": entity, "image_url": url}
        for i, one in enumerate(samples)
        for entity, url in [(f"this {shape_of(one.question)}", f"./{i:012d}.png")]
    ]
    write_csv(folder / "okvqa.csv", [*rows, {**rows[0], "": N, "main_entity": "the person"}])


def notice(folder: Path, samples: Sequence[Sample], model: HookedVLM) -> None:
    name = "LLAVA" if "language_model" in model.towers else "BLIP"
    rows = []
    for i, one in enumerate(samples):
        prompt = f"what color is the {shape_of(one.question)} {one.answer} or {one.foil} ?"
        rows.append(
            {
                "clean_prompt": prompt,
                "corrupt_prompt": f"what color is the {shape_of(str(one.question_cf))} white or orange ?",
                "clean_image_path": f"{i:012d}.png",
                "corrupt_image_path": f"{i:012d}-cf.png",
                "correct_answer": model.generate(model.prepare(one.picture(), prompt))[0],
                "incorrect_answer": one.foil,
            }
        )
    write_csv(folder / f"{name}_final_mit_states.csv", rows)


def zhang(folder: Path, samples: Sequence[Sample], model: HookedVLM) -> None:
    rows = []
    for i, one in enumerate(samples):
        x, y, w, h = box_of(one)
        asked = f"{one.question} \nAnswer the question using a single word or phrase."
        facts = {"question_id": i, "img_id": f"{i:012d}", "question": one.question, "answer": ""}
        facts["answer"] = model.generate(model.prepare(one.picture(), asked))[0]
        box = {"central object x": x, "central object y": y, "central object w": w, "central object h": h}
        kind = {"type_structural": "choose", "type_semantic": "attr", "central object name": shape_of(one.question)}
        width, height = one.picture().size
        rows.append({**facts, **kind, **box, "image_w": width, "image_h": height})
    write_csv(folder / "GQA_val_correct_question_with_choose_ChooseAttr.csv", rows)


def object_tokens(folder: Path, samples: Sequence[Sample], model: HookedVLM) -> None:
    (folder / "clean_questions.json").write_text(
        json.dumps({str(i): [f"what color is the {shape_of(one.question)} ?"] for i, one in enumerate(samples)})
    )
    names = ["circle", "square", "triangle", "star"]
    annotations = []
    for i, one in enumerate(samples):
        x, y, w, h = box_of(one)
        polygon = [x, y, x + w - 1, y, x + w - 1, y + h - 1, x, y + h - 1]
        category = names.index(shape_of(one.question)) if shape_of(one.question) in names else len(names)
        annotations.append({"image_id": i, "category_id": category, "area": 1500, "segmentation": [polygon]})
    sizes = [dict(zip(("width", "height"), one.picture().size, strict=True)) for one in samples]
    instances = {
        "annotations": annotations,
        "images": [{"id": i, **size} for i, size in enumerate(sizes)],
        "categories": [{"id": i, "name": name} for i, name in enumerate([*names, "thing"])],
    }
    (folder / "instances_train2017.json").write_text(json.dumps(instances))


WRITERS = {"palit": coco_qa, "basu": constraints, "notice": notice, "zhang": zhang, "neo": object_tokens}

IMAGES = {"palit": "{id:012d}.png", "neo": "{id:012d}.png", "zhang": "{id}.png", "basu": ".", "notice": "."}
"""Where the pictures are here, and what they are called."""


@pytest.mark.parametrize(("paper", "model", "samples"), CHANGES, ids=[f"{one[0]} {one[1]}" for one in CHANGES])
def test_it_runs_with_two_lines_changed(paper: str, model: str, samples: str, tmp_path: Path, unchecked: None) -> None:
    if "blip" in model:
        shutil.copytree(toys.folder("toy-blip-vqa"), tmp_path / "model")
    else:
        # Neo et al. choose up to 250 tokens.
        larger_llava(tmp_path / "model", n_across=16 if paper == "neo" else 6)
    found = shapes(N, seed=7, kinds=("color",))
    WRITERS[paper](tmp_path, found, HookedVLM.from_pretrained(tmp_path / "model"))
    for i, one in enumerate(found):
        one.picture().save(tmp_path / f"{i:012d}.png")
        one.picture_cf().save(tmp_path / f"{i:012d}-cf.png")
    published = Experiment.parse(with_lines(paper, model, samples), base=tmp_path)
    here = published.on(model="model", samples={**published.samples, "images": IMAGES[paper]})
    assert [repr(step.arguments) for step in here.steps] == [repr(step.arguments) for step in published.steps]

    ended = run(here, tmp_path / "run")
    assert set(ended.counts) == set(STEPS[paper])
    for step, (used, _, failed) in ended.counts.items():
        own = ended.summary["steps"][step]
        assert used > 0
        assert (failed, own["notes"]) == (0, [])
        assert own["tables"]
        assert own["figures"]
        assert results.load(ended.folder / "results" / f"{step}.nc").attrs["samples_used"] == used
    if paper == "basu":
        assert ended.summary["not_read"][0]["kind"] == "a constraint that is not in the question"

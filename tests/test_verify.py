"""The comparison with HF: equal to the bit where nothing is wrong, and right about where a mistake begins."""

import json
import math
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from hooked_vlm import HookedVLM, toys
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.verify import Report, Row, compare, verify
from hooked_vlm.verify.compare import Kept, Run, record
from hooked_vlm.verify.report import LOGITS
from tests.tiny_blip import hf_blip, inputs
from weights_conversion import Counterparts, counterparts_of_config

TOY = "toy-blip-vqa"
TASKS = ["vqa", "caption", "retrieval"]
ABSENT = {"hook_scale", "hook_attn_scores", "hook_result"}
"""Ends of the names of which HF has no tensor: its LayerNorm returns no scale, its attention neither the scores nor a
head's share of the output."""
PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module", params=TASKS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint without a processor."""
    folder = tmp_path_factory.mktemp(request.param)
    shape = "heads of 12" if request.param == "vqa" else "narrow on wide"
    hf_blip(request.param, shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqa")
    hf_blip("vqa").save_pretrained(folder)
    return folder


def with_changed(monkeypatch: pytest.MonkeyPatch, parameter: str, change: float) -> None:
    """From now on one number of one of HF's parameters is another than in the checkpoint."""
    load = compare.load_hf

    def load_changed(*args: object, **options: object) -> torch.nn.Module:
        model = load(*args, **options)
        with torch.no_grad():
            model.get_parameter(parameter).flatten()[0] += change
        return model

    monkeypatch.setattr(compare, "load_hf", load_changed)


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return verify(folder)


@pytest.fixture(scope="module")
def vqa_report(vqa: Path) -> Report:
    return verify(vqa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_is_equal_to_the_bit(folder: Path, report: Report, dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        report = verify(folder, dtype=dtype)
    assert report.passed
    assert {row.difference for row in report.rows} == {0.0}
    assert all(row.equal for row in report.rows)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.tolerance == 0
    assert report.cross_attention_padding == "hf"
    assert "random" in report.inputs


def test_every_hook_point_is_compared_or_said_to_have_no_counterpart(folder: Path, report: Report) -> None:
    model = HookedVLM.from_pretrained(folder)
    compared = {row.name for row in report.rows} - {LOGITS}
    absent = dict(report.without_counterpart)
    assert compared | set(absent) == set(model.hook_names)
    assert not compared & set(absent)
    assert {name.rpartition(".")[2] for name in absent} == ABSENT
    assert all(absent.values())
    assert not {name for name, reason in absent.items() if "not in the table" in reason}


def test_rows_are_in_forward_order_and_end_with_the_logits(vqa: Path, vqa_report: Report) -> None:
    names = [row.name for row in vqa_report.rows]
    order = HookedVLM.from_pretrained(vqa).hook_names
    assert names[-1] == LOGITS
    assert names[:-1] == [name for name in order if name in names]
    assert len(set(names)) == len(names)


def test_a_decoder_reads_more_than_one_token(vqa_report: Report) -> None:
    pattern = next(row for row in vqa_report.rows if row.name == "answer_decoder.blocks.0.attn.hook_pattern")
    assert pattern.shape[2:] == (7, 7)


def test_a_retrieval_model_is_run_in_both_ways(tmp_path: Path) -> None:
    hf_blip("retrieval").save_pretrained(tmp_path)
    rows = verify(tmp_path).rows
    itm, itc = ({row.name for row in rows if row.run == run} for run in ("ITM", "ITC"))
    assert "hook_itm_logits" in itm - itc
    assert {"hook_image_embeds", "hook_text_embeds"} <= itc - itm
    assert "text_encoder.blocks.0.cross_attn.hook_pattern" in itm - itc
    assert LOGITS in itm & itc
    assert {row.shape for row in rows if row.name == LOGITS} == {(2, 2)}
    assert not any(name.startswith("vision_encoder.") for name in itc)


def test_the_embedded_model() -> None:
    report = verify(TOY)
    assert report.passed
    assert report.n_equal == len(report.rows) == 324
    assert len(report.without_counterpart) == 72
    assert toys.demo_sample().question in report.inputs


@pytest.mark.parametrize("hf_class", [BlipForConditionalGeneration, BlipForImageTextRetrieval])
def test_a_checkpoint_with_a_processor(tmp_path: Path, hf_class: type) -> None:
    hf_class.from_pretrained(toys.folder(TOY)).save_pretrained(tmp_path)
    for name in PROCESSOR:
        shutil.copy(toys.folder(TOY) / name, tmp_path)
    one = toys.demo_sample()
    report = verify(tmp_path, one.image, "is there a red circle ?")
    assert report.passed
    assert report.architecture == hf_class.__name__
    assert "'is there a red circle ?'" in report.inputs


def test_unpadded_inputs_are_said_to_be_so() -> None:
    one = toys.demo_sample()
    report = verify(TOY, one.image, one.question)
    assert report.passed
    assert report.cross_attention_padding == "mask"
    assert any(line.startswith("padding: none") for line in report.lines())


def test_a_tokenizer_that_does_not_know_the_demo_gets_words_of_its_own() -> None:
    from hooked_vlm.verify.sample import _texts

    words = {"[UNK]": 0, "alpha": 1, "beta": 2, "##x": 3, "gamma": 4}

    class Strange:
        unk_token_id = 0

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[words.get(word, 0) for word in text.split()])

        def get_vocab(self) -> dict[str, int]:
            return words

    long, short = _texts(Strange())
    assert set(long.split()) == {"alpha", "beta", "gamma"}
    assert long.startswith(short)
    assert len(short) < len(long)


@pytest.mark.parametrize(
    ("parameter", "first"),
    [
        ("vision_model.encoder.layers.1.self_attn.qkv.bias", "vision_encoder.blocks.1.attn.hook_q"),
        ("vision_model.encoder.layers.2.mlp.fc2.weight", "vision_encoder.blocks.2.hook_mlp_out"),
        ("text_encoder.embeddings.position_embeddings.weight", "question_encoder.hook_pos_embed"),
        ("text_encoder.encoder.layer.1.crossattention.self.value.bias", "question_encoder.blocks.1.cross_attn.hook_v"),
        ("text_decoder.cls.predictions.transform.LayerNorm.weight", "answer_decoder.ln_final.hook_normalized"),
    ],
)
def test_one_changed_number_fails_where_it_is_first_felt(
    vqa: Path, monkeypatch: pytest.MonkeyPatch, parameter: str, first: str
) -> None:
    with_changed(monkeypatch, parameter, 1e-3)
    report = verify(vqa)
    assert not report.passed
    assert report.first_failure is not None
    assert report.first_failure.name == first
    assert not report.rows[-1].passed
    assert f"first difference: {first}" in "\n".join(report.lines())
    assert report.lines()[-1].startswith("FAIL: logits differ by ")


def test_a_tolerance_lets_small_differences_pass(vqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_changed(monkeypatch, "text_decoder.cls.predictions.bias", 1e-4)
    strict, lenient = verify(vqa), verify(vqa, tolerance=1e-3)
    assert not strict.passed
    assert lenient.passed
    assert lenient.n_equal == strict.n_equal == len(strict.rows) - 2
    last = lenient.rows[-1]
    assert 0 < last.relative < last.difference
    assert last.verdict == "pass"


def test_attention_that_hf_lacks_is_compared_within_a_stated_tolerance(vqa: Path) -> None:
    report = verify(vqa, attention="sdpa")
    assert report.passed
    assert (report.attention, report.hf_attention) == ("sdpa", "eager")
    assert 0 < report.tolerance <= 1e-4
    assert report.n_equal < len(report.rows)
    assert any("attention: ours sdpa, HF's eager" in line for line in report.lines())


def test_low_memory_gives_the_same_report_and_leaves_no_file(
    folder: Path, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    put = Kept.put

    def counted(self: Kept, *args: object) -> None:
        put(self, *args)
        written.extend(path for path in self._kept.values() if isinstance(path, Path))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Kept, "put", counted)
    assert verify(folder, low_memory=True) == report
    assert written
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("low_memory", [False, True])
def test_hf_is_gone_before_ours_is_there(vqa: Path, monkeypatch: pytest.MonkeyPatch, low_memory: bool) -> None:
    held: list[weakref.ref] = []
    load, load_ours = compare.load_hf, HookedVLM.from_pretrained

    def watched(*args: object, **options: object) -> torch.nn.Module:
        model = load(*args, **options)
        held.append(weakref.ref(model))
        return model

    def alone(*args: object, **options: object) -> HookedVLM:
        assert not any(reference() for reference in held)
        return load_ours(*args, **options)

    monkeypatch.setattr(compare, "load_hf", watched)
    monkeypatch.setattr(HookedVLM, "from_pretrained", alone)
    assert verify(vqa, low_memory=low_memory).passed
    assert len(held) == 1


def recorded(hf_model: torch.nn.Module, batch: VLMInputs) -> tuple[HookedVLM, dict, Kept]:
    model = HookedVLM.from_hf(hf_model)
    table = counterparts_of_config(model.config)
    wanted = {name: side for name in (*model.hook_names, LOGITS) if (side := table.of(name))}
    kept = Kept()
    record(hf_model, batch, wanted, Run(), kept)
    return model, wanted, kept


def test_what_runs_on_one_side_alone_fails() -> None:
    batch = VLMInputs(**inputs("vqa"))
    model, wanted, kept = recorded(hf_blip("vqa"), batch)
    silent, missing = "answer_decoder.hook_logits", "question_encoder.hook_out"
    del kept._kept["", wanted[missing].module, wanted[missing].place]
    model.hook_dict[silent].forward = None
    model.answer_decoder.hook_logits = torch.nn.Identity()
    rows = {row.name: row for row in compare.compare(model, batch, wanted, Run(), kept)}
    failed = {name: row.note for name, row in rows.items() if not row.passed}
    assert failed == {missing: "HF's module did not run", silent: "our hook point did not fire"}
    assert math.isinf(rows[missing].difference)


def test_other_shapes_and_dtypes_fail() -> None:
    batch = VLMInputs(**inputs("vqa"))
    model, wanted, kept = recorded(hf_blip("vqa"), batch)

    def spoil(name: str, tensor: Tensor | None) -> None:
        kept.put(Run(), wanted[name], tensor)

    spoil("question_encoder.hook_full_embed", None)
    spoil("question_encoder.hook_out", torch.zeros(1, 5, 35))
    spoil("vision_encoder.blocks.0.attn.hook_z", torch.zeros(1, 10, 37))
    spoil("answer_decoder.hook_out", torch.zeros(1, 3, 36, dtype=torch.float64))
    spoil("answer_decoder.ln_final.hook_normalized", torch.full((1, 3, 36), math.nan))
    rows = {row.name: row for row in compare.compare(model, batch, wanted, Run(), kept, tolerance=1.0)}
    failed = {name: row.note for name, row in rows.items() if not row.passed}
    assert failed == {
        "question_encoder.hook_full_embed": "HF's module gave nothing there",
        "question_encoder.hook_out": "HF has (1, 5, 35) torch.float32",
        "vision_encoder.blocks.0.attn.hook_z": "HF has (1, 10, 37)",
        "answer_decoder.hook_out": "HF has (1, 3, 36) torch.float64",
        "answer_decoder.ln_final.hook_normalized": "HF's holds NaN or infinity",
    }


def test_hf_and_ours_are_left_without_hooks() -> None:
    hf_model, batch = hf_blip("vqa"), VLMInputs(**inputs("vqa"))
    model, wanted, kept = recorded(hf_model, batch)
    compare.compare(model, batch, wanted, Run(), kept)
    assert not any(module._forward_hooks for module in (*hf_model.modules(), *model.modules()))


def test_a_report_is_json_and_prints_whole_names(vqa_report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    odd = Row.incomparable("", "a.hook", "b: output", (1, 2), "HF's module did not run")
    report = replace(vqa_report, rows=(odd, *vqa_report.rows))
    read = json.loads(report.to_json())
    assert read["passed"] is False
    assert read["rows"][0]["difference"] is None
    assert read["n_equal"] == read["n_compared"] - 1 == len(report.rows) - 1
    assert read["versions"]["torch"] == torch.__version__
    assert Counter(read["without_counterpart"].values()) == Counter(dict(report.without_counterpart).values())
    report.print()
    printed = capsys.readouterr().out
    assert all(row.name in printed and row.hf in printed for row in report.rows)
    assert "FAIL: HF's module did not run" in printed
    assert printed.rstrip().splitlines()[-1] == report.lines()[-1]


def test_a_report_without_rows_does_not_pass() -> None:
    empty = Report("m", "A", "none", (), (), 0.0, "float32", "cpu", "eager", "eager", "", "mask", {})
    assert not empty.passed
    assert empty.first_failure is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "no-such-model"}, "no-such-model"),
        ({"name_or_path": TOY, "device": "nowhere"}, "no device nowhere"),
        ({"name_or_path": TOY, "question": " "}, "empty"),
        ({"name_or_path": TOY, "image": "no-such-picture.png"}, "does not exist"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        verify(**arguments)


def test_a_picture_for_a_checkpoint_without_a_processor_is_refused(vqa: Path) -> None:
    with pytest.raises(ValueError, match="no processor"):
        verify(vqa, question="what ?")


def test_a_research_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match=r"HF cannot load model\.pth"):
        verify(path)


def test_an_unknown_way_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="no such way to read"):
        Counterparts(("hook", "module", "output, sideways"))

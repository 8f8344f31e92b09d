"""From checkpoints in every form to models that answer as HF's do over the same weights."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hooked_vlm import HookedBlipCaption, HookedVLM, toys
from tests.checkpoints import (
    BIAS,
    HEAD,
    HEAD_BIAS,
    TASKS,
    WORDS,
    assert_same_answer,
    hf_answer,
    state_of,
    write_folder,
)
from tests.tiny_blip import CLASSES, hf_blip, inputs
from weights_conversion import CheckpointError

load = HookedVLM.from_pretrained


def as_torch_file(folder: Path, hf: PreTrainedModel, **options: bool) -> None:
    torch.save(state_of(hf), folder / "pytorch_model.bin", **options)


def as_torch_shards(folder: Path, hf: PreTrainedModel) -> None:
    names = {}
    state = state_of(hf)
    keys = list(state)
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({key: state[key] for key in part}, folder / name)
        names |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


FORMS: dict[str, Callable[[Path, PreTrainedModel], None]] = {
    "safetensors": lambda folder, hf: hf.save_pretrained(folder),
    "sharded safetensors": lambda folder, hf: hf.save_pretrained(folder, max_shard_size="30KB"),
    "bin": as_torch_file,
    "bin of torch before 1.6": lambda folder, hf: as_torch_file(folder, hf, _use_new_zipfile_serialization=False),
    "sharded bin": as_torch_shards,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_checkpoint_answers_as_hf(form: str, task: str, tmp_path: Path) -> None:
    hf = hf_blip(task)
    FORMS[form](tmp_path, hf)
    if "bin" in form:
        hf.config.architectures = [type(hf).__name__]
        hf.config.save_pretrained(tmp_path)
    elif "sharded" in form:
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_answer(load(tmp_path), hf, task)


def test_a_single_file_goes_before_shards_as_in_hf(tmp_path: Path) -> None:
    hf_blip("vqa", seed=1).save_pretrained(tmp_path, max_shard_size="30KB")
    hf = hf_blip("vqa")
    write_folder(tmp_path, state_of(hf), hf)
    assert_same_answer(load(tmp_path), CLASSES["vqa"].from_pretrained(tmp_path).eval(), "vqa")
    assert_same_answer(load(tmp_path), hf, "vqa")


def test_the_task_is_told_by_the_keys_where_the_config_is_silent(tmp_path: Path) -> None:
    for task in TASKS:
        hf = hf_blip(task)
        assert load(write_folder(tmp_path, state_of(hf), hf, architectures=None)).config.task == task


# Names ----------------------------------------------------------------------------------------------------------------


def test_an_embedded_name_is_found_and_recorded() -> None:
    model = load("toy-blip-vqa")
    assert (model.config.name_or_path, model.config.revision) == ("toy-blip-vqa", "")
    assert model.processor.tokenizer.vocab_size > 20


@pytest.mark.parametrize(
    "name", ["toy-blip", "", "nobody/nothing", "./nobody/nothing", Path("toy-blip-vqa"), "a/b/c", "a--b/c"]
)
def test_a_name_that_is_nothing_is_refused_with_those_known(name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="toy-blip-vqa"):
        load(name, local_files_only=True)


def test_another_class_than_the_checkpoint_is_refused() -> None:
    with pytest.raises(TypeError, match="toy-blip-vqa is a HookedBlipVQA, not a HookedBlipCaption"):
        HookedBlipCaption.from_pretrained("toy-blip-vqa")


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A cache as the hub's client lays it out: one repository, `main` two commits after the first."""
    repository = tmp_path / "models--owner--name"
    for commit, seed in (("a" * 40, 1), ("b" * 40, 0)):
        hf = hf_blip("vqa", seed=seed)
        written = write_folder(tmp_path / "written", state_of(hf), hf)
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / commit).mkdir(parents=True)
        for file in [*written.iterdir(), *toys.folder("toy-blip-vqa").glob("*token*.json")]:
            blob = repository / "blobs" / f"{commit}-{file.name}"
            blob.write_bytes(file.read_bytes())
            (repository / "snapshots" / commit / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    processor = toys.folder("toy-blip-vqa") / "processor_config.json"
    (repository / "snapshots" / ("b" * 40) / processor.name).write_bytes(processor.read_bytes())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    (repository / "refs" / "v1").write_text("a" * 40)
    return tmp_path


@pytest.mark.parametrize(("revision", "seed"), [(None, 0), ("main", 0), ("v1", 1), ("a" * 40, 1)])
def test_a_hub_id_is_read_from_the_cache(hub_cache: Path, revision: str | None, seed: int) -> None:
    model = load("owner/name", revision=revision, cache_dir=hub_cache, local_files_only=True)
    assert_same_answer(model, hf_blip("vqa", seed=seed), "vqa")
    assert model.config.name_or_path == "owner/name"
    assert model.config.revision == ("a" if seed else "b") * 40


def test_the_processor_comes_from_the_revision_that_was_read(hub_cache: Path) -> None:
    model = load("owner/name", cache_dir=hub_cache, local_files_only=True)
    assert type(model.processor).__name__ == "BlipProcessor"
    older = load("owner/name", revision="v1", cache_dir=hub_cache, local_files_only=True)
    with pytest.raises(ValueError, match=r"no processor at .*a{40}.*processor_config\.json"):
        _ = older.processor


def test_a_processor_may_be_named(hub_cache: Path) -> None:
    for name in ("owner/name", "toy-blip-vqa", toys.folder("toy-blip-vqa")):
        model = load("owner/name", revision="v1", processor=name, cache_dir=hub_cache, local_files_only=True)
        assert type(model.processor).__name__ == "BlipProcessor"
    given = load("toy-blip-vqa").processor
    assert load("toy-blip-vqa", processor=given).processor is given
    with pytest.raises(FileNotFoundError, match="no folder here, and the hub does not give it"):
        load("toy-blip-vqa", processor="owner/other", cache_dir=hub_cache, local_files_only=True)


def test_a_revision_that_is_not_there_is_named(hub_cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"owner/name .* at revision v2"):
        load("owner/name", revision="v2", cache_dir=hub_cache, local_files_only=True)


def test_what_is_fetched_is_safetensors_or_else_torchs_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = hf_blip("vqa")
    write_folder(tmp_path, state_of(hf), hf)
    (tmp_path / "model.safetensors").unlink()
    asked = []

    def download(repository: str, *, allow_patterns: list[str], **options: object) -> str:
        asked.append((repository, options))
        if "pytorch_model*.bin" in allow_patterns:
            as_torch_file(tmp_path, hf)
        assert "*.json" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same_answer(load("owner/name", revision="v1", token="secret", cache_dir=tmp_path), hf, "vqa")
    options = {"revision": "v1", "token": "secret", "cache_dir": tmp_path, "local_files_only": False}
    assert asked == [("owner/name", options)] * 2


@pytest.mark.parametrize("error", [OSError(), OSError("no route\nto host"), ConnectionError("offline")])
def test_a_hub_that_does_not_answer_is_one_error(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"^owner/name .*, and the hub does not give it: [\w ]+$"):
        load("owner/name")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    hf = hf_blip("vqa")
    assert load(write_folder(tmp_path, state_of(hf), hf), revision="v1").config.revision == ""


# Keys that may be absent, or there twice ------------------------------------------------------------------------------


def loaded_with(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], **config: object) -> HookedVLM:
    hf = hf_blip("vqa")
    state = state_of(hf)
    change(state)
    return load(write_folder(tmp_path, state, hf, **config))


HARMLESS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "head present": lambda state: None,
    "head absent": lambda state: state.pop(HEAD),
    "words absent": lambda state: state.pop(WORDS),
    "head's bias absent": lambda state: state.pop(HEAD_BIAS),
    "bias absent": lambda state: state.pop(BIAS),
    "buffers": lambda state: state.update(
        {f"{tower}.embeddings.position_ids": torch.arange(24)[None] for tower in ("text_encoder", "text_decoder.bert")}
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_tied_keys_may_be_absent_and_buffers_present(case: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = loaded_with(tmp_path, HARMLESS[case])
    assert model.answer_decoder.unembed.decoder.weight is model.answer_decoder.embed.token.weight
    assert_same_answer(model, hf_blip("vqa"), "vqa")


def test_a_head_that_differs_is_kept_apart_with_a_warning(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state[HEAD] += 0.5
        state[HEAD_BIAS] += 0.5

    with pytest.warns(UserWarning, match=rf"{re.escape(HEAD)} differs from {re.escape(WORDS)}"):
        model = loaded_with(tmp_path, change)
    assert model.answer_decoder.unembed.decoder.weight is not model.answer_decoder.embed.token.weight
    assert_same_answer(model, CLASSES["vqa"].from_pretrained(tmp_path).eval(), "vqa")


def test_a_config_may_say_that_nothing_is_tied(tmp_path: Path) -> None:
    text = hf_blip("vqa").config.text_config.to_dict() | {"tie_word_embeddings": False}
    untied = {"tie_word_embeddings": False, "text_config": text}
    model = loaded_with(tmp_path, lambda state: None, **untied)
    assert model.answer_decoder.unembed.decoder.weight is not model.answer_decoder.embed.token.weight
    with pytest.raises(CheckpointError, match=f"1 missing: {re.escape(HEAD)}"):
        loaded_with(tmp_path, lambda state: state.pop(HEAD), **untied)


def test_all_keys_that_do_not_fit_are_said_in_one_error_by_their_names(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["text_encoder.encoder.layer.1.crossattention.self.query.weight"], state[BIAS], state[HEAD_BIAS]
        state["text_encoder.pooler.dense.weight"] = torch.zeros(3)
        state["vision_model.post_layernorm.bias"] = torch.zeros(7)

    with pytest.raises(CheckpointError) as caught:
        loaded_with(tmp_path, change)
    for part in (
        f"{tmp_path} does not fit HookedBlipVQA",
        f"2 missing: text_encoder.encoder.layer.1.crossattention.self.query.weight; {HEAD_BIAS}",
        "1 unexpected: text_encoder.pooler.dense.weight",
        r"1 misshapen: vision_model.post_layernorm.bias: (7,), should be (36,)",
    ):
        assert part in str(caught.value)


def test_many_wrong_keys_are_counted(tmp_path: Path) -> None:
    hf = hf_blip("caption")
    folder = write_folder(tmp_path, state_of(hf), hf, architectures=["BlipForQuestionAnswering"])
    with pytest.raises(CheckpointError, match=r"\d\d missing: (text_encoder\S+; ){8}\.\.\.$"):
        load(folder)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    key = "vision_model.post_layernorm.bias"
    with pytest.raises(CheckpointError, match=rf"{key} in .* is torch.int8"):
        loaded_with(tmp_path, lambda state: state.update({key: state[key].to(torch.int8)}))


# Dtype and device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["dtype", "torch_dtype"])
def test_the_dtype_is_what_config_json_says(written: str, tmp_path: Path) -> None:
    model = loaded_with(tmp_path, lambda state: None, **{"dtype": None, written: "bfloat16"})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    hf = CLASSES["vqa"].from_pretrained(tmp_path).eval()
    assert hf.dtype == torch.bfloat16
    assert_same_answer(model, hf, "vqa")
    assert_same_answer(load(tmp_path, dtype=torch.float32), hf_blip("vqa"), "vqa")


def test_without_a_written_dtype_it_is_the_first_tensors_as_in_hf(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        for key in list(state):
            state[key] = state[key].to(torch.float32 if key == "vision_model.post_layernorm.bias" else torch.float16)

    model = loaded_with(tmp_path, change, dtype=None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert_same_answer(model, CLASSES["vqa"].from_pretrained(tmp_path).eval(), "vqa")


@pytest.mark.parametrize("dtype", [torch.int8, "float32"])
def test_a_dtype_that_is_none_is_refused(dtype: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the types are not checked for users either
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch\.dtype"):
        load("toy-blip-vqa", dtype=dtype)


def test_a_device_is_taken() -> None:
    model = load("toy-blip-vqa", device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.answer_decoder.unembed.decoder.weight is model.answer_decoder.embed.token.weight


@pytest.mark.parametrize("choice", ["attention", "cross_attention_padding", "variant"])
def test_a_choice_that_is_none_is_refused_with_those_allowed(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=rf"{choice} must be one of \('\w+', '\w+'\), not 'flash'"):
        load("toy-blip-vqa", **{choice: "flash"})


def test_a_model_is_loaded_ready_to_run_and_may_be_trained() -> None:
    model = load("toy-blip-vqa")
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(point.is_hooked for point in model.hook_points())


def test_loading_twice_gives_two_models(tmp_path: Path) -> None:
    """Weights are mapped privately: an edit of one model reaches neither the file nor another model."""
    hf = hf_blip("vqa")
    folder = write_folder(tmp_path, state_of(hf), hf)
    before = (folder / "model.safetensors").read_bytes()
    edited, other = load(folder), load(folder)
    with torch.no_grad():
        edited.vision_encoder.ln_post.weight.mul_(2)
    batch = inputs("vqa")
    assert not torch.equal(edited(batch), hf_answer(hf, "vqa", batch))
    assert torch.equal(other(batch), hf_answer(hf, "vqa", batch))
    assert (folder / "model.safetensors").read_bytes() == before

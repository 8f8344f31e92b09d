"""Files that are damaged, incomplete or something else: one error that says which, and nothing is executed."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weights_conversion import CheckpointError, family_of_config, one_dtype, open_checkpoint
from weights_conversion.blip import BLIP

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def refused(path: Path, message: str) -> None:
    """Opening and reading everything gives this error, which names the file."""
    with pytest.raises(CheckpointError, match=message) as caught:
        dict(open_checkpoint(path).state)
    assert str(path) in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and no weights yet."""
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    return tmp_path


def index(folder: Path, name: str, weight_map: Any) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing"):
        open_checkpoint(tmp_path / "nothing")


def test_a_folder_without_weights_says_what_is_expected(folder: Path) -> None:
    (folder / "tf_model.h5").write_bytes(b"")
    refused(
        folder, "no weights in .*: expected one of model.safetensors, model.safetensors.index.json, pytorch_model.bin"
    )


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    refused(tmp_path, "has no config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON: Expecting"),
        ("", "config.json is not JSON"),
        ("[1, 2]", "holds a JSON list, not an object"),
        ("null", "holds a JSON NoneType"),
    ],
)
def test_a_config_that_is_no_json_object(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, message)


def test_a_config_that_is_no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    refused(folder, "is not JSON")


def test_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "model.h5").write_bytes(b"x")
    refused(tmp_path / "model.h5", r"neither a folder with config.json nor a .safetensors/.pth")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file(folder: Path, form: str, kept: float) -> None:
    path = folder / form
    state = {"a": torch.arange(1000.0)}
    save_file(state, path) if form.endswith("safetensors") else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=rf"{form} is not a whole .*; fetch it again"):
        dict(open_checkpoint(folder).state)


def test_a_truncated_shard(folder: Path) -> None:
    save_file({"a": STATE["a"]}, folder / "one.safetensors")
    save_file({"b": STATE["b"]}, folder / "two.safetensors")
    index(folder, "model.safetensors.index.json", {"a": "one.safetensors", "b": "two.safetensors"})
    assert torch.equal(open_checkpoint(folder).state["b"], STATE["b"])
    (folder / "two.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:-3])
    refused(folder, "two.safetensors is not a whole safetensors file")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_names_a_shard_that_is_missing(folder: Path, name: str) -> None:
    index(folder, name, {"a": "one", "b": "two", "c": "two"})
    (folder / "one").write_bytes(b"")
    refused(folder, f"{name} names shards that are not in the folder: two$")


@pytest.mark.parametrize("weight_map", [None, ["a"]])
def test_an_index_without_a_map(folder: Path, weight_map: Any) -> None:
    index(folder, "model.safetensors.index.json", weight_map)
    refused(folder, "has no weight_map")


def test_an_index_that_promises_a_key_that_its_shard_lacks(folder: Path) -> None:
    save_file({"a": STATE["a"]}, folder / "one.safetensors")
    index(folder, "model.safetensors.index.json", {"a": "one.safetensors", "b": "one.safetensors"})
    refused(folder, "one.safetensors does not hold b")


INDEX = "model.safetensors.index.json"


def shards(folder: Path, weight_map: dict[str, str], **files: dict[str, torch.Tensor]) -> Path:
    for name, state in files.items():
        save_file(state, folder / f"{name}.safetensors")
    index(folder, INDEX, {key: f"{name}.safetensors" for key, name in weight_map.items()})
    return folder


def test_an_index_that_names_a_key_twice(folder: Path) -> None:
    shards(folder, {}, one={"a": STATE["a"]}, two={"b": STATE["b"]})
    twice = '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "a": "two.safetensors"}}'
    (folder / INDEX).write_text(twice)
    refused(folder, f"{INDEX} says a twice: 'one.safetensors' and 'two.safetensors'")
    (folder / INDEX).write_text(twice.replace('"a": "two', '"a": "one'))
    assert torch.equal(open_checkpoint(folder).state["a"], STATE["a"])


def test_a_config_that_says_something_twice(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "blip", "vision_config": {"eps": 1, "eps": 2}}')
    refused(folder, "config.json says eps twice: 1 and 2")


def test_the_files_say_where_a_key_is_and_not_the_index(folder: Path) -> None:
    """As in HF: a key that the index puts elsewhere is read where it is, and one that it leaves out is read too."""
    shards(folder, {"a": "two", "b": "one"}, one={"a": STATE["a"], "c": STATE["b"] + 1}, two={"b": STATE["b"]})
    state = open_checkpoint(folder).state
    assert {*state} == {"a", "b", "c"}
    assert torch.equal(state["a"], STATE["a"])
    assert torch.equal(state["c"], STATE["b"] + 1)
    assert "d" not in state
    with pytest.raises(KeyError):
        state["d"]


def test_a_key_in_two_shards(folder: Path) -> None:
    shards(folder, {"a": "one", "b": "two"}, one={"a": STATE["a"]}, two=STATE)
    refused(folder, "one.safetensors and two.safetensors both hold a; one of them is of another save")


# What else it says ----------------------------------------------------------------------------------------------------


def test_the_generation_config_is_read_where_there_is_one(folder: Path) -> None:
    save_file(STATE, folder / "model.safetensors")
    assert open_checkpoint(folder).generation == {}
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert open_checkpoint(folder).generation == {"eos_token_id": [2, 5]}
    (folder / "generation_config.json").write_text("[]")
    refused(folder, "generation_config.json holds a JSON list")


def test_one_dtype_of_all_floating_point_tensors(folder: Path) -> None:
    state = {"a": STATE["a"].half(), "b": torch.arange(3), "inv_freq": STATE["b"]}
    for name in ("model.safetensors", "pytorch_model.bin"):
        save_file(state, folder / name) if name.startswith("model") else torch.save(state, folder / name)
        checkpoint = open_checkpoint(folder)
        assert one_dtype(checkpoint, lambda key: key == "inv_freq") == torch.float16
        told = f"dtypes: 1 of torch.float16 .a in {name}., 1 of torch.float32 .inv_freq in {name}.; choose one"
        with pytest.raises(CheckpointError, match=told):
            one_dtype(checkpoint)
        (folder / name).unlink()
    shards(folder, {"a": "one", "b": "two"}, one={"a": STATE["a"]}, two={"b": STATE["b"].bfloat16()})
    with pytest.raises(CheckpointError, match=r"torch.float32 .a in one.safetensors., 1 of torch.bfloat16 .b in two"):
        one_dtype(open_checkpoint(folder))
    shards(folder, {"b": "two"}, two={"b": torch.arange(3)})
    assert one_dtype(open_checkpoint(folder)) is None


def test_a_companion_adds_what_is_missing_and_does_not_count_for_the_dtype(folder: Path, tmp_path: Path) -> None:
    save_file({"a": STATE["a"].half()}, folder / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "clip"}')
    save_file(STATE, other / "model.safetensors")
    joined = open_checkpoint(folder).joined(open_checkpoint(other))
    assert [*joined.state] == ["a", "b"]
    assert joined.state["a"].dtype == torch.float16
    assert torch.equal(joined.state["b"], STATE["b"])
    assert one_dtype(joined) == torch.float16
    assert joined.config == {"model_type": "blip", "companion": {"model_type": "clip"}}


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden_in", ["the state", "beside it"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, hidden_in: str, zipped: bool) -> None:
    witness = tmp_path / "was_run"
    payload = Payload(f"touch {witness}")
    held = {"model": {**STATE, "c": payload}} if hidden_in == "the state" else {"model": STATE, "config": payload}
    path = tmp_path / "model.pth"
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"holds more than tensors, and unpickling that could run code \(\w+.system\)")
    assert not witness.exists()
    torch.load(path, weights_only=False)  # it would have
    assert witness.exists()


@pytest.mark.parametrize("held", [[1, 2], {"model": [1]}, {"a": 1.0}, {"model": {"a": "text"}}, torch.ones(2)])
def test_a_file_without_a_dictionary_of_tensors(tmp_path: Path, held: Any) -> None:
    torch.save(held, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "holds no dictionary of tensors")


def refusal_of(path: Path) -> str:
    """What is said of a file; of one that is read nevertheless, its path alone."""
    try:
        dict(open_checkpoint(path).state)
    except CheckpointError as error:
        return str(error)
    return str(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_no_damage_gives_another_error(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
    save_file(STATE, path) if form == "safetensors" else torch.save(
        {"model": STATE}, path, _use_new_zipfile_serialization=form == "zip"
    )
    whole = path.read_bytes()
    refusals = 0
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(min(rng.randrange(1, 5), len(damaged))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.unlink()
        path.write_bytes(damaged)
        refusal = refusal_of(path)
        assert str(path) in refusal
        refusals += refusal != str(path)
    assert refusals > 30


# What config.json says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "clip_vision_model", None, ["blip"]])
def test_an_unsupported_model_type_lists_those_supported(model_type: Any) -> None:
    with pytest.raises(
        CheckpointError, match=re.escape(f"unsupported model_type {model_type!r}; supported: blip, llava, ")
    ):
        family_of_config({"model_type": model_type})


def test_an_unsupported_architecture_lists_those_supported() -> None:
    expected = "BlipModel; supported: BlipForQuestionAnswering, BlipForConditionalGeneration, BlipForImageTextRetrieval"
    with pytest.raises(CheckpointError, match=expected):
        BLIP.config({"model_type": "blip", "architectures": ["BlipModel"]}, {})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"vision_config": "large"}, "config.json is not one of a BLIP model: .*vision_config"),
        ({"text_config": {"hidden_size": "wide"}}, "config.json is not one of a BLIP model: .*hidden_size"),
        ({"dtype": "float33"}, "config.json is not one of a BLIP model: .*float33"),
        ({"text_config": {"num_attention_heads": 5}}, "text_config .* hidden_size 768, num_attention_heads 5"),
        ({"vision_config": {"num_attention_heads": 0}}, "vision_config .* hidden_size 768, num_attention_heads 0"),
        ({"vision_config": {"image_size": [384, 480]}}, r"only square images.*not image_size \[384, 480\]"),
        ({"text_config": {"is_decoder": False}}, "is_decoder is false"),
        ({"text_config": {"bos_token_id": None}}, "text_config.bos_token_id is None, not a token id"),
    ],
)
def test_a_config_that_cannot_be(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        BLIP.config({"model_type": "blip", **entries}, {})

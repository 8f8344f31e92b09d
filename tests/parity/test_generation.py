"""What BLIP generates is what HF's generates, token for token; and what its own forward says comes next."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM, HookPoint
from tests.tiny_blip import DEC, SEP, hf_blip, inputs, padded_inputs, token_ids

SEEDS = range(4)
LENGTH = 9


@cache
def wordy(task: str, seed: int) -> PreTrainedModel:
    """A model whose texts wander: what was said weighs as much in them as what is looked at."""
    hf = hf_blip(task, seed=seed)
    with torch.no_grad():
        for name, parameter in hf.text_decoder.named_parameters():
            if "crossattention.output.dense" in name:
                parameter.mul_(0.1)
            if "embeddings.weight" in name:
                parameter.mul_(4)
        hf.text_decoder.cls.predictions.bias[SEP] = 13  # or else hardly any text would end
    return hf


def batch_for(task: str, kind: str) -> dict[str, Any]:
    if kind == "padded":
        batch = padded_inputs(task)
        return {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    batch = inputs(task, batch=3)
    batch.pop("decoder_input_ids", None)
    if task == "caption":
        batch["input_ids"][:, -1] = SEP  # which HF drops, and so do we
    if kind == "unconditional":
        del batch["input_ids"]
    return batch


def hf_generate(hf: PreTrainedModel, batch: dict[str, Any], **settings: Any) -> Tensor:
    # HF writes into the caption's input_ids.
    return hf.generate(**{name: value.clone() for name, value in batch.items()}, do_sample=False, **settings)


@pytest.mark.parametrize("num_beams", [1, 2, 3])
@pytest.mark.parametrize(
    ("task", "kind"), [("vqa", "plain"), ("vqa", "padded"), ("caption", "plain"), ("caption", "unconditional")]
)
def test_tokens_equal_hf(task: str, kind: str, num_beams: int) -> None:
    texts = []
    for seed in SEEDS:
        hf = wordy(task, seed)
        ours = HookedVLM.from_hf(hf, cross_attention_padding="hf")
        batch = batch_for(task, kind)
        expected = hf_generate(hf, batch, max_new_tokens=LENGTH, num_beams=num_beams)
        found = ours.generate(batch, max_new_tokens=LENGTH, num_beams=num_beams, return_type="tokens")
        assert torch.equal(found, expected), f"seed {seed}\nours {found.tolist()}\nHF   {expected.tolist()}"
        texts += [tuple(row) for row in found.tolist()]
    assert len(set(texts)) > len(texts) // 2, "texts that are all alike prove little"
    assert len({token for text in texts for token in text}) > 10
    ended = [SEP in text for text in texts]
    assert any(ended), "no text ended early"
    assert not all(ended)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_tokens_equal_hf_in_half_precision(pair, task: str, dtype: torch.dtype) -> None:
    """Where logits tie, and one bit would choose another token."""
    hf, ours = pair(task, "heads of 20", dtype)
    for num_beams in (1, 3):
        batch = batch_for(task, "plain")
        expected = hf_generate(hf, batch, max_new_tokens=LENGTH, num_beams=num_beams)
        assert torch.equal(
            ours.generate(batch, max_new_tokens=LENGTH, num_beams=num_beams, return_type="tokens"), expected
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "length_penalty": 2.0},
        {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
        {"num_beams": 2, "min_new_tokens": 4},
        {"min_new_tokens": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_tokens_equal_hf_with_settings(task: str, settings: dict[str, Any]) -> None:
    for seed in SEEDS:
        hf, batch = wordy(task, seed), batch_for(task, "plain")
        expected = hf_generate(hf, batch, max_new_tokens=LENGTH, **settings)
        found = HookedVLM.from_hf(hf).generate(batch, max_new_tokens=LENGTH, return_type="tokens", **settings)
        assert torch.equal(found, expected)


def argmax_without_cache(ours: HookedVLM, batch: dict[str, Any], name: str, prompt: Tensor) -> Tensor:
    """Greedy search as one would write it in a minute: a whole forward a token."""
    ids = prompt
    for _ in range(LENGTH):
        ids = torch.cat([ids, ours(batch | {name: ids})[:, -1:].argmax(-1)], dim=1)
    return ids


def until_end(row: Tensor) -> list[int]:
    tokens = row.tolist()
    return tokens[: tokens.index(SEP) + 1] if SEP in tokens else tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("task", "name"), [("vqa", "decoder_input_ids"), ("caption", "input_ids")])
@torch.no_grad()
def test_with_cache_equals_forward_without(task: str, name: str, attention: str) -> None:
    for seed in SEEDS:
        ours = HookedVLM.from_hf(wordy(task, seed), attention=attention)
        batch = batch_for(task, "plain" if task == "vqa" else "unconditional")
        expected = argmax_without_cache(ours, batch, name, torch.full((3, 1), DEC))
        found = ours.generate(batch, max_new_tokens=LENGTH, return_type="tokens")
        for row, expected_row in zip(found, expected, strict=True):
            assert until_end(row) == until_end(expected_row)


@torch.no_grad()
def test_logits_with_cache_are_the_forwards() -> None:
    """Step by step against the whole, in float64: what is kept and what is computed anew add up to the same."""
    ours = HookedVLM.from_hf(wordy.__wrapped__("vqa", 0).to(torch.float64))
    batch = batch_for("vqa", "padded")
    answer = token_ids(3, 6, first=DEC)
    whole = ours(batch | {"decoder_input_ids": answer})
    decoding, _ = ours._start_decoding(ours._inputs(batch))
    for chunk in ([0, 1], [2], [3, 4, 5]):
        last = decoding.step(answer[:, chunk])
        torch.testing.assert_close(last, whole[:, chunk[-1]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_a_padded_row_generates_what_it_generates_alone(task: str, num_beams: int) -> None:
    """By default; HF reads a padded question's padding, and goes on from a padded prompt's padding."""
    for seed in SEEDS:
        ours = HookedVLM.from_hf(wordy(task, seed))
        batch = batch_for(task, "padded")
        together = ours.generate(batch, max_new_tokens=LENGTH, num_beams=num_beams, return_type="tokens")
        longest = int(batch["attention_mask"].sum(1).max())
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = {"pixel_values": batch["pixel_values"][[row]], "input_ids": batch["input_ids"][[row], :length]}
            expected = ours.generate(alone, max_new_tokens=LENGTH, num_beams=num_beams, return_type="tokens")
            found = together[row, longest - length if task == "caption" else 0 :]
            assert until_end(found) == until_end(expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("task", "tower"), [("vqa", "answer_decoder"), ("caption", "text_decoder")])
def test_logits_of_every_step_equal_hf(pair, task: str, tower: str, dtype: torch.dtype) -> None:
    """To the bit, and seen through a hook, which is active at every step."""
    hf, ours = pair(task, "heads of 20", dtype)
    batch = batch_for(task, "plain")
    settings = {"return_dict_in_generate": True, "output_logits": True, "min_new_tokens": LENGTH}
    expected = hf_generate(hf, batch, max_new_tokens=LENGTH, **settings).logits
    steps: list[Tensor] = []
    with ours.hooks([(f"{tower}.hook_logits", lambda logits, hook: steps.append(logits[:, -1].clone()))]):
        ours.generate(batch, max_new_tokens=LENGTH, min_new_tokens=LENGTH, return_type="tokens")
    assert len(steps) == len(expected) == LENGTH
    for found, theirs in zip(steps, expected, strict=True):
        assert torch.equal(found.float(), theirs.float())


def test_an_edit_during_generation_acts_at_every_step() -> None:
    ours = HookedVLM.from_hf(wordy("vqa", 0))
    batch = batch_for("vqa", "plain")
    favourite = 42

    def favour(logits: Tensor, hook: HookPoint) -> None:
        logits[..., favourite] = 1e3

    with ours.hooks([("answer_decoder.hook_logits", favour)]):
        found = ours.generate(batch, max_new_tokens=LENGTH, return_type="tokens")
    assert (found[:, 1:] == favourite).all()


def test_an_answer_goes_on_from_what_is_given() -> None:
    ours = HookedVLM.from_hf(wordy("vqa", 1))
    batch = batch_for("vqa", "plain")
    whole = ours.generate(batch, max_new_tokens=LENGTH, return_type="tokens")
    begun = batch | {"decoder_input_ids": whole[:, :3]}
    assert torch.equal(ours.generate(begun, max_new_tokens=LENGTH - 2, return_type="tokens"), whole)
    padded = begun | {"decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]])}
    with pytest.raises(ValueError, match="without padding"):
        ours.generate(padded, return_type="tokens")


def test_inputs_are_not_written_to() -> None:
    ours = HookedVLM.from_hf(wordy("caption", 0))
    batch = batch_for("caption", "plain")
    before = {name: tensor.clone() for name, tensor in batch.items()}
    ours.generate(batch, max_new_tokens=3, return_type="tokens")
    assert all(torch.equal(batch[name], before[name]) for name in before)

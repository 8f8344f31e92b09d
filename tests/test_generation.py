"""Greedy and beam search against ``generate`` of HF transformers: the same tokens, for many settings and seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hooked_vlm.generation import beam_search, greedy_search, greedy_tokens

VOCAB, PAD, PROMPT_LENGTH = 19, 17, 4
EOS = [(), (3,), (3, 11), (3, 11, 5, 8)]
MAX_MIN_NEW_TOKENS = [(1, 0), (1, 1), (5, 0), (5, 3), (20, 0), (20, 3)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as these are only slowed down by a second thread, and badly where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Cached:
    """A Decoding around an HF model, which notes what it was fed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.past = DynamicCache(config=model.config)
        self.fed: list[tuple[int, ...]] = []

    def step(self, token_ids: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.fed.append(tuple(token_ids.shape))
        return self.model(input_ids=token_ids, past_key_values=self.past).logits[:, -1]

    def reorder(self, rows: Tensor) -> None:
        self.past.reorder_cache(rows)


@cache
def build(family: str, seed: int, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose weights are large enough for its texts to wander and to meet their ends."""
    torch.manual_seed(seed)
    shared = {"vocab_size": vocab, "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        sizes = {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(**shared, **sizes, tie_word_embeddings=False))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**shared, **sizes))
    return model.to(dtype).eval()


def make_prompt(batch: int, seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (batch, PROMPT_LENGTH), generator=torch.Generator().manual_seed(seed))


def hf_tokens(model: PreTrainedModel, prompt: Tensor, eos_token_ids: tuple[int, ...], **settings: Any) -> Tensor:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        eos_token_id=list(eos_token_ids) or None,
        do_sample=False,
        **settings,
    )


def assert_same(model: PreTrainedModel, prompt: Tensor, **settings: Any) -> Tensor:
    search = beam_search if "num_beams" in settings else greedy_search
    found = search(Cached(model), prompt, **settings)
    expected = hf_tokens(model, prompt, **settings)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected), f"{settings}\nfound {found.tolist()}\nHF    {expected.tolist()}"
    return found


def cases(seed: object, count: int) -> Iterator[tuple[PreTrainedModel, Tensor, dict[str, Any]]]:
    """Some of all combinations of batch, eos and lengths, each with a model and a prompt of its own."""
    rng = random.Random(str(seed))
    for batch, eos, (most, least) in rng.sample(list(product([1, 4], EOS, MAX_MIN_NEW_TOKENS)), count):
        model = build(rng.choice(["gpt2", "llama"]), rng.randrange(6))
        limits = {"max_new_tokens": most, "min_new_tokens": least, "eos_token_ids": eos, "pad_token_id": PAD}
        yield model, make_prompt(batch, rng.randrange(10**6)), limits


@pytest.mark.parametrize("seed", range(3))
def test_greedy_search_equals_hf(seed: int) -> None:
    for model, prompt, limits in cases(seed, count=16):
        assert_same(model, prompt, **limits)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 3, 4, 5])
def test_beam_search_equals_hf(num_beams: int, length_penalty: float, early_stopping: bool | str) -> None:
    beams = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    for model, prompt, limits in cases(beams, count=4):
        assert_same(model, prompt, **limits, **beams)


def test_one_beam_is_greedy_search_as_in_hf() -> None:
    for model, prompt, limits in cases("one beam", count=12):
        assert_same(model, prompt, num_beams=1, **limits)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ties_of_bf16_fall_as_in_hf(family: str, num_beams: int) -> None:
    for seed in range(3):
        model = build(family, seed, dtype=torch.bfloat16)
        limits = {"max_new_tokens": 12, "eos_token_ids": (3, 11), "pad_token_id": PAD}
        assert_same(model, make_prompt(4, seed), num_beams=num_beams, **limits)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_with_fewer_tokens_than_candidates(early_stopping: bool | str) -> None:
    """Beams that are ruled out and eos tokens that are forbidden then fill the candidates."""
    for seed in range(8):
        limits = {"max_new_tokens": 6, "min_new_tokens": 2, "eos_token_ids": (3, 1), "pad_token_id": 5}
        model, prompt = build("llama", seed, vocab=7), make_prompt(4, seed, vocab=7)
        assert_same(model, prompt, num_beams=5, early_stopping=early_stopping, **limits)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_pads_as_hf_where_the_padding_token_is_0(num_beams: int) -> None:
    """HF's greedy search pads with 0 then, and its beam search with the first eos token."""
    limits = {"max_new_tokens": 20, "eos_token_ids": (3, 11), "pad_token_id": 0}
    last_tokens = set()
    for seed in range(6):
        found = assert_same(build("llama", seed), make_prompt(4, seed), num_beams=num_beams, **limits)
        last_tokens |= {token for row in found.tolist() if row[-2] in (3, 11) for token in row[-1:]}
    assert (0 if num_beams == 1 else 3) in last_tokens


def test_cases_end_early_and_apart() -> None:
    """The comparisons above are worth something only if rows end at different lengths, and before they must."""
    ended_early, ended_apart = 0, 0
    for model, prompt, limits in cases("any", count=24):
        found = beam_search(Cached(model), prompt, num_beams=3, **limits)
        ended_early += found.shape[1] < PROMPT_LENGTH + limits["max_new_tokens"]
        padded = (found[:, PROMPT_LENGTH:] == PAD).any(dim=1)
        ended_apart += bool(padded.any() and not padded.all())
    assert ended_early >= 3
    assert ended_apart >= 3


def test_greedy_tokens_are_found_one_at_a_time() -> None:
    model, prompt = build("llama", 0), make_prompt(2, 0)
    limits = {"max_new_tokens": 8, "eos_token_ids": (), "pad_token_id": PAD}
    decoding = Cached(model)
    tokens = greedy_tokens(decoding, prompt, **limits)
    assert decoding.fed == []
    first = [next(tokens), next(tokens)]
    assert decoding.fed == [(2, PROMPT_LENGTH), (2, 1)]
    assert torch.is_grad_enabled()
    expected = greedy_search(Cached(model), prompt, **limits)
    assert torch.equal(torch.stack([*first, *tokens], dim=1), expected[:, PROMPT_LENGTH:])


def test_decoding_sees_each_prompt_once_a_beam() -> None:
    decoding = Cached(build("gpt2", 0))
    beam_search(decoding, make_prompt(2, 0), num_beams=3, max_new_tokens=3, eos_token_ids=(), pad_token_id=PAD)
    assert decoding.fed == [(6, PROMPT_LENGTH), (6, 1), (6, 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"min_new_tokens": 6}, "min_new_tokens must be from 0 to max_new_tokens=5, got 6"),
        ({"min_new_tokens": -1}, "min_new_tokens must be from 0 to max_new_tokens=5, got -1"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping must be True, False or \"never\", got 'always'"),
        ({"num_beams": 2, "early_stopping": 1}, 'early_stopping must be True, False or "never", got 1'),
        ({"num_beams": 2, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the types are not checked for users either
    search = beam_search if "num_beams" in settings else greedy_tokens
    settings = {"max_new_tokens": 5, "eos_token_ids": (), "pad_token_id": PAD} | settings
    decoding = Cached(build("gpt2", 0))
    with pytest.raises(ValueError, match=message):
        search(decoding, make_prompt(1, 0), **settings)
    assert decoding.fed == []

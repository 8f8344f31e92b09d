"""What LLaVA generates is what HF's generates, token for token, and what its own forward says comes next."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hooked_vlm import HookedVLM, HookPoint
from hooked_vlm.config import AttentionImplementation
from tests.tiny_llava import EOS, IMAGE_ID, LANGUAGE_MODELS, MODELS, PAD, ROPES, WINDOW, prompts, row_alone

LENGTH = 64
IMAGES = (1, 0, 2)
"""How many each row has; rows are padded on the left."""

BOUNDED = {("mistral, sliding", "eager"), ("qwen2, mixed", "eager")}
"""HF's cache forgets the keys that are out of the window, and our fused attention passes them over. Eager does not,
because its scores and pattern are there to be edited; what they add to the sums is 0, and that rounds differently."""

pytestmark = pytest.mark.usefixtures("unchecked")
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@cache
def wordy(name: str, seed: int) -> PreTrainedModel:
    """A model that never says the image token, which it could not read again without an image."""
    hf = MODELS[name](seed=seed)
    with torch.no_grad():
        hf.lm_head.weight[IMAGE_ID] = 0
    return hf


def both_of(
    name: str, attention: AttentionImplementation = "sdpa", *, seed: int = 1
) -> tuple[PreTrainedModel, HookedVLM]:
    hf = wordy(name, seed)
    hf.set_attn_implementation(attention)
    return hf, HookedVLM.from_hf(hf, attention=attention)


def hf_generate(hf: PreTrainedModel, batch: dict[str, Tensor], **settings: Any) -> Any:
    tower = hf.model.language_model  # whose rotary embeddings may remember what they have seen
    tower.rotary_emb = type(tower.rotary_emb)(tower.config)
    return hf.generate(**batch, do_sample=False, **settings)


def tokens_of(ours: HookedVLM, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    return ours.generate(batch, return_type="tokens", **settings)


def own_words(row: Tensor, prompt: int) -> list[int]:
    """What was generated, up to its end."""
    tokens = row[prompt:].tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


WITHOUT_CACHE = ("llama", "mistral, sliding", "qwen2, mixed", "phi3", "next")


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *ROPES, "tied", "several", "next", "next, mistral"])
def test_greedy_tokens_equal_hf(name: str) -> None:
    """A padded batch, with no image, one and two; stretched rotary embeddings go beyond their contexts."""
    hf, ours = both_of(name)
    batch = prompts(hf, IMAGES)
    expected = hf_generate(hf, batch, max_new_tokens=LENGTH)
    found = tokens_of(ours, batch, max_new_tokens=LENGTH)
    assert torch.equal(found, expected)
    assert len({token for row in found[:, batch["input_ids"].shape[1] :].tolist() for token in row}) > 20


def test_texts_are_of_different_lengths() -> None:
    """The comparison above is worth something only if some end early and some do not, and rows end apart."""
    ended = []
    for name in ("llama, biases", "llama, every head its own keys", "phi3", "next"):
        hf, ours = both_of(name)
        batch = prompts(hf, IMAGES)
        found = tokens_of(ours, batch, max_new_tokens=LENGTH)[:, batch["input_ids"].shape[1] :]
        ended.append([EOS in row for row in found.tolist()])
    assert any(any(row) and not all(row) for row in ended)
    assert sum(map(sum, ended)) > 2


@every_attention
@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_with_cache_and_without(name: str, attention: AttentionImplementation) -> None:
    """HF with a cache and without, ours, and ours where each token takes a forward over all before it.

    Windows are crossed in the prompt and again and again after it.
    """
    hf, ours = both_of(name, attention)
    batch = prompts(hf, (1,) if attention == "eager" else IMAGES)
    prompt = batch["input_ids"].shape[1]
    found = tokens_of(ours, batch, max_new_tokens=LENGTH)
    assert torch.equal(found, hf_generate(hf, batch, max_new_tokens=LENGTH))
    assert torch.equal(found, hf_generate(hf, batch, max_new_tokens=LENGTH, use_cache=False))
    for row, expected in zip(found, argmax_without_cache(ours, batch, found.shape[1] - prompt), strict=True):
        assert own_words(row, prompt) == own_words(expected, prompt)
    assert prompt + LENGTH > 3 * WINDOW


@torch.no_grad()
def argmax_without_cache(ours: HookedVLM, batch: dict[str, Tensor], length: int) -> Tensor:
    """Greedy search as one would write it in a minute: a whole forward a token."""
    for _ in range(length):
        ids = torch.cat([batch["input_ids"], ours(batch)[:, -1:].argmax(-1)], dim=1)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        batch = {**batch, "input_ids": ids, "attention_mask": mask}
    return batch["input_ids"]


@every_attention
@pytest.mark.parametrize("name", ["llama", "mistral, sliding", "qwen2, mixed", "yarn"])
@torch.no_grad()
def test_what_is_known_and_what_is_new_add_up_to_the_whole(name: str, attention: AttentionImplementation) -> None:
    """Step by step, several tokens at a time too, in windows too; within rounding."""
    hf, ours = both_of(name, attention)
    batch = prompts(hf, IMAGES)
    words = torch.randint(3, IMAGE_ID, (len(IMAGES), 16))
    whole = ours(
        {
            **batch,
            "input_ids": torch.cat([batch["input_ids"], words], dim=1),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 16), value=1),
        }
    )
    decoding, prompt = ours._start_decoding(ours._inputs(batch))
    last, known = decoding.step(prompt), prompt.shape[1]
    for n_new in (1, 2, 10, 3):
        torch.testing.assert_close(last, whole[:, known - 1], rtol=0, atol=1e-5 * float(whole.abs().max()))
        start = known - prompt.shape[1]
        last, known = decoding.step(words[:, start : start + n_new]), known + n_new
    torch.testing.assert_close(last, whole[:, -1], rtol=0, atol=1e-5 * float(whole.abs().max()))


@every_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral, sliding", "qwen2, mixed", "phi3", "dynamic", "next"])
def test_logits_of_every_step_equal_hf(both, name: str, dtype: torch.dtype, attention: str) -> None:
    """To the bit, and seen through a hook, which is active at every step."""
    n_steps = 20
    hf, ours = both(name, dtype, attention)
    batch = prompts(hf, IMAGES)
    settings = {"max_new_tokens": n_steps, "min_new_tokens": n_steps}
    expected = hf_generate(hf, batch, return_dict_in_generate=True, output_logits=True, **settings)
    steps: list[Tensor] = []
    with ours.hooks([("language_model.hook_logits", lambda logits, hook: steps.append(logits[:, -1].clone()))]):
        found = tokens_of(ours, batch, **settings)
    assert torch.equal(found, expected.sequences)
    assert len(steps) == len(expected.logits) == n_steps
    for ours_, theirs in zip(steps, expected.logits, strict=True):
        if (name, attention) in BOUNDED:
            rounding = {torch.float32: 1e-5}.get(dtype, 1e-2)
            torch.testing.assert_close(ours_.float(), theirs, rtol=0, atol=rounding * float(theirs.abs().max()))
        else:
            assert torch.equal(ours_.float(), theirs)


@pytest.mark.parametrize("name", ["llama", "mistral, sliding", "qwen2, mixed", "dynamic", "next"])
def test_beams_equal_hf(name: str) -> None:
    """In a padded batch, and row by row: beams must take their own row's images with them."""
    hf, ours = both_of(name)
    batch = prompts(hf, IMAGES)
    settings = {"max_new_tokens": 20, "num_beams": 3}
    found = tokens_of(ours, batch, **settings)
    assert torch.equal(found, hf_generate(hf, batch, **settings))
    # "dynamic" embeddings depend on the longest row of the batch.
    for row in range(len(found) if name != "dynamic" else 0):
        alone = row_alone(batch, row)
        theirs = hf_generate(hf, alone, **settings)
        assert torch.equal(tokens_of(ours, alone, **settings), theirs)
        expected = own_words(theirs[0], alone["input_ids"].shape[1])
        assert own_words(found[row], batch["input_ids"].shape[1])[: len(expected)] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "length_penalty": 2.0, "min_new_tokens": 4},
        {"num_beams": 2, "length_penalty": -1.0, "early_stopping": True},
        {"num_beams": 4, "early_stopping": "never"},
        {"min_new_tokens": 10},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["phi3", "next"])
def test_tokens_equal_hf_with_settings(name: str, settings: dict[str, Any]) -> None:
    hf, ours = both_of(name, seed=2)
    batch = prompts(hf, IMAGES)
    expected = hf_generate(hf, batch, max_new_tokens=12, **settings)
    assert torch.equal(tokens_of(ours, batch, max_new_tokens=12, **settings), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral, sliding", "phi3", "next"])
def test_tokens_equal_hf_in_bfloat16(both, name: str, num_beams: int) -> None:
    """Where logits tie, and one bit would choose another token."""
    hf, ours = both(name, torch.bfloat16, "sdpa")
    batch = prompts(hf, IMAGES)
    expected = hf_generate(hf, batch, max_new_tokens=30, num_beams=num_beams)
    assert torch.equal(tokens_of(ours, batch, max_new_tokens=30, num_beams=num_beams), expected)


@every_attention
@pytest.mark.parametrize("name", ["llama", "mistral, sliding", "dynamic", "next"])
def test_a_padded_row_generates_what_it_generates_alone(name: str, attention: AttentionImplementation) -> None:
    """But for rotary embeddings that depend on the longest row of the batch ("dynamic"), which is HF's way too."""
    hf, ours = both_of(name, attention)
    batch = prompts(hf, IMAGES)
    together = tokens_of(ours, batch, max_new_tokens=30)
    same = []
    for row in range(len(together)):
        alone = row_alone(batch, row)
        expected = own_words(tokens_of(ours, alone, max_new_tokens=30)[0], alone["input_ids"].shape[1])
        same.append(own_words(together[row], batch["input_ids"].shape[1]) == expected)
    assert all(same) == (name != "dynamic")
    assert same[-1]  # the longest


@pytest.mark.parametrize("several", [False, True])
def test_a_text_ends_at_any_of_its_end_tokens(several: bool) -> None:
    hf, ours = both_of("llama")
    batch = prompts(hf, IMAGES)
    prompt = batch["input_ids"].shape[1]
    words = tokens_of(ours, batch, max_new_tokens=12)[:, prompt:]
    ends = [int(words[0, 5]), *([int(words[2, 3])] if several else [])]
    other = MODELS["llama"](seed=1)
    other.load_state_dict(hf.state_dict())
    other.config.text_config.eos_token_id = other.generation_config.eos_token_id = ends if several else ends[0]
    model = HookedVLM.from_hf(other)
    assert model.config.eos_token_ids == tuple(ends)
    found = tokens_of(model, batch, max_new_tokens=12)
    assert torch.equal(found, hf_generate(other, batch, max_new_tokens=12))
    first = [int(torch.isin(row, torch.tensor(ends)).int().argmax()) for row in words]
    assert first[0] <= 5
    assert (found[0, prompt + first[0] + 1 :] == PAD).all()
    assert torch.equal(found[0, prompt : prompt + first[0] + 1], words[0, : first[0] + 1])


HALF = "\N{REPLACEMENT CHARACTER}"


class Speller:
    """In a processor's place: token ids as words, some of them halves of one character."""

    def batch_decode(self, tokens: Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [self.decode([token for token in row if token > EOS]) for row in tokens.tolist()]

    @staticmethod
    def decode(ids: list[int]) -> str:
        halves = b"".join(
            bytes([0xC3]) if token % 7 == 3 else bytes([0xA9]) if token % 7 == 4 else f" w{token}".encode()
            for token in ids
        )
        return halves.decode(errors="replace")


@pytest.mark.parametrize("name", ["llama", "phi3", "next"])
def test_a_stream_is_the_generated_text_piece_by_piece(name: str) -> None:
    hf = wordy(name, 1)
    ours = HookedVLM.from_hf(hf, processor=Speller())
    for images in ((1,), (0,)):
        batch = prompts(hf, images)
        pieces = list(ours.stream(batch, max_new_tokens=LENGTH))
        assert len(pieces) > 5
        (text,) = ours.generate(batch, max_new_tokens=LENGTH)
        assert "".join(pieces) in (text, text.rstrip(HALF))  # half a character at the end may go untold
        assert not any(piece.endswith(HALF) for piece in pieces[:-1])
    with pytest.raises(ValueError, match="a stream is of one row, and these inputs have 3"):
        next(ours.stream(prompts(hf, IMAGES)))


def test_images_and_prompts_are_read_once() -> None:
    hf, ours = both_of("next")
    batch = prompts(hf, IMAGES)
    seen: dict[str, list[int]] = {"vision_encoder.hook_full_embed": [], "language_model.hook_full_embed": []}
    note = [(name, lambda states, hook: seen[hook.name].append(states.shape[1])) for name in seen]
    with ours.hooks(note):
        tokens_of(ours, batch, max_new_tokens=5, min_new_tokens=5, num_beams=3)
    assert len(seen["vision_encoder.hook_full_embed"]) == 1
    assert seen["language_model.hook_full_embed"] == [batch["input_ids"].shape[1], 1, 1, 1, 1]


def test_an_edit_during_generation_acts_at_every_step() -> None:
    hf, ours = both_of("llama")
    batch, favourite = prompts(hf, IMAGES), 42

    def favour(logits: Tensor, hook: HookPoint) -> None:
        logits[..., favourite] = 1e3

    with ours.hooks([("language_model.hook_logits", favour)]):
        found = tokens_of(ours, batch, max_new_tokens=9)
    assert (found[:, batch["input_ids"].shape[1] :] == favourite).all()


def test_inputs_are_not_written_to_and_padding_on_the_right_is_refused() -> None:
    hf, ours = both_of("llama")
    batch = prompts(hf, IMAGES)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    tokens_of(ours, batch, max_new_tokens=3, num_beams=2)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    flipped = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    with pytest.raises(ValueError, match="padded on the left, and these end in padding"):
        tokens_of(ours, flipped)


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_what_generates_no_text_says_so(name: str) -> None:
    ours = HookedVLM.from_hf(MODELS[name]())
    with pytest.raises(TypeError, match="does not generate text"):
        ours.generate({"pixel_values": torch.randn(1, 3, 28, 28)})

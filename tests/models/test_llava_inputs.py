"""What does not fit together is told before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.inputs import VLMInputs
from tests.tiny_blip import pixels
from tests.tiny_llava import BOS, IMAGE, IMAGE_ID, MODELS, N_PATCHES, TEXT, hf_llava, prompts


@pytest.fixture(scope="module")
def llava() -> tuple[Any, HookedVLM]:
    hf = MODELS["llama"]()
    return hf, HookedVLM.from_hf(hf)


@pytest.fixture(scope="module")
def tiled() -> tuple[Any, HookedVLM]:
    hf = MODELS["next"]()
    return hf, HookedVLM.from_hf(hf)


def with_image_tokens(*counts: int, length: int = 60) -> Tensor:
    """Rows with so many image tokens, in one run each."""
    ids = torch.full((len(counts), length), 7)
    ids[:, 0] = BOS
    for row, count in enumerate(counts):
        ids[row, 2 : 2 + count] = IMAGE_ID
    return ids


def refused(model: HookedVLM, batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(batch)
    with pytest.raises(ValueError, match=message):
        model.generate(batch, return_type="tokens")


def test_image_tokens_without_images(llava, tiled) -> None:
    """HF embeds the token itself."""
    for _, model in (llava, tiled):
        refused(
            model,
            {"input_ids": with_image_tokens(3, 0)},
            f"has 3 image tokens \\(id {IMAGE_ID}\\), and there are no pixel_values",
        )


N = N_PATCHES
WRONG = {
    "too many": (1, (N + 1,)),
    "too few": (1, (N - 1,)),
    "none": (1, (0,)),
    "none in any row": (2, (0, 0)),
    "an image more": (1, (2 * N,)),
    "an image less": (2, (N,)),
    "split between rows": (2, (N + 4, N - 4)),
    "an image in halves": (1, (N // 2, N // 2)),
    "the last row short": (3, (N, N, N - 1)),
    "a middle row short": (3, (N, N - 1, N + 1)),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_number_of_image_tokens_than_of_features(llava, case: str) -> None:
    """Also where the sum is right, and HF would give one row part of another's image."""
    hf, model = llava
    images, counts = WRONG[case]
    batch = {"input_ids": with_image_tokens(*counts), "pixel_values": pixels(images, IMAGE, IMAGE)}
    told = f"rows have \\[{', '.join(map(str, counts))}\\] tokens of id {IMAGE_ID}, and the images have \\[{N}"
    refused(model, batch, told)
    if sum(counts) != images * N:
        with pytest.raises(ValueError, match="do not match"):
            hf(**batch)


def test_every_right_split_is_taken(llava) -> None:
    hf, model = llava
    for counts in ((N, N, N), (3 * N, 0, 0), (0, N, 2 * N), (0, 0, 3 * N)):
        batch = {"input_ids": with_image_tokens(*counts), "pixel_values": pixels(3, IMAGE, IMAGE)}
        with torch.no_grad():
            assert torch.equal(model(batch), hf(**batch).logits)
        expected = [row for row, count in enumerate(counts) for _ in range(count // N)]
        assert list(model._inputs(batch).image_rows) == expected


def test_image_tokens_need_not_stand_together(llava) -> None:
    """They are filled one after the other, as in HF."""
    hf, model = llava
    ids = with_image_tokens(0, 0)
    ids[:, 3 : 3 + 2 * N : 2] = IMAGE_ID
    batch = {"input_ids": ids, "pixel_values": pixels(2, IMAGE, IMAGE)}
    with torch.no_grad():
        assert torch.equal(model(batch), hf(**batch).logits)


def test_with_the_class_token_among_the_features_an_image_takes_one_more() -> None:
    model = HookedVLM.from_hf(MODELS["last but one, class token too"]())
    batch = {"input_ids": with_image_tokens(N + 1), "pixel_values": pixels(1, IMAGE, IMAGE)}
    assert model(batch).shape == (1, 60, 99)
    refused(model, {**batch, "input_ids": with_image_tokens(N)}, f"the images have \\[{N + 1}\\] features")


def test_a_prompt_over_the_context(llava) -> None:
    _, model = llava
    n_ctx = TEXT["max_position_embeddings"]
    assert model({"input_ids": with_image_tokens(0, length=n_ctx)}).shape[1] == n_ctx
    refused(
        model,
        {"input_ids": with_image_tokens(0, length=n_ctx + 1)},
        f"the prompt has {n_ctx + 1} positions, more than the model's context of {n_ctx}",
    )
    stretched = HookedVLM.from_hf(MODELS["dynamic"]())
    assert stretched.config.text.n_ctx == 20
    assert stretched({"input_ids": with_image_tokens(0, length=41)}).shape[1] == 41


def test_pixels_of_another_shape(llava, tiled) -> None:
    _, model = llava
    ids = with_image_tokens(N)
    for shape, axes in (((1, 5, 3, IMAGE, IMAGE), "b 3 height width"), ((1, 1, IMAGE, IMAGE), "b 3 height width")):
        refused(model, {"input_ids": ids, "pixel_values": torch.randn(shape)}, f"have shape .*; give \\[{axes}\\]")
    small = {"input_ids": ids, "pixel_values": pixels(1, 21, 21)}
    refused(model, small, f"21x21 pixels.*{IMAGE}x{IMAGE}")
    _, model = tiled
    batch = {"input_ids": ids, "pixel_values": pixels(1, IMAGE, IMAGE), "image_sizes": torch.tensor([[28, 56]])}
    refused(model, batch, r"give \[b tile 3 height width\]")


@pytest.mark.usefixtures("unchecked")
def test_tiles_without_sizes_or_too_few_of_them(tiled) -> None:
    hf, model = tiled
    batch = prompts(hf, (1, 1), sizes=[(28, 56), (56, 56)])
    assert batch["pixel_values"].shape[1] == 5
    without = {name: batch[name] for name in batch if name != "image_sizes"}
    refused(model, without, r"needs image_sizes, the \(height, width\) of each picture")
    fewer = {**batch, "pixel_values": batch["pixel_values"][:, :4]}
    refused(model, fewer, r"pixel_values hold 4 tiles an image, and images of these sizes have \[3, 5\]")
    swapped = {**batch, "image_sizes": batch["image_sizes"].flip(0)}
    refused(model, swapped, "image tokens do not match the images")
    with pytest.raises(ValueError, match="different numbers of rows"):
        model({**batch, "image_sizes": batch["image_sizes"][:1]})


def test_what_stands_in_unused_tiles_does_not_matter(tiled) -> None:
    hf, model = tiled
    batch = prompts(hf, (1, 1), sizes=[(28, 56), (56, 56)])
    other = batch["pixel_values"].clone()
    other[0, 3:] = 5.0
    with torch.no_grad():
        assert torch.equal(model(batch), model({**batch, "pixel_values": other}))


def test_tokens_and_entries_that_there_are_not(llava) -> None:
    _, model = llava
    with pytest.raises(ValueError, match="LLaVA needs a prompt's input_ids"):
        model({"pixel_values": pixels(1, IMAGE, IMAGE)})
    refused(model, {"input_ids": torch.tensor([[1, 99]])}, "hold 99, and the model's tokens are 0 to 98")
    with pytest.raises(ValueError, match="unknown entries"):
        model({"input_ids": torch.tensor([[1, 2]]), "images": pixels(1)})


def test_an_image_token_beyond_the_vocabulary_is_never_embedded() -> None:
    """As in research checkpoints, whose image token is negative or none; it may be any number that no word has."""
    hf = hf_llava({"vocab_size": 80}, image_token_index=80)
    model = HookedVLM.from_hf(hf)
    ids = with_image_tokens(N)
    ids[ids == IMAGE_ID] = 80
    seen: list[Tensor] = []
    look = [("language_model.hook_merged_embed", lambda merged, hook: seen.append(merged.clone()))]
    batch = {"input_ids": ids, "pixel_values": pixels(1, IMAGE, IMAGE)}
    with torch.no_grad():
        model.run_with_hooks(batch, fwd_hooks=look)
        assert torch.equal(seen[0][ids == 80], model.encode_images(VLMInputs(**batch)))
        assert torch.equal(seen[0][ids != 80], model.language_model.W_E[ids[ids != 80]])
    with pytest.raises(ValueError, match="hold 81"):
        model({**batch, "input_ids": ids + (ids == 80).long()})

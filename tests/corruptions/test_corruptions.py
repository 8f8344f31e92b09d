"""Corrupted runs: drawn once from a seed, in the units they say, and the clean run where they corrupt nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM, toys
from hooked_vlm.corruptions import (
    IMAGE_EMBEDDINGS,
    AdditiveGaussian,
    Corrupted,
    Corruption,
    CounterfactualImage,
    CounterfactualQuestion,
    MultiplicativeGaussian,
    PixelNoise,
    Scaled,
    describe,
)
from hooked_vlm.data import sample
from hooked_vlm.edits import edit_hooks, gaussian
from hooked_vlm.inputs import VLMInputs
from tests import llava_processors
from tests.tiny_blip import hf_blip
from tests.tiny_blip import inputs as plain_inputs
from tests.tiny_runs import batch, tiny

SAMPLES = [sample(5, index, kinds=("color",)) for index in range(2)]
QUESTIONS = tuple(one.question for one in SAMPLES)
NOISES: list[Callable[..., Any]] = [AdditiveGaussian, MultiplicativeGaussian, PixelNoise]


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture(scope="module")
def clean(model: HookedVLM) -> VLMInputs:
    return model.prepare([one.image for one in SAMPLES], QUESTIONS)


@torch.no_grad()
def logits(model: HookedVLM, run: Corrupted) -> Tensor:
    return model.patch(run.inputs, run.edits)


@torch.no_grad()
def activation(model: HookedVLM, run: Corrupted, site: str = IMAGE_EMBEDDINGS) -> Tensor:
    with model.hooks(edit_hooks(model, run.inputs, run.edits)):
        return model.run_with_hooks(run.inputs, stop_at=site)


def pixels(run: Corrupted | VLMInputs) -> Tensor:
    values = run.pixel_values if isinstance(run, VLMInputs) else run.inputs.pixel_values
    assert values is not None
    return values


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_drawn_once_from_its_seed(noise: Callable[..., Any], model: HookedVLM, clean: VLMInputs) -> None:
    run = noise(draws=3, seed=4)(model, clean)
    corrupted = logits(model, run)
    assert torch.equal(corrupted, logits(model, run)), "a run is drawn anew"
    assert torch.equal(corrupted, logits(model, noise(draws=3, seed=4)(model, clean)))
    assert not torch.equal(corrupted, logits(model, noise(draws=3, seed=5)(model, clean)))
    assert not torch.equal(corrupted, model(clean.repeat(3)))


@pytest.mark.parametrize("noise", NOISES)
def test_copies_of_a_row_stand_beside_each_other(noise: Callable[..., Any], model: HookedVLM, clean: VLMInputs) -> None:
    run = noise(draws=3)(model, clean)
    assert (run.draws, len(run.inputs)) == (3, 6)
    assert run.inputs.tokens == tuple(clean.tokens[row] for row in (0, 0, 0, 1, 1, 1))  # type: ignore[index]
    assert run.inputs.spans["question"].rows[3] == clean.spans["question"].rows[1]
    same_pictures = activation(model, noise(draws=3)(model, clean.rows([0, 0])))
    assert len({tuple(row.flatten()[:5].tolist()) for row in same_pictures}) == 6, "every draw is another"
    # Each is nearest to its own picture: a weak noise.
    weak = activation(model, noise(std=0.05, draws=3)(model, clean))
    own = activation(model, Corrupted(clean))
    distances = (weak[:, None] - own[None]).flatten(2).norm(dim=-1)
    assert distances.argmin(1).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("noise", NOISES)
def test_a_draw_depends_on_neither_the_other_draws_nor_the_rows_behind(
    noise: Callable[..., Any], model: HookedVLM, clean: VLMInputs
) -> None:
    whole = activation(model, noise(draws=3)(model, clean))
    fewer = activation(model, noise(draws=2)(model, clean))
    alone = activation(model, noise(draws=3)(model, clean.rows([0])))
    torch.testing.assert_close(whole[[0, 1, 3, 4]], fewer)
    torch.testing.assert_close(whole[:3], alone)


def test_additive_noise_is_in_units_of_each_rows_spread(model: HookedVLM, clean: VLMInputs) -> None:
    own = activation(model, Corrupted(clean))
    added = activation(model, AdditiveGaussian(std=2.0, draws=4)(model, clean)) - own.repeat_interleave(4, dim=0)
    spread = added.flatten(1).std(1) / own.flatten(1).std(1).repeat_interleave(4)
    assert spread.tolist() == pytest.approx([2.0] * 8, rel=0.05)
    assert added.flatten(1).mean(1).abs().max() < 0.1 * added.std()


def test_multiplicative_noise_is_of_its_mean_and_spread(model: HookedVLM, clean: VLMInputs) -> None:
    own = activation(model, Corrupted(clean)).repeat_interleave(4, dim=0)
    factors = (activation(model, MultiplicativeGaussian(0.5, 2.0, draws=4)(model, clean)) / own).flatten(1)
    low, middle, high = factors.quantile(torch.tensor([0.1587, 0.5, 0.8413]), dim=1)
    assert middle.tolist() == pytest.approx([0.5] * 8, abs=0.2)
    assert ((high - low) / 2).tolist() == pytest.approx([2.0] * 8, rel=0.1)


def test_pixel_noise_is_in_units_of_each_pictures_spread(model: HookedVLM, clean: VLMInputs) -> None:
    brighter = clean.with_pixels(pixels(clean) * torch.tensor([1.0, 3.0])[:, None, None, None])
    added = pixels(PixelNoise(std=0.5, draws=2)(model, brighter)) - pixels(brighter).repeat_interleave(2, dim=0)
    spread = added.flatten(1).std(1) / pixels(brighter).flatten(1).std(1).repeat_interleave(2)
    assert spread.tolist() == pytest.approx([0.5] * 4, rel=0.02)


def test_scaling(model: HookedVLM, clean: VLMInputs) -> None:
    run = Scaled(0.7691)(model, clean)
    assert (run.draws, run.inputs) == (1, clean)
    assert torch.equal(activation(model, run), activation(model, Corrupted(clean)) * 0.7691)


@pytest.mark.parametrize(
    "corruption",
    [
        AdditiveGaussian(std=0.0, draws=2),
        MultiplicativeGaussian(std=0.0, draws=2),
        PixelNoise(std=0.0, draws=2),
        Scaled(1.0),
        CounterfactualImage([one.image for one in SAMPLES]),
        CounterfactualQuestion(QUESTIONS),
    ],
    ids=lambda corruption: type(corruption).__name__,
)
def test_where_nothing_is_corrupted_the_run_is_the_clean_one(
    corruption: Corruption, model: HookedVLM, clean: VLMInputs
) -> None:
    run = corruption(model, clean)
    assert run.draws == corruption.draws
    with torch.no_grad():
        assert torch.equal(logits(model, run), model(clean.repeat(run.draws)))


@pytest.mark.parametrize("noise", [AdditiveGaussian, MultiplicativeGaussian])
@pytest.mark.parametrize(
    "site", ["question_encoder.hook_embed", "question_encoder.blocks.1.cross_attn.hook_z", "vision_encoder.hook_out"]
)
def test_noise_on_other_activations(site: str, noise: Callable[..., Any]) -> None:
    tiny_model, inputs = tiny(), batch()
    own = activation(tiny_model, Corrupted(inputs), site)
    run = noise(std=1.5, draws=2, site=site)(tiny_model, inputs)
    corrupted = activation(tiny_model, run, site)
    assert corrupted.shape == (6, *own.shape[1:])
    assert (corrupted != own.repeat_interleave(2, dim=0)).float().mean() > 0.99


def test_a_counterfactual_image_leaves_the_question(model: HookedVLM, clean: VLMInputs) -> None:
    run = CounterfactualImage([one.sip.image for one in SAMPLES])(model, clean)
    other = model.prepare([one.sip.image for one in SAMPLES], QUESTIONS)
    assert torch.equal(pixels(run), pixels(other))
    assert torch.equal(run.inputs.tensors()["input_ids"], clean.tensors()["input_ids"])
    assert (run.inputs.tokens, run.inputs.texts, run.inputs.spans) == (clean.tokens, clean.texts, clean.spans)
    assert (run.edits, run.draws) == ((), 1)
    one_for_all = CounterfactualImage(SAMPLES[0].sip.image)(model, clean)
    assert torch.equal(pixels(one_for_all), pixels(other)[[0, 0]])


def test_a_counterfactual_question_leaves_the_image(model: HookedVLM, clean: VLMInputs) -> None:
    run = CounterfactualQuestion(tuple(one.str_.question for one in SAMPLES))(model, clean)
    assert torch.equal(pixels(run), pixels(clean))
    assert run.inputs.input_ids is not None
    assert clean.input_ids is not None
    differs = (run.inputs.input_ids != clean.input_ids).nonzero().tolist()
    assert differs == [[row, one.str_.position + 1] for row, one in enumerate(SAMPLES)]
    assert run.inputs.span(SAMPLES[0].str_.new.strip(), occurrence=0).tower == "question_encoder"
    assert (run.edits, run.draws) == ((), 1)


def test_questions_of_another_length_are_named_with_both_counts(model: HookedVLM, clean: VLMInputs) -> None:
    longer = f"{QUESTIONS[1].removesuffix('?')} circle ?"
    n_clean = len(clean.texts[1].offsets)  # type: ignore[index]
    with pytest.raises(ValueError, match="positions would not align") as caught:
        CounterfactualQuestion((QUESTIONS[0], longer))(model, clean)
    for part in (f"{longer!r} has {n_clean + 1} tokens", f"{QUESTIONS[1]!r} has {n_clean}"):
        assert part in str(caught.value)


def test_padding_hides_no_question_of_another_length() -> None:
    """LLaVA's rows are as long as the longest, whatever their own."""
    toy = HookedVLM.from_pretrained("toy-llava")
    inputs = toy.prepare([one.image for one in SAMPLES], QUESTIONS)
    shorter = QUESTIONS[0].replace("the ", "")
    with pytest.raises(ValueError, match="positions would not align") as caught:
        CounterfactualQuestion((shorter, QUESTIONS[1]))(toy, inputs)
    assert shorter in str(caught.value)


def test_counterfactuals_of_another_number_of_rows(model: HookedVLM, clean: VLMInputs) -> None:
    with pytest.raises(ValueError, match="1 counterfactual questions for 2 rows"):
        CounterfactualQuestion(QUESTIONS[0])(model, clean)
    with pytest.raises(ValueError, match="3 images and 2 texts"):
        CounterfactualImage([SAMPLES[0].image] * 3)(model, clean)


@pytest.mark.parametrize(
    "corruption", [CounterfactualImage(SAMPLES[0].image), CounterfactualQuestion("what color is the circle ?")]
)
def test_counterfactuals_need_inputs_that_know_their_texts(corruption: Corruption, model: HookedVLM) -> None:
    with pytest.raises(ValueError, match=r"needs inputs that model\.prepare made"):
        corruption(model, VLMInputs(**plain_inputs("vqa")))


def test_a_counterfactual_image_of_another_size(model: HookedVLM, clean: VLMInputs) -> None:
    with pytest.raises(ValueError, match=r"counterfactual pixels are \(2, 3, 96, 96\), the clean \(2, 3, 32, 32\)"):
        CounterfactualImage(SAMPLES[0].image)(model, clean.with_pixels(torch.zeros(2, 3, 32, 32)))


def test_a_counterfactual_image_to_caption(model: HookedVLM) -> None:
    """A picture alone has no text to know."""
    captioner = HookedVLM.from_hf(hf_blip("caption"), processor=model.processor)
    run = CounterfactualImage(SAMPLES[1].image)(captioner, captioner.prepare(SAMPLES[0].image))
    assert torch.equal(pixels(run), pixels(captioner.prepare(SAMPLES[1].image)))


def test_nothing_to_corrupt_or_no_draws(model: HookedVLM, clean: VLMInputs) -> None:
    with pytest.raises(ValueError, match="no pixel_values to corrupt"):
        PixelNoise()(model, replace(clean, pixel_values=None))
    for noise in NOISES:
        with pytest.raises(ValueError, match=f"{noise.__name__} needs at least one draw, not 0"):
            noise(draws=0)(model, clean)


@pytest.mark.parametrize(
    ("corruption", "described"),
    [
        (AdditiveGaussian(2.0, draws=4, seed=1), {"std": 2.0, "draws": 4, "seed": 1, "site": IMAGE_EMBEDDINGS}),
        (MultiplicativeGaussian(), {"mean": 1.0, "std": 5.0, "draws": 10, "seed": 0, "site": IMAGE_EMBEDDINGS}),
        (Scaled(), {"factor": 0.7691, "site": IMAGE_EMBEDDINGS}),
        (PixelNoise(0.5), {"std": 0.5, "draws": 10, "seed": 0}),
        (CounterfactualQuestion(("a", "b")), {"questions": ["a", "b"]}),
        (CounterfactualImage(Path("other.png")), {"images": ["other.png"]}),
        (CounterfactualImage([np.zeros((2, 2, 3)), "other.png"]), {"images": ["given", "other.png"]}),
        (CounterfactualImage(SAMPLES[0].image), {"images": ["given"]}),
    ],
    ids=lambda value: "",
)
def test_a_description_is_json(corruption: Corruption, described: dict[str, Any]) -> None:
    assert isinstance(corruption, Corruption)
    assert json.loads(json.dumps(describe(corruption))) == {"corruption": type(corruption).__name__, **described}


class Backwards:
    """A corruption of a user's own, which is no dataclass."""

    draws = 1

    def __call__(self, model: HookedVLM, clean: VLMInputs) -> Corrupted:
        return Corrupted(clean.with_pixels(pixels(clean).flip(-1)))


def test_a_corruption_of_ones_own(model: HookedVLM, clean: VLMInputs) -> None:
    assert describe(Backwards()) == {"corruption": "Backwards"}
    assert not torch.equal(logits(model, Backwards()(model, clean)), logits(model, Corrupted(clean)))


def test_the_demo_pairs_change_the_answer(model: HookedVLM) -> None:
    one = toys.demo_sample()
    clean = model.prepare(one.image, one.question)
    answer = model.generate(clean)
    for corruption in (CounterfactualImage(one.sip.image), CounterfactualQuestion(one.str_.question)):
        assert model.generate(corruption(model, clean).inputs) != answer


# LLaVA: other numbers of pictures than of rows ------------------------------------------------------------------------

NEXT_SIZES, N_TILES = ((28, 28), (60, 28), (28, 90)), (3, 4, 4)
"""Heights and widths of pictures, and how many tiles LLaVA-NeXT makes of them."""


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prompts(*counts: int) -> list[str]:
    return [f"USER: {'<image> ' * count}\nwhat color is it ? ASSISTANT:" for count in counts]


def llava_rows(tiles: bool) -> tuple[HookedVLM, VLMInputs, list[tuple[int, int]]]:
    """A model, rows with two pictures, with none and with one, and each vision row's (row, how many it has there)."""
    one = llava_processors.model(tiles=tiles)
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(NEXT_SIZES)]
    inputs = one.prepare([pictures[:2], [], pictures[2:]], prompts(2, 0, 1))
    return one, inputs, [(0, 7), (2, 4)] if tiles else [(0, 2), (2, 1)]


@pytest.mark.parametrize("tiles", [False, True], ids=["LLaVA-1.5", "LLaVA-NeXT"])
@pytest.mark.parametrize("site", ["vision_encoder.hook_out", "projector.hook_out", "language_model.hook_merged_embed"])
def test_draws_stay_with_their_pictures(site: str, tiles: bool) -> None:
    """Row after row, draw after draw, a row's pictures (tiles) together: where the repeated inputs have them."""
    one, inputs, counts = llava_rows(tiles)
    own = activation(one, Corrupted(inputs), site)
    if site.startswith("language_model"):
        counts = [(row, 1) for row in range(3)]
    assert len(own) == sum(count for _, count in counts)
    run = AdditiveGaussian(std=0.5, draws=3, seed=2, site=site)(one, inputs)
    repeated = activation(one, Corrupted(inputs.repeat(3)), site)
    noise = activation(one, run, site) - repeated
    first, order = 0, []
    for _, count in counts:
        order += [(place, draw) for draw in range(3) for place in range(first, first + count)]
        first += count
    torch.testing.assert_close(repeated, own[[place for place, _ in order]])
    for (place, draw), found in zip(order, noise, strict=True):
        expected = 0.5 * own[place].std() * gaussian(own.shape[1:], 2, place, draw)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    factors = MultiplicativeGaussian(std=0.5, draws=3, seed=2, site=site)(one, inputs)
    expected = repeated * torch.stack([1 + 0.5 * gaussian(own.shape[1:], 2, *key) for key in order])
    torch.testing.assert_close(activation(one, factors, site), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tiles", [False, True], ids=["LLaVA-1.5", "LLaVA-NeXT"])
def test_as_many_pictures_as_rows_need_not_be_one_a_row(tiles: bool) -> None:
    one = llava_processors.model(tiles=tiles)
    inputs = one.prepare([[picture(28, 28), picture(28, 28, 1)], []], prompts(2, 0))
    for site in ("language_model.hook_merged_embed", "vision_encoder.hook_out"):
        own = activation(one, Corrupted(inputs), site)
        run = AdditiveGaussian(std=1.0, draws=2, site=site)(one, inputs)
        noise = activation(one, run, site) - activation(one, Corrupted(inputs.repeat(2)), site)
        order = [(0, 0), (0, 1), (1, 0), (1, 1)]
        if site.startswith("vision"):
            order = [(place, draw) for draw in range(2) for place in range(len(own))]
        for (place, draw), found in zip(order, noise, strict=True):
            expected = own[place].std() * gaussian(own.shape[1:], 0, place, draw)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tiles", [False, True], ids=["LLaVA-1.5", "LLaVA-NeXT"])
def test_pixel_noise_of_several_pictures(tiles: bool) -> None:
    """In units of each picture's spread, without the empty tiles that fill it up."""
    one, inputs, _ = llava_rows(tiles)
    own, run = pixels(inputs), PixelNoise(std=0.5, draws=2)(one, inputs)
    images = [0, 1, 0, 1, 2, 2]
    assert run.inputs.image_rows == (0, 0, 1, 1, 4, 5)
    added = pixels(run) - own[images]
    for image, noise in zip(images, added, strict=True):
        spread = own[image][: N_TILES[image]].std() if tiles else own[image].std()
        assert noise.std() == pytest.approx(0.5 * float(spread), rel=0.03)
    assert len({round(float(noise.flatten()[0]), 6) for noise in added}) == 6
    alone = inputs.rows([0])
    torch.testing.assert_close(pixels(PixelNoise(std=0.5, draws=2)(one, alone)), pixels(run)[:4])


def test_a_counterfactual_picture_of_several() -> None:
    one, inputs, _ = llava_rows(False)
    others = [[picture(28, 28, 7), picture(60, 28, 1)], [], [picture(28, 90, 2)]]
    run = CounterfactualImage(others)(one, inputs)
    differs = (pixels(run) != pixels(inputs)).flatten(1).any(1)
    assert differs.tolist() == [True, False, False]
    assert run.inputs.input_ids is inputs.input_ids
    with pytest.raises(ValueError, match="text 0 has 2 <image> and 1 images"):
        CounterfactualImage([others[0][:1], [], others[2]])(one, inputs)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((90, 28), "is tiled otherwise than the clean one; give one of its size"),  # as many tiles, one below the other
        ((28, 70), "is tiled otherwise"),  # the same tiles, of which less is left out as padding
        ((28, 28), r"counterfactual pixels are \(1, 3, 3, 28, 28\), the clean \(1, 4, 3, 28, 28\)"),
    ],
)
def test_a_counterfactual_picture_that_is_tiled_otherwise(size: tuple[int, int], message: str) -> None:
    one = llava_processors.model(tiles=True)
    clean = one.prepare(picture(28, 90), prompts(1))
    assert torch.equal(pixels(CounterfactualImage(picture(28, 90))(one, clean)), pixels(clean))
    with pytest.raises(ValueError, match=message):
        CounterfactualImage(picture(*size))(one, clean)


def test_the_demo_pairs_change_the_llavas_answer() -> None:
    one, toy = toys.demo_sample(), HookedVLM.from_pretrained("toy-llava")
    clean = toy.prepare(one.image, one.question)
    for corruption, answer in (
        (CounterfactualImage(one.sip.image), one.sip.answer),
        (CounterfactualQuestion(one.str_.question), one.str_.answer),
    ):
        assert toy.generate(corruption(toy, clean).inputs) == [answer]
    with pytest.raises(ValueError, match=r"positions would not align"):
        CounterfactualQuestion("is it red ?")(toy, clean)

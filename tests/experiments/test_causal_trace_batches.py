"""Traces of several rows, of several pictures in a row, and of the vision tower."""

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM, VLMInputs, results, toys
from hooked_vlm.corruptions import AdditiveGaussian, CounterfactualImage, CounterfactualQuestion, Scaled
from hooked_vlm.edits import Replace
from hooked_vlm.experiments import causal_trace
from tests import llava_processors

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

TOWER = "language_model"
SAMPLES = [toys.sample(11, index, kinds=(kind,)) for index, kind in enumerate(("shape", "color"))]
PICTURES = [one.image for one in SAMPLES]
ONE, TWO = (f"USER: {pictures}\nwhat color is the circle ? ASSISTANT:" for pictures in ("<image>", "<image> <image>"))


@pytest.fixture(scope="module")
def model():
    return HookedVLM.from_pretrained("toy-llava")


@pytest.fixture(scope="module")
def clean(model):
    """Of two lengths, padded on the left."""
    inputs = model.prepare(PICTURES, [one.question for one in SAMPLES])
    assert inputs.attention_mask[:, 0].tolist() == [1, 0]
    return inputs


CORRUPTIONS = {
    "SIP": lambda rows: CounterfactualImage([SAMPLES[row].sip.image for row in rows]),
    "STR": lambda rows: CounterfactualQuestion(tuple(SAMPLES[row].str_.question for row in rows)),
    "Scaled": lambda rows: Scaled(0.4),
}


@pytest.mark.parametrize(
    ("corruption", "which", "direction"),
    [("SIP", "image", "denoising"), ("STR", "text", "noising"), ("Scaled", "text", "denoising")],
)
def test_rows_of_a_batch_are_traced_as_if_alone(model, clean, corruption, which, direction):
    settings = {"sites": ["mlp"], "which": which, "all_positions": True, "direction": direction}
    batch = causal_trace(model, clean, CORRUPTIONS[corruption]([0, 1]), **settings)
    assert batch.attrs["samples_used"] == 2
    for row, one in enumerate(SAMPLES):
        if which == "image" and row == 0:
            continue  # enough forwards
        inputs = model.prepare(one.image, one.question)
        alone = results.tower(causal_trace(model, inputs, CORRUPTIONS[corruption]([row]), **settings), TOWER)
        part = results.tower(batch, TOWER, row)
        assert part.token.values.tolist() == alone.token.values.tolist()
        for name in ("patched", "effect", "clean", "corrupted"):
            assert np.allclose(part[name].transpose(*alone[name].dims), alone[name], atol=1e-4), name
        assert (str(part.answer.values), str(part.foil.values)) == (str(alone.answer.values), str(alone.foil.values))
        assert ("picture" in part.coords) == ("picture" in alone.coords) == (which == "image")
        if which == "image":
            assert part.picture.values.tolist() == alone.picture.values.tolist()
            assert np.array_equal(part.box.values, alone.box.values, equal_nan=True)


def test_padding_is_no_position_and_answers_may_be_given(model, clean):
    token = model.processor.tokenizer.convert_tokens_to_ids
    answers, foils = torch.tensor([token("star"), token("red")]), torch.tensor([token("blue")] * 2)
    result = causal_trace(model, clean, Scaled(0.4), sites=["mlp"], which="text", answer=answers, foil=foils)
    for row, n_padding in enumerate((clean.attention_mask == 0).sum(1).tolist()):
        own = results.tower(result, TOWER, row)
        assert own.position.values[0] == n_padding
        assert str(own.token.values[0]) == "<s>"
        assert "" not in own.token.values
    assert result.answer.values.tolist() == ["star", "red"]
    assert result.foil.values.tolist() == ["blue"] * 2
    with torch.no_grad():
        last = model(clean)[:, -1]
    expected = last.gather(1, answers[:, None]) - last.gather(1, foils[:, None])
    assert np.allclose(result.clean.sel(metric="logit_difference"), expected[:, 0], atol=1e-5)


@torch.no_grad()
def test_noise_is_averaged_over_its_draws_row_by_row(model):
    one, site = SAMPLES[0], f"{TOWER}.blocks.1.hook_mlp_out"
    inputs = model.prepare([one.image, one.sip.image], [one.question] * 2)
    corruption = AdditiveGaussian(std=2.0, draws=3, seed=1)
    result = causal_trace(model, inputs, corruption, sites=["mlp"], which="text")
    run = corruption(model, inputs)
    _, cache = model.run_with_cache(inputs, names_filter=site)
    answer = model(inputs)[:, -1].argmax(-1).repeat_interleave(3)
    edit = Replace(site, cache[site].repeat_interleave(3, 0), positions="last")
    probabilities = model.patch(run.inputs, [*run.edits, edit])[:, -1].softmax(-1)
    expected = probabilities.gather(1, answer[:, None]).view(2, 3).mean(1)
    last = inputs.input_ids.shape[1] - 1
    found = result.patched.sel(metric="probability", tower=TOWER, site="mlp", layer=1, position=last)
    assert np.allclose(found, expected, atol=1e-5)


# Several pictures in a row --------------------------------------------------------------------------------------------


def test_positions_of_several_pictures():
    tiny = llava_processors.model()
    pictures = np.random.default_rng(0).integers(0, 256, (3, 28, 56, 3), dtype=np.uint8)
    inputs = tiny.prepare([[*pictures[:2]], [pictures[2]]], [TWO, ONE])
    result = causal_trace(tiny, inputs, Scaled(0.4), sites=["mlp"], which="image", all_positions=True)
    for row, pictures_there in enumerate((2, 1)):
        part = results.tower(result, TOWER, row)
        numbers = [f"{picture}:" for picture in range(2)] if pictures_there == 2 else [""]
        patches = [f"{number}{down},{across}" for number in numbers for down in range(4) for across in range(4)]
        assert part.token.values.tolist() == [*patches, "(image)", "(all)"]
        assert part.picture.values.tolist() == [0] * 16 + [1] * 16 * (pictures_there - 1) + [-1, -1]
        # Of a picture twice as wide as high, the middle is seen.
        for box, (down, across) in zip(part.box.values[:-2], list(np.ndindex(4, 4)) * pictures_there, strict=True):
            assert box.tolist() == [14 + 7 * across, 7 * down, 21 + 7 * across, 7 * down + 7]


def test_a_row_of_two_pictures_under_noise_is_traced_as_if_alone(model):
    """Draws stay with their pictures. (They are those of the first row of any batch.)"""
    inputs = model.prepare([PICTURES, PICTURES[:1]], [TWO, ONE])
    corruption = AdditiveGaussian(std=2.0, draws=2)
    settings = {"sites": ["resid"], "which": "text", "all_positions": True}
    batch = results.tower(causal_trace(model, inputs, corruption, **settings), TOWER, 0)
    alone = results.tower(causal_trace(model, inputs.rows([0]), corruption, **settings), TOWER)
    assert np.allclose(batch.patched.transpose(*alone.patched.dims), alone.patched, atol=1e-4)
    assert not np.allclose(alone.clean, alone.corrupted, atol=1e-3)
    whole = alone.patched.sel(site="resid", position=-1)
    assert np.allclose(whole.transpose("metric", ...), alone.clean.values[:, None], atol=1e-4)


def test_a_row_without_a_picture_has_no_image_cell(model):
    inputs = model.prepare([PICTURES[:1], []], [ONE, "is there a circle ?"])
    result = causal_trace(model, inputs, AdditiveGaussian(draws=1), sites=["mlp"], which="text", all_positions=True)
    missing = result.patched.sel(tower=TOWER, position=-2).isnull()
    assert not missing.isel(sample=0).any()
    assert missing.isel(sample=1).all()
    assert np.allclose(result.clean.isel(sample=1), result.corrupted.isel(sample=1), atol=1e-6)
    with pytest.raises(ValueError, match="have no positions to patch in language_model"):
        causal_trace(model, inputs.rows([1]), Scaled(0.2), which="image")


def test_which_positions_hold_the_image_must_be_known(model, clean):
    plain = VLMInputs(**clean.rows([0]).tensors())
    with pytest.raises(ValueError, match=r"which positions are the image's is not known: .* model\.prepare"):
        causal_trace(model, plain, Scaled(0.2), which="image")


# The vision tower -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corruption", "whole"),
    [
        (CounterfactualImage(PICTURES[1]), [True, True, True, False]),  # the last layer is not read
        (CounterfactualQuestion("what color is the square ?"), [False] * 4),
        (Scaled(0.3), [False] * 4),  # spoils what the tower has made
        (Scaled(0.3, site="vision_encoder.blocks.1.hook_resid_mid"), [False, True, True, False]),
    ],
)
def test_the_vision_towers_identities(corruption, whole):
    """Its whole stream is all that differs, up to the layer that is read, if the picture is what is corrupted."""
    tiny = llava_processors.model()
    inputs = tiny.prepare(PICTURES[0], ONE)
    if isinstance(corruption, CounterfactualQuestion):
        corruption = CounterfactualQuestion(ONE.replace("circle", "square"))
    result = causal_trace(
        tiny, inputs, corruption, towers=["vision_encoder"], sites=["resid"], all_positions=True
    ).isel(sample=0)
    marked = result.identity.sel(tower="vision_encoder", site="resid")
    assert marked.sel(position=-1).values.tolist() == whole
    assert int(marked.sum()) == sum(whole)
    found = result.patched.sel(tower="vision_encoder", site="resid", position=-1, metric="logit_difference").values
    ends = [float(result[end].sel(metric="logit_difference")) for end in ("clean", "corrupted")]
    assert abs(ends[0] - ends[1]) > 0.05
    assert np.allclose(found[whole], ends[0], atol=1e-4)
    assert np.allclose(found[3], ends[1], atol=1e-4)


def test_a_corruption_inside_the_language_model_is_brought_back_from_there_on(model):
    inputs = model.prepare(SAMPLES[1].image, SAMPLES[1].question)
    corruption = Scaled(-0.5, site=f"{TOWER}.blocks.2.hook_resid_mid")
    result = causal_trace(model, inputs, corruption, sites=["resid"], which="text", all_positions=True).isel(sample=0)
    marked = result.identity.sel(tower=TOWER, site="resid", position=-1)
    assert marked.values.tolist() == [False, False, True, True, True]
    for end, is_whole in (("clean", True), ("corrupted", False)):
        found = result.patched.sel(tower=TOWER, site="resid", position=-1).where(marked == is_whole, drop=True)
        assert np.allclose(found.transpose("metric", ...), result[end].values[:, None], atol=1e-4)


def test_the_vision_towers_rows_must_be_the_batchs(model):
    pairs = model.prepare([PICTURES], [TWO])
    with pytest.raises(ValueError, match="give one picture a row"):
        causal_trace(model, pairs, Scaled(0.3), towers=["vision_encoder"])
    tiled = llava_processors.model(tiles=True)
    with pytest.raises(ValueError, match="pictures, or tiles"):
        causal_trace(tiled, tiled.prepare(PICTURES[0], ONE), Scaled(0.3), towers=["vision_encoder"])

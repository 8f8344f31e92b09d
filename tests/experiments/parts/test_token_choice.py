"""Tokens of a picture that are chosen: by what they show, by chance, by their length, by gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM, SpanError
from hooked_vlm.data import SampleError, shapes
from hooked_vlm.edits import Replace
from hooked_vlm.experiments.parts.cases import prepared, ready
from hooked_vlm.experiments.parts.identification import (
    NextToken,
    Said,
    mentions,
    says_yes,
)
from hooked_vlm.experiments.parts.picture_parts import with_picture_spans
from hooked_vlm.experiments.parts.token_choice import (
    AllTokens,
    GradientTokens,
    LastRowTokens,
    ObjectTokens,
    OtherTokens,
    RandomTokens,
    RegisterTokens,
    SurroundingTokens,
    choose_tokens,
    visual_tokens_of,
)
from hooked_vlm.experiments.parts.visual_gradients import integrated_gradients, visual_site
from hooked_vlm.experiments.visual_tokens import visual_tokens
from hooked_vlm.metrics import at
from tests.llava_processors import model as tiny_llava
from tests.llava_processors import noise

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

COLOR = ("color",)
WRITTEN = Said("{question}", mentions, max_new_tokens=1)
POLL = Said("is there a {object} ?", says_yes, max_new_tokens=3)


@pytest.fixture(scope="module")
def toys():
    return {name: HookedVLM.from_pretrained(name) for name in ("toy-llava", "toy-blip-vqa")}


@pytest.fixture(params=["toy-llava", "toy-blip-vqa"])
def model(toys, request):
    return toys[request.param]


def named(sample):
    """A sample whose object has a name: a red circle."""
    return replace(sample, meta={"object": f"{sample.answer} {sample.text_of('subject')}"})


@pytest.fixture(scope="module")
def samples():
    return shapes(6, seed=7, kinds=COLOR).map(named)


# Which tokens ---------------------------------------------------------------------------------------------------------


def test_choices_are_what_they_say(model, samples):
    for sample in samples[:3]:
        chosen = {
            choice: set(choose_tokens(model, sample, choice)[0])
            for choice in (
                *(ObjectTokens(dilate=by) for by in (0, 1, 2)),
                *(SurroundingTokens(), SurroundingTokens(dilate=2), OtherTokens(), OtherTokens(dilate=1)),
                *(RandomTokens(), RandomTokens(7), RandomTokens(34, avoid=True), AllTokens(), LastRowTokens()),
            )
        }
        inputs = with_picture_spans(prepared(model, sample))
        seen = set(inputs.positions("image.seen")[0])
        own, wider, widest = (chosen[ObjectTokens(dilate=by)] for by in (0, 1, 2))
        assert own == set(inputs.positions_in(sample.regions["object"])[0])
        assert own < wider < widest < seen
        assert chosen[SurroundingTokens()] == wider - own
        assert chosen[SurroundingTokens(dilate=2)] == widest - own
        assert chosen[OtherTokens()] == seen - own
        assert chosen[OtherTokens(dilate=1)] == seen - wider
        assert len(chosen[RandomTokens()]) == len(own)
        assert len(chosen[RandomTokens(7)]) == 7
        assert chosen[RandomTokens(7)] < seen
        assert not chosen[RandomTokens(34, avoid=True)] & own
        assert chosen[AllTokens()] == set(inputs.positions("image")[0])
        assert sorted(chosen[LastRowTokens()]) == sorted(seen)[-6:]


def test_random_tokens_depend_on_seed_and_picture_and_not_on_the_question(toys, samples):
    model = toys["toy-llava"]

    def drawn(sample, seed=0):
        return choose_tokens(model, sample, RandomTokens(9, seed=seed))[0]

    one, other = samples[0], samples[1]
    assert drawn(one) == drawn(one)
    assert drawn(one) != drawn(one, seed=1)
    assert drawn(one) != drawn(other)
    asked = replace(one, question="what shape is the red object ?", spans={})
    assert drawn(asked) == drawn(one)


def test_registers_are_longer_than_the_rest(model, samples):
    inputs = with_picture_spans(prepared(model, samples[0]))
    seen = inputs.positions("image.seen")
    norms = visual_tokens_of(model, inputs, seen).norm(dim=-1)
    limit = norms.mean() + 1.5 * norms.std()
    chosen = choose_tokens(model, samples[0], RegisterTokens(1.5))[0]
    assert set(chosen) == {position for position, norm in zip(seen[0], norms, strict=True) if norm > limit}
    assert 0 < len(chosen) < 10


def test_the_last_row_of_tiles_is_that_of_all_together():
    model = tiny_llava(tiles=True)
    inputs = with_picture_spans(model.prepare(noise(60, 120), "USER: <image>\nwhat is it ? ASSISTANT:"))
    (grid,) = inputs.patch_grid
    row = choose_tokens(model, inputs, LastRowTokens())[0]
    labels = model.position_labels(inputs, "language_model")[0]
    newlines = inputs.spans["newline"][0]
    assert row == tuple(range(newlines[-2] + 1, newlines[-1]))
    assert all("newline" not in labels[position] for position in row)
    below = max(box[3] for box in grid.boxes if not np.isnan(box).any())
    boxes = dict(zip(grid.positions, grid.boxes, strict=True))
    assert all(boxes[position][3] == below for position in row)


def test_gradients_are_complete(model, samples):
    """They sum to what the logit changes by, from a picture all of whose tokens are its mean."""
    for sample in samples[:2]:
        case = ready(model, sample)
        inputs = with_picture_spans(case.clean)
        image = inputs.positions("image")
        mean = visual_tokens_of(model, inputs, inputs.positions("image.seen")).mean(0)
        found = integrated_gradients(model, inputs, image, case.answer, baseline=mean)
        assert found.values.shape == (len(image[0]), len(mean))
        assert found.error < 0.0004  # where gradients are taken at the steps' ends, up to 0.0023
        with torch.no_grad():
            edit = Replace(visual_site(model), mean, positions=image)
            blind = at(model.patch(inputs, [edit]), -1)
            change = float((case.clean_logits - blind)[0, case.answer])
        assert found.change == pytest.approx(change, abs=1e-3)
        most = image[0][int(found.values.abs().sum(-1).argmax())]
        assert most in inputs.positions("image.object")[0]


def test_several_numbers_of_tokens_share_their_gradients(toys, samples, monkeypatch):
    model, taken = toys["toy-llava"], []

    def noted(*arguments, **options):
        taken.append(options["steps"])
        return integrated_gradients(*arguments, **options)

    monkeypatch.setattr("hooked_vlm.experiments.parts.token_choice.integrated_gradients", noted)
    choices = [
        GradientTokens(1, steps=3),
        GradientTokens(5, steps=3),
        GradientTokens(5, steps=2),
        GradientTokens(steps=3),
    ]
    conditions = {str(place): choice for place, choice in enumerate(choices)}
    result = visual_tokens(model, samples[0], conditions, replace_by="zero", evaluate={"vqa": NextToken()})
    assert taken == [3, 2]
    for name, choice in conditions.items():
        alone = choose_tokens(model, samples[0], choice)[0]
        first = with_picture_spans(prepared(model, samples[0])).positions("image")[0][0]
        assert [place + first for place in np.flatnonzero(result.ablated.sel(condition=name)[0])] == list(alone)


def test_gradients_leave_no_trace(model, samples):
    case = ready(model, samples[0])
    inputs = with_picture_spans(case.clean)
    needed = [parameter.requires_grad for parameter in model.parameters()]
    image = inputs.positions("image")
    during: list[bool] = []

    def look(activation, hook):
        during.extend(parameter.requires_grad for parameter in model.parameters())

    with model.hooks([(visual_site(model), look)]):
        integrated_gradients(model, inputs, image, case.answer, steps=1)
    assert not any(during[len(needed) : 2 * len(needed)])  # after the forward that reads the tokens themselves
    few, many = (integrated_gradients(model, inputs, image, case.answer, steps=6, batch_size=size) for size in (4, 6))
    assert torch.allclose(few.values, many.values, atol=1e-4)
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="at least 1"):
        integrated_gradients(model, inputs, image, case.answer, steps=0)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        integrated_gradients(model, inputs, image, case.answer)


def test_a_choice_that_cannot_be_made_is_said(toys, samples):
    model = toys["toy-llava"]
    with pytest.raises(SampleError, match="no region 'objct'"):
        choose_tokens(model, samples[0], ObjectTokens("objct"))
    with pytest.raises(SampleError, match="40 tokens are to be chosen of 36"):
        choose_tokens(model, samples[0], RandomTokens(40))
    with pytest.raises(ValueError, match="at least 1 token"):
        choose_tokens(model, samples[0], RandomTokens(0))
    with pytest.raises(ValueError, match="'own mean', 'zero'"):
        choose_tokens(model, samples[0], GradientTokens(baseline="ones"))
    with pytest.raises(SpanError, match="no picture"):
        choose_tokens(model, model.prepare(None, "is there a star ?"), AllTokens())

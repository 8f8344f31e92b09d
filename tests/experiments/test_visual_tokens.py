"""Ablating visual tokens finds the planted object and nothing else; which tokens are chosen, and what is evaluated."""

import json
from dataclasses import dataclass, replace

import jaxtyping
import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM, Span
from hooked_vlm.data import SampleError, shapes
from hooked_vlm.edits import Replace, Zero, edit_hooks
from hooked_vlm.experiments.parts.cases import prepared, ready
from hooked_vlm.experiments.parts.identification import (
    EVALUATIONS,
    IT_IS_A,
    NextToken,
    Said,
    begins,
    mentions,
    object_name,
    says_yes,
)
from hooked_vlm.experiments.parts.picture_parts import with_picture_spans
from hooked_vlm.experiments.parts.token_choice import (
    AllTokens,
    GradientTokens,
    ObjectTokens,
    OtherTokens,
    RandomTokens,
    RegisterTokens,
    SurroundingTokens,
    choose_tokens,
    visual_tokens_of,
)
from hooked_vlm.experiments.parts.visual_gradients import visual_site
from hooked_vlm.experiments.visual_tokens import mean_visual_embedding, paper_conditions, visual_tokens
from hooked_vlm.metrics import at
from tests.experiments import planted_llava as planted
from tests.experiments.planted_words import planted_model, planted_sample
from tests.llava_processors import clip_model

pytestmark = pytest.mark.usefixtures("unchecked_throughout")

COLOR = ("color",)
WRITTEN = Said("{question}", mentions, max_new_tokens=1)
POLL = Said("is there a {object} ?", says_yes, max_new_tokens=3)


@dataclass(frozen=True)
class Patch:
    """One patch, by its number."""

    number: int

    def __call__(self, model, inputs, answer=None):
        image = inputs.positions("image.seen")
        return Span(image.tower, ((image[0][self.number],),))


@dataclass(frozen=True)
class Nobody:
    def __call__(self, model, inputs, answer=None):
        return Span(inputs.positions("image").tower, ((),))


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


def dropped(result) -> list[tuple[str, str]]:
    return [(id, kind) for id, kind, _ in json.loads(result.attrs["dropped"])]


# The planted circuit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replace_by", ["zero", "resample", "mean"])
def test_only_the_planted_patch_holds_the_answer(replace_by):
    conditions = {str(number): Patch(number) for number in range(planted.N_PATCHES)}
    pair = [planted_sample("red"), planted_sample("blue")]
    word = torch.nn.functional.one_hot(torch.tensor(planted.WORD), planted.D_MODEL).float()
    result = visual_tokens(
        planted_model(),
        pair,
        {**conditions, "object": ObjectTokens(), "other": OtherTokens(), "register": RegisterTokens()},
        replace_by=replace_by,
        mean=word if replace_by == "mean" else None,
        evaluate={"said": WRITTEN, "next": NextToken()},
    )
    assert (result.identified.sel(condition="nothing") == 1).all()
    holders = {str(planted.OBJECT_PATCH), "object", "register"}
    for condition in result.condition.values[1:]:
        assert (result.lost.sel(condition=condition) == (condition in holders)).all(), condition
    # A resampled object is the other picture's.
    expected = {"resample": ["blue", "red"], "zero": ["", ""], "mean": ["", ""]}[replace_by]
    for way in ("said", "next"):
        assert result.text.sel(condition="object", evaluation=way).values.tolist() == expected
    score = result.score.sel(evaluation="next", metric="probability")
    assert (score.sel(condition="nothing") > 0.95).all()
    assert (score.sel(condition="object") < 0.2).all()
    assert result.score.sel(evaluation="said").isnull().all()


def test_gradients_and_lengths_point_at_the_planted_patch():
    model = planted_model()
    for color in ("red", "blue"):
        sample = planted_sample(color)
        for choice in (GradientTokens(1), GradientTokens(), RegisterTokens(), ObjectTokens()):
            assert choose_tokens(model, sample, choice)[0] == (planted.OBJECT_POSITION,), choice


# Ablating -------------------------------------------------------------------------------------------------------------


def test_ablating_nothing_or_a_token_with_itself_changes_nothing(model, samples):
    sample = samples[0]
    inputs = with_picture_spans(prepared(model, sample))
    image = inputs.positions("image")
    own = visual_tokens_of(model, inputs, image)
    with torch.no_grad():
        plain = model(inputs)
        source = model.run_with_hooks(inputs, stop_at=visual_site(model)).clone()
        source[0, list(image[0])] = own
        same = model.patch(inputs, [Replace(visual_site(model), source, positions=image)])
        none = model.patch(inputs, [Zero(visual_site(model), positions=Span(image.tower, ((),)))])
    assert torch.equal(same, plain)
    assert torch.equal(none, plain)


@pytest.mark.parametrize("replace_by", ["mean", "zero"])
def test_without_any_token_pictures_do_not_matter(model, samples, replace_by):
    one, other = samples[0], samples[1]
    twin = replace(one, id="twin", image=other.image, regions=other.regions)
    ways = {"next": NextToken()}
    mean = mean_visual_embedding(model, samples)
    result = visual_tokens(model, [one, twin], {"all": AllTokens()}, replace_by=replace_by, mean=mean, evaluate=ways)
    score = result.score.sel(evaluation="next", metric="probability")
    assert abs(score.sel(condition="nothing").diff("sample")) > 0.5
    assert abs(score.sel(condition="all").diff("sample")) < 1e-6


def test_scores_are_those_of_a_run_by_hand(model, samples):
    result = visual_tokens(
        model,
        samples[:2],
        {"object": ObjectTokens()},
        replace_by="zero",
        evaluate={"next": NextToken(), "said": WRITTEN},
    )
    for row, sample in enumerate(samples[:2]):
        case = ready(model, sample)
        where = case.clean.positions_in(sample.regions["object"])
        edit = Zero(visual_site(model), positions=where)
        with torch.no_grad():
            logits = at(model.patch(case.clean, [edit]), -1)
        cell = result.sel(condition="object", evaluation="next").isel(sample=row)
        assert cell.score.sel(metric="probability").item() == pytest.approx(
            logits.softmax(-1)[0, case.answer].item(), abs=1e-5
        )
        assert cell.score.sel(metric="logit_difference").item() == pytest.approx(
            float(logits[0, case.answer] - logits[0, case.foil]), abs=1e-3
        )
        assert cell.text.item() == model.decode(logits.argmax(-1)[None])[0]
        with model.hooks(edit_hooks(model, case.clean, [edit])):
            said = model.generate(case.clean, max_new_tokens=1)[0]
        assert result.text.sel(condition="object", evaluation="said")[row].item() == said
        shown = result.ablated.sel(condition="object")[row].values
        image = with_picture_spans(case.clean).positions("image")[0]
        assert [image[place] for place in np.flatnonzero(shown)] == list(where[0])
        boxes = result.box[row].values[shown]
        assert np.array_equal(
            boxes, case.clean.patch_grid[0].boxes[np.isin(case.clean.patch_grid[0].positions, where[0])]
        )


def test_the_mean_is_of_the_tokens_that_see_a_picture(model, samples):
    by_hand = torch.cat(
        [
            visual_tokens_of(model, inputs, inputs.positions("image"))
            for inputs in (prepared(model, sample) for sample in samples)
        ]
    )
    mean = mean_visual_embedding(model, samples)
    assert torch.allclose(mean, by_hand.mean(0), atol=1e-5)
    spoilt = [*samples, replace(samples[0], id="gone", image="no/such/picture.png")]
    assert torch.equal(mean_visual_embedding(model, spoilt), mean)
    with pytest.raises(ValueError, match="no sample has a picture.*no/such/picture.png"):
        mean_visual_embedding(model, spoilt[-1:])


def test_tokens_that_are_written_are_not_ablated(toys, samples, monkeypatch):
    """In a generation positions count from the prompt's first: what follows is the model's own."""
    model = toys["toy-llava"]
    monkeypatch.setattr(model, "config", replace(model.config, eos_token_ids=()))  # so that it goes on
    long = Said("{question}", mentions, max_new_tokens=4)
    result = visual_tokens(model, samples[0], {"all": AllTokens()}, replace_by="zero", evaluate={"said": long})
    inputs = with_picture_spans(prepared(model, samples[0]))
    ids = inputs.input_ids
    edit = Zero(visual_site(model), positions=inputs.positions("image"))
    with torch.no_grad():
        for _ in range(4):
            token = model.patch(replace(inputs, input_ids=ids, attention_mask=torch.ones_like(ids)), [edit])[:, -1:]
            ids = torch.cat([ids, token.argmax(-1)], 1)
    assert result.text.sel(condition="all").item() == model.decode(ids[:, inputs.input_ids.shape[1] :])[0]


# Evaluating -----------------------------------------------------------------------------------------------------------


def test_objects_lie_in_their_own_tokens(model, samples):
    """Of 60 pictures with a mean in the object's place: 80 % (LLaVA) and 95 % (BLIP) no longer named, all polls lost;
    with any other patches in its stead, none."""
    conditions = {
        "object": ObjectTokens(),
        "surrounding": SurroundingTokens(),
        "other": OtherTokens(),
        "control": RandomTokens(9, avoid=True),
        "gradient": GradientTokens(steps=4),
    }
    ways = {"said": WRITTEN_NAME, "poll": POLL, "vqa": NextToken()}
    result = visual_tokens(model, samples[:4], conditions, evaluate=ways)
    assert (result.identified.sel(condition="nothing") == 1).all()
    assert result.attrs["initially_wrong"] == json.dumps(dict.fromkeys(ways, 0))
    lost = result.lost.mean("sample").sel(evaluation=["poll", "vqa"])
    for condition in ("object", "gradient"):
        assert (lost.sel(condition=condition) > 0.6).all()
    for condition in ("surrounding", "other", "control"):
        assert (lost.sel(condition=condition) == 0).all()
    assert (result.lost.sel(evaluation="said") == result.lost.sel(evaluation="vqa")).all()


WRITTEN_NAME = Said("{question}", lambda text, name: mentions(text, name.split()[0]), max_new_tokens=3)


def test_a_whole_prompt_is_asked_as_it_is(toys, samples):
    model = toys["toy-llava"]
    ways = {"vqa": NextToken(), "whole": NextToken("USER: <image>\n{question} ASSISTANT:")}
    result = visual_tokens(model, samples[:2], {"object": ObjectTokens()}, evaluate=ways)
    assert np.allclose(*(result.score.sel(evaluation=way) for way in ways))


def test_what_was_wrong_before_is_not_lost(toys, samples):
    model = toys["toy-llava"]
    wrong = replace(samples[0], id="wrong", answer="star", foil="red", meta={})
    result = visual_tokens(model, [wrong, samples[1]], {"object": ObjectTokens()}, evaluate={"vqa": NextToken()})
    assert result.identified.sel(condition="nothing").values.tolist() == [[0.0, 1.0]]
    assert result.lost.isel(sample=0).isnull().all()
    assert result.lost.isel(sample=1).notnull().all()
    assert json.loads(result.attrs["initially_wrong"]) == {"vqa": 1}


def test_a_picture_without_such_tokens_is_counted_and_not_run(toys, samples):
    result = visual_tokens(
        toys["toy-llava"],
        samples[:2],
        {"nobody": Nobody(), "object": ObjectTokens()},
        evaluate={"vqa": NextToken(), "poll": POLL},
    )
    assert result.identified.sel(condition="nobody").isnull().all()
    assert result.lost.sel(condition="nobody").isnull().all()
    assert (result.text.sel(condition="nobody") == "").all()
    assert result.identified.sel(condition="object").notnull().all()
    assert json.loads(result.attrs["without_tokens"]) == {"nobody": 2, "object": 0}
    assert result.n_tokens.sel(condition="nobody").values.tolist() == [0, 0]


def test_samples_that_lack_something_are_dropped_by_name(toys, samples):
    good, *others = samples[:5]
    no_region = replace(others[0], regions={})
    outside = replace(others[1], regions={"object": (50, 50, 97, 90)})
    no_answer = replace(others[2], answer=None)
    no_picture = replace(others[3], id="text", image=None, regions={})
    other = replace(others[3], question="zebra", spans={}, id="other")
    result = visual_tokens(
        toys["toy-llava"],
        [good, no_region, outside, no_answer, no_picture],
        {"object": ObjectTokens()},
        evaluate={"vqa": NextToken(), "poll": POLL},
        replace_by="zero",
    )
    assert result.sample.values.tolist() == [good.id]
    assert dropped(result) == [
        (no_region.id, "no tokens to choose by"),
        (outside.id, "a region that does not fit"),
        (no_answer.id, "no answer"),
        ("text", "no tokens to choose by"),
    ]
    with pytest.raises(SampleError, match="object's name|neither meta"):
        visual_tokens(
            toys["toy-llava"], replace(other, answer=None, meta={}), {"object": ObjectTokens()}, replace_by="zero"
        )


def test_what_cannot_be_done_is_said(toys, samples):
    model, conditions = toys["toy-llava"], {"object": ObjectTokens()}
    with pytest.raises(ValueError, match="'mean', 'zero' or 'resample'"):
        visual_tokens(model, samples, conditions, replace_by="noise")
    with pytest.raises(ValueError, match="another sample"):
        visual_tokens(model, samples[0], conditions, replace_by="resample", evaluate=["vqa"])
    with pytest.raises(ValueError, match="caption, poll, vqa"):
        visual_tokens(model, samples, conditions, evaluate=["captions"])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        visual_tokens(model, samples, conditions, evaluate=[])
    for bad in ({}, {"nothing": ObjectTokens()}):
        with pytest.raises(ValueError, match="none is called 'nothing'"):
            visual_tokens(model, samples, bad)
    with pytest.raises(ValueError, match="nothing reads a picture's tokens"):
        visual_site(clip_model())


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("A Dog runs.", "dog", True),
        ("two dogs", "dog", True),
        ("three glasses", "glass", True),
        ("a hotdog", "dog", False),
        ("a category", "cat", False),
        ("a tennis  racket.", "tennis racket", True),
        ("a hot dog", "h.t dog", False),
        ("", "dog", False),
        ("anything", "", False),
    ],
)
def test_a_caption_mentions_whole_words(text, name, expected):
    assert mentions(text, name) is expected


def test_yes_is_a_word():
    assert says_yes("Yes, there is.", "dog")
    assert says_yes("yes", "dog")
    assert not says_yes("No. Eyes only", "dog")
    assert not says_yes("yesterday", "dog")


def test_a_token_begins_an_answer():
    assert begins(" Tr", "truck")
    assert begins("red", "red")
    assert not begins("", "red")
    assert not begins("ed", "red")
    assert not begins("reds", "red")


def test_the_papers_own(toys, samples):
    conditions = paper_conditions()
    assert len(conditions) == 3 + 1 + 7 + 7
    assert conditions["object +2"] == ObjectTokens(dilate=2)
    prompts = {name: evaluation.prompt for name, evaluation in EVALUATIONS.items()}
    assert prompts["caption"] == "Describe this image."
    assert prompts["poll"] == "Is there a {object} in this image?"
    assert NextToken(IT_IS_A).prompt == "USER: <image>\n{question} ASSISTANT: It is a"
    assert object_name(samples[0]) == samples[0].meta["object"]
    assert object_name(replace(samples[0], meta={})) == samples[0].answer


def test_who_gives_its_tokens_depends_on_the_seed_and_not_on_the_order(toys, samples):
    model, ways = toys["toy-llava"], {"vqa": NextToken()}

    def scores(order, seed=0):
        result = visual_tokens(model, order, {"all": AllTokens()}, replace_by="resample", evaluate=ways, seed=seed)
        return result.score.sel(evaluation="vqa", condition="all").sortby("sample").values

    few = list(samples[:4])
    first = scores(few)
    assert np.allclose(first, scores(few[::-1]), atol=1e-5)
    assert any(not np.allclose(first, scores(few, seed), atol=1e-2) for seed in (1, 2))


def test_signatures_hold(toys, samples, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", False)
    for model in toys.values():
        result = visual_tokens(
            model,
            samples[:2],
            {"object": ObjectTokens(), "gradient": GradientTokens(1, steps=1), "register": RegisterTokens()},
            replace_by="resample",
            evaluate={"poll": POLL, "vqa": NextToken()},
        )
        assert result.identified.dims == ("evaluation", "sample", "condition")
        assert json.loads(result.attrs["conditions"])["object"] == "ObjectTokens(region='object', dilate=0)"

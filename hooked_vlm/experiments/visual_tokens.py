"""Where a model keeps an object: ablate visual tokens, and ask for it (Neo et al. 2025, section 4.1).

Tokens are overwritten where they enter what reads them, in LLaVA's language model (``hook_merged_embed``) or as BLIP's
image embeddings (``vision_encoder.hook_out``): by a mean embedding, by zeros, or by those of another picture.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.edits import Edit, Mean, Replace, Zero
from hooked_vlm.experiments.parts.cases import prepared
from hooked_vlm.experiments.parts.identification import (
    Evaluation,
    Judged,
    NextToken,
    evaluations,
    object_name,
)
from hooked_vlm.experiments.parts.loop import current_loop
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.token_choice import (
    GradientTokens,
    ObjectTokens,
    RandomTokens,
    RegisterTokens,
    TokenChoice,
    visual_tokens_of,
    with_picture,
)
from hooked_vlm.experiments.parts.visual_gradients import visual_site
from hooked_vlm.files import whole_file
from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.models import HookedVLM

if TYPE_CHECKING:
    import xarray as xr

Replacement = Literal["mean", "zero", "resample"]

NOTHING = "nothing"
"""The condition in which no token is ablated."""

BUDGETS = (5, 10, 20, 40, 60, 100, 250)
"""How many tokens the paper chooses at random and by gradient, of 576."""

SCORES = ("probability", "logit_difference")


def paper_conditions(budgets: Sequence[int] = BUDGETS, *, seed: int = 0) -> dict[str, TokenChoice]:
    """The paper's: the object, with one and two patches around it, registers, and others at some budgets."""
    return {
        **{f"object +{by}" if by else "object": ObjectTokens(dilate=by) for by in (0, 1, 2)},
        "register": RegisterTokens(),
        **{f"random {n}": RandomTokens(n, seed=seed) for n in budgets},
        **{f"gradient {n}": GradientTokens(n) for n in budgets},
    }


def visual_tokens(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    conditions: Mapping[str, TokenChoice] | None = None,
    *,
    replace_by: Replacement = "mean",
    mean: Float[Tensor, " d_model"] | None = None,
    evaluate: Mapping[str, Evaluation] | Sequence[str] = ("caption", "poll", "vqa"),
    named: Callable[[Sample], str] = object_name,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Overwrite some visual tokens of each picture, and see whether the model still says what is there.

    Tokens are chosen once a sample, where the first :class:`NextToken` evaluation asks, or else at its own question,
    and ablated in every evaluation, in the prompt alone: tokens that are generated are as the model makes them.

    Args:
        conditions: which tokens, by name; by default :func:`paper_conditions`.
        replace_by: ``"mean"``; ``"zero"``; or ``"resample"``, the tokens of another sample's picture in the same
            places.
        mean: an embedding, by default :func:`mean_visual_embedding` of the samples.
        evaluate: names of :data:`~hooked_vlm.experiments.parts.identification.EVALUATIONS`, or evaluations of your own
            by name.
        named: what the object is called.
        seed: of which other sample gives its tokens.

    Returns:
        Over ``(evaluation, sample, condition)``, the first condition being ``nothing``: ``identified``, 1 where the
        object is; ``lost``, 1 where it is no longer, of those identified without ablation, NaN of the others (counted
        in ``initially_wrong``); ``text``, what was said. NaN where a picture has no tokens of a condition (counted in
        ``without_tokens``). ``score`` over ``(metric, evaluation, sample, condition)``: ``probability`` and
        ``logit_difference`` of the answer's first token, of evaluations that measure them; ``noise_floor`` over
        ``metric``. ``ablated`` over ``(sample, condition, token)``, ``n_tokens`` its sum; ``box`` is the part of the
        picture that a token sees.

    Raises:
        SampleError: a single sample that cannot be used; of several, such are dropped and counted.
        ValueError: no conditions; unknown evaluations or replacement; nobody to take tokens from.
    """
    asking = evaluations(evaluate)
    chosen = paper_conditions() if conditions is None else dict(conditions)
    if not chosen or NOTHING in chosen:
        raise ValueError(f"conditions are choices of tokens by name, and none is called {NOTHING!r}: {list(chosen)}")
    filling = _filling(model, samples, replace_by, mean, seed)

    def one(sample: Sample) -> xr.Dataset:
        name = named(sample)
        inputs, ablated = _chosen(model, sample, name, chosen, asking)
        edit = filling(sample)
        kept = [condition for condition in range(len(ablated)) if condition == 0 or ablated[condition].any()]

        def edits_of(asked: VLMInputs) -> list[list[Edit]]:
            image = with_picture(asked).positions("image")
            if len(image[0]) != ablated.shape[1]:
                raise SampleError(
                    f"{sample.id}: its prompts have {len(image[0])} and {ablated.shape[1]} visual tokens",
                    "prompts with different pictures",
                )
            places = np.array(image[0])
            spans = [Span(image.tower, (tuple(places[ablated[one]].tolist()),)) for one in kept]
            return [[edit(asked, image, span)] if span[0] else [] for span in spans]

        judged = {way: asked.judge(model, sample, name, edits_of) for way, asked in asking.items()}
        return _result(sample, [NOTHING, *chosen], inputs, ablated, kept, judged)

    settings = {
        "replace_by": replace_by,
        **({"mean": "of the samples" if mean is None else "given"} if replace_by == "mean" else {}),
        "conditions": {name: repr(choice) for name, choice in chosen.items()},
        "prompts": {name: evaluation.prompt for name, evaluation in asking.items()},
        "seed": seed,
    }
    return _count(over_samples(model, samples, "visual_tokens", one, progress=progress, **settings))


@torch.no_grad()
def mean_visual_embedding(
    model: HookedVLM, samples: Sample | Sequence[Sample], *, progress: bool = False
) -> Float[Tensor, " d_model"]:
    """The mean over pictures of the tokens that see a part of one, where they enter what reads them.

    Samples whose picture cannot be used are left out.

    Raises:
        ValueError: none of the samples can be used.
    """
    from hooked_vlm.progress import track

    total, n_tokens, reasons = None, 0, []
    for sample in track(_listed(samples), "mean embedding", shown=progress):
        try:
            inputs = with_picture(prepared(model, sample).to(model.device))
            tokens = visual_tokens_of(model, inputs, inputs.positions("image.seen")).double()
        except (SampleError, SpanError) as error:
            reasons.append(str(error))
            continue
        total, n_tokens = tokens.sum(0) + (0 if total is None else total), n_tokens + len(tokens)
    if total is None:
        raise ValueError(f"no sample has a picture to take a mean of; the first: {(reasons or ['there are none'])[0]}")
    return (total / n_tokens).to(model.dtype)


_Fill = Callable[[VLMInputs, Span, Span], Edit]
"""The edit of inputs, all of whose visual tokens are the first span, at the second."""


def _filling(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    replace_by: str,
    mean: Float[Tensor, " d_model"] | None,
    seed: int,
) -> Callable[[Sample], _Fill]:
    """What takes the place of a sample's tokens."""
    site = visual_site(model)
    if replace_by == "zero":
        return lambda sample: lambda inputs, image, span: Zero(site, positions=span)
    if replace_by == "mean":
        if mean is None:
            mean = current_loop().once("mean", lambda: mean_visual_embedding(model, samples), _save, _load)
        vector = mean.to(model.device)
        return lambda sample: lambda inputs, image, span: Mean(site, vector, positions=span)
    if replace_by != "resample":
        raise ValueError(f"tokens are replaced by 'mean', 'zero' or 'resample', not {replace_by!r}")
    listed = _listed(samples)
    if len(listed) < 2:
        raise ValueError("to resample takes another sample, whose picture gives its tokens")
    return lambda sample: _from_another(model, site, listed, sample, seed)


def _save(mean: Float[Tensor, " d_model"], path: Path) -> None:
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        save_file({"mean": mean.contiguous()}, temporary)


def _load(path: Path) -> Float[Tensor, " d_model"]:
    from safetensors.torch import load_file

    return load_file(path)["mean"]


def _from_another(model: HookedVLM, site: str, samples: Sequence[Sample], sample: Sample, seed: int) -> _Fill:
    # By their names, so that who gives does not depend on the order.
    others = [other for other in samples if other.id != sample.id]
    other = min(others, key=lambda one: zlib.crc32(f"{seed} {sample.id} {one.id}".encode()))
    donor = with_picture(prepared(model, other).to(model.device))
    given = visual_tokens_of(model, donor, donor.positions("image"))

    def fill(inputs: VLMInputs, image: Span, span: Span) -> Edit:
        if len(image[0]) != len(given):
            raise SampleError(
                f"{sample.id} has {len(image[0])} visual tokens, and {other.id}, whose it gets, {len(given)}",
                "a donor with other tokens",
            )
        length = 1 + max(image[0])
        if image.tower == inputs.text_tower:
            assert inputs.input_ids is not None
            length = inputs.input_ids.shape[1]
        source = given.new_zeros(1, length, given.shape[-1])
        source[0, list(image[0])] = given
        return Replace(site, source, positions=span)

    return fill


def _chosen(
    model: HookedVLM,
    sample: Sample,
    name: str,
    conditions: Mapping[str, TokenChoice],
    asking: Mapping[str, Evaluation],
) -> tuple[VLMInputs, np.ndarray]:
    """The inputs that tokens are chosen in, and which of their visual tokens each condition means, nothing first."""
    answer, asked = None, next((one for one in asking.values() if isinstance(one, NextToken)), None)
    if asked is None:
        inputs = prepared(model, sample).to(model.device)
    else:
        case = asked.case(model, sample, name)
        inputs, answer = case.clean, case.answer
    try:
        inputs = with_picture(inputs)
        image = inputs.positions("image")[0]
        spans = _spans(model, inputs, answer, conditions.values())
    except SpanError as error:
        raise SampleError(f"{sample.id}: {error}", "no tokens to choose by") from error
    return inputs, np.stack([np.zeros(len(image), dtype=bool), *(np.isin(image, span[0]) for span in spans)])


def _spans(
    model: HookedVLM, inputs: VLMInputs, answer: Int[Tensor, "1"] | None, choices: Iterable[TokenChoice]
) -> list[Span]:
    """What each choice means; gradients are taken once for all that differ in their number alone."""
    rankings: dict[Hashable, list[int]] = {}
    spans = []
    for choice in choices:
        if not isinstance(choice, GradientTokens):
            spans.append(choice(model, inputs, answer))
            continue
        if choice.way not in rankings:
            rankings[choice.way] = choice.ranking(model, inputs, answer)
        spans.append(choice.most(inputs, rankings[choice.way]))
    return spans


def _result(
    sample: Sample,
    conditions: Sequence[str],
    inputs: VLMInputs,
    ablated: np.ndarray,
    kept: Sequence[int],
    judged: Mapping[str, Judged],
) -> xr.Dataset:
    import xarray as xr

    identified = np.full((len(judged), 1, len(conditions)), np.nan)
    texts = np.full(identified.shape, "", dtype=object)
    scores = np.full((len(SCORES), *identified.shape), np.nan)
    floors = np.zeros(len(SCORES))
    for place, one in enumerate(judged.values()):
        identified[place, 0, kept] = np.array(one.is_right, float)
        texts[place, 0, kept] = one.texts
        if one.scores is not None and one.noise_floor is not None:
            scores[:, place, 0, kept] = one.scores.double().cpu().numpy().T
            floors = np.maximum(floors, one.noise_floor.double().cpu().numpy())
    dims = ("evaluation", "sample", "condition")
    result = xr.Dataset(
        {
            "identified": (dims, identified),
            "lost": (dims, np.where(identified[..., :1] == 1, 1 - identified, np.nan)),
            "text": (dims, texts.astype(str)),
            "score": (("metric", *dims), scores),
            "noise_floor": ("metric", floors),
            "ablated": (("sample", "condition", "token"), ablated[None]),
            "n_tokens": (("sample", "condition"), ablated.sum(1)[None]),
        },
        coords={
            "evaluation": list(judged),
            "condition": list(conditions),
            "metric": list(SCORES),
            "token": np.arange(ablated.shape[1]),
            "side": ["left", "top", "right", "bottom"],
            "box": (("sample", "token", "side"), _boxes(inputs)[None]),
        },
    )
    return result


def _boxes(inputs: VLMInputs) -> Float[np.ndarray, "n 4"]:
    """What each visual token sees of the picture; NaN where that is nothing."""
    image = inputs.positions("image")[0]
    boxes = np.full((len(image), 4), np.nan)
    index = {position: place for place, position in enumerate(image)}
    for grid in inputs.patch_grid:
        boxes[[index[position] for position in grid.positions]] = grid.boxes
    return boxes


def _count(result: xr.Dataset) -> xr.Dataset:
    wrong = (result.identified.sel(condition=NOTHING) == 0).sum("sample")
    without = (result.n_tokens == 0).sum("sample")
    return result.assign_attrs(
        initially_wrong=json.dumps(
            {str(name.item()): int(count) for name, count in zip(wrong.evaluation, wrong, strict=True)}
        ),
        without_tokens=json.dumps(
            {
                str(name.item()): int(count)
                for name, count in zip(without.condition, without, strict=True)
                if str(name.item()) != NOTHING
            }
        ),
    )


def _listed(samples: Sample | Sequence[Sample]) -> list[Sample]:
    return [samples] if isinstance(samples, Sample) else list(samples)

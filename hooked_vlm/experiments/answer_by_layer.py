"""How likely each layer's stream makes the answer, read as if it were the last (Zhang et al. 2025, section 4.3).

A logit lens (nostalgebraist 2020) for one position and the words that matter: the answer, as it may be written, and the
foil.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.experiments.parts.cases import QUESTION, first_tokens, prepared
from hooked_vlm.experiments.parts.cells import n_layers
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.sites import site_name
from hooked_vlm.inputs import SpanError, VLMInputs
from hooked_vlm.models import HookedVLM
from hooked_vlm.models.bert import Bert

if TYPE_CHECKING:
    import xarray as xr

FORMS = ("given", "small", "capitalised")
"""How an answer may be written."""


@torch.no_grad()
def answer_by_layer(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    *,
    norm: bool = True,
    position: str = "last",
    prompt: str = QUESTION,
    progress: bool = False,
) -> xr.Dataset:
    """The probability of answer and foil at each layer of the tower that answers.

    Args:
        norm: pass each stream through the tower's last normalisation, as the last one is. The paper does not, and so
            compares streams of very different lengths: ``norm=False``. BLIP's head normalises in any case.
        position: a span of that tower, whose last position is read; by default where the answer begins.
        prompt: what is asked, around the question.

    Returns:
        ``probability`` over ``(target, form, sample, layer)``, ``target`` being ``answer`` or ``foil``, ``form`` how it
        is written. Layer 0 is what the first block reads, layer l what block l - 1 leaves; the last is the model's own
        output. ``token`` says what is scored: a form's first token, with or without a space, whichever the model finds
        likelier in the end. NaN where a sample has no foil, or the tokenizer not that word.

    Raises:
        SampleError: a single sample without an answer, or with one that the tokenizer does not know; of several, such
            are dropped and counted.
        ValueError: a position of another tower; ``norm=False`` in a tower that normalises in every layer.
    """
    tower: Any = model.get_submodule(model.towers[-1])
    if isinstance(tower, Bert) and not norm:
        raise ValueError(f"{model.towers[-1]} normalises its stream in every layer: there is no last one to leave out")

    def one(sample: Sample) -> xr.Dataset:
        if sample.answer is None:
            raise SampleError(f"{sample.id} has no answer", "no answer")
        inputs = prepared(model, sample, prompt=prompt).to(model.device)
        try:
            inputs.positions(position)
        except SpanError as error:
            raise SampleError(f"{sample.id}: {error}", "a position without tokens") from error
        probabilities = layer_logits(model, inputs, position=position, norm=norm)[:, 0].float().softmax(-1)
        return _result(model, sample, probabilities)

    settings = {"norm": norm, "position": position, "prompt": prompt}
    return over_samples(model, samples, "answer_by_layer", one, progress=progress, **settings)


def layer_logits(
    model: HookedVLM, inputs: VLMInputs, *, position: str = "last", norm: bool = True
) -> Float[Tensor, "layer b d_vocab"]:
    """Logits that the last tower's head makes of each layer's stream, at one position of each row.

    The last is the model's own output.

    Raises:
        ValueError: a position of another tower.
    """
    tower = model.towers[-1]
    span = inputs.positions(position)
    if span.tower != tower or not all(span.rows):
        raise ValueError(f"{position!r} is in {span.tower}; the answer is read in {tower}")
    earlier = [site_name(model, tower, "resid", layer) for layer in range(n_layers(model, tower) - 1)]
    names = [f"{tower}.blocks.0.hook_resid_pre", *earlier]
    logits, cache = model.run_with_cache(inputs, names_filter=names)
    places = torch.tensor([row[-1] for row in span.rows], device=model.device)
    rows = torch.arange(len(places), device=model.device)
    read = [_head(model, cache[name].to(model.device)[rows, places], norm) for name in names]
    return torch.stack([*read, logits[rows, places].to(read[0])])


def _head(model: HookedVLM, stream: Float[Tensor, "b d_model"], norm: bool) -> Float[Tensor, "b d_vocab"]:
    """The tower's head, past its hooks: those of a user should see the model's own run alone."""
    tower: Any = model.get_submodule(model.towers[-1])
    if isinstance(tower, Bert):
        head = tower.unembed
        return head.decoder(tower.ln_final.normalize(head.act(head.dense(stream))))
    return tower.unembed(tower.ln_final.normalize(stream) if norm else stream)


def _result(model: HookedVLM, sample: Sample, probabilities: Float[Tensor, "layer d_vocab"]) -> xr.Dataset:
    import xarray as xr

    targets = {"answer": sample.answer, "foil": sample.foil}
    found = np.full((len(targets), len(FORMS), 1, len(probabilities)), np.nan)
    tokens = np.full(found.shape[:3], "", dtype="<U64")
    for place, text in enumerate(targets.values()):
        ids = _first_tokens(model, sample, text)
        for column, form in enumerate(FORMS):
            known = [ids[name] for name in (form, f"{form} ") if name in ids]
            if known:
                token = max(known, key=lambda one: float(probabilities[-1, one]))
                found[place, column, 0] = probabilities[:, token].double().cpu()
                tokens[place, column, 0] = model.token_strings(torch.tensor([token]))[0]
    return xr.Dataset(
        {"probability": (("target", "form", "sample", "layer"), found)},
        coords={
            "target": list(targets),
            "form": list(FORMS),
            "sample": [sample.id],
            "layer": np.arange(len(probabilities)),
            "token": (("target", "form", "sample"), tokens),
        },
    )


def _first_tokens(model: HookedVLM, sample: Sample, text: str | None) -> dict[str, int]:
    try:
        return {} if text is None else first_tokens(model, text)
    except SampleError as error:
        raise SampleError(f"{sample.id}: {error}", error.kind) from None

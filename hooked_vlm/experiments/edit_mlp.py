"""A fact written into an MLP's weights, in closed form (Basu et al. 2024, section 6: MultEdit).

The MLP's output projection is taken for a memory: what it reads at the constraint's last token is the key, what it
should write there the value. The new weight is the ridge regression from keys to values, drawn to the old weight:
``W = argmin ||K W^T - V||^2 + ridge ||W - W_old||^2``.

Axes: n keys, or rows of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.components.weights import is_int8
from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.edits import Add
from hooked_vlm.experiments.constraint_trace import PROMPT
from hooked_vlm.experiments.parts.cases import first_tokens, ready
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.metrics import at
from hooked_vlm.models import HookedVLM
from hooked_vlm.placement import Offloaded

if TYPE_CHECKING:
    import xarray as xr

TOWER = "language_model"

LAYER = 2
"""The paper's, of LLaVA-1.5-7B."""


def edit_mlp(
    model: HookedVLM,
    layer: int,
    key: Float[Tensor, "*n d_mlp"],
    value: Float[Tensor, "*n d_model"],
    *,
    ridge: float = 0.01,
    tower: str = TOWER,
) -> Float[Tensor, "d_model d_mlp"]:
    """The output projection's new weight, with which an MLP answers ``key`` by ``value``; the model stays as it is.

    ``W_new^T = (K^T K + ridge)^-1 (K^T (V - b_out) + ridge W_old^T)``, computed in the equal form ``W_old^T + K^T (K
    K^T + ridge)^-1 (V - b_out - K W_old^T)``, in double precision: a system as large as there are keys, not as the MLP
    is wide. Towards a ridge of 0 the keys are answered exactly, and what is orthogonal to all of them as before;
    towards infinity nothing changes.

    Args:
        key: what the projection reads (``mlp.hook_post``), one or several: :func:`key_of`.
        value: what the MLP should write (``hook_mlp_out``), its bias included: :func:`find_value`.
        ridge: how strongly the weight is held where it is.

    Raises:
        ValueError: a tower without such a layer; keys and values that do not fit it, or each other; keys that depend
            on each other, without a ridge; a weight in 8 bits, or that is kept elsewhere than on its device.
    """
    projection = _projection(model, tower, layer)
    weight = projection.weight
    if not 0 <= ridge < math.inf:
        raise ValueError(f"a ridge is 0 or more, and finite, not {ridge}")
    keys, values = (one.detach().to(weight.device).double().reshape(-1, one.shape[-1]) for one in (key, value))
    if (keys.shape[1], values.shape[1]) != (weight.shape[1], weight.shape[0]) or len(keys) != len(values):
        raise ValueError(
            f"keys {tuple(key.shape)} and values {tuple(value.shape)} for the MLP of {tower}'s layer {layer}: give "
            f"[n {weight.shape[1]}] and [n {weight.shape[0]}]"
        )
    if not bool(keys.isfinite().all() & values.isfinite().all()):
        raise ValueError("keys or values hold numbers that are NaN or infinite")
    old = weight.detach().double()
    bias = 0.0 if projection.bias is None else projection.bias.detach().double()
    missing = values - bias - keys @ old.T
    gram = keys @ keys.T + ridge * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
    if torch.linalg.matrix_rank(gram, hermitian=True) < len(keys):
        raise ValueError("these keys are 0 or depend on each other, so no weight answers each of them; give a ridge")
    return (old + (keys.T @ torch.linalg.solve(gram, missing)).T).to(weight.dtype)


@contextmanager
def edited_mlp(
    model: HookedVLM, layer: int, weight: Float[Tensor, "d_model d_mlp"], *, tower: str = TOWER
) -> Iterator[HookedVLM]:
    """The model with another output projection of one MLP, for the length of a ``with`` block.

    Afterwards, after an exception too, the old weight is there again, bit for bit.

    Raises:
        ValueError: a tower without such a layer; a weight of another shape; a weight that cannot be exchanged.
    """
    projection = _projection(model, tower, layer)
    parameter = projection.weight
    if weight.shape != parameter.shape:
        raise ValueError(
            f"the weight is {tuple(weight.shape)}, and that of {tower}'s layer {layer} {tuple(parameter.shape)}"
        )
    old = parameter.data
    parameter.data = weight.detach().to(old)
    try:
        yield model
    finally:
        parameter.data = old


@torch.no_grad()
def key_of(
    model: HookedVLM, inputs: VLMInputs, layer: int, position: int | str | Span, *, tower: str = TOWER
) -> Float[Tensor, "b d_mlp"]:
    """What an MLP's output projection reads at one position of each row.

    Args:
        position: of a span, its last position is meant.

    Raises:
        ValueError: a tower without such a layer; a position that it does not have.
    """
    _projection(model, tower, layer)
    name = f"{tower}.blocks.{layer}.mlp.hook_post"
    activation = model.run_with_cache(inputs, names_filter=name)[1][name]
    places = _places(inputs, position, activation.shape[1])
    return activation[torch.arange(len(places)), places]


def find_value(
    model: HookedVLM,
    inputs: VLMInputs,
    answer: str | Int[Tensor, " b"],
    layer: int,
    position: int | str | Span,
    *,
    steps: int = 10,
    lr: float = 0.1,
    weight: float = 0.001,
    clamp: float = 1e-4,
    tower: str = TOWER,
) -> Float[Tensor, "b d_model"]:
    """What an MLP should write at a position for the model to answer otherwise.

    Adam adds to what it writes, to lower ``-log p(answer) + weight ||change|| / ||old||^2``; after each step the
    change is shortened to ``clamp ||old||``, where it is longer. The divisor is squared and the change's norm is not,
    as in the paper's code.

    Args:
        answer: text, of which the first token is meant, in the form that the model finds likeliest; or a token of each
            row.
        position: one position of each row; of a span, its last.
        clamp: the paper's code has 1e-4, which hardly moves the value: look whether the edit does anything, and give
            more (ROME's is about 4).

    Returns:
        The old output with the change, ``hook_mlp_out`` at that position, its bias included.

    Raises:
        ValueError: a tower without such a layer; fewer than one step; a position that it does not have, or at which the
            MLP writes nothing.
    """
    if steps < 1 or lr <= 0 or clamp <= 0:
        raise ValueError(f"a value takes steps, a rate and a clamp above 0, not {steps}, {lr} and {clamp}")
    _projection(model, tower, layer)
    site = f"{tower}.blocks.{layer}.hook_mlp_out"
    with torch.no_grad():
        activation = model.run_with_cache(inputs, names_filter=site)[1][site]
    places = _places(inputs, position, activation.shape[1])
    old = activation[torch.arange(len(places)), places].float()
    if not bool(old.any(-1).all()):
        row = old.any(-1).tolist().index(False)
        raise ValueError(
            f"the MLP of {tower}'s layer {layer} writes nothing in row {row}, and a change is by its length"
        )
    target = _tokens_of(model, inputs, answer).to(old.device)
    where = torch.arange(activation.shape[1]) == places[:, None]
    longest = clamp * old.norm(dim=-1, keepdim=True)
    change = torch.zeros_like(old, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=lr)
    for _ in range(steps):
        with torch.enable_grad():
            logits = at(model.patch(inputs, [Add(site, change[:, None], positions=where)]), -1)
            lost = -logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
            # Rows do not depend on each other, so that each is optimised as if alone.
            loss = (lost + weight * change.norm(dim=-1) / old.norm(dim=-1) ** 2).sum()
            (change.grad,) = torch.autograd.grad(loss, change)
        optimizer.step()
        with torch.no_grad():
            change *= (longest / change.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
    return (old + change).detach()


@dataclass(frozen=True, eq=False)
class MultEdit:
    """A fact written into one MLP: ``with edit.applied(model): ...``."""

    tower: str
    layer: int
    position: int
    """Of the key: the last token of the constraint."""
    weight: Float[Tensor, "d_model d_mlp"]
    """The output projection's new weight."""
    key: Float[Tensor, " d_mlp"]
    value: Float[Tensor, " d_model"]
    target: str
    """The token that the model is to answer."""
    before: float
    """Its probability before the edit."""
    after: float
    """Its probability after it."""
    answers: bool
    """Whether it is the likeliest after the edit."""

    def applied(self, model: HookedVLM) -> AbstractContextManager[HookedVLM]:
        """The model with this edit, as :func:`edited_mlp`."""
        return edited_mlp(model, self.layer, self.weight, tower=self.tower)


@torch.no_grad()
def multedit(
    model: HookedVLM,
    sample: Sample,
    target: str,
    layer: int = LAYER,
    span: str = "constraint",
    *,
    ridge: float = 0.01,
    steps: int = 10,
    lr: float = 0.1,
    weight: float = 0.001,
    clamp: float = 1e-4,
    tower: str = TOWER,
    prompt: str = PROMPT,
) -> MultEdit:
    """Find the weight with which the model answers a sample by ``target``; the model stays as it is.

    Args:
        target: the answer wanted; its first token is meant.
        layer: of the MLP that is edited.
        span: of the sample, or another by name or text; the key is what the MLP reads at its last token.
        ridge: as of :func:`edit_mlp`; the others as of :func:`find_value`.

    Raises:
        SampleError: a sample without the span, or that the model cannot take.
        ValueError: as of :func:`edit_mlp` and :func:`find_value`.
    """
    inputs = ready(model, replace(sample, foil=None), prompt=prompt, scored="own").clean
    try:
        position = inputs.positions(span)[0][-1]
    except SpanError as error:
        raise SampleError(f"{sample.id}: {error}", f"no span {span!r}") from error
    token = _tokens_of(model, inputs, target)
    key = key_of(model, inputs, layer, span, tower=tower)
    value = find_value(model, inputs, token, layer, span, steps=steps, lr=lr, weight=weight, clamp=clamp, tower=tower)
    new = edit_mlp(model, layer, key, value, ridge=ridge, tower=tower)
    before = at(model(inputs), -1)[0].softmax(-1)
    with edited_mlp(model, layer, new, tower=tower):
        after = at(model(inputs), -1)[0].softmax(-1)
    return MultEdit(
        *(tower, layer, position, new, key[0], value[0], model.token_strings(token)[0]),
        *(float(before[token]), float(after[token]), int(after.argmax()) == int(token)),
    )


@torch.no_grad()
def edit_side_effects(
    model: HookedVLM,
    samples: Sample | Sequence[Sample],
    edit: MultEdit,
    *,
    prompt: str = PROMPT,
    progress: bool = False,
) -> xr.Dataset:
    """What an edit does to the answers of other samples.

    Returns:
        Over ``sample``: ``before`` and ``after``, the likeliest first token without and with the edit; ``kept``,
        whether they are the same; ``probability_before`` and ``probability_after`` of the token that was likeliest
        before; ``key_overlap``, the cosine of the edit's key with the nearest of what the sample's MLP reads. The mean
        of ``kept`` is the share that the edit leaves alone.

    Raises:
        ValueError: no samples, or none that can be used.
    """
    import xarray as xr

    site = f"{edit.tower}.blocks.{edit.layer}.mlp.hook_post"

    def one(sample: Sample) -> xr.Dataset:
        inputs = ready(model, replace(sample, foil=None), prompt=prompt, scored="own").clean
        logits, cache = model.run_with_cache(inputs, names_filter=site)
        with edit.applied(model):
            edited = at(model(inputs), -1)[0].softmax(-1)
        first = at(logits, -1)[0].softmax(-1)
        overlap = torch.cosine_similarity(cache[site][0].float(), edit.key.float(), dim=-1).abs().max()
        answers = [model.token_strings(one.argmax(-1, keepdim=True))[0] for one in (first, edited)]
        found = {
            "before": np.array(answers[:1]),
            "after": np.array(answers[1:]),
            "kept": np.array([int(first.argmax()) == int(edited.argmax())]),
            "probability_before": np.array([float(first.max())]),
            "probability_after": np.array([float(edited[first.argmax()])]),
            "key_overlap": np.array([float(overlap)]),
        }
        return xr.Dataset({name: ("sample", values) for name, values in found.items()})

    facts = {"edited": f"{edit.tower}.blocks.{edit.layer}.mlp", "target": edit.target, "prompt": prompt}
    return over_samples(model, samples, "edit_side_effects", one, progress=progress, **facts)


def _projection(model: HookedVLM, tower: str, layer: int) -> nn.Linear:
    """An MLP's output projection, whose weight can be exchanged."""
    model._check_tower(tower)
    blocks = getattr(model.get_submodule(tower), "blocks", ())
    if layer not in range(len(blocks)):
        raise ValueError(f"{tower} has {len(blocks)} layers; there is no layer {layer}")
    projection: nn.Linear = blocks[layer].mlp.down
    if is_int8(projection.weight) or isinstance(projection.weight, Offloaded):
        how = "in 8 bits" if is_int8(projection.weight) else "elsewhere than on its device"
        raise ValueError(f"the weight of {tower}'s layer {layer} is kept {how}, and cannot be edited; load it whole")
    return projection


def _places(inputs: VLMInputs, position: int | str | Span, n_positions: int) -> Int[Tensor, " b"]:
    """One position of each row."""
    if isinstance(position, int):
        rows = [position] * len(inputs)
    else:
        span = inputs.positions(position) if isinstance(position, str) else position
        rows = [row[-1] if row else n_positions for row in span.rows]
    if len(rows) != len(inputs) or not all(-n_positions <= row < n_positions for row in rows):
        raise ValueError(f"{position!r} is no position of each of {len(inputs)} rows of {n_positions}")
    return torch.tensor(rows) % n_positions


def _tokens_of(model: HookedVLM, inputs: VLMInputs, answer: str | Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The token that each row is to answer."""
    if isinstance(answer, str):
        forms = torch.tensor([*first_tokens(model, answer).values()], device=model.device)
        with torch.no_grad():
            return forms[at(model(inputs), -1)[:, forms].argmax(-1)]
    if answer.shape != (len(inputs),) or not bool(((answer >= 0) & (answer < model.config.d_vocab)).all()):
        raise ValueError(f"an answer is one of {model.config.d_vocab} tokens for each of {len(inputs)} rows")
    return answer.to(model.device)

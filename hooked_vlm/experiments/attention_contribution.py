"""What attention carries from some tokens to one: the norm of what it writes there (Basu et al. 2024, section 5).

Source position i contributes to target position j of a layer the vector ``sum_h A[h, j, i] (x_i W_V[h] + b_V[h])
W_O[h]``. Its norm is the contribution; over all sources the vectors, with ``b_O``, are what attention adds at j. Where
a question's constraint contributes little to the answer's position, the answer is wrong more often.

Axes: h head, kv head of keys and values, q query (target), k key (source).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import einsum, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.components import Attention
from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.experiments.constraint_trace import PROMPT
from hooked_vlm.experiments.parts.cases import first_tokens, prepared
from hooked_vlm.experiments.parts.cells import n_layers
from hooked_vlm.experiments.parts.over_samples import over_samples
from hooked_vlm.experiments.parts.roles import with_roles
from hooked_vlm.hook_point import HookPoint
from hooked_vlm.inputs import Span, SpanError, VLMInputs
from hooked_vlm.metrics import at
from hooked_vlm.models import HookedVLM
from hooked_vlm.results import provenance
from hooked_vlm.selection import positions_of
from hooked_vlm.statistics import auroc_interval

if TYPE_CHECKING:
    import xarray as xr


def attention_contribution(
    model: HookedVLM,
    samples: VLMInputs | Sample | Sequence[Sample],
    source: str = "constraint",
    target: str = "last",
    *,
    prompt: str = PROMPT,
    progress: bool = False,
) -> xr.Dataset:
    """How much each source position's value adds to the target, in each layer and by each head.

    Args:
        samples: samples, or inputs of any number of rows.
        source, target: spans by name, text or expression. In one tower they are read in its self-attention; in two, in
            the target's cross-attention (BLIP: ``"image"`` to ``"question"``, ``"question"`` to ``"last"``).
        prompt: of samples: what is asked, around the question.

    Returns:
        ``contribution`` over ``(sample, tower, layer, position)``, positions being all of the source's tower, and
        ``head_contribution`` with ``head``, of each head alone; of several target positions, their sum. ``from_source``
        and ``head_from_source``: their sums over the source's positions, which ``is_source`` marks; ``is_image`` marks
        those of a picture. The coordinate ``reader`` names the attention. ``confidence`` is
        the probability of the likeliest first token. Of samples, ``right`` says whether that is the sample's answer (1
        or 0; NaN without an answer), and ``role`` what a position is to the question.

    Raises:
        SpanError: a span that inputs do not have.
        SampleError: a single sample without it; of several, such are dropped.
        ValueError: a tower that does not read the other; a model that predicts no tokens.
    """
    if isinstance(samples, VLMInputs):
        found, _ = _contributions(model, samples, source, target)
        facts = {"source": source, "target": target, "samples_used": len(samples)}
        return found.assign_attrs(provenance(model, "attention_contribution", **facts))

    def one(sample: Sample) -> xr.Dataset:
        inputs = prepared(model, sample, prompt=prompt)
        try:
            found, logits = _contributions(model, inputs, source, target)
        except SpanError as error:
            raise SampleError(f"{sample.id}: {error}", f"no span {source!r} or {target!r}") from error
        right = np.nan
        if sample.answer is not None:
            right = float(int(logits.argmax(-1)) in first_tokens(model, sample.answer).values())
        return with_roles(model, inputs, found.assign(right=("sample", [right])), "template")

    asked = {"source": source, "target": target, "prompt": prompt}
    return over_samples(model, samples, "attention_contribution", one, progress=progress, **asked)


def contributions(
    attention: Attention, pattern: Float[Tensor, "h q k"], v: Float[Tensor, "k kv d_head"]
) -> tuple[Float[Tensor, "q k d_model"], Float[Tensor, "h q k"]]:
    """What each source position writes to each target position, and the norms of what each head writes of it.

    Args:
        pattern: of one row, at the target positions.
        v: of the same row, as ``hook_v`` shows it.
    """
    pattern, v, weights = (tensor.to(pattern.device).float() for tensor in (pattern, v, attention.W_O))
    values = repeat(v, "k kv d_head -> (kv group) k d_head", group=attention.n_heads // attention.n_kv_heads)
    written = pattern.new_zeros(*pattern.shape[1:], weights.shape[-1])
    norms = torch.empty_like(pattern)
    for head in range(attention.n_heads):
        own = einsum(pattern[head], values[head] @ weights[head], "q k, k d_model -> q k d_model")
        written += own
        norms[head] = own.norm(dim=-1)
    return written, norms


def predict_correctness(result: xr.Dataset, *, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> xr.Dataset:
    """How well the constraint's contribution, and the model's confidence, say which answers are right.

    Args:
        result: of :func:`attention_contribution`, of samples.
        level, resamples, seed: of the intervals: percentiles over samples drawn anew with replacement.

    Returns:
        ``auroc``, ``low`` and ``high`` over ``predictor``: ``"confidence"``, ``"contribution"`` (summed over layers),
        and ``"layer 0"`` onwards; ``n_right`` and ``n_wrong``. An AUROC is NaN where all answers are right, or none.

    Raises:
        ValueError: a result without right or wrong answers.
    """
    import xarray as xr

    if "right" not in result:
        raise ValueError("whether answers are right is not known: make the result of samples that have answers")
    known = result.isel(sample=np.flatnonzero(result.right.notnull()))
    if not known.sizes["sample"]:
        raise ValueError("no sample of this result has an answer")
    right = known.right.values == 1
    scores = {"confidence": known.confidence.values, "contribution": known.from_source.sum("layer").values}
    scores |= {f"layer {layer}": known.from_source.sel(layer=layer).values for layer in known.layer.values}
    found = [auroc_interval(one, right, level=level, resamples=resamples, seed=seed) for one in scores.values()]
    return xr.Dataset(
        {name: ("predictor", values) for name, values in zip(("auroc", "low", "high"), np.array(found).T, strict=True)}
        | {"n_right": int(right.sum()), "n_wrong": int((~right).sum())},
        {"predictor": list(scores)},
        {**result.attrs, "level": level, "resamples": resamples, "seed": seed},
    )


@torch.no_grad()
def _contributions(
    model: HookedVLM, inputs: VLMInputs, source: str, target: str
) -> tuple[xr.Dataset, Float[Tensor, "b d_vocab"]]:
    """Contributions in each row of inputs, and the logits where the answer begins."""
    if f"{model.towers[-1]}.hook_logits" not in model.hook_dict:
        raise ValueError(f"contributions are to an answer, and {type(model).__name__} predicts no tokens")
    sources, targets = inputs.positions(source), inputs.positions(target)
    site = _attention_between(model, sources, targets)
    layers = [f"{targets.tower}.blocks.{layer}.{site}" for layer in range(n_layers(model, targets.tower))]
    seen: dict[str, Tensor] = {}
    norms: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def keep_values(v: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = v

    def measure(pattern: Tensor, hook: HookPoint) -> None:
        # Of each layer at once, and at the targets alone: whole patterns of all layers may not fit.
        name = hook.name.removesuffix(".hook_pattern")
        norms[name] = _norms(model.get_submodule(name), pattern, seen.pop(f"{name}.hook_v"), targets)

    handles = model.add_hook([f"{layer}.hook_v" for layer in layers], keep_values, reads=True)
    handles += model.add_hook([f"{layer}.hook_pattern" for layer in layers], measure, reads=True)
    try:
        logits = at(model(inputs), -1)
    finally:
        for handle in handles:
            handle.remove()
    whole, of_heads = (np.stack([norms[layer][which] for layer in layers], 1) for which in (0, 1))
    found = _labelled(model, inputs, sources, whole, of_heads).assign_coords(reader=f"{targets.tower}.{site}")
    found["confidence"] = ("sample", logits.softmax(-1).amax(-1).double().cpu().numpy())
    return found, logits


def _norms(
    attention: Any, pattern: Float[Tensor, "b h q k"], v: Float[Tensor, "b k kv d_head"], targets: Span
) -> tuple[np.ndarray, np.ndarray]:
    """``[b k]`` and ``[b h k]``, summed over the target positions."""
    whole, of_heads = [], []
    for row, positions in enumerate(targets.rows):
        written, norms = contributions(attention, pattern[row][:, list(positions)], v[row])
        whole.append(written.norm(dim=-1).sum(0))
        of_heads.append(norms.sum(1))
    return tuple(torch.stack(found).double().cpu().numpy() for found in (whole, of_heads))  # type: ignore[return-value]


def _attention_between(model: HookedVLM, sources: Span, targets: Span) -> str:
    """Which attention of the target's tower reads the source's."""
    if sources.tower == targets.tower:
        return "attn"
    hook = model.hook_dict.get(f"{targets.tower}.blocks.0.cross_attn.hook_pattern")
    if hook is None or positions_of(hook, "k", model.towers) != sources.tower:
        raise ValueError(f"{targets.tower} does not attend to {sources.tower}")
    return "cross_attn"


def _labelled(
    model: HookedVLM, inputs: VLMInputs, sources: Span, whole: np.ndarray, of_heads: np.ndarray
) -> xr.Dataset:
    import xarray as xr

    labels = model.position_labels(inputs, sources.tower)
    n_positions = whole.shape[-1]
    tokens = np.array([[*row, *[""] * (n_positions - len(row))] for row in labels], dtype="<U64")
    image = inputs.spans.get("image")
    is_source = _marked(sources, tokens.shape)
    is_image = _marked(image if image is not None and image.tower == sources.tower else None, tokens.shape)
    # Padding is read by nothing.
    whole = np.where((tokens != "")[:, None], whole, np.nan)
    of_heads = np.where((tokens != "")[:, None, None], of_heads, np.nan)
    dims = ("sample", "tower", "layer", "head", "position")
    found = xr.Dataset(
        {
            "contribution": ((*dims[:3], "position"), whole[:, None]),
            "head_contribution": (dims, of_heads[:, None]),
            "is_source": (("sample", "tower", "position"), is_source[:, None]),
            "is_image": (("sample", "tower", "position"), is_image[:, None]),
        },
        {
            "sample": np.arange(len(tokens)),
            "tower": [sources.tower],
            "layer": np.arange(whole.shape[1]),
            "head": np.arange(of_heads.shape[2]),
            "position": np.arange(n_positions),
            "token": (("sample", "tower", "position"), tokens[:, None]),
        },
    )
    of_source = (
        found[["contribution", "head_contribution"]].where(found.is_source).sum("position").isel(tower=0, drop=True)
    )
    return found.assign(from_source=of_source.contribution, head_from_source=of_source.head_contribution)


def _marked(span: Span | None, shape: tuple[int, ...]) -> Bool[np.ndarray, "b p"]:
    marked = np.zeros(shape, dtype=bool)
    for row, positions in enumerate(span.rows if span is not None else ()):
        marked[row, list(positions)] = True
    return marked

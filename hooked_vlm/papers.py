"""The experiment of each paper: its samples, its arguments, its figures; and one like it for an embedded model.

The table is :data:`PAPERS`. What the published checkpoints should give is in docs/reproduce.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from hooked_vlm.corruptions import AdditiveGaussian, Scaled
from hooked_vlm.data import Samples, shapes
from hooked_vlm.experiments.answer_by_layer import answer_by_layer
from hooked_vlm.experiments.causal_trace import causal_trace
from hooked_vlm.experiments.constraint_trace import peak_by_layer, window_study
from hooked_vlm.experiments.information_flow import EDGES, information_flow
from hooked_vlm.experiments.notice import notice, patch_heads
from hooked_vlm.experiments.parts.cases import Pair
from hooked_vlm.experiments.parts.heads import select_heads
from hooked_vlm.experiments.parts.identification import NextToken
from hooked_vlm.experiments.parts.token_choice import ObjectTokens, OtherTokens, RandomTokens
from hooked_vlm.experiments.visual_tokens import visual_tokens
from hooked_vlm.models import HookedVLM

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Results: TypeAlias = "dict[str, xr.Dataset]"
Figures: TypeAlias = "dict[str, Figure]"


@dataclass(frozen=True)
class Paper:
    """One paper's experiment."""

    title: str
    format: str
    """Of its sample files, in :data:`hooked_vlm.data.readers.READERS`."""
    checkpoint: str
    """That it was done on."""
    run: Callable[..., Results]
    """``run(model, samples, **arguments)``."""
    draw: Callable[[Results], Figures]
    toy: str
    """The embedded model that stands for it."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The paper's."""
    toy_arguments: Mapping[str, Any] = field(default_factory=dict)
    """In place of the paper's, for the embedded model and its pictures of shapes."""
    kinds: tuple[str, ...] = ("color",)
    """Of questions about shapes."""
    keeps_correct: bool = False
    """Whether only samples are used that the model answers rightly."""

    def toy_samples(self, n: int) -> Samples:
        """Samples for the embedded model, which it was not trained on."""
        return shapes(n, seed=7, kinds=self.kinds)


def _palit(model: HookedVLM, samples: Samples, *, progress: bool = False, **arguments: Any) -> Results:
    options = {"sites": ["resid"], "scored": "own", **arguments}
    corruption = options.pop("corruption")
    return {"trace": causal_trace(model, samples, corruption, progress=progress, **options)}


def _basu(model: HookedVLM, samples: Samples, *, progress: bool = False, **arguments: Any) -> Results:
    study = window_study(model, samples, progress=progress, **arguments)
    return {"constraint": study, "peaks": peak_by_layer(study)}


def _notice(model: HookedVLM, samples: Samples, *, progress: bool = False, **arguments: Any) -> Results:
    pairs: list[Pair] = ["sip"] if any(one.image_cf is not None for one in samples) else []
    pairs += ["str"] if any(one.question_cf is not None for one in samples) else []
    if not pairs:
        raise ValueError("none of these samples has a counterfactual picture or question")
    results: Results = {}
    for pair in pairs:
        results[f"modules_{pair}"] = notice(model, samples, pair, progress=progress)
        heads = patch_heads(model, samples, pair, progress=progress, **arguments)
        results[f"heads_{pair}"] = heads
        results[f"selected_{pair}"] = select_heads(heads, allow_empty=True)
    return results


def _zhang(model: HookedVLM, samples: Samples, *, progress: bool = False, **arguments: Any) -> Results:
    prompt = {"prompt": arguments["prompt"]} if "prompt" in arguments else {}
    flow = information_flow(model, samples, progress=progress, **arguments)
    return {"flow": flow, "answer": answer_by_layer(model, samples, norm=False, progress=progress, **prompt)}


def _neo(model: HookedVLM, samples: Samples, *, progress: bool = False, **arguments: Any) -> Results:
    return {"visual_tokens": visual_tokens(model, samples, progress=progress, **arguments)}


def _draw_palit(results: Results) -> Figures:
    from hooked_vlm.plots import role_figure

    trace = results["trace"]
    return {"trace": role_figure(trace, metric="probability", quantity="effect", title=_title(trace))}


def _draw_basu(results: Results) -> Figures:
    from hooked_vlm.plots import constraint_trace_figure, window_study_figure

    study, peaks = results["constraint"], results["peaks"]
    return {
        "constraint": constraint_trace_figure(study, title=_title(study)),
        "windows": window_study_figure(peaks, title=_title(peaks)),
    }


def _draw_notice(results: Results) -> Figures:
    from hooked_vlm.plots import head_grid_figure, role_figure

    drawn: dict[str, Callable[..., Figure]] = {"modules": role_figure, "selected": head_grid_figure}
    return {
        name: drawn[kind](own, title=f"{own.attrs['model']}, {pair.upper()}")
        for name, own in results.items()
        for kind, _, pair in [name.partition("_")]
        if kind in drawn
    }


def _draw_zhang(results: Results) -> Figures:
    from hooked_vlm.plots import answer_by_layer_figure, information_flow_figure

    flow, answer = results["flow"], results["answer"]
    return {
        "flow": information_flow_figure(flow, title=_title(flow)),
        "answer": answer_by_layer_figure(answer, title=_title(answer)),
    }


def _draw_neo(results: Results) -> Figures:
    from hooked_vlm.plots import visual_tokens_figure

    ablated = results["visual_tokens"]
    return {"visual_tokens": visual_tokens_figure(ablated, title=_title(ablated))}


def _title(result: xr.Dataset) -> str:
    told = [result.attrs["model"], result.attrs.get("corruption"), result.attrs.get("direction")]
    return ", ".join(str(one) for one in told if one)


PAPERS: dict[str, Paper] = {
    "palit": Paper(
        "Palit et al. 2023, figures 3 and 4: causal tracing of BLIP",
        format="coco-qa",
        checkpoint="Salesforce/blip-vqa-base",
        run=_palit,
        draw=_draw_palit,
        toy="toy-blip-vqa",
        # Their figures are of embeddings that are scaled, not of noise: see docs/reproduce.md.
        arguments={"corruption": Scaled(0.7691)},
        toy_arguments={"corruption": AdditiveGaussian(draws=3)},
    ),
    "basu": Paper(
        "Basu et al. 2024, section 4: tracing of constraints, over windows of layers",
        format="constraints",
        checkpoint="llava-hf/llava-1.5-7b-hf",
        run=_basu,
        draw=_draw_basu,
        toy="toy-llava",
        toy_arguments={"span": "subject", "by": "object", "widths": (1, 2), "prompt": "{question}"},
        kinds=("color", "shape"),
    ),
    "notice": Paper(
        "Golovanevsky, Rudman et al. 2025 (NOTICE): modules and heads under SIP and STR",
        format="notice",
        checkpoint="Salesforce/blip-vqa-base",
        run=_notice,
        draw=_draw_notice,
        toy="toy-blip-vqa",
        toy_arguments={"positions": "subject"},
        keeps_correct=True,
    ),
    "zhang": Paper(
        "Zhang et al. 2025: information flow by attention knockout",
        format="zhang",
        checkpoint="llava-hf/llava-1.5-13b-hf",
        run=_zhang,
        draw=_draw_zhang,
        toy="toy-llava",
        arguments={"width": 9, "prompt": "{question} \nAnswer the question using a single word or phrase."},
        toy_arguments={
            "width": 1,
            "prompt": "{question}",
            "edges": [*EDGES[:4], ("image.object", "last"), ("image - image.object", "last")],
        },
        keeps_correct=True,
    ),
    "neo": Paper(
        "Neo et al. 2025, section 4: visual tokens ablated",
        format="object-tokens",
        checkpoint="llava-hf/llava-1.5-7b-hf",
        run=_neo,
        draw=_draw_neo,
        toy="toy-llava",
        toy_arguments={
            "conditions": {
                "object": ObjectTokens(),
                "object +1": ObjectTokens(dilate=1),
                "all but the object": OtherTokens(),
                "random 9": RandomTokens(9, seed=0),
            },
            "evaluate": {"vqa": NextToken()},
        },
    ),
}
"""By the name of its first author, or of its method."""

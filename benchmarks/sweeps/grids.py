"""The grids of published methods, on models at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from benchmarks.sweeps.cells import Cell, Knockout, Patch
from benchmarks.sweeps.subject import Subject
from hooked_vlm import VLMInputs
from hooked_vlm.corruptions import AdditiveGaussian
from hooked_vlm.edits import Add, Edit
from hooked_vlm.experiments.parts.sites import window

WINDOW = 9
"""Layers in which an edge is blocked together (Zhang et al. 2024)."""


@dataclass(frozen=True)
class Grid:
    """Cells, and the run that each of them is a change of.

    Attributes:
        corrupted: the inputs of that run.
        noise: added to the image embeddings in that run.
        rows: of the forward that the method's own code runs for a cell: the clean one is run anew each time.
        goals: by contender, how many times its time ours is meant to be worth.
    """

    title: str
    subject: Subject
    corrupted: Mapping[str, Tensor]
    cells: Sequence[Cell]
    noise: Tensor | None = None
    rows: int = 1
    goals: Mapping[str, float] | None = None

    @property
    def base(self) -> list[Edit]:
        """The edits that corrupt our run."""
        return [] if self.noise is None else [Add("vision_encoder.hook_out", self.noise)]


def palit(subject: Subject, every: int) -> Iterator[Grid]:
    """Causal tracing of BLIP (Palit et al. 2023): noise on the image, a layer's output put back at one token."""
    corrupted = AdditiveGaussian(std=3.0, draws=1)(subject.model, VLMInputs.of(subject.clean))
    (noise,) = corrupted.edits
    assert isinstance(noise, Add)
    assert isinstance(noise.amount, Tensor)
    towers = {"question_encoder": subject.clean["input_ids"], "answer_decoder": subject.clean["decoder_input_ids"]}
    cells = [
        Patch(tower, "resid", layer, position)
        for tower, tokens in towers.items()
        for layer in range(subject.size.n_layers)
        for position in range(tokens.shape[1])
    ]
    noise_added = noise.amount.to(subject.dtype)
    goals = {"papers": 120.0, "hooks": 120.0, "batched": 5.0}
    yield Grid("Palit", subject, subject.clean, cells, noise_added, rows=2, goals=goals)


def notice(subject: Subject, every: int) -> Iterator[Grid]:
    """NOTICE on BLIP (Golovanevsky et al. 2025): another image; sub-layers at all tokens, all heads at one."""
    n_tokens = subject.clean["input_ids"].shape[1]
    layers, sites = range(subject.size.n_layers), ("mlp", "attn", "cross_attn")
    cells = [
        Patch("question_encoder", site, layer, position)
        for site in sites
        for layer in layers
        for position in range(n_tokens)
    ]
    cells += [
        Patch("question_encoder", site, layer, n_tokens // 2, (head,))
        for site in sites[1:]
        for layer in layers
        for head in range(subject.size.n_heads)
    ]
    goals = {"papers": 120.0, "hooks": 120.0, "batched": 8.0}
    yield Grid("NOTICE", subject, subject.other, cells, rows=3, goals=goals)


def llava_text(subject: Subject, every: int) -> Iterator[Grid]:
    """Denoising of LLaVA: another image; the stream and sub-layers at every text position after the image."""
    cells = _llava_cells(subject, ("resid", "mlp", "attn"), subject.spans["text"])
    goals = {"papers": 40.0, "hooks": 40.0, "batched": 25.0}
    yield Grid("LLaVA, text positions", subject, subject.other, cells, rows=3, goals=goals)


def llava_image(subject: Subject, every: int) -> Iterator[Grid]:
    """The stream at image positions: everything behind them changes."""
    positions = subject.spans["image"]
    kept = positions[every // 2 :: every]
    title = f"LLaVA, {len(kept)} of {len(positions)} image positions"
    yield Grid(title, subject, subject.other, _llava_cells(subject, ("resid",), kept), rows=3)


def knockout(subject: Subject, every: int) -> Iterator[Grid]:
    """Attention knockout (Geva et al. 2023; in LLaVA, Zhang et al. 2024): an edge blocked in a window of layers."""
    n_layers = subject.size.n_layers
    spans = {name: tuple(span) for name, span in subject.spans.items()}

    def blocked(source: str, target: str) -> list[Cell]:
        windows = [tuple(window(layer, min(WINDOW, n_layers), n_layers)) for layer in range(n_layers)]
        return [Knockout(layers, queries=spans[target], keys=spans[source]) for layers in windows]

    into_last = [*blocked("image", "last"), *blocked("question", "last")]
    yield Grid("Knockout, image and question to last", subject, subject.clean, into_last, goals={"hooks": 200.0})
    yield Grid("Knockout, image to question", subject, subject.clean, blocked("image", "question"))


GRIDS: dict[str, tuple[str, Callable[[Subject, int], Iterator[Grid]]]] = {
    "palit": ("blip", palit),
    "notice": ("blip", notice),
    "llava-text": ("llava", llava_text),
    "knockout": ("llava", knockout),
    "llava-image": ("llava", llava_image),
}
"""By name: the family that a grid is for, and what makes it."""


def many(subject: Subject) -> Grid:
    """More than 10,000 cells of one kind: heads of LLaVA's text positions, pairs of heads of BLIP's question."""
    n_heads, layers = subject.size.n_heads, range(subject.size.n_layers)
    if "decoder_input_ids" not in subject.clean:
        positions, heads = subject.spans["text"], [(head,) for head in range(n_heads)]
        tower, sites = "language_model", ["attn"]
    else:
        positions, heads = range(subject.clean["input_ids"].shape[1]), list[Any](combinations(range(n_heads), 2))
        tower, sites = "question_encoder", ["attn", "cross_attn"]
    cells = [
        Patch(tower, site, layer, position, chosen)
        for site in sites
        for layer in layers
        for position in positions
        for chosen in heads
    ]
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0)).tolist()
    return Grid("Growth", subject, subject.other, [cells[place] for place in order])


def _llava_cells(subject: Subject, sites: Sequence[str], positions: Sequence[int]) -> list[Cell]:
    return [
        Patch("language_model", site, layer, position)
        for site in sites
        for layer in range(subject.size.n_layers)
        for position in positions
    ]

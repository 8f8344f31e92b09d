"""NOTICE over samples, in samples an hour: ours, and the loop of the paper's code, one forward of 3 rows a cell.

``python -m benchmarks.samples [--size toy vqa-base] [--samples N] [--cells N] [--one-thread] [--json FILE]``

A sample's cells are every module at every token, and every head at the word that the question is about. The loop runs
some cells of some samples, and its time is scaled by their number; their values are compared with ours first.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ONE_THREAD, ONE_THREAD_HELP, WALL, Timing, machine, parser, report
from benchmarks.models import SIZES, BlipSize
from benchmarks.rivals.hf_hooks import Published
from benchmarks.sweeps.cells import Patch
from benchmarks.sweeps.grids import Grid
from hooked_vlm import HookedVLM, toys
from hooked_vlm.data import Sample, Samples, shapes
from hooked_vlm.experiments.notice import notice, patch_heads
from hooked_vlm.experiments.parts.cases import ready
from hooked_vlm.metrics import Probability

TOY = "toy-blip-vqa"
TOWER, SITES = "question_encoder", ("mlp", "attn", "cross_attn")
COLUMNS = (
    "size",
    "samples",
    "cells a sample",
    "run by",
    "measured",
    "a sample",
    "samples an hour",
    "ratio",
    "differ by",
)


@dataclass(frozen=True)
class Setting:
    """How many samples, and how many cells of how many samples the loop runs."""

    samples: int
    looped_samples: int
    cells: int


SETTINGS = {"toy": Setting(200, 5, 40), "vqa-base": Setting(20, 2, 2)}


@dataclass(frozen=True)
class Subject:
    """A sample and a model, as the paper's loop takes them."""

    hf_model: Any
    size: BlipSize
    model: HookedVLM
    sample: Sample

    @cached_property
    def _case(self) -> Any:
        return ready(self.model, self.sample, "sip", scored="own")

    @property
    def clean(self) -> dict[str, Tensor]:
        return self._with_start(self._case.clean.tensors())

    @property
    def other(self) -> dict[str, Tensor]:
        """The same question about the counterfactual picture."""
        return self._with_start(self._case.corrupted.inputs.tensors())

    @property
    def metric(self) -> Probability:
        return Probability(self._case.answer)

    @property
    def cells(self) -> list[Patch]:
        """All that NOTICE patches."""
        layers, heads = range(self.size.n_layers), range(self.size.n_heads)
        tokens, subject = range(self.clean["input_ids"].shape[1]), self._case.clean.spans["subject"][0][0]
        modules = [Patch(TOWER, site, layer, place) for site in SITES for layer in layers for place in tokens]
        return modules + [
            Patch(TOWER, site, layer, subject, (head,)) for site in SITES[1:] for layer in layers for head in heads
        ]

    def _with_start(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        start = torch.full((1, 1), self.model.config.bos_token_id)  # type: ignore[union-attr]
        return {**tensors, "decoder_input_ids": start}


def main() -> None:
    """Measure the sizes asked for, and print a table."""
    options = parser("NOTICE over samples.", repeats=1)
    options.add_argument("--size", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="by default both")
    options.add_argument("--samples", type=int, help="how many of ours")
    options.add_argument("--cells", type=int, help="how many of each sample the loop runs")
    options.add_argument("--one-thread", action="store_true", help=ONE_THREAD_HELP)
    chosen = options.parse_args()
    records = []
    for name in chosen.size:
        timing = ONE_THREAD if chosen.one_thread else WALL
        setting = SETTINGS[name]
        records.append(
            measure(
                name,
                Setting(chosen.samples or setting.samples, setting.looped_samples, chosen.cells or setting.cells),
                timing,
            )
        )
    note = "CPU time, one thread." if chosen.one_thread else "Wall time, all threads."
    report(
        "NOTICE over samples, SIP, fp32", COLUMNS, [row for record in records for row in rows(record)], [], [note], None
    )
    if chosen.json is not None:
        written = {"machine": machine(), "options": vars(chosen), "rows": records}
        chosen.json.write_text(json.dumps(written, indent=2, default=str) + "\n", encoding="utf-8")


def measure(name: str, setting: Setting, timing: Timing) -> dict[str, Any]:
    """Seconds a sample, ours and the loop's, and how far the same cells differ."""
    hf_model, size, model = subject_of(name)
    samples = shapes(setting.samples, seed=7, kinds=("color",))
    with timing.threaded():
        ours(model, samples[:1])  # what is compiled and cached at first is nobody's
        start = timing.clock()
        modules, heads = ours(model, samples)
        own = (timing.clock() - start) / len(samples)
        looped, count, difference = 0.0, 0, 0.0
        n_cells = 0
        for sample in samples[: setting.looped_samples]:
            subject = Subject(hf_model, size, model, sample)
            n_cells = len(subject.cells)
            cells = random.Random(0).sample(subject.cells, min(setting.cells, n_cells))
            loop = Published(Grid("NOTICE", subject, subject.other, cells, rows=3), 1)  # type: ignore[arg-type]
            loop.scores(cells[:1])
            start = timing.clock()
            values = loop.scores(cells)
            looped += timing.clock() - start
            count += len(cells)
            expected = torch.tensor([value_of(cell, sample, modules, heads) for cell in cells])
            difference = max(difference, float((values - expected).abs().max()))
    return {
        "size": name,
        "samples": len(samples),
        "cells": n_cells,
        "looped": count,
        "ours": own,
        "loop": looped / count * n_cells,
        "difference": difference,
    }


def ours(model: HookedVLM, samples: Samples) -> tuple[Any, Any]:
    """Modules and heads."""
    modules = notice(model, samples, "sip", scored="own", all_positions=False)
    return modules, patch_heads(model, samples, "sip", positions="subject", scored="own")


def value_of(cell: Patch, sample: Sample, modules: Any, heads: Any) -> float:
    """Ours, of a cell."""
    place = {"metric": "probability", "sample": sample.id, "tower": TOWER, "layer": cell.layer}
    if cell.heads:
        return float(heads.patched.sel(**place, attention=cell.site, head=cell.heads[0]))
    return float(modules.patched.sel(**place, site=cell.site, position=cell.position))


def subject_of(name: str) -> tuple[Any, BlipSize, HookedVLM]:
    """HF's model, its size, and ours over the same parameters; with the toy's words."""
    import transformers

    toy = HookedVLM.from_pretrained(TOY)
    if name == "toy":
        hf_model = transformers.BlipForQuestionAnswering.from_pretrained(toys.folder(TOY)).eval()
        text = toy.config.text  # type: ignore[union-attr]
        size = BlipSize(text.d_model, text.n_layers, text.n_heads, toy.config.vision.image_size, text.d_vocab, 8)  # type: ignore[union-attr]
        return hf_model, size, HookedVLM.from_hf(hf_model, processor=toy.processor)
    size = SIZES[name]  # type: ignore[assignment]
    assert isinstance(size, BlipSize)
    processor = transformers.BlipProcessor(
        transformers.BlipImageProcessor(size={"height": size.image, "width": size.image}), toy.processor.tokenizer
    )
    hf_model = size.hf_model()
    return hf_model, size, HookedVLM.from_hf(hf_model, processor=processor)


def rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Lines of the table."""
    for who in ("ours", "loop"):
        seconds = record[who]
        is_loop = who == "loop"
        yield (
            record["size"],
            str(record["samples"]),
            str(record["cells"]),
            "the paper's loop on HF" if is_loop else "ours",
            f"{record['looped']} cells" if is_loop else f"{record['samples']} samples",
            f"{seconds:.3g} s",
            f"{3600 / seconds:,.0f}",
            f"{record['loop'] / record['ours']:.3g}" if is_loop else "",
            f"{record['difference']:.0e}" if is_loop else "",
        )


if __name__ == "__main__":
    main()

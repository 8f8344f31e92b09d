"""How well a model answers questions about pictures of shapes: ``python -m hooked_vlm.toys.evaluate [MODEL]``.

For every kind of question: the share of exact answers, and the share of counterfactual pairs in which the answer flips
as it should, that is, both the sample and its counterfactual are answered exactly.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from rich.table import Table

from hooked_vlm.data.shapes import KINDS, ShapesSample, generate

TOY = "toy-blip-vqa"

EVALUATION_SEED = 7
"""The seed of the figures that we report. The embedded checkpoints were trained on seed 0."""

Scores = dict[str, dict[str, float]]
"""kind -> {"exact", "sip", "str", "n"}: three shares between 0 and 1, and the number of samples of the kind."""


@runtime_checkable
class Answers(Protocol):
    """What :func:`evaluate` needs of a model; :class:`hooked_vlm.HookedVLM` has it."""

    def prepare(self, images: Sequence[Any], texts: Sequence[str]) -> Any:
        """Pictures and questions to the model's inputs."""

    def generate(self, inputs: Any, *, max_new_tokens: int) -> Any:
        """One answer a row, as strings."""


def evaluate(model: Answers, n: int = 2000, seed: int = EVALUATION_SEED, batch_size: int = 100) -> Scores:
    """Ask a model ``n`` questions, and each again about its SIP picture and in its STR wording.

    Args:
        model: has ``prepare`` and ``generate``, as :class:`hooked_vlm.HookedVLM`.
        n: how many samples, of all kinds together.
        seed: of the samples, another than that of the training.
        batch_size: samples in one call; the model sees three times as many rows.

    Returns:
        Scores for each kind of question that occurs.
    """
    hits: dict[str, list[tuple[bool, bool, bool]]] = {kind: [] for kind in KINDS}
    for samples in _chunks(generate(n, seed), batch_size):
        images = [image for one in samples for image in (one.image, one.sip.image, one.image)]
        questions = [text for one in samples for text in (one.question, one.question, one.str_.question)]
        expected = [word for one in samples for word in (one.answer, one.sip.answer, one.str_.answer)]
        answers = model.generate(model.prepare(images, questions), max_new_tokens=4)
        right = [answer.strip() == word for answer, word in zip(answers, expected, strict=True)]
        for index, one in enumerate(samples):
            plain, sip, str_ = right[3 * index : 3 * index + 3]
            hits[one.kind].append((plain, plain and sip, plain and str_))
    return {kind: _scores(rows) for kind, rows in hits.items() if rows}


def table(scores: Scores, title: str = "exact answers and flips") -> Table:
    """The scores as a rich table."""
    view = Table("kind", "samples", "exact", "SIP flips", "STR flips", title=title)
    for kind, row in scores.items():
        view.add_row(kind, str(int(row["n"])), *(f"{row[name]:.1%}" for name in ("exact", "sip", "str")))
    return view


def in_a_line(scores: Scores) -> str:
    """The scores as a line of text: exact / SIP flips / STR flips of every kind."""
    shares = {kind: "/".join(f"{row[name]:.3f}" for name in ("exact", "sip", "str")) for kind, row in scores.items()}
    return "  ".join(f"{kind} {share}" for kind, share in shares.items())


def _scores(rows: Sequence[tuple[bool, bool, bool]]) -> dict[str, float]:
    exact, sip, str_ = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return {"exact": exact, "sip": sip, "str": str_, "n": len(rows)}


def _chunks(samples: Iterator[ShapesSample], size: int) -> Iterator[list[ShapesSample]]:
    chunk: list[ShapesSample] = []
    for one in samples:
        chunk.append(one)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def main() -> None:
    """The command line."""
    from rich.console import Console

    from hooked_vlm import HookedVLM

    parser = argparse.ArgumentParser(prog="python -m hooked_vlm.toys.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=TOY, help="embedded name, local folder, or hub id")
    parser.add_argument("--n", type=int, default=2000, help="how many samples (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=EVALUATION_SEED,
        help="of the samples; the toys were trained on seed 0 (default: %(default)s)",
    )
    arguments = parser.parse_args()
    scores = evaluate(HookedVLM.from_pretrained(arguments.model), arguments.n, arguments.seed)
    Console().print(table(scores, f"{arguments.model}: {arguments.n} samples of seed {arguments.seed}"))


if __name__ == "__main__":
    main()

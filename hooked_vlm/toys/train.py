"""Train the embedded checkpoints: ``python -m hooked_vlm.toys.train blip|llava --out FOLDER``.

The model is HF's own class and the result is an HF folder, so that what the library reads is what any checkpoint is.

Three things make so narrow a model learn to bind a color to a shape. The weights start at the scale of
``1 / sqrt(fan in)``: with HF's standard deviation of 0.02 attention stays flat for thousands of steps. Every sample
comes with its counterfactual picture and its counterfactual question, so that a batch holds pairs that differ in one
attribute or in one word: what is true of the picture as a whole never gives the answer away. And the questions come in
stages, the easy ones first; with all of them at once, "how many" and "is there" stay at chance.

What one architecture needs besides is said in :mod:`~hooked_vlm.toys.blip` and :mod:`~hooked_vlm.toys.llava`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from hooked_vlm.toys import blip, llava
from hooked_vlm.toys.evaluate import EVALUATION_SEED, evaluate, in_a_line, table
from hooked_vlm.toys.lessons import STAGES, Batch, draw_batch
from hooked_vlm.toys.recipe import Recipe


@runtime_checkable
class Toy(Protocol):
    """What a module says of one architecture.

    Attributes:
        FOLDER: the checkpoint's name.
        END: the token that ends an answer.
        CONTINUES_PROMPT: whether what is generated begins with the prompt.
    """

    FOLDER: str
    RECIPE: Recipe
    END: str
    CONTINUES_PROMPT: bool

    def build_processor(self) -> Any:
        """A new HF processor."""

    def build_model(self, recipe: Recipe) -> Any:
        """A freshly initialised HF model."""

    def prompt(self, question: str) -> str:
        """The text that the processor is given."""

    def before_questions(self, model: Any, processor: Any, recipe: Recipe, log: Callable[[str], None]) -> None:
        """What is taught first, in place."""

    def parts(self, batch: Batch, step: int) -> list[Batch]:
        """How the rows of a step are put together."""

    def answer_logits(self, model: Any, tokenizer: Any, batch: Batch) -> torch.Tensor:
        """``[row 2 vocabulary]``: the logits where the answer should come, and, after the right one, its end."""


TOYS: Mapping[str, Toy] = {"blip": blip, "llava": llava}


def train(toy: Toy, recipe: Recipe, folder: Path, log: Callable[[str], None] = print) -> Any:
    """Train a new model, and save it into ``folder`` every 500 steps and at the end.

    Args:
        toy: one of ``TOYS``.
        recipe: sizes, schedule, seed.
        folder: where checkpoints go, each over the last.
        log: takes one line of text.
    """
    torch.manual_seed(recipe.seed)
    begun = time.monotonic()
    processor, model = toy.build_processor(), toy.build_model(recipe).train()
    toy.before_questions(model, processor, recipe, log)
    end = processor.tokenizer.convert_tokens_to_ids(toy.END)
    optimizer = recipe.optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    stages, right = list(STAGES), RunningShares()
    for step in range(recipe.steps):
        batch = draw_batch(recipe, step, stages[0], processor.image_processor)
        for part in toy.parts(batch, step):
            answers = torch.tensor(processor.tokenizer.convert_tokens_to_ids(part.answers))
            # Twice as fast on a CPU; the weights and their updates stay float32.
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step < recipe.steps - recipe.float32_steps):
                logits = toy.answer_logits(model, processor.tokenizer, part).float()
            targets = torch.stack([answers, torch.full_like(answers, end)], 1)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            (loss * len(part.answers) / len(batch.answers)).backward()
            right.add([question.kind for question in part.questions], logits[:, 0].argmax(-1) == answers)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (step + 1) % 50 == 0:
            log(f"step {step + 1:5d}  {time.monotonic() - begun:5.0f} s  {right}")
            if len(stages) > 1 and right.least() >= recipe.advance_at:
                stages.pop(0)
            right = RunningShares()
        if (step + 1) % 500 == 0 or step + 1 == recipe.steps:
            save(toy, model, folder)
            model.eval()
            log(in_a_line(evaluate(HFModel(toy, model), n=400, seed=EVALUATION_SEED)))
            model.train()
    return model.eval()


class RunningShares:
    """The share of right answers of every kind, in training, so far."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}

    def add(self, kinds: Sequence[str], right: Bool[torch.Tensor, " row"]) -> None:
        """Count some more answers."""
        for kind, hit in zip(kinds, right.tolist(), strict=True):
            count = self.counts.setdefault(kind, [0, 0])
            count[0] += hit
            count[1] += 1

    def least(self) -> float:
        """The share of the worst kind."""
        return min(hits / total for hits, total in self.counts.values())

    def __str__(self) -> str:
        return "  ".join(f"{kind} {hits / total:.3f}" for kind, (hits, total) in sorted(self.counts.items()))


def save(toy: Toy, model: Any, folder: Path) -> None:
    """Write model and processor as HF does. The processor is a new one: a used one writes how it was last used."""
    model.save_pretrained(folder)
    toy.build_processor().save_pretrained(folder)


class HFModel:
    """The two methods of :class:`hooked_vlm.HookedVLM` that :func:`evaluate` needs, for HF's own model."""

    def __init__(self, toy: Toy, model: Any) -> None:
        self.toy, self.model, self.processor = toy, model, toy.build_processor()

    def prepare(self, images: Sequence[Any], texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Pictures and questions to tensors."""
        prompts = [self.toy.prompt(text) for text in texts]
        return self.processor(images=list(images), text=prompts, padding=True, return_tensors="pt")

    def generate(self, inputs: Mapping[str, torch.Tensor], *, max_new_tokens: int = 4) -> list[str]:
        """The answers, greedily."""
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        begun = inputs["input_ids"].shape[1] if self.toy.CONTINUES_PROMPT else 0
        return self.processor.batch_decode(ids[:, begun:], skip_special_tokens=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hooked_vlm.toys.train", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(TOYS), help="which toy to train")
    parser.add_argument("--out", type=Path, help="folder to write (default: the toy's name, here)")
    parser.add_argument("--seed", type=int, help="of the weights and of the samples")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--threads", type=int, help="CPU threads; by default, torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    toy = TOYS[arguments.model]
    given = {name: getattr(arguments, name) for name in ("seed", "steps", "learning_rate")}
    recipe = replace(toy.RECIPE, **{name: value for name, value in given.items() if value is not None})
    model = train(toy, recipe, arguments.out or Path(toy.FOLDER), log=lambda line: print(line, flush=True))
    Console().print(table(evaluate(HFModel(toy, model), seed=EVALUATION_SEED)))


if __name__ == "__main__":
    main()

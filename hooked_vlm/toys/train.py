"""Train the embedded checkpoints: ``python -m hooked_vlm.toys.train blip --out FOLDER``.

The model is HF's own class and the result is an HF folder, so that what the library reads is what any checkpoint is.

Three things make so narrow a model learn to bind a color to a shape. The weights start at the scale of
``1 / sqrt(fan in)``: with HF's standard deviation of 0.02 attention stays flat for thousands of steps. Every sample
comes with its counterfactual picture and its counterfactual question, so that a batch holds pairs that differ in one
attribute or in one word: what is true of the picture as a whole never gives the answer away. And the questions come in
stages, the easy ones first; with all of them at once, "how many" and "is there" stay at chance.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)

from hooked_vlm.data.scene import CELL, COLORS, IMAGE_SIZE, SHAPES, Scene
from hooked_vlm.data.shapes import COUNTS, KINDS, Question, sample
from hooked_vlm.toys.evaluate import EVALUATION_SEED, evaluate, in_a_line, table

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
QUESTION_WORDS = "what color shape is the object objects how many are there a ? yes no".split()
REPHRASING_WORDS = (
    "of in this picture image any some an do does you see can which it thing things one and or not".split()
)


@dataclass(frozen=True)
class Recipe:
    """Everything that the checkpoint depends on, apart from the code.

    Attributes:
        primers: questions about each picture besides those of its sample.
        advance_at: the share of right answers, in the worst kind over 50 steps, that ends a stage.
        float32_steps: how many steps at the end are not computed in bfloat16.
    """

    seed: int = 0
    steps: int = 3500
    samples_per_step: int = 32
    learning_rate: float = 7e-4
    warmup: int = 300
    weight_decay: float = 0.02
    gradient_norm: float = 1.0
    primers: int = 2
    advance_at: float = 0.96
    float32_steps: int = 300
    d_model: int = 96
    d_head: int = 24
    vision_layers: int = 3
    text_layers: int = 4


def vocabulary() -> dict[str, int]:
    """Every word that a question or an answer can hold, and a few more, with its id."""
    plurals = [f"{shape}s" for shape in SHAPES]
    words = [*QUESTION_WORDS, *COLORS, *SHAPES, *plurals, *COUNTS, *REPHRASING_WORDS]
    return {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *words]))}


def build_processor() -> BlipProcessor:
    """HF's processor, for pictures of the toy's own size: they pass through it unresized."""
    tokenizer = BertTokenizer(vocab=vocabulary(), additional_special_tokens=["[DEC]", "[ENC]"], model_max_length=32)
    return BlipProcessor(BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}), tokenizer)


def build_model(recipe: Recipe) -> BlipForQuestionAnswering:
    """HF's model, freshly initialised."""
    words = vocabulary()
    width = {"hidden_size": recipe.d_model, "intermediate_size": 4 * recipe.d_model}
    heads = {"num_attention_heads": recipe.d_model // recipe.d_head}
    text = {
        **width,
        **heads,
        "encoder_hidden_size": recipe.d_model,
        "vocab_size": len(words),
        "max_position_embeddings": 32,
        "bos_token_id": words["[DEC]"],
        "sep_token_id": words["[SEP]"],
        "eos_token_id": words["[SEP]"],
        "pad_token_id": words["[PAD]"],
        "is_decoder": True,
    }
    vision = {**width, **heads, "image_size": IMAGE_SIZE, "patch_size": CELL}
    vision["num_hidden_layers"] = recipe.vision_layers
    config = BlipConfig(
        text_config=BlipTextConfig(**text, num_hidden_layers=recipe.text_layers).to_dict(),
        vision_config=BlipVisionConfig(**vision).to_dict(),
        projection_dim=recipe.d_model,
        image_text_hidden_size=recipe.d_model,
    )
    model = BlipForQuestionAnswering(config)
    initialise(model, recipe)
    return model


def initialise(model: BlipForQuestionAnswering, recipe: Recipe) -> None:
    """Draw every weight at the scale of ``1 / sqrt(fan in)``, in place; LayerNorms and biases stay as they are."""
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # After the Linears, because the decoder's last one shares its weight with the word embeddings.
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=recipe.d_model**-0.5)
        nn.init.normal_(model.vision_model.embeddings.class_embedding, std=recipe.d_model**-0.5)
        nn.init.normal_(model.vision_model.embeddings.position_embedding, std=recipe.d_model**-0.5)


@dataclass(frozen=True)
class Stage:
    """What is asked at one time of the training.

    Attributes:
        kinds: of the samples, each of which is asked with its counterfactuals.
        primers: templates of the questions that are asked besides, each on its own: a kind, and which attributes it
            names.
    """

    kinds: tuple[str, ...]
    primers: tuple[tuple[str, str], ...]


STAGES = (
    Stage(("color", "shape"), (("exists", "color"), ("exists", "shape"))),
    Stage(
        KINDS, (("exists", "color"), ("exists", "shape"), ("exists", "both"), ("count", "color"), ("count", "shape"))
    ),
    Stage((*KINDS, "count", "count"), ()),
)
"""Finding a thing comes first, then that there is none, then both attributes at once and how many.

That nothing matches is what counterfactual pairs teach last, because every easy clue cancels within a pair. Primers are
asked on their own, so there the easy clues help, and the harder questions start from them. But few of their answers are
high numbers, so they are left out at last, and counting is asked more often.
"""


@dataclass(frozen=True)
class Batch:
    """Some pictures, and rows that each ask something about one of them."""

    pixel_values: Float[torch.Tensor, "picture 3 height width"]
    pictures: Int[torch.Tensor, " row"]
    questions: list[Question]
    answers: list[str]

    def rows(self, chosen: Sequence[int]) -> Batch:
        """The same pictures, with only the chosen rows."""
        index = torch.tensor(chosen)
        return Batch(
            self.pixel_values,
            self.pictures[index],
            [self.questions[row] for row in chosen],
            [self.answers[row] for row in chosen],
        )

    def by_length(self) -> list[Batch]:
        """One part for each length of question, so that none holds padding."""
        lengths = [len(question.text.split()) for question in self.questions]
        return [self.rows([row for row, own in enumerate(lengths) if own == length]) for length in sorted(set(lengths))]


def draw_batch(recipe: Recipe, step: int, stage: Stage, images: BlipImageProcessor) -> Batch:
    """Samples never seen before. Of each: two pictures and two questions in all pairs, and primers for each picture."""
    random = np.random.default_rng((recipe.seed, step, 1))
    pixels: list[np.ndarray] = []
    rows: list[tuple[int, Question, str]] = []
    for index in range(recipe.samples_per_step):
        one = sample(recipe.seed, step * recipe.samples_per_step + index, stage.kinds)
        for scene in (one.scene, one.sip.scene):
            primers = [_primer(random, scene, stage) for _ in range(recipe.primers if stage.primers else 0)]
            for asked in (one.asked, one.str_.asked, *primers):
                answer = asked.answer(scene.objects)
                if answer is not None:
                    rows.append((len(pixels), asked, answer))
            pixels.append(scene.pixels)
    pictures, questions, answers = zip(*rows, strict=True)
    values = (np.stack(pixels).astype(np.float32) / 255 - np.float32(images.image_mean)) / np.float32(images.image_std)
    pixel_values = torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()
    return Batch(pixel_values, torch.tensor(pictures), list(questions), list(answers))


def _primer(random: np.random.Generator, scene: Scene, stage: Stage) -> Question:
    kind, named = stage.primers[random.integers(len(stage.primers))]
    item = scene.objects[random.integers(len(scene.objects))]
    color, shape = item.color, item.shape
    if random.random() < 0.55:
        color, shape = tuple(COLORS)[random.integers(len(COLORS))], SHAPES[random.integers(len(SHAPES))]
    return Question(kind, None if named == "shape" else color, None if named == "color" else shape)


def answer_logits(
    model: BlipForQuestionAnswering, tokenizer: BertTokenizer, batch: Batch, answers: Int[torch.Tensor, " row"]
) -> Float[torch.Tensor, "row 2 vocabulary"]:
    """Logits after ``[DEC]`` and after ``[DEC] answer``.

    HF's own loss takes the labels for the decoder's inputs, whose first token is [CLS]; generation starts at [DEC].
    """
    images = model.vision_model(batch.pixel_values).last_hidden_state[batch.pictures]
    asked = tokenizer([question.text for question in batch.questions], padding=True, return_tensors="pt")
    states = model.text_encoder(
        asked.input_ids, attention_mask=asked.attention_mask, encoder_hidden_states=images
    ).last_hidden_state
    prompt = torch.stack([torch.full_like(answers, model.decoder_start_token_id), answers], 1)
    return model.text_decoder(prompt, encoder_hidden_states=states).logits


def train(recipe: Recipe, folder: Path, log: Callable[[str], None] = print) -> BlipForQuestionAnswering:
    """Train a new model, and save it into ``folder`` every 500 steps and at the end.

    Args:
        recipe: sizes, schedule, seed.
        folder: where checkpoints go, each over the last.
        log: takes one line of text.
    """
    torch.manual_seed(recipe.seed)
    processor, model = build_processor(), build_model(recipe).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_then_cosine(step, recipe))
    begun, stages, right = time.monotonic(), list(STAGES), RunningShares()
    for step in range(recipe.steps):
        batch = draw_batch(recipe, step, stages[0], processor.image_processor)
        # HF's decoder looks at padded question positions. Trained on padded rows alone, it would come to need them,
        # and a question asked alone, or with its padding masked as it should be, would be answered worse.
        for part in [batch] if step % 2 else batch.by_length():
            answers = torch.tensor(processor.tokenizer.convert_tokens_to_ids(part.answers))
            # Twice as fast on a CPU; the weights and their updates stay float32.
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step < recipe.steps - recipe.float32_steps):
                logits = answer_logits(model, processor.tokenizer, part, answers).float()
            targets = torch.stack([answers, torch.full_like(answers, processor.tokenizer.sep_token_id)], 1)
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
            save(model, folder)
            model.eval()
            log(in_a_line(evaluate(HFModel(model, processor), n=400, seed=EVALUATION_SEED)))
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


def save(model: BlipForQuestionAnswering, folder: Path) -> None:
    """Write model and processor as HF does. The processor is a new one: a used one writes how it was last used."""
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)


class HFModel:
    """The two methods of :class:`hooked_vlm.HookedVLM` that :func:`evaluate` needs, for HF's own model."""

    def __init__(self, model: BlipForQuestionAnswering, processor: BlipProcessor) -> None:
        self.model, self.processor = model, processor

    def prepare(self, images: Sequence[Any], texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Pictures and questions to tensors."""
        return self.processor(images=list(images), text=list(texts), padding=True, return_tensors="pt")

    def generate(self, inputs: Mapping[str, torch.Tensor], *, max_new_tokens: int = 4) -> list[str]:
        """The answers, greedily."""
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.processor.batch_decode(ids, skip_special_tokens=True)


def _warmup_then_cosine(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def main() -> None:
    """The command line."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m hooked_vlm.toys.train", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["blip"], help="which toy to train")
    parser.add_argument("--out", type=Path, default=Path("toy-blip-vqa"), help="folder to write")
    parser.add_argument("--seed", type=int, default=recipe.seed, help="of the weights and of the samples")
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--learning-rate", type=float, default=recipe.learning_rate)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; by default, torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = Recipe(seed=arguments.seed, steps=arguments.steps, learning_rate=arguments.learning_rate)
    model = train(recipe, arguments.out, log=lambda line: print(line, flush=True))
    Console().print(table(evaluate(HFModel(model, build_processor()), seed=EVALUATION_SEED)))


if __name__ == "__main__":
    main()

"""Train the embedded checkpoints: ``python -m hooked_vlm.toys.train blip --out FOLDER``.

The model is HF's own class and the result is an HF folder, so that what the library reads is what any checkpoint is.

Two things make so narrow a model learn to bind a colour to a shape at all. The weights start at the scale of
``1 / sqrt(fan in)``: with HF's standard deviation of 0.02 attention stays flat for thousands of steps. And every sample
comes with its counterfactual picture and its counterfactual question, so that a batch holds pairs that differ in one
attribute or in one word: what is true of the picture as a whole never gives the answer away.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from hooked_vlm.data.scene import CELL, COLORS, IMAGE_SIZE, SHAPES, Scene
from hooked_vlm.data.shapes import COUNTS, OBJECT_COUNTS, Question, sample
from hooked_vlm.toys.evaluate import evaluate, table

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
QUESTION_WORDS = "what color shape is the object objects how many are there a ? yes no".split()
REPHRASING_WORDS = (
    "of in this picture image any some an do does you see can which it thing things one and or not".split()
)

EVALUATION_SEED = 7
"""Never a training seed."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the checkpoint depends on, apart from the code."""

    seed: int = 0
    steps: int = 6000
    samples_per_step: int = 32
    learning_rate: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.02
    gradient_norm: float = 1.0
    two_object_steps: int = 600
    primers: int = 2
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
    return BlipProcessor(BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}), tokenizer)


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
                nn.init.zeros_(module.bias)
        # After the Linears, because the decoder's last one shares its weight with the word embeddings.
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=recipe.d_model**-0.5)
        nn.init.normal_(model.vision_model.embeddings.class_embedding, std=recipe.d_model**-0.5)
        nn.init.normal_(model.vision_model.embeddings.position_embedding, std=recipe.d_model**-0.5)


@dataclass(frozen=True)
class Batch:
    """Some pictures, and rows that each ask something about one of them."""

    pixel_values: Float[torch.Tensor, "picture 3 height width"]
    pictures: Int[torch.Tensor, " row"]
    questions: list[str]
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


def batches(recipe: Recipe, mean: Sequence[float], std: Sequence[float]) -> Iterator[Batch]:
    """One batch a step, each of samples never seen before. Of every sample: two pictures, two questions, all pairs."""
    for step in range(recipe.steps):
        counts = (2,) if step < recipe.two_object_steps else OBJECT_COUNTS
        random = np.random.default_rng((recipe.seed, step, 1))
        pixels, rows = [], []
        for index in range(recipe.samples_per_step):
            one = sample(recipe.seed, step * recipe.samples_per_step + index, object_counts=counts)
            for scene in (one.scene, one.sip.scene):
                for asked in (one.asked, one.str_.asked):
                    answer = asked.answer(scene.objects)
                    if answer is not None:
                        rows.append((len(pixels), asked.text, answer))
                for asked in primers(random, scene, recipe.primers):
                    rows.append((len(pixels), asked.text, asked.answer(scene.objects)))
                pixels.append(scene.pixels)
        pictures, questions, answers = zip(*rows, strict=True)
        values = (np.stack(pixels).astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
        pixel_values = torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()
        yield Batch(pixel_values, torch.tensor(pictures), list(questions), list(answers))


def primers(random: np.random.Generator, scene: Scene, n: int) -> list[Question]:
    """Easier questions about a picture: whether there is, and how many there are of, one attribute or two.

    That nothing matches is what the counterfactual pairs teach last, because every easy clue cancels within a pair.
    These are asked on their own, so there the easy clues help, and the harder questions start from them.
    """
    questions = []
    for _ in range(n):
        kind = ("exists", "count")[random.integers(2)]
        named = ("color", "shape", "both")[random.integers(3 if kind == "exists" else 2)]
        item = scene.objects[random.integers(len(scene.objects))]
        color, shape = item.color, item.shape
        if random.random() < 0.4:
            color, shape = tuple(COLORS)[random.integers(len(COLORS))], SHAPES[random.integers(len(SHAPES))]
        asked = Question(kind, color if named != "shape" else None, shape if named != "color" else None)
        if asked.answer(scene.objects) is not None:
            questions.append(asked)
    return questions


def loss_of(model: BlipForQuestionAnswering, tokenizer: BertTokenizer, batch: Batch) -> Float[torch.Tensor, ""]:
    """Cross entropy of ``answer [SEP]`` after ``[DEC]``, in nats a token.

    HF's own loss takes the labels for the decoder's inputs, whose first token is [CLS]; generation starts at [DEC].
    """
    images = model.vision_model(batch.pixel_values).last_hidden_state[batch.pictures]
    asked = tokenizer(batch.questions, padding=True, return_tensors="pt")
    states = model.text_encoder(
        asked.input_ids, attention_mask=asked.attention_mask, encoder_hidden_states=images
    ).last_hidden_state
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(batch.answers))
    start = torch.full_like(answers, model.decoder_start_token_id)
    end = torch.full_like(answers, tokenizer.sep_token_id)
    logits = model.text_decoder(torch.stack([start, answers], 1), encoder_hidden_states=states).logits
    return F.cross_entropy(logits.flatten(0, 1), torch.stack([answers, end], 1).flatten())


def parts(batch: Batch, step: int) -> list[Batch]:
    """In every other step, one part for each length of question.

    HF's decoder looks at padded question positions. Trained on padded rows alone, it would come to need them, and a
    question asked alone, or with its padding masked as it should be, would be answered worse.
    """
    if step % 2:
        return [batch]
    lengths = [len(question.split()) for question in batch.questions]
    return [batch.rows([row for row, own in enumerate(lengths) if own == length]) for length in sorted(set(lengths))]


def train(recipe: Recipe, folder: Path, every: int = 500, log=print) -> BlipForQuestionAnswering:
    """Train from nothing, and save into ``folder`` every so many steps and at the end.

    Args:
        every: steps between two checkpoints, each of which is evaluated on 400 samples.
        log: takes one line of text.
    """
    torch.manual_seed(recipe.seed)
    processor, model = build_processor(), build_model(recipe).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_then_cosine(step, recipe))
    images, tokenizer = processor.image_processor, processor.tokenizer
    begun, recent = time.monotonic(), []
    for step, batch in enumerate(batches(recipe, images.image_mean, images.image_std)):
        for part in parts(batch, step):
            share = len(part.answers) / len(batch.answers)
            loss = loss_of(model, tokenizer, part) * share
            loss.backward()
            recent.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (step + 1) % 50 == 0:
            log(f"step {step + 1:5d}  loss {sum(recent) / 50:.4f}  {time.monotonic() - begun:6.0f} s")
            recent.clear()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            save(model, folder)
            model.eval()
            log(str(evaluate(HFModel(model, processor), n=400, seed=EVALUATION_SEED)))
            model.train()
    return model.eval()


def save(model: BlipForQuestionAnswering, folder: Path) -> None:
    """Write model and processor as HF does. The processor is a new one: a used one writes how it was last used."""
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)


class HFModel:
    """The two methods of :class:`hooked_vlm.HookedVLM` that :func:`evaluate` needs, for HF's own model."""

    def __init__(self, model: BlipForQuestionAnswering, processor: BlipProcessor) -> None:
        self.model, self.processor = model, processor

    def prepare(self, images: Sequence, texts: Sequence[str]):
        """Pictures and questions to tensors."""
        return self.processor(images=list(images), text=list(texts), padding=True, return_tensors="pt")

    def generate(self, inputs, max_new_tokens: int = 4) -> list[str]:
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
    table(evaluate(HFModel(model, build_processor()), seed=EVALUATION_SEED))


if __name__ == "__main__":
    main()

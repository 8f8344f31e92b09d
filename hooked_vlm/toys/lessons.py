"""What the toys are asked while they learn: batches of samples with their counterfactuals, and of easier questions.

The same for every architecture; how a question becomes tokens is each one's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from hooked_vlm.data.scene import COLORS, SHAPES, Scene
from hooked_vlm.data.shapes import COUNTS, KINDS, Question, sample
from hooked_vlm.toys.recipe import Recipe

QUESTION_WORDS = "what color shape is the object objects how many are there a ? yes no".split()
REPHRASING_WORDS = (
    "of in this picture image any some an do does you see can which it thing things one and or not".split()
)


def vocabulary(specials: Sequence[str]) -> dict[str, int]:
    """Some special tokens, then every word that a question or an answer can hold, and a few more, with their ids."""
    plurals = [f"{shape}s" for shape in SHAPES]
    words = [*QUESTION_WORDS, *COLORS, *SHAPES, *plurals, *COUNTS, *REPHRASING_WORDS]
    return {word: index for index, word in enumerate(dict.fromkeys([*specials, *words]))}


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
    """Some pictures, and rows that each ask something about one of them; the rows of one picture come together."""

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


def draw_batch(recipe: Recipe, step: int, stage: Stage, images: Any) -> Batch:
    """Samples never seen before. Of each: two pictures and two questions in all pairs, and primers for each picture.

    Args:
        images: the toy's image processor.
    """
    random = np.random.default_rng((recipe.seed, step, 1))
    scenes: list[Scene] = []
    rows: list[tuple[int, Question, str]] = []
    for index in range(recipe.samples_per_step):
        one = sample(recipe.seed, step * recipe.samples_per_step + index, stage.kinds)
        for scene in (one.scene, one.sip.scene):
            primers = [_primer(random, scene, stage) for _ in range(recipe.primers if stage.primers else 0)]
            for asked in (one.asked, one.str_.asked, *primers):
                answer = asked.answer(scene.objects)
                if answer is not None:
                    rows.append((len(scenes), asked, answer))
            scenes.append(scene)
    pictures, questions, answers = zip(*rows, strict=True)
    return Batch(pixel_values(scenes, images), torch.tensor(pictures), list(questions), list(answers))


def pixel_values(scenes: Sequence[Scene], images: Any) -> Float[torch.Tensor, "picture 3 height width"]:
    """What the image processor makes of pictures of the toys' own size, only faster."""
    pixels = np.stack([scene.pixels for scene in scenes]).astype(np.float32) / 255
    values = (pixels - np.float32(images.image_mean)) / np.float32(images.image_std)
    return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()


def _primer(random: np.random.Generator, scene: Scene, stage: Stage) -> Question:
    kind, named = stage.primers[random.integers(len(stage.primers))]
    item = scene.objects[random.integers(len(scene.objects))]
    color, shape = item.color, item.shape
    if random.random() < 0.55:
        color, shape = tuple(COLORS)[random.integers(len(COLORS))], SHAPES[random.integers(len(SHAPES))]
    return Question(kind, None if named == "shape" else color, None if named == "color" else shape)

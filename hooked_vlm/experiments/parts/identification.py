"""Whether a model says what it sees: in a caption, when asked for it, or as the next word (Neo et al. 2025, 4.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.data.samples import Sample, SampleError
from hooked_vlm.edits import Edit
from hooked_vlm.experiments.parts.cases import QUESTION, Case, prepared, ready
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.metrics import Generated, LogitDifference, Position, Probability, ReadsOne, Together, at
from hooked_vlm.models import HookedVLM
from hooked_vlm.sweep import sweep

NAME = "{object}"
"""Where the object's name stands in a prompt."""

EditsOf: TypeAlias = Callable[[VLMInputs], Sequence[Sequence[Edit]]]
"""The runs that are judged, as edit sets of some inputs."""

Says: TypeAlias = Callable[[str, str], bool]
"""Whether a text, the first, says that an object is there, whose name is the second."""


@dataclass(frozen=True, eq=False)
class Judged:
    """What became of one sample in each run."""

    is_right: Sequence[bool]
    texts: Sequence[str]
    """What was said."""
    scores: Float[Tensor, "runs metric"] | None = None
    """Probability of the answer's first token, and its logit less the foil's, where an evaluation measures them."""
    noise_floor: Float[Tensor, " metric"] | None = None


@runtime_checkable
class Evaluation(Protocol):
    """A way of asking for an object."""

    @property
    def prompt(self) -> str:
        """What is asked."""
        ...

    def judge(self, model: HookedVLM, sample: Sample, name: str, edits_of: EditsOf) -> Judged:
        """Ask for an object in each run.

        Raises:
            SampleError: a sample that cannot be asked about.
        """
        ...


@dataclass(frozen=True)
class Said:
    """The object is in what the model writes, greedily.

    Attributes:
        prompt: what is asked; may hold ``{object}`` and ``{question}``.
        says: whether the text says it.
    """

    prompt: str
    says: Says
    max_new_tokens: int = 20

    def judge(self, model: HookedVLM, sample: Sample, name: str, edits_of: EditsOf) -> Judged:
        asked, prompt = _asked(sample, self.prompt, name)
        inputs = prepared(model, asked, prompt=prompt).to(model.device)
        texts: list[str] = []

        def judged(said: list[str]) -> list[float]:
            texts.extend(said)
            return [float(self.says(text, name)) for text in said]

        right = sweep(model, inputs, edits_of(inputs), Generated(judged, self.max_new_tokens), progress=False)
        return Judged(right[:, 0].bool().tolist(), texts)


@dataclass(frozen=True)
class NextToken:
    """The token that the model finds likeliest is the beginning of the sample's answer.

    Attributes:
        prompt: what is asked; may hold ``{object}`` and ``{question}``. Neo et al. begin the answer for the model,
            :data:`IT_IS_A`.
    """

    prompt: str = QUESTION

    def case(self, model: HookedVLM, sample: Sample, name: str) -> Case:
        """The run that is read, and the answer."""
        if sample.answer is None:
            raise SampleError(f"{sample.id} has no answer", "no answer")
        asked, prompt = _asked(sample, self.prompt, name)
        return ready(model, asked, prompt=prompt)

    def judge(self, model: HookedVLM, sample: Sample, name: str, edits_of: EditsOf) -> Judged:
        case = self.case(model, sample, name)
        metric = Together((Probability(case.answer), LogitDifference(case.answer, case.foil), Likeliest()))
        found = sweep(model, case.clean, edits_of(case.clean), metric, progress=False)
        texts = model.decode(found[:, 0, 2:].long())
        right = [begins(text, sample.answer or "") for text in texts]
        return Judged(right, texts, found[:, 0, :2], found.noise_floor[:2])


@dataclass(frozen=True, eq=False)
class Likeliest(ReadsOne):
    """The token that each row finds likeliest, as a number."""

    position: Position = -1

    def __call__(self, logits: Float[Tensor, "b p d_vocab"]) -> Float[Tensor, " b"]:
        return at(logits, self.position).argmax(-1).to(torch.float32)


def mentions(text: str, name: str) -> bool:
    """Whether a text has a name in it, as whole words, in the singular or plural, whatever its case."""
    words = r"\s+".join(map(re.escape, name.split()))
    return bool(words) and re.search(rf"(?<!\w){words}(?:s|es)?(?!\w)", text, re.IGNORECASE) is not None


def says_yes(text: str, name: str = "") -> bool:
    """Whether a text has the word yes in it, whatever its case."""
    return re.search(r"\byes\b", text, re.IGNORECASE) is not None


def begins(token: str, answer: str) -> bool:
    """Whether a token is the beginning of an answer, whatever the case of both."""
    return bool(token.strip()) and answer.strip().lower().startswith(token.strip().lower())


EVALUATIONS: Mapping[str, Evaluation] = {
    "caption": Said("Describe this image.", mentions, max_new_tokens=200),
    "poll": Said(f"Is there a {NAME} in this image?", says_yes, max_new_tokens=10),
    "vqa": NextToken(),
}
"""The paper's three, each by its name; ``vqa`` without the beginning of an answer, which is LLaVA-1.5's own prompt."""

IT_IS_A = f"USER: <image>\n{QUESTION} ASSISTANT: It is a"
"""The paper's prompt for the next token, for LLaVA-1.5."""


def object_name(sample: Sample) -> str:
    """What an object is called: ``meta["object"]``, or else the sample's answer.

    Raises:
        SampleError: it has neither.
    """
    name = sample.meta.get("object", sample.answer)
    if not name:
        raise SampleError(
            f"{sample.id} has neither meta['object'] nor an answer to name its object", "no object's name"
        )
    return str(name)


def evaluations(chosen: Mapping[str, Evaluation] | Sequence[str]) -> dict[str, Evaluation]:
    """Evaluations by name: some of :data:`EVALUATIONS`, or others.

    Raises:
        ValueError: none, or an unknown name.
    """
    if isinstance(chosen, Mapping):
        found = dict(chosen)
    else:
        unknown = [name for name in chosen if name not in EVALUATIONS]
        if unknown or isinstance(chosen, str):
            raise ValueError(f"evaluations are a list of {', '.join(EVALUATIONS)}, or your own by name, not {chosen!r}")
        found = {name: EVALUATIONS[name] for name in chosen}
    if not found:
        raise ValueError("there is nothing to evaluate")
    return found


def _asked(sample: Sample, prompt: str, name: str) -> tuple[Sample, str]:
    """A sample and the prompt that asks for its object. A prompt without its question is a question of its own."""
    text = prompt.replace(NAME, name)
    return (sample, text) if QUESTION in text else (replace(sample, question=text, spans={}), QUESTION)

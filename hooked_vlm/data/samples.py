"""One record for every dataset: a picture, a question, its answer, and what would change it.

Every method of :mod:`hooked_vlm.experiments` is a function of a model and a list of these. What a method needs and a
sample lacks drops the sample, by name and with the reason, or is an error: never a silent zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from hooked_vlm.patches import Region

if TYPE_CHECKING:
    from PIL.Image import Image


SAME_BEGINNING = "answer and foil begin with the same token"
"""What samples are counted under whose answers one token cannot tell apart."""


UNREADABLE = "a picture that cannot be read"
"""What samples are counted under whose picture is damaged, or out of reach."""


class SampleError(ValueError):
    """A sample that a method cannot use; says why. ``kind`` is what such samples are counted under."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind or message


@dataclass(frozen=True, eq=False)
class Sample:
    """One question about one picture, with its counterfactuals.

    Raises:
        SampleError: a span that is no part of the question.
    """

    id: str
    """Its name in its dataset, by which it is reported."""
    image: Any
    """The picture, read when it is needed: a path, an address (``http://``, ``https://``, ``hf://``), what ``prepare``
    takes, or a function that gives it. None for text alone."""
    question: str
    answer: str | None = None
    foil: str | None = None
    """The answer that it is held against: of NOTICE's pairs, what would be right on the counterfactual picture."""
    image_cf: Any = None
    """The picture changed, so that the answer is another (a semantic image pair, SIP)."""
    question_cf: str | None = None
    """The question changed, as many tokens long, so that the answer is another (symmetric token replacement, STR)."""
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Parts of the question by name: (first, one past the last) character. ``subject``, ``constraint``, ``answer``,
    ``foil`` and the like; of a counterfactual question as long in tokens, the same tokens."""
    regions: Mapping[str, Region] = field(default_factory=dict)
    """Parts of the picture by name: a box (left, top, right, bottom) in its pixels, or a mask ``[height width]``."""
    group: str | None = None
    """What it is averaged with: a kind of question, an attribute class, a task."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else its file says."""

    def __post_init__(self) -> None:
        for name, (start, end) in self.spans.items():
            if not 0 <= start < end <= len(self.question):
                raise SampleError(
                    f"the span {name!r} is characters {start} to {end}, and the question {self.question!r} has "
                    f"{len(self.question)}",
                    "a span outside the question",
                )
        for name in ("spans", "regions", "meta"):
            object.__setattr__(self, name, dict(getattr(self, name)))  # its own, whatever becomes of the given one

    def __repr__(self) -> str:
        return f"Sample({self.id!r}, {self.question!r}, answer={self.answer!r})"

    def picture(self) -> Image:
        """The picture: upright, in RGB.

        Raises:
            ImageError: it cannot be had, or read.
            SampleError: there is none.
        """
        return self._loaded("image")

    def picture_cf(self) -> Image:
        """The counterfactual picture; raises as :meth:`picture`."""
        return self._loaded("image_cf")

    def _loaded(self, name: str) -> Image:
        from hooked_vlm.data.pictures import load_picture

        source = getattr(self, name)
        if source is None:
            what = {"image": "picture", "image_cf": "counterfactual picture"}[name]
            raise SampleError(f"{self.id} has no {what}", f"no {what}")
        return load_picture(source, what=f"{name} of {self.id}")

    def text_of(self, span: str) -> str:
        """The words of a span.

        Raises:
            SampleError: it has none of this name.
        """
        if span not in self.spans:
            known = ", ".join(self.spans) or "none"
            raise SampleError(f"{self.id} has no span {span!r}; it has {known}", f"no span {span!r}")
        start, end = self.spans[span]
        return self.question[start:end]


@dataclass(frozen=True)
class Dropped:
    """A sample, or a row of a file, that was left out, and why."""

    id: str
    reason: str
    """What is wrong with it, in full."""
    kind: str
    """What such reasons are counted under."""

    @classmethod
    def of(cls, id: str, error: Exception) -> Dropped:
        reason = str(error)
        return cls(id, reason, getattr(error, "kind", "") or reason)


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """A list of samples that remembers what was left out on the way."""

    samples: tuple[Sample, ...]
    dropped: tuple[Dropped, ...] = ()

    def __init__(self, samples: Iterable[Sample], dropped: Iterable[Dropped] = ()) -> None:
        object.__setattr__(self, "samples", tuple(samples))
        object.__setattr__(self, "dropped", tuple(dropped))

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self.samples[index], self.dropped)
        return self.samples[index]

    def __repr__(self) -> str:
        groups = Counter(sample.group for sample in self.samples if sample.group is not None)
        parts = [f"{len(self)} samples", *(f"{name}: {count}" for name, count in groups.most_common(6))]
        return f"Samples({'; '.join([*parts, *([self.report()] if self.dropped else [])])})"

    def filter(self, keep: Callable[[Sample], bool], kind: str = "filtered") -> Samples:
        """Those that ``keep`` admits; the others are counted as dropped, under ``kind``."""
        kept = [sample for sample in self.samples if keep(sample)]
        ids = {id(sample) for sample in kept}
        left = [Dropped(sample.id, kind, kind) for sample in self.samples if id(sample) not in ids]
        return Samples(kept, (*self.dropped, *left))

    def map(self, change: Callable[[Sample], Sample]) -> Samples:
        """Each changed; those for which ``change`` raises :class:`SampleError` are dropped."""
        changed, left = [], []
        for sample in self.samples:
            try:
                changed.append(change(sample))
            except SampleError as error:
                left.append(Dropped.of(sample.id, error))
        return Samples(changed, (*self.dropped, *left))

    def report(self) -> str:
        """How many were dropped, and why, in a line."""
        kinds = Counter(one.kind for one in self.dropped)
        reasons = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common())
        return f"{len(self.dropped)} dropped ({reasons})" if kinds else "none dropped"


def span_of(question: str, part: str, *, occurrence: int = 0) -> tuple[int, int]:
    """The characters of ``part`` in a question, as whole words, whatever their case.

    Raises:
        SampleError: it does not occur, or not so often.
    """
    from hooked_vlm.inputs import occurrences

    found = occurrences(question, part)
    if occurrence >= len(found):
        raise SampleError(f"{part!r} does not occur in {question!r}", "a phrase that is not in the question")
    return found[occurrence]

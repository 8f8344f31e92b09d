"""Semantic image pairs: another picture on which the question has another answer (Golovanevsky et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from hooked_vlm.data.correct import QUESTION, Match, matcher, told_by
from hooked_vlm.data.pairs.editing import Edits, Prompt
from hooked_vlm.data.pairs.editors import ImageEditor
from hooked_vlm.data.pairs.likeness import Avoid, Likeness
from hooked_vlm.data.samples import UNREADABLE, Dropped, Sample, SampleError, Samples
from hooked_vlm.data.shapes import ShapesSample
from hooked_vlm.models import HookedVLM
from hooked_vlm.processing import ImageError
from hooked_vlm.progress import track

if TYPE_CHECKING:
    from PIL.Image import Image


def make_sip(
    samples: Iterable[Sample | ShapesSample],
    *,
    by: tuple[str, str] = ("attribute", "noun"),
    avoid: Avoid | None = None,
    symmetric: bool = True,
    same_size: bool = False,
    editor: ImageEditor | None = None,
    region: str = "object",
    prompt: Prompt = "a {foil} {noun}",
    dilate: int = 0,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Samples:
    """``image_cf`` for each sample: from the dataset, from an editor, or from the shapes generator.

    **From the dataset**: the picture of another sample of the same noun and another attribute, drawn by ``seed`` and
    the sample's id, as NOTICE pairs MIT-States. A sample with a foil gets a picture of which the foil is the attribute;
    one without gets for its foil the other's attribute. ``meta["partner"]`` is the other sample's id.

    **With an editor**: the sample's own picture with a region painted anew. Outside of it the picture stays as it is,
    to the bit. Pictures are edited at once. With ``folder`` they are kept there, under the sample's id and a digest of
    all that they were made from, and found again; else they are held in memory. ``meta["edit"]`` says how.

    **Samples of the shapes generator** (:func:`~hooked_vlm.data.generate`) bring their own pairs.

    Args:
        by: where the attribute and the noun of a sample are: entries of its ``meta``, or else ``"answer"``, ``"foil"``
            or ``"group"``.
        avoid: for each attribute those that are too much like it; ``symmetric``: and the other way round.
        same_size: make the other picture as large as the sample's own. LLaVA-NeXT sees both in the same tiles then.
        region: of the sample's regions, the one that is edited.
        prompt: what the editor is told, with entries of ``meta`` and ``{answer}``, ``{foil}``, ``{question}``; or a
            function of the sample.
        dilate: by how many pixels the region is made larger on every side.

    Returns:
        The samples with their pairs. Dropped are those that lack what is needed, duplicates (the same picture, question
        and answer), and those for which there is no partner, or whose edit changes nothing.
    """
    given = list(samples)
    others = [sample for sample in given if isinstance(sample, Sample)]
    before = samples.dropped if isinstance(samples, Samples) else ()
    likeness = Likeness(avoid, symmetric=symmetric)
    pair: Callable[[Sample], Sample]
    if editor is None:
        pair = _Partners(others, by, likeness, same_size=same_size, seed=seed)
    else:
        pair = Edits(editor, region, prompt, dilate, None if folder is None else Path(folder), seed)
    kept, dropped = [], list(before)
    for sample in track(given, "making pairs", shown=progress):
        if isinstance(sample, ShapesSample):
            kept.append(sample.as_sample())
            continue
        try:
            kept.append(pair(sample))
        except ImageError as error:
            dropped.append(Dropped(sample.id, str(error), UNREADABLE))
        except SampleError as error:
            dropped.append(Dropped.of(sample.id, error))
    return Samples(kept, dropped)


def verify_pairs(
    model: HookedVLM,
    samples: Iterable[Sample],
    *,
    max_new_tokens: int = 10,
    match: Match = "exact",
    batch_size: int = 8,
    prompt: str = QUESTION,
    progress: bool = False,
) -> Samples:
    """The pairs on whose counterfactual picture the model itself says the foil; the arguments are ``keep_correct``'s.

    What it says there is ``meta["generated_cf"]``. Dropped are, each by name: those on which it says something else,
    and those without a foil, or a counterfactual picture that can be read.
    """
    matches = matcher(match)
    kept, dropped = [], list(samples.dropped if isinstance(samples, Samples) else ())
    told = told_by(
        model,
        list(samples),
        lambda sample: (sample.picture_cf(), sample.question),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        prompt=prompt,
        progress=progress,
    )
    for sample, (said, _) in told:
        if isinstance(said, SampleError):
            dropped.append(Dropped.of(sample.id, said))
        elif sample.foil is None:
            dropped.append(Dropped(sample.id, f"{sample.id} has no foil", "no foil"))
        elif not matches(said, sample.foil):
            reason = f"{sample.id}: the model says {said!r} of the other picture, and the foil is {sample.foil!r}"
            dropped.append(Dropped(sample.id, reason, "a foil that the model does not give"))
        else:
            kept.append(replace(sample, meta={**sample.meta, "generated_cf": said}))
    return Samples(kept, dropped)


class _Partners:
    """The samples of each noun, by attribute."""

    def __init__(
        self, samples: Sequence[Sample], by: tuple[str, str], likeness: Likeness, *, same_size: bool, seed: int
    ) -> None:
        self.by, self.likeness, self.same_size, self.seed = by, likeness, same_size, seed
        self._of_noun: dict[str, dict[str, list[Sample]]] = {}
        self._seen: set[tuple[Any, ...]] = set()
        for sample in sorted(samples, key=lambda sample: sample.id):
            with suppress(SampleError):
                attribute, noun = (_entry(sample, key).casefold() for key in by)
                self._of_noun.setdefault(noun, {}).setdefault(attribute, []).append(sample)

    def __call__(self, sample: Sample) -> Sample:
        attribute, noun = (_entry(sample, key) for key in self.by)
        known = (_picture_key(sample), sample.question, sample.answer)
        if known in self._seen:
            raise SampleError(f"{sample.id} has the picture, the question and the answer of another", "a duplicate")
        self._seen.add(known)
        random = Random(f"{self.seed}/{sample.id}")
        partners = self._partners(sample, attribute, noun)
        if not partners:
            wanted = "another attribute" if sample.foil is None else repr(sample.foil)
            raise SampleError(f"{sample.id}: no other {noun!r} is {wanted}, as {attribute!r} is not", "no partner")
        # First the attribute, so that a rare one is as likely as a common one.
        partner = random.choice(partners[random.choice(sorted(partners))])
        return replace(
            sample,
            foil=sample.foil or _entry(partner, self.by[0]),
            image_cf=partial(_resized, partner, sample) if self.same_size else partner.image,
            meta={**sample.meta, "partner": partner.id},
        )

    def _partners(self, sample: Sample, attribute: str, noun: str) -> dict[str, list[Sample]]:
        """Those with the foil's attribute, or any that is unlike the sample's own; never the same picture."""
        found = {
            other: [one for one in own if _picture_key(one) != _picture_key(sample)]
            for other, own in self._of_noun[noun.casefold()].items()
            if not self.likeness.forbids(attribute, other) and other == (sample.foil or other).casefold()
        }
        return {other: own for other, own in found.items() if own}


def _entry(sample: Sample, key: str) -> str:
    value = sample.meta.get(key)
    if value is None and key in ("answer", "foil", "group"):
        value = getattr(sample, key)
    if value is None:
        raise SampleError(f"{sample.id} has no {key!r}", f"no {key!r}")
    return str(value)


def _picture_key(sample: Sample) -> Any:
    """The same for the same picture: where it lies, or which object it is."""
    return str(sample.image) if isinstance(sample.image, (str, Path)) else id(sample.image)


def _resized(partner: Sample, sample: Sample) -> Image:
    """A partner's picture as large as the sample's own."""
    return partner.picture().resize(sample.picture().size)

"""Donors of resampled activations: who may be one, and which positions stand in for which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hooked_vlm import HookedVLM
from hooked_vlm.data import shapes
from hooked_vlm.experiments.ablate import ablate

LD = {"metric": "logit_difference"}
COLORS = shapes(5, seed=7, kinds=("color",))
SAMPLE, MOVER = COLORS[0], "language_model.L1.attn.H1"

# The pages of the documentation run the same code with every signature checked.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def llava():
    return HookedVLM.from_pretrained("toy-llava")


def test_donors_of_the_same_answer_or_another(llava):
    pool = [replace(one, id=str(place)) for place, one in enumerate(COLORS)]
    answers = [SAMPLE.answer, SAMPLE.answer, None, "purple", SAMPLE.answer]
    pool = [replace(one, answer=answer) for one, answer in zip(pool, answers, strict=True)]
    for donors, n in (("same_answer", 3), ("other_answer", 1), ("any", 5)):
        found = ablate(llava, SAMPLE, [MOVER], "resample", reference=pool, donors=donors, draws=9)
        assert int(found.draws.squeeze()) == n
    with pytest.raises(ValueError, match="none of 2 samples can stand in for it"):
        ablate(llava, SAMPLE, [MOVER], "resample", reference=[SAMPLE, pool[2]], donors="same_answer")
    with pytest.raises(ValueError, match="has no answer that donors could share"):
        ablate(llava, pool[2], [MOVER], "resample", reference=pool, donors="other_answer", scored="own")


def test_donors_by_role_may_be_of_another_length(llava):
    longer = replace(SAMPLE, id="longer", question="what color is the is the circle ?", spans={})
    shorter = replace(SAMPLE, id="shorter", question="what color is the circle ?", spans={})
    with pytest.raises(ValueError, match="none of 1 samples"):
        ablate(llava, shorter, [MOVER], "resample", reference=[longer])
    found = ablate(llava, shorter, [MOVER], "resample", reference=[longer], by="role")
    assert abs(float(found.effect.sel(LD).squeeze())) > 1e-3
    with pytest.raises(ValueError, match="none of 1 samples"):  # it has "the (2)", which the other lacks
        ablate(llava, longer, [MOVER], "resample", reference=[shorter], by="role")


def test_what_a_sample_is_given_does_not_depend_on_those_beside_it(llava):
    options = {"how": "resample", "reference": COLORS, "draws": 2, "seed": 5}
    together = ablate(llava, COLORS[:3], [MOVER], **options)
    for sample in COLORS[:3]:
        alone = ablate(llava, sample, [MOVER], **options)
        assert np.allclose(together.sel(sample=sample.id).ablated, alone.ablated.isel(sample=0), atol=1e-5)
    again = ablate(llava, COLORS[:3], [MOVER], **{**options, "seed": 6})
    assert not np.allclose(together.ablated, again.ablated, atol=1e-3)

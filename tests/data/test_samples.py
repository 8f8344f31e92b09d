"""Samples and lists of them: what is wrong is said, what is left out is counted, what was given is kept."""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hooked_vlm.data import Dropped, Sample, SampleError, Samples, shapes, span_of
from hooked_vlm.processing import ImageError

QUESTION = "is the red circle left of the Red square ?"


def made(id="a", **facts) -> Sample:
    return Sample(id, None, QUESTION, **facts)


# One sample -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [(0, 1), (0, len(QUESTION)), (len(QUESTION) - 1, len(QUESTION))])
def test_spans_reach_to_both_ends(span):
    assert made(spans={"part": span}).text_of("part") == QUESTION[slice(*span)]


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 3), (0, len(QUESTION) + 1), (len(QUESTION), len(QUESTION) + 1)])
def test_spans_outside_of_the_question_are_named(span):
    with pytest.raises(SampleError, match=f"'part' is characters {span[0]} to {span[1]}") as error:
        made(spans={"part": span})
    assert error.value.kind == "a span outside the question"


def test_a_span_that_it_lacks_is_named_with_those_that_it_has():
    with pytest.raises(SampleError, match="a has no span 'object'; it has subject, other"):
        made(spans={"subject": (0, 2), "other": (3, 6)}).text_of("object")
    with pytest.raises(SampleError, match="it has none"):
        made().text_of("object")


def test_it_keeps_its_own_copy_of_what_it_was_given():
    spans, meta = {"subject": (0, 2)}, {"n": 1}
    sample = made(spans=spans, meta=meta)
    spans["other"], meta["n"] = (3, 6), 2
    assert dict(sample.spans) == {"subject": (0, 2)}
    assert sample.meta["n"] == 1
    changed = replace(sample, id="b", spans={**sample.spans, "other": (3, 6)})
    assert (sample.id, list(sample.spans), list(changed.spans)) == ("a", ["subject"], ["subject", "other"])
    with pytest.raises(FrozenInstanceError):
        sample.id = "b"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sample: pickle.loads(pickle.dumps(sample))])
def test_it_can_be_copied_and_sent_to_another_process(copied):
    sample = made(
        spans={"subject": (0, 2)}, regions={"box": (0, 0, 3, 3), "mask": np.ones((4, 4), bool)}, meta={"n": 1}
    )
    other = copied(sample)
    assert (other.id, other.question, dict(other.spans), other.meta["n"]) == ("a", QUESTION, {"subject": (0, 2)}, 1)
    assert np.array_equal(other.regions["mask"], sample.regions["mask"])


def test_pictures_are_read_when_they_are_needed(tmp_path):
    picture = Image.new("RGBA", (5, 4), (200, 10, 10, 255))
    picture.save(tmp_path / "one.png")
    for source in (picture, tmp_path / "one.png", str(tmp_path / "one.png"), np.asarray(picture), lambda: picture):
        read = replace(made(), image=source, image_cf=source)
        for one in (read.picture(), read.picture_cf()):
            assert (one.mode, one.size, one.getpixel((0, 0))) == ("RGB", (5, 4), (200, 10, 10))


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for source in (tmp_path / "none.png", tmp_path / "text.png", 3.5):
        for name in ("image", "image_cf"):
            sample = replace(made("the-one"), **{name: source})
            with pytest.raises(ImageError, match=f"{name} of the-one"):
                getattr(sample, {"image": "picture", "image_cf": "picture_cf"}[name])()
    with pytest.raises(SampleError, match="a has no counterfactual picture") as error:
        made().picture_cf()
    assert error.value.kind == "no counterfactual picture"
    with pytest.raises(SampleError, match="a has no picture"):
        made().picture()


def test_a_samples_representation_shows_no_picture():
    assert repr(shapes(1, seed=7)[0]) == "Sample('shapes-7-0', 'is there a yellow triangle ?', answer='yes')"


# Lists ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples():
    groups = ["x", "x", "y", None]
    listed = [made(f"s{place}", group=group) for place, group in enumerate(groups)]
    return Samples(listed, [Dropped("bad", "it is bad", "badness")])


def test_a_list_is_a_sequence_that_remembers_what_was_left_out(samples):
    assert len(samples) == 4
    assert [one.id for one in samples] == ["s0", "s1", "s2", "s3"]
    assert samples[-1].id == "s3"
    assert samples.index(samples[2]) == 2
    part = samples[1:3]
    assert isinstance(part, Samples)
    assert ([one.id for one in part], part.dropped) == (["s1", "s2"], samples.dropped)
    assert len(samples[:0]) == 0
    assert repr(samples) == "Samples(4 samples; x: 2; y: 1; 1 dropped (badness: 1))"
    assert samples.report() == "1 dropped (badness: 1)"
    assert Samples([]).report() == "none dropped"
    with pytest.raises(IndexError):
        samples[4]


def test_filters_count_what_they_leave_out(samples):
    kept = samples.filter(lambda one: one.group == "x", kind="other groups")
    assert [one.id for one in kept] == ["s0", "s1"]
    assert [(one.id, one.kind) for one in kept.dropped] == [
        ("bad", "badness"),
        ("s2", "other groups"),
        ("s3", "other groups"),
    ]
    assert kept.report() == "3 dropped (other groups: 2, badness: 1)"
    assert len(samples) == 4


def test_changes_drop_what_they_cannot_change(samples):
    def change(one):
        if one.group is None:
            raise SampleError(f"{one.id} has no group", "no group")
        return replace(one, group=one.group.upper())

    changed = samples.map(change)
    assert [one.group for one in changed] == ["X", "X", "Y"]
    assert changed.dropped[1:] == (Dropped("s3", "s3 has no group", "no group"),)
    assert [one.group for one in samples] == ["x", "x", "y", None]
    with pytest.raises(KeyError):  # an error of the function's own is no sample's fault
        samples.map(lambda one: {}[one.id])


def test_what_a_sample_is_dropped_for_is_counted_under_its_kind():
    assert Dropped.of("a", SampleError("a: too long", "too long")) == Dropped("a", "a: too long", "too long")
    assert Dropped.of("a", SampleError("too long")) == Dropped("a", "too long", "too long")
    assert Dropped.of("a", ValueError("other")) == Dropped("a", "other", "other")


# Spans ----------------------------------------------------------------------------------------------------------------


def test_spans_are_found_as_whole_words_whatever_their_case():
    assert span_of(QUESTION, "red") == (7, 10)
    assert span_of(QUESTION, "RED", occurrence=1) == (30, 33)
    assert span_of(QUESTION, "red  circle") == (7, 17)
    assert span_of(QUESTION, "?") == (len(QUESTION) - 1, len(QUESTION))
    for part in ("ed", "circ", "blue", "", " "):
        with pytest.raises(SampleError, match="does not occur") as error:
            span_of(QUESTION, part)
        assert error.value.kind == "a phrase that is not in the question"
    with pytest.raises(SampleError, match="does not occur"):
        span_of(QUESTION, "red", occurrence=2)


words = st.lists(st.sampled_from(["a", "is", "it", "cat", "cats", "c++", "(a)", "what's", "?"]), min_size=1, max_size=8)


@settings(max_examples=30)
@given(words, st.data())
def test_what_is_found_is_what_was_looked_for(listed, data):
    question = " ".join(listed)
    start = data.draw(st.integers(0, len(listed) - 1))
    end = data.draw(st.integers(start + 1, len(listed)))
    part = " ".join(listed[start:end])
    first, last = span_of(question, part)
    assert question[first:last] == part
    assert first <= len(" ".join([*listed[:start], ""]))

"""Roles: each position has one, padding has none, and averages over roles are means of what is there."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm import HookedVLM, results
from hooked_vlm.data import Sample, shapes, span_of
from hooked_vlm.experiments.parts.cases import prepared
from hooked_vlm.experiments.parts.found import combine
from hooked_vlm.experiments.parts.roles import by_role, token_roles, with_roles

QUESTION = "is the red circle one of the red things ?"


@pytest.fixture(scope="module")
def toys():
    return {name: HookedVLM.from_pretrained(name) for name in ("toy-blip-vqa", "toy-llava")}


def asked(spans=(), question=QUESTION) -> Sample:
    return Sample("a", shapes(1, seed=7)[0].image, question, spans={name: span_of(question, name) for name in spans})


def roles_of(model, sample, how="template", tower=None) -> list[str]:
    inputs = prepared(model, sample)
    return token_roles(model, inputs, tower or inputs.text_tower, how)


# Templates ------------------------------------------------------------------------------------------------------------


def test_words_of_a_span_have_its_name_and_others_their_own(toys):
    sample = replace(
        asked(), spans={"subject": span_of(QUESTION, "red circle"), "place": span_of(QUESTION, "red things")}
    )
    words = ["is", "the", "subject", "subject", "one", "of", "the (2)", "place", "place", "?"]
    assert roles_of(toys["toy-blip-vqa"], sample) == ["[CLS]", *words, "[SEP]"]
    llava = roles_of(toys["toy-llava"], sample)
    assert llava == ["<s>", "USER:", *["image"] * 36, "\\n", *words, "ASSISTANT:"]


def test_words_that_occur_again_are_counted(toys):
    words = ["is", "the", "red", "circle", "one", "of", "the (2)", "red (2)", "things", "?"]
    assert roles_of(toys["toy-blip-vqa"], asked()) == ["[CLS]", *words, "[SEP]"]
    # The words of a span are no occurrences of their own.
    spans = {"subject": span_of(QUESTION, "red circle")}
    words[2:4], words[7] = ["subject", "subject"], "red"
    assert roles_of(toys["toy-blip-vqa"], replace(asked(), spans=spans)) == ["[CLS]", *words, "[SEP]"]


def test_a_position_in_two_spans_has_the_first_ones(toys):
    spans = {"color": span_of(QUESTION, "red"), "thing": span_of(QUESTION, "red circle")}
    found = roles_of(toys["toy-blip-vqa"], replace(asked(), spans=spans))
    assert found[3:5] == ["color", "thing"]


def test_a_span_called_like_a_word_is_told_apart(toys):
    sample = replace(asked(), spans={"circle": span_of(QUESTION, "red")})
    found = roles_of(toys["toy-blip-vqa"], sample)
    assert found[3] != found[4]


def test_towers_without_the_words(toys):
    blip = toys["toy-blip-vqa"]
    sample = asked(["circle"])
    assert roles_of(blip, sample, tower="answer_decoder") == ["[DEC]"]
    assert roles_of(blip, sample, tower="vision_encoder") == ["[class]", *["image"] * 36]
    assert roles_of(blip, sample, "subject", tower="answer_decoder") == ["[DEC]"]


# Positions, subjects, functions ---------------------------------------------------------------------------------------

SUBJECTS = [
    (("is", 0), ["last subject", "first after subject", *["further"] * 8]),
    (("red", 0), [*["before subject"] * 2, "last subject", "first after subject", *["further"] * 6]),
    (
        ("red circle", 0),
        [*["before subject"] * 2, "first subject", "last subject", "first after subject", *["further"] * 5],
    ),
    (
        ("the red circle one", 0),
        [
            "before subject",
            "first subject",
            *["middle subject"] * 2,
            "last subject",
            "first after subject",
            *["further"] * 4,
        ],
    ),
    (("?", 0), [*["before subject"] * 9, "last subject"]),
]


@pytest.mark.parametrize(("subject", "expected"), SUBJECTS)
def test_roles_by_the_subject(toys, subject, expected):
    """ROME's: a subject of one token is its last; the last token of all has a role of its own."""
    words, occurrence = subject
    sample = replace(asked(), spans={"subject": span_of(QUESTION, words, occurrence=occurrence)})
    assert roles_of(toys["toy-blip-vqa"], sample, "subject") == ["before subject", *expected, "last token"]
    llava = roles_of(toys["toy-llava"], sample, "subject")
    head = ["before subject", "before subject", *["image"] * 36, "before subject"]
    assert llava == [*head, *expected, "last token"]


def test_roles_by_a_subject_need_one(toys):
    for model in toys.values():
        with pytest.raises(ValueError, match="roles by a subject need a span of that name"):
            roles_of(model, asked(["circle"]), "subject")


def test_roles_by_position_and_by_a_function(toys):
    for model in toys.values():
        inputs = prepared(model, asked())
        n_positions = inputs.input_ids.shape[1]
        assert roles_of(model, asked(), "position") == [str(place) for place in range(n_positions)]
        seen = []

        def own(given, tower, tokens, seen=seen):
            seen.append((len(given), tower, len(tokens)))
            return [token[:1] for token in tokens]

        found = token_roles(model, inputs, inputs.text_tower, own)
        assert seen == [(1, inputs.text_tower, n_positions)]
        assert found[-2] == "?"


@pytest.mark.usefixtures("unchecked")
def test_roles_by_what_is_unknown(toys):
    with pytest.raises(ValueError, match="roles are by 'position', 'template' or 'subject', or a function, not 'word'"):
        roles_of(toys["toy-blip-vqa"], asked(), "word")


def test_padding_has_no_role(toys):
    for model in toys.values():
        pictures = [asked().picture()] * 2
        inputs = model.prepare(pictures, ["what color is the circle ?", QUESTION]).rows([0])
        for how in ("template", "position"):
            found = token_roles(model, inputs, inputs.text_tower, how)
            mask = inputs.attention_mask[0].bool().tolist()
            assert [bool(role) for role in found] == mask
            assert not all(mask)


# Results over roles ---------------------------------------------------------------------------------------------------


def made(roles, values, *, sample="a", flags=None, extra=()) -> xr.Dataset:
    """A result of one sample and tower, with a group of positions last."""
    dims = ("sample", "tower", "position")
    n = len(roles)
    variables = {
        "effect": (("metric", *dims), np.array(values, float)[None, None, None]),
        "clean": (("metric", "sample"), [[0.5]]),
    }
    if flags is not None:
        variables["identity"] = (dims, np.array(flags)[None, None])
    coords = {
        "metric": ["p"],
        "sample": [sample],
        "tower": ["t"],
        "position": [*range(n - len(extra)), *extra],
        "token": (dims, np.array([f"w{place}" for place in range(n)])[None, None]),
        "role": (dims, np.array(roles, dtype="<U64")[None, None]),
    }
    return xr.Dataset(variables, coords, {"method": "m"})


role_lists = st.lists(st.sampled_from(["a", "b", "c", "the (2)", ""]), min_size=1, max_size=7)


@settings(max_examples=25)
@given(st.lists(role_lists, min_size=1, max_size=3), st.booleans(), st.randoms(use_true_random=False))
def test_a_role_is_the_mean_of_its_positions(lists, with_flags, random):
    """Of those that a sample has, and that are no NaN; NaN, and false, where it has none."""
    if not any(role for roles in lists for role in roles):
        return
    tables = [
        [(role, random.choice([random.random(), float("nan")]), random.random() < 0.5) for role in roles]
        for roles in lists
    ]
    parts = [
        made(
            [role for role, _, _ in table],
            [value if role else np.nan for role, value, _ in table],
            sample=f"s{place}",
            flags=[flag and bool(role) for role, _, flag in table] if with_flags else None,
        )
        for place, table in enumerate(tables)
    ]
    found = by_role(combine(parts))
    assert set(found.role.values) == {role for roles in lists for role in roles} - {""}
    for place, table in enumerate(tables):
        for role in found.role.values:
            own = [value for name, value, _ in table if name == role and not np.isnan(value)]
            cell = found.isel(sample=place, tower=0, metric=0).sel(role=role)
            assert np.isclose(float(cell.effect), np.mean(own) if own else np.nan, equal_nan=True)
            if with_flags:
                assert bool(cell.identity) == any(flag for name, _, flag in table if name == role)
    assert found.clean.values.tolist() == [[0.5] * len(tables)]
    assert "position" not in found.dims
    assert "token" not in found.coords


def test_roles_stand_in_the_order_of_the_question():
    found = by_role(made(["x", "z", "y", "z", "(all)"], range(5), extra=[-1]))
    assert found.role.values.tolist() == ["x", "z", "y", "(all)"]
    assert found.effect.values.ravel().tolist() == [0.0, 2.0, 2.0, 4.0]


def test_a_result_without_roles():
    with pytest.raises(ValueError, match="no roles: make it of samples"):
        by_role(made(["a"], [1.0]).drop_vars("role"))


def test_over_roles_saved_and_loaded_it_is_the_same(tmp_path):
    result = combine([made(["a", "b", ""], [1, 2, np.nan], flags=[True, False, False])])
    found = by_role(result)
    results.save(found, tmp_path / "roles.nc")
    assert results.load(tmp_path / "roles.nc").identical(found)
    results.save(result, tmp_path / "whole.nc")
    assert by_role(results.load(tmp_path / "whole.nc")).identical(found)


def test_results_get_roles_where_they_have_positions(toys):
    """Groups keep their names, what is not traced has none, and missing positions shift nothing."""
    llava = toys["toy-llava"]
    sample = replace(asked(), spans={"subject": span_of(QUESTION, "red circle")})
    inputs = prepared(llava, sample)
    tokens = llava.position_labels(inputs, "language_model")[0]
    kept = [0, 41, 42, 43, 49]
    labels = [*(tokens[place] for place in kept[:-1]), "", "(image)", "(all)"]
    result = xr.Dataset(
        {"effect": (("sample", "tower", "position"), np.ones((1, 1, 7)))},
        {
            "tower": ["language_model"],
            "position": [*kept, -2, -1],
            "token": (("sample", "tower", "position"), np.array(labels)[None, None]),
        },
    )
    found = with_roles(llava, inputs, result, "template")
    assert found.role.values[0, 0].tolist() == ["<s>", "subject", "subject", "one", "", "(image)", "(all)"]

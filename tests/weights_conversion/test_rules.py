"""The tables of names are bijections: every parameter has its key, every key its parameter, none is left over."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_vlm import HookedVLM
from hooked_vlm.config import BlipConfig
from tests.checkpoints import BIAS, HEAD, HEAD_BIAS, TASKS, WORDS, research_state, state_of
from tests.tiny_blip import Shape, hf_blip
from weights_conversion import Rules
from weights_conversion.blip import BLIP, BLIP_RESEARCH

LAYOUTS = {"hf": (BLIP, state_of), "research": (BLIP_RESEARCH, research_state)}
MOMENTUM = ("visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m.")
QUEUES = {"image_queue", "text_queue", "idx_queue", "ptr_queue", "queue_ptr", "temp"}


def names_and_keys(task: str, layout: str) -> tuple[Rules, set[str], set[str]]:
    """The rules, our parameters' names (tied ones too) and the checkpoint's keys."""
    hf = hf_blip(task, Shape(text=36, text_heads=3, vision=36, vision_heads=3, text_layers=11, vision_layers=12))
    model = HookedVLM.from_hf(hf)
    family, state = LAYOUTS[layout]
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert isinstance(model.config, BlipConfig)
    return family.rules(model.config), names, set(state(hf))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_parameters_and_keys_are_one_to_one(task: str, layout: str) -> None:
    rules, names, keys = names_and_keys(task, layout)
    written = {name: rules.key(name) for name in names}
    assert len(set(written.values())) == len(names)
    for name, key in written.items():
        assert rules.parameter(key) == name
    read = {key: rules.parameter(key) for key in keys}
    assert set(read.values()) - {None} == names
    # One parameter has two keys: HF ties the head's bias to another name.
    assert set(written.values()) == {key for key, name in read.items() if name} - {BIAS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_key_without_a_parameter_is_one_that_is_ignored_and_no_other_is(task: str, layout: str) -> None:
    rules, _, keys = names_and_keys(task, layout)
    for key in keys:
        carries_nothing = key in QUEUES or key.endswith("position_ids") or key.startswith(MOMENTUM)
        assert rules.ignores(key) == (rules.parameter(key) is None) == carries_nothing


def test_of_two_keys_for_one_parameter_the_table_prefers_what_hf_computes_with() -> None:
    rules, _, _ = names_and_keys("vqa", "hf")
    assert rules.rank(HEAD_BIAS) < rules.rank(BIAS)
    assert rules.rank(WORDS) < rules.rank(HEAD)
    assert rules.rank("nonsense") > max(rules.rank(key) for key in (HEAD, BIAS))


RULES = Rules(
    ("outer.{l}.a.*", "ours.{l}.first.*"), ("outer.{l}.a_b.*", "ours.{l}.second.*"), ("x.y", "z"), ignored=("gone.*",)
)
leaf = st.text(string.ascii_lowercase + "._", min_size=1)


@given(layer=st.integers(0, 10**6), rest=leaf, pair=st.sampled_from([("a", "first"), ("a_b", "second")]))
def test_rules_read_both_ways(layer: int, rest: str, pair: tuple[str, str]) -> None:
    key, name = f"outer.{layer}.{pair[0]}.{rest}", f"ours.{layer}.{pair[1]}.{rest}"
    assert RULES.parameter(key) == name
    assert RULES.key(name) == key


@given(st.text())
def test_a_name_that_no_rule_knows_has_no_other(name: str) -> None:
    known = RULES.parameter(name)
    assert known is None or RULES.key(known) == name
    known = RULES.key(name)
    assert known is None or RULES.parameter(known) == name


@pytest.mark.parametrize(
    "key", ["xxy", "x.y.", "x.y\n", "outer.1.a", "outer..a.w", "outer.one.a.w", "outer.1.ab.w", "Gone.x", ""]
)
def test_a_pattern_is_taken_to_the_letter(key: str) -> None:
    assert RULES.parameter(key) is None
    assert not RULES.ignores(key)


def test_tables_add_up() -> None:
    both = RULES + Rules(("p.*", "q.*"), ignored=("more",))
    assert [both.parameter(key) for key in ("x.y", "p.w")] == ["z", "q.w"]
    assert [both.ignores(key) for key in ("gone.w", "more", "p.w")] == [True, True, False]

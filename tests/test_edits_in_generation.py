"""Edits during generation: positions count from the prompt's first, whatever a step reads."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from hooked_vlm import HookedLlava, HookedVLM, VLMInputs, toys
from hooked_vlm.edits import BlockAttention, Edit, Scale, Zero, edit_hooks

SAMPLE = toys.demo_sample()
QUESTIONS = [SAMPLE.question, "is there a red circle ?", "how many circles are there ?"]
EMBEDS = "language_model.hook_merged_embed"
ATTENTION = "language_model.blocks.*.attn"


@cache
def model() -> HookedLlava:
    loaded = HookedVLM.from_pretrained("toy-llava")
    assert isinstance(loaded, HookedLlava)
    return loaded


def inputs() -> VLMInputs:
    return model().prepare(SAMPLE.image, QUESTIONS)


def cases() -> dict[str, list[Edit]]:
    given = inputs()
    box = given.positions_in(SAMPLE.scene.objects[3].box)
    return {
        "a span": [Zero(EMBEDS, positions="image")],
        "another": [Scale("language_model.blocks.2.hook_resid_post", 0.3, positions="last")],
        "keys": [BlockAttention(ATTENTION, keys=box)],
        "queries and keys": [BlockAttention(ATTENTION, positions="last", keys=box)],
        "a place": [Zero("language_model.blocks.0.hook_mlp_out", positions=40)],
        "all": [Scale("language_model.blocks.1.hook_attn_out", 0.5)],
    }


@torch.no_grad()
@pytest.mark.parametrize("case", cases())
def test_the_logits_of_each_step_are_those_of_the_whole_sequence(case: str) -> None:
    given, edits = inputs(), cases()[case]
    chosen = torch.tensor([[5, 9], [7, 3], [11, 12]])
    longer = {
        "input_ids": torch.cat([given.input_ids, chosen], 1),  # type: ignore[list-item]
        "attention_mask": torch.nn.functional.pad(given.attention_mask, (0, 2), value=1),  # type: ignore[arg-type]
        "pixel_values": given.pixel_values,
    }
    with model().hooks(edit_hooks(model(), given, edits)):
        whole = model()(longer)[:, -3:]
        decoding, prompt = model()._start_decoding(model()._inputs(given))
        steps = [decoding.step(prompt), decoding.step(chosen[:, :1]), decoding.step(chosen[:, 1:])]
    for step, logits in enumerate(steps):
        torch.testing.assert_close(logits, whole[:, step], rtol=1e-4, atol=1e-4)


def test_a_mask_of_the_prompt_holds_for_what_follows_it() -> None:
    given = inputs()
    image = given.input_ids == model().config.image_token_id
    answers = []
    for positions in (image, "image"):
        with model().hooks(edit_hooks(model(), given, [Zero(EMBEDS, positions=positions)])):
            answers.append(model().generate(given, max_new_tokens=3, return_type="tokens"))
    assert torch.equal(*answers)


def test_beams_of_a_row_are_edited_as_the_row() -> None:
    given = inputs()
    edits: list[Edit] = [BlockAttention(ATTENTION, positions="last", keys=given.spans["image"])]
    with model().hooks(edit_hooks(model(), given, edits)):
        together = model().generate(given, max_new_tokens=3, num_beams=3)
        alone = []
        for row in range(len(given)):
            one = given.rows([row])
            own: list[Edit] = [BlockAttention(ATTENTION, positions="last", keys=one.spans["image"])]
            alone.append((one, own))
    for row, (one, own) in enumerate(alone):
        with model().hooks(edit_hooks(model(), one, own)):
            assert model().generate(one, max_new_tokens=3, num_beams=3) == [together[row]]


def test_a_forward_after_a_generation_is_edited_from_its_first_position() -> None:
    given = inputs()
    edits: list[Edit] = [Zero(EMBEDS, positions="image")]
    before = model().patch(given, edits)
    model().generate(given, max_new_tokens=3)
    assert torch.equal(model().patch(given, edits), before)

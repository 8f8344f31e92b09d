"""What must hold of any exact sweep, whatever the numbers: identities of patching."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from hooked_vlm import HookedVLM
from hooked_vlm.edits import Add, BlockAttention, Edit, Noise, Replace, Zero
from hooked_vlm.inputs import VLMInputs
from hooked_vlm.sweep import sweep
from tests.sweep.drawing import Sites
from tests.sweep.families import family
from tests.sweep.one_at_a_time import distance
from tests.tiny_llava import IMAGE_ID

pytestmark = pytest.mark.usefixtures("unchecked")

RESIDUALS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


def logits_of(logits: Tensor) -> Tensor:
    return logits


@cache
def corrupted(kind: str, site: str) -> tuple[Sites, Noise]:
    return family(kind, "sdpa"), Noise(site, 1.0, "multiplicative", seed=1)


@torch.no_grad()
def swept(sites: Sites, sets: list[list[Edit]], base: tuple[Edit, ...] = ()) -> Tensor:
    return sweep(sites.model, sites.inputs, sets, logits_of, base=base, progress=False)


@torch.no_grad()
def clean_and_corrupted(sites: Sites, noise: Edit) -> tuple[Tensor, Tensor]:
    clean, wrong = sites.model(sites.inputs), sites.model.patch(sites.inputs, [noise])
    assert distance(wrong, clean) > 0.1
    return clean, wrong


def test_all_of_a_residual_stream_restored_is_the_clean_run() -> None:
    """In any layer of the one stream that leads to the logits."""
    sites, noise = corrupted("llava, one row", "language_model.hook_merged_embed")
    clean, _ = clean_and_corrupted(sites, noise)
    names = [name for name in sites.names if name.startswith("language_model") and name.endswith(RESIDUALS)]
    assert len(names) == 6
    for found in swept(sites, [[Replace(name, sites.clean)] for name in names], (noise,)):
        assert distance(found, clean) <= 1e-5


def test_the_last_state_of_the_last_position_decides_what_comes_next() -> None:
    sites, noise = corrupted("llava, one row", "language_model.hook_merged_embed")
    clean, wrong = clean_and_corrupted(sites, noise)
    (found,) = swept(sites, [[Replace("language_model.blocks.1.hook_resid_post", sites.clean, positions=-1)]], (noise,))
    assert distance(found[:, -1], clean[:, -1]) <= 1e-5
    assert distance(found[:, :-1], wrong[:, :-1]) <= 1e-5


def test_the_last_layer_of_a_question_restored_is_the_clean_run() -> None:
    """An earlier one is not: later layers look at the picture again, which is the corrupted one."""
    sites, noise = corrupted("blip vqa, one row", "vision_encoder.hook_out")
    clean, _ = clean_and_corrupted(sites, noise)
    ends = [f"question_encoder.blocks.{layer}.hook_normalized_resid_post" for layer in range(2)]
    earlier, last = swept(sites, [[Replace(name, sites.clean)] for name in ends], (noise,))
    assert distance(last, clean) <= 1e-5
    assert distance(earlier, clean) > 1e-2


def test_the_last_layer_of_a_decoder_of_one_token_restored_is_the_clean_run() -> None:
    sites, noise = corrupted("blip vqa, [DEC] alone", "vision_encoder.hook_out")
    clean, _ = clean_and_corrupted(sites, noise)
    (found,) = swept(sites, [[Replace("answer_decoder.blocks.1.hook_normalized_resid_post", sites.clean)]], (noise,))
    assert distance(found, clean) <= 1e-5


def test_corrupted_by_nothing_every_score_is_the_clean_runs() -> None:
    sites = family("blip vqa, one row", "eager")
    base = (Noise("vision_encoder.hook_full_embed", 0.0),)
    with torch.no_grad():
        clean = sites.model(sites.inputs)
    for found in swept(sites, [[Replace(name, sites.clean)] for name in sites.names[::5]], base):
        assert distance(found, clean) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "noise", "blind"),
    [
        ("blip vqa, one row", "vision_encoder.hook_out", "question_encoder.blocks.0.hook_attn_out"),
        ("blip vqa, one row", "vision_encoder.hook_out", "question_encoder.blocks.0.cross_attn.hook_q"),
        ("blip vqa, one row", "vision_encoder.hook_out", "answer_decoder.blocks.0.hook_attn_out"),
        ("llava, one row", "projector.hook_out", "language_model.blocks.1.hook_resid_pre"),
    ],
)
def test_what_cannot_see_the_picture_has_no_effect(kind: str, noise: str, blind: str) -> None:
    """Before the first look at it; in a causal tower, positions before its first."""
    sites, corruption = corrupted(kind, noise)
    _, wrong = clean_and_corrupted(sites, corruption)
    before = None
    if kind.startswith("llava"):
        before = range(int((sites.inputs.input_ids[0] == IMAGE_ID).int().argmax()))  # type: ignore[index]
        assert len(before) == 2
    (found,) = swept(sites, [[Replace(blind, sites.clean, positions=before)]], (corruption,))
    assert distance(found, wrong) <= 1e-5


def test_knockouts_of_what_is_not_read_have_no_effect() -> None:
    """Of no edge; of later keys in a causal tower. And of all keys but the query's own: its value is all it gets."""
    sites = family("llava, one row", "sdpa")
    n = sites.clean["language_model.hook_embed"].shape[1]
    layer = "language_model.blocks.1.attn"
    none = torch.zeros(n, dtype=torch.bool)
    unread: list[list[Edit]] = [[BlockAttention(layer, keys=none)], [BlockAttention(layer, positions=none)]]
    unread += [[BlockAttention(layer, positions=3, keys=range(4, n))]]
    with torch.no_grad():
        clean = sites.model(sites.inputs)
    for found in swept(sites, unread):
        assert distance(found, clean) <= 1e-5
    others = [key for key in range(n) if key != 3]
    own_value = sites.clean[f"{layer}.hook_v"][:, 3].repeat_interleave(2, dim=1)  # two heads read each
    alone, put_in = swept(
        sites,
        [
            [BlockAttention(layer, positions=3, keys=others)],
            [Replace(f"{layer}.hook_z", own_value[:, None], positions=3)],
        ],
    )
    assert distance(alone, put_in) <= 1e-5
    assert distance(alone, clean) > 1e-3


@pytest.mark.parametrize("kind", ["blip vqa, padded", "llava, padded"])
@torch.no_grad()
def test_a_row_of_a_batch_is_what_it_is_alone(kind: str) -> None:
    """Rows share a sweep and nothing else; identical rows are identical."""
    sites = family(kind, "sdpa")
    model, inputs = sites.model, sites.inputs
    tower = model.text_towers[0]
    sets: list[list[Edit]] = [
        [Zero(f"{tower}.blocks.0.hook_mlp_out", neurons=[0, 1])],
        [Add("vision_encoder.hook_out", 0.5)],
    ]

    def last_read(run: VLMInputs) -> Tensor:
        mask = run.decoder_attention_mask if model.towers[-1] == "answer_decoder" else run.attention_mask
        assert mask is not None
        last = mask.cumsum(1).argmax(1)
        return sweep(model, run, sets, lambda logits: logits[torch.arange(len(logits)), last], progress=False)

    together = last_read(inputs)
    for row in range(len(inputs)):
        alone = last_read(inputs.rows([row]))
        assert distance(together[:, row], alone[:, 0]) <= 1e-5
        twice = last_read(replace(inputs.rows([row, row]), spans={}))
        assert distance(twice[:, 0], twice[:, 1]) <= 1e-6


@torch.no_grad()
def test_a_sweep_leaves_the_model_as_it_was() -> None:
    sites = family("blip vqa, one row", "eager")
    model: HookedVLM = sites.model
    clean = model(sites.inputs)
    first = swept(sites, [[Zero(name)] for name in sites.names if name.endswith("hook_mlp_out")])
    assert torch.equal(model(sites.inputs), clean)
    assert not any(point.is_hooked for point in model.hook_points())
    assert torch.equal(swept(sites, [[Zero(name)] for name in sites.names if name.endswith("hook_mlp_out")]), first)

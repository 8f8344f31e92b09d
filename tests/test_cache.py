"""The cache: a mapping with short names, and the sums that a residual stream is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_vlm import ActivationCache, HookedVLM
from tests.tiny_blip import hf_blip, inputs

VISION, QUESTION, DECODER = "vision_encoder", "question_encoder", "answer_decoder"


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_hf(hf_blip("vqa"))


@pytest.fixture(scope="module")
def cache(model: HookedVLM) -> ActivationCache:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.run_with_cache(inputs("vqa", batch=2))[1]


# A mapping --------------------------------------------------------------------------------------------------------


def test_it_is_a_mapping_in_forward_order(model: HookedVLM, cache: ActivationCache) -> None:
    assert list(cache) == list(cache.keys()) == model.hook_names
    assert len(cache) == len(list(cache.values())) == len(model.hook_names)
    assert f"{VISION}.hook_out" in cache
    assert f"{VISION}.hook_in" not in cache
    assert cache.get("nothing") is None
    assert cache.towers == (VISION, QUESTION, DECODER)


@pytest.mark.parametrize(
    ("short", "ending"),
    [
        ("resid_pre", "hook_resid_pre"),
        ("resid_mid", "hook_resid_mid"),
        ("resid_mid_cross", "hook_resid_mid_cross"),
        ("resid_post", "hook_resid_post"),
        ("normalized_resid_post", "hook_normalized_resid_post"),
        ("normalized_resid_mid_cross", "hook_normalized_resid_mid_cross"),
        ("attn_in", "hook_attn_in"),
        ("q_input", "hook_q_input"),
        ("cross_attn_in", "hook_cross_attn_in"),
        ("attn_out", "hook_attn_out"),
        ("cross_attn_out", "hook_cross_attn_out"),
        ("mlp_out", "hook_mlp_out"),
        ("q", "attn.hook_q"),
        ("z", "attn.hook_z"),
        ("pattern", "attn.hook_pattern"),
        ("attn_scores", "attn.hook_attn_scores"),
        ("result", "attn.hook_result"),
        ("cross_q", "cross_attn.hook_q"),
        ("cross_pattern", "cross_attn.hook_pattern"),
        ("cross_attn_scores", "cross_attn.hook_attn_scores"),
        ("pre", "mlp.hook_pre"),
        ("post", "mlp.hook_post"),
        ("scale", "ln1.hook_scale"),
        ("ln2.normalized", "ln2.hook_normalized"),
        ("ln_cross.scale", "ln_cross.hook_scale"),
        ("hook_mlp_out", "hook_mlp_out"),
        ("attn.hook_z", "attn.hook_z"),
    ],
)
def test_short_names(cache: ActivationCache, short: str, ending: str) -> None:
    assert (short, 1, QUESTION) in cache
    assert cache[short, 1, QUESTION] is cache[f"{QUESTION}.blocks.1.{ending}"]


def test_every_name_in_a_block_has_a_short_one(model: HookedVLM, cache: ActivationCache) -> None:
    for name in model.hook_names:
        if ".blocks." in name:
            tower, _, layer, ending = name.split(".", 3)
            assert cache[ending, int(layer), tower] is cache[name]


def test_the_tower_may_be_left_out_where_one_alone_has_it(cache: ActivationCache) -> None:
    last_layer_of_vision_alone = cache["resid_post", 2]
    assert last_layer_of_vision_alone is cache[f"{VISION}.blocks.2.hook_resid_post"]
    with pytest.raises(KeyError, match=r"'resid_post' at layer 1 is in several towers; name one of: vision_encoder, "):
        cache["resid_post", 1]
    with pytest.raises(KeyError, match="several towers"):
        cache["cross_q", 0]
    assert ("resid_post", 1) not in cache


def test_what_is_not_there(cache: ActivationCache) -> None:
    with pytest.raises(KeyError, match=r"not in the cache of \d+ activations; nearest: .*blocks.1.hook_mlp_out"):
        cache[f"{QUESTION}.blocks.1.hook_mlpout"]
    with pytest.raises(KeyError, match="question_encoder.blocks.7.hook_resid_post is not in the cache"):
        cache["resid_post", 7, QUESTION]
    assert ("resid_post", 7, QUESTION) not in cache
    assert 3 not in cache
    empty = ActivationCache({})
    with pytest.raises(KeyError, match="cache of 0 activations"):
        empty["resid_post", 0]
    with pytest.raises(KeyError, match="the cache holds none"):
        empty.stack("resid_post")


def test_repr_says_how_many_and_how_much(cache: ActivationCache) -> None:
    assert repr(cache).startswith(f"ActivationCache({len(cache)} activations, ")
    tensor = torch.zeros(2, 3, 1024, 64)
    assert repr(ActivationCache({"a": tensor, "b": tensor[0]})) == "ActivationCache(2 activations, 1.5 MiB)"
    assert ActivationCache({"a": tensor, "b": tensor[0]}).nbytes == tensor.nbytes
    assert ActivationCache({"a": tensor, "b": tensor.clone()}).nbytes == 2 * tensor.nbytes


# Moving and keeping -----------------------------------------------------------------------------------------------


def test_to(cache: ActivationCache) -> None:
    ids = torch.arange(3)
    half = ActivationCache({**cache, "ids": ids}).to(dtype=torch.bfloat16)
    assert half["ids"] is ids
    assert all(half[name].dtype == torch.bfloat16 for name in cache)
    assert {tensor.device.type for tensor in cache.to("meta").values()} == {"meta"}
    assert cache.to(dtype=torch.float64).model is cache.model


def test_remove_batch_dim(model: HookedVLM, cache: ActivationCache) -> None:
    with pytest.raises(ValueError, match=r"a batch of 1, not of \[2\]"):
        cache.remove_batch_dim()
    one = ActivationCache({name: tensor[:1] for name, tensor in cache.items()}, model)
    bare = one.remove_batch_dim()
    assert all(torch.equal(bare[name], cache[name][0]) for name in cache)
    assert not bare.has_batch_dim
    assert bare.remove_batch_dim() is bare
    assert torch.equal(bare.stack_head_results(tower=VISION), one.stack_head_results(tower=VISION)[:, 0])


def test_save_and_load(model: HookedVLM, cache: ActivationCache, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "run.safetensors"
    mixed = ActivationCache(
        {**cache.to(dtype=torch.bfloat16), "last": cache[f"{VISION}.hook_out"].mT, "ids": torch.arange(3)}
    )
    mixed.save(path)
    loaded = ActivationCache.load(path)
    assert list(loaded) == list(mixed)
    assert all(torch.equal(loaded[name], mixed[name]) and loaded[name].dtype == mixed[name].dtype for name in mixed)
    assert loaded.has_batch_dim
    assert [file.name for file in path.parent.iterdir()] == ["run.safetensors"]
    cache.save(path)
    again = ActivationCache.load(path, model)
    assert torch.equal(again.decompose_resid(tower=VISION), cache.decompose_resid(tower=VISION))
    with pytest.raises(ValueError, match="loaded without its model"):
        ActivationCache.load(path).decompose_resid(tower=VISION)


def test_save_and_load_without_a_batch_axis(tmp_path: Path) -> None:
    ActivationCache({"a": torch.ones(3)}, has_batch_dim=False).save(tmp_path / "one")
    assert not ActivationCache.load(tmp_path / "one").has_batch_dim
    ActivationCache({}).save(tmp_path / "none")
    assert len(ActivationCache.load(tmp_path / "none")) == 0


@pytest.mark.parametrize("kept", [0, 4, 200, -100])
def test_a_truncated_file(cache: ActivationCache, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "run.safetensors"
    cache.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"run.safetensors is not a cache: "):
        ActivationCache.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ActivationCache.load(tmp_path / "none")


# The residual stream ----------------------------------------------------------------------------------------------


def test_stack(cache: ActivationCache) -> None:
    stacked = cache.stack("resid_post", VISION)
    assert stacked.shape == (3, 2, 10, 36)
    assert all(torch.equal(stacked[layer], cache["resid_post", layer, VISION]) for layer in range(3))
    assert cache.stack("cross_pattern", QUESTION).shape == (2, 2, 3, 5, 10)
    with pytest.raises(KeyError, match="name a tower: the cache holds vision_encoder, question_encoder"):
        cache.stack("resid_post")
    with pytest.raises(KeyError, match="no layer of 'text_decoder' is in the cache; its towers: vision_encoder"):
        cache.stack("resid_post", "text_decoder")
    some = ActivationCache({name: cache[name] for name in cache if "blocks.1." in name}, cache.model)
    with pytest.raises(KeyError, match="'resid_post' is cached for 1 of 3 layers of vision_encoder"):
        some.stack("resid_post", VISION)


def test_one_tower_needs_no_name(cache: ActivationCache) -> None:
    alone = ActivationCache({name: cache[name] for name in cache if name.startswith(VISION)}, cache.model)
    assert torch.equal(alone.stack("z"), cache.stack("z", VISION))
    assert torch.equal(alone["z", 1], cache["z", 1, VISION])


def test_accumulated_resid_before_layernorms(model: HookedVLM, cache: ActivationCache) -> None:
    stack, labels = cache.accumulated_resid(tower=VISION, return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    names = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(3)), "blocks.2.hook_resid_post"]
    assert torch.equal(stack, torch.stack([cache[f"{VISION}.{name}"] for name in names]))
    stack, labels = cache.accumulated_resid(1, VISION, incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre"]
    assert torch.equal(stack[1], cache["resid_mid", 0, VISION])
    assert len(cache.accumulated_resid(0, VISION)) == 1
    assert torch.equal(cache.accumulated_resid(-1, VISION), cache.accumulated_resid(3, VISION))
    normalized = cache.accumulated_resid(tower=VISION, apply_ln=True)
    assert torch.equal(normalized[-1], cache[f"{VISION}.hook_out"])
    assert torch.equal(normalized[0], model.vision_encoder.ln_post.normalize(cache["resid_pre", 0, VISION]))


@pytest.mark.parametrize("tower", [QUESTION, DECODER])
def test_accumulated_resid_after_layernorms(cache: ActivationCache, tower: str) -> None:
    """What each sub-layer reads: in a post-LN tower, the LayerNorms' outputs."""
    stack, labels = cache.accumulated_resid(tower=tower, incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "0_mid_cross", "1_pre", "1_mid", "1_mid_cross", "final_post"]
    for label, resid in zip(labels, stack, strict=True):
        layer, _, point = label.partition("_")
        reader = {"pre": "attn_in", "mid": "cross_attn_in", "mid_cross": "mlp_in"}.get(point)
        expected = cache[f"{tower}.hook_out"] if layer == "final" else cache[reader, int(layer), tower]
        assert torch.equal(resid, expected), label
    with pytest.raises(ValueError, match=f"{tower} normalises its stream in every layer"):
        cache.accumulated_resid(tower=tower, apply_ln=True)


@given(layer=st.integers(0, 3), mid=st.booleans())
def test_decompose_resid_sums_to_the_stream(cache: ActivationCache, layer: int, mid: bool) -> None:
    """``embed + sum of attn_out + sum of mlp_out = resid``, before every layer and after the last."""
    parts, labels = cache.decompose_resid(layer, VISION, return_labels=True)
    expected = cache.accumulated_resid(layer, VISION, incl_mid=mid)[-1]
    assert labels == ["embed", *(f"{index}_{kind}" for index in range(layer) for kind in ("attn_out", "mlp_out"))]
    torch.testing.assert_close(parts.sum(0), expected, rtol=1e-5, atol=1e-5)


def test_decompose_resid_by_kind(cache: ActivationCache) -> None:
    attn, mlp = (cache.decompose_resid(tower=VISION, mode=mode, incl_embeds=False) for mode in ("attn", "mlp"))
    assert torch.equal(attn, cache.stack("attn_out", VISION))
    assert torch.equal(mlp, cache.stack("mlp_out", VISION))
    assert cache.decompose_resid(tower=VISION, mode="mlp", return_labels=True)[1] == [
        *("embed", "0_mlp_out", "1_mlp_out", "2_mlp_out"),
    ]


@pytest.mark.parametrize("tower", [QUESTION, DECODER])
def test_a_post_ln_stream_is_no_sum(cache: ActivationCache, tower: str) -> None:
    with pytest.raises(ValueError, match=f"{tower} normalises its stream after every sub-layer, so .*no.* sum"):
        cache.decompose_resid(tower=tower)


@pytest.mark.parametrize(("tower", "cross"), [(VISION, False), (QUESTION, False), (QUESTION, True), (DECODER, True)])
def test_head_results_sum_to_what_attention_writes(
    model: HookedVLM, cache: ActivationCache, tower: str, cross: bool
) -> None:
    results, labels = cache.stack_head_results(tower=tower, cross=cross, return_labels=True)
    blocks = model.get_submodule(tower).blocks
    assert labels == [f"L{layer}H{head}" for layer in range(len(blocks)) for head in range(3)]
    for layer, block in enumerate(blocks):
        attention = block.cross_attn if cross else block.attn
        heads = results[3 * layer : 3 * layer + 3]
        total = heads.sum(0) + attention.b_O
        torch.testing.assert_close(
            total, cache["cross_attn_out" if cross else "attn_out", layer, tower], rtol=1e-5, atol=1e-5
        )
        shown = cache["cross_result" if cross else "result", layer, tower]
        torch.testing.assert_close(heads, shown.movedim(2, 0), rtol=1e-5, atol=1e-5)
    assert torch.equal(cache.stack_head_results(1, tower, cross=cross), results[:3])


@pytest.mark.parametrize("layer", [4, -2, 99])
def test_a_layer_that_is_not_there(cache: ActivationCache, layer: int) -> None:
    for method in (cache.accumulated_resid, cache.decompose_resid, cache.stack_head_results):
        with pytest.raises(ValueError, match=f"vision_encoder has 3 layers; there is no layer {layer}"):
            method(layer, VISION)

"""Which sets run together, how many at a time, and what happens where memory is too short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_vlm.edits import Add, BlockAttention, Edit, Function, Scale, Zero
from hooked_vlm.metrics import LogitDifference
from hooked_vlm.sweep import batches, sweep
from hooked_vlm.sweep.batches import Batcher, free_memory, is_out_of_memory
from hooked_vlm.sweep.wave import Wave
from tests.sweep.planned import compiled
from tests.tiny_runs import batch, n_hooks, tiny

pytestmark = pytest.mark.usefixtures("unchecked")

METRIC = LogitDifference(torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10]), position=1)
SCORES = "question_encoder.blocks.0.attn.hook_attn_scores"
MLP = "{}.blocks.{}.hook_mlp_out"


def edit_sets() -> list[list[Edit]]:
    """Some of each kind, in no order."""
    sets: list[list[Edit]] = []
    for position in range(5):
        sets += [
            [Scale(MLP.format("question_encoder", 1), 2.0, positions=[position])],
            [Zero(MLP.format("vision_encoder", 0), positions=[position])],
            [BlockAttention("question_encoder.blocks.0.cross_attn", positions=[position], keys=[1, 2])],
            [Zero("question_encoder.blocks.0.attn.hook_result", positions=[position])],
            [Scale(SCORES, 0.5, positions=[position])],
        ]
        if position < 3:
            sets.append([Add(MLP.format("answer_decoder", 0), 1.0, positions=[position])])
    whole: list[Edit] = [Function(MLP.format("question_encoder", 0), lambda activation, hook: activation.flip(1))]
    return [*sets, whole, [], [*whole, *sets[0]]]


def expected(sets: Sequence[Sequence[Edit]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([METRIC(tiny().patch(batch(), edits)) for edits in sets])


def close(found: Tensor, sets: Sequence[Sequence[Edit]]) -> None:
    torch.testing.assert_close(found, expected(sets), rtol=0, atol=1e-5)


class Sizes:
    """How many sets each wave carries, without the null set; and a memory that has room for so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int = 10**6, error: BaseException | None = None) -> None:
        self.all: list[int] = []
        self.fitting: list[int] = []
        run = Wave.run

        def counted(wave: Wave, *given: Any) -> None:
            size = len(wave.chunk) - 1
            self.all.append(size)
            if size > room:
                raise error if error is not None else torch.OutOfMemoryError("CUDA out of memory.")
            self.fitting.append(size)
            run(wave, *given)

        monkeypatch.setattr(Wave, "run", counted)


# Chunks ---------------------------------------------------------------------------------------------------------------


def chunks_of(sets: Sequence[Sequence[Edit]], batch_size: int | None) -> list[list[Any]]:
    compiler, trail, found = compiled(tiny(), batch(), sets)
    return list(Batcher(compiler, trail, 1).chunks(found, batch_size))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100, None])
def test_every_set_is_in_one_chunk(batch_size: int | None) -> None:
    sets = edit_sets()
    chunks = chunks_of(sets, batch_size)
    assert sorted(one.index for chunk in chunks for one in chunk) == list(range(len(sets)))
    assert all(chunks), "no chunk is empty"
    if batch_size is not None:
        assert max(map(len, chunks)) <= batch_size
        # But for the last of each kind of sets, chunks are full.
        assert sum(len(chunk) < batch_size for chunk in chunks) <= 6


def test_sets_that_need_all_positions_are_apart() -> None:
    """So are those that look at what is large."""
    for chunk in chunks_of(edit_sets(), None):
        assert len({any(isinstance(edit, Function) for edit in all_edits(one)) for one in chunk}) == 1
        assert len({looks_beside(one) for one in chunk}) == 1


def looks_beside(one: Any) -> bool:
    spelled_out = any(isinstance(edit, Scale) for edit in one.edits.get(SCORES, []))
    return spelled_out or any("hook_result" in name for name in one.edits)


def all_edits(one: Any) -> list[Edit]:
    return [edit for edits in one.edits.values() for edit in edits]


def test_chunks_are_as_large_as_memory_admits(monkeypatch: pytest.MonkeyPatch) -> None:
    sets: list[list[Edit]] = [[Zero(MLP.format("question_encoder", 0), positions=[1])] for _ in range(12)]
    assert len(chunks_of(sets, None)) == 1
    numbers = []
    for free in (10**5, 10**6, 4 * 10**6, 10**12):
        monkeypatch.setattr(batches, "free_memory", lambda device, free=free: free)
        found = chunks_of(sets, None)
        assert sum(map(len, found)) == 12
        numbers.append(len(found))
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] == 12, "one set is always tried"
    assert 1 < numbers[1] < 12
    assert numbers[-1] == 1


@pytest.mark.parametrize("batch_size", [1, 2, 5, "auto"])
def test_the_batch_size_changes_no_number(batch_size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The effects come in the order of the sets, too."""
    sizes, sets = Sizes(monkeypatch), edit_sets()
    close(sweep(tiny(), batch(), sets, METRIC, batch_size=batch_size, progress=False), sets)
    assert sum(sizes.all) == len(sets)
    if batch_size != "auto":
        assert max(sizes.all) == batch_size


# Too little memory ----------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."),
    MemoryError(),
]
by_error = pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["accelerator", "linux", "windows", "python"])


@by_error
def test_where_memory_is_short_half_as_many_are_tried(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = edit_sets()[:18]
    sizes = Sizes(monkeypatch, room=2, error=error)
    model, inputs = tiny(), batch()
    clean = model(inputs)
    effects = sweep(model, inputs, sets, METRIC, batch_size=9, progress=False)
    assert sum(sizes.fitting) == len(sets) == 18
    assert max(sizes.fitting) == 2
    assert max(sizes.all) > 2
    assert n_hooks(model) == 0
    assert torch.equal(model(inputs), clean)
    close(effects, sets)


@by_error
def test_a_set_that_does_not_fit_alone(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(monkeypatch, room=0, error=error)
    model, inputs = tiny(), batch()
    with pytest.raises(type(error)) as caught:
        sweep(model, inputs, edit_sets(), METRIC, progress=False)
    assert caught.value is error
    assert sizes.all[-1] == 1
    assert not sizes.fitting
    assert n_hooks(model) == 0


def test_an_error_in_the_middle_of_a_wave_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out inside a block, with hooks on."""
    model, inputs = tiny(), batch()
    sets: list[list[Edit]] = [
        [Scale(MLP.format("question_encoder", 0), factor / 4, positions=[1])] for factor in range(10)
    ]
    clean, alone = model(inputs), sweep(model, inputs, sets, METRIC, progress=False)
    tower: Any = model.get_submodule("question_encoder")
    feed_forward = tower.blocks[1].feed_forward
    failed = []

    def too_large(stream: Tensor) -> Tensor:
        if len(stream) == 1 and stream.shape[1] > 48:
            failed.append(stream.shape[1])
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return feed_forward(stream)

    monkeypatch.setattr(tower.blocks[1], "feed_forward", too_large)
    effects = sweep(model, inputs, sets, METRIC, progress=False)
    assert failed
    torch.testing.assert_close(torch.Tensor(effects), torch.Tensor(alone), rtol=0, atol=1e-5)
    assert n_hooks(model) == 0
    assert torch.equal(model(inputs), clean)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("not enough memory"), KeyError("x")])
def test_other_errors_are_not_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(monkeypatch, room=0, error=error)
    with pytest.raises(type(error)) as caught:
        sweep(tiny(), batch(), edit_sets(), METRIC, progress=False)
    assert caught.value is error
    assert len(sizes.all) == 1
    assert not is_out_of_memory(error)


def test_what_says_that_memory_is_short() -> None:
    assert all(is_out_of_memory(error) for error in OUT_OF_MEMORY)
    assert not is_out_of_memory(KeyboardInterrupt())


def test_some_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the system does not say how much."""
    assert free_memory(torch.device("cpu")) > 2**20

    def unreadable(path: object, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(batches.Path, "read_text", unreadable)
    assert free_memory(torch.device("cpu")) > 2**20

"""A loop whose outcomes are kept: each sample's turn once, whatever comes of it, and what is damaged again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from hooked_vlm.data import Dropped, Sample, SampleError
from hooked_vlm.experiments.parts.found import Found
from hooked_vlm.experiments.parts.loop import Failed, Loop, Outcome, current_loop, going_through
from hooked_vlm.runs import kept
from hooked_vlm.runs.kept import LONGEST, KeptLoop, NothingLeft
from hooked_vlm.runs.records import Kept, Records, encoded
from tests.runs.disturbed import numbers_of

NAMES = ("a", "b/c", "é 🟥 \n", "../d", "e" * 500)


def samples(names: Sequence[str] = NAMES) -> list[Sample]:
    return [Sample(name, None, "what ?", group="g") for name in names]


@dataclass
class Method:
    """What is done with a sample: it is counted, and some end in errors."""

    errors: dict[str, BaseException] = field(default_factory=dict)
    turns: list[str] = field(default_factory=list)

    def __call__(self, sample: Sample) -> Found:
        self.turns.append(sample.id)
        if sample.id in self.errors:
            raise self.errors[sample.id]
        return Found.of(numbers_of(sample.id))


def same(ones: Sequence[Outcome], others: Sequence[Outcome]) -> bool:
    return [encoded(Kept(one, 0.0)) for one in ones] == [encoded(Kept(other, 0.0)) for other in others]


def test_each_sample_has_one_turn_and_what_comes_of_it_is_what_comes_of_it_in_a_plain_loop(tmp_path: Path) -> None:
    method = Method({"b/c": SampleError("nothing to see", "blank")})
    plain = Loop().outcomes("", samples(), Method(method.errors))
    for _ in range(2):
        assert same(KeptLoop(tmp_path).outcomes("", samples(), method), plain)
    assert method.turns == list(NAMES)
    assert plain[1] == Dropped("b/c", "nothing to see", "blank")
    assert len(Records(tmp_path).finished()) == 5


def test_a_loop_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """A sample that is interrupted leaves nothing; what took its time once counts once."""
    method = Method({"../d": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        KeptLoop(tmp_path).outcomes("", samples(), method)
    assert [path.name for path in sorted(tmp_path.rglob("*.*"))] == [f"{number:06d}.record" for number in range(3)]
    method.errors.clear()
    loop = KeptLoop(tmp_path)
    found = loop.outcomes("", samples(), method)
    assert [str(one.variables["sample"][1][0]) for one in found if isinstance(one, Found)] == list(NAMES)
    assert method.turns == [*NAMES[:4], *NAMES[3:]]
    assert loop.seconds == sum(Records(tmp_path).read(number).seconds for number in range(5)) > 0


def test_a_sample_that_fails_is_kept_with_its_error(tmp_path: Path) -> None:
    method = Method(
        {"a": RuntimeError("no luck"), "../d": MemoryError(), "b/c": torch.cuda.OutOfMemoryError("CUDA out")}
    )
    found = KeptLoop(tmp_path).outcomes("", samples(), method)
    failed = [one for one in found if isinstance(one, Failed)]
    assert [(one.id, one.reason, one.kind) for one in failed] == [
        ("a", "RuntimeError: no luck", "RuntimeError"),
        ("b/c", "torch.OutOfMemoryError: CUDA out", "OutOfMemoryError"),
        ("../d", "MemoryError", "MemoryError"),
    ]
    assert "raise self.errors[sample.id]\nRuntimeError: no luck" in failed[0].traceback
    assert same(KeptLoop(tmp_path).outcomes("", samples(), method), found)
    assert len(method.turns) == 5


class _SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("kind", [RuntimeError, SampleError])
def test_messages_are_as_long_as_anybody_reads_and_can_be_written(kind: type[Exception], tmp_path: Path) -> None:
    errors = {"a": kind("x" * 10_000_000), "b/c": kind("half a pair: \ud83d, nothing: \0"), "../d": _SilentError()}
    found = KeptLoop(tmp_path).outcomes("", samples(), Method(errors))
    told = {one.id: one for one in found if isinstance(one, Dropped)}
    assert all(len(text) < LONGEST + 10 for one in told.values() for text in (one.reason, one.kind))
    assert told["a"].reason.endswith("x" * (LONGEST // 2))
    assert told["b/c"].reason.endswith("half a pair: \\ud83d, nothing: \0")
    assert told["../d"].kind == "_SilentError"
    assert max(path.stat().st_size for path in tmp_path.rglob("*.record")) < 10 * LONGEST


def _behind(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        _behind(SampleError("a picture that cannot be kept"), OSError(errno.ENOSPC, "No space left on device")),
    ],
    ids=lambda error: str(error)[:20],
)
def test_what_ends_every_turn_ends_the_run(error: Exception, tmp_path: Path) -> None:
    """A full disk, or a device that has died, is no sample's fault, and is not kept as such."""
    method = Method({"b/c": error})
    with pytest.raises(type(error)) as raised:
        KeptLoop(tmp_path).outcomes("", samples(), method)
    assert raised.value is error
    assert Records(tmp_path).finished() == {0}
    method.errors.clear()
    assert len(KeptLoop(tmp_path).outcomes("", samples(), method)) == 5
    assert method.turns == ["a", *NAMES[1:2], *NAMES[1:]]


def test_damaged_records_are_told_of_and_done_again(tmp_path: Path) -> None:
    first, again, told = Method(), Method(), list[str]()
    found = KeptLoop(tmp_path).outcomes("", samples(), first)
    paths = [Records(tmp_path).path(number) for number in range(5)]
    paths[0].write_bytes(paths[1].read_bytes())
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    paths[3].unlink()
    (paths[3] / "folder").mkdir(parents=True)
    assert same(KeptLoop(tmp_path, told=told.append).outcomes("", samples(), again), found)
    assert again.turns == list(NAMES[:4])
    assert told == [
        f"{paths[0]} is of 'b/c', not of 'a'; a is done again",
        f"{paths[1]} is damaged: it is not what was written; b/c is done again",
        f"{paths[2]} is damaged: it is not what was written; {NAMES[2]} is done again",
        f"{paths[3]} is a folder; ../d is done again",
    ]
    assert same(KeptLoop(tmp_path).outcomes("", samples(), Method({"a": ValueError()})), found)


def test_only_what_failed_is_done_again(tmp_path: Path) -> None:
    method = Method({"a": RuntimeError("no luck"), "b/c": SampleError("nothing to see"), "../d": RuntimeError("ever")})
    KeptLoop(tmp_path).outcomes("", samples(), method)
    method.turns.clear()
    del method.errors["a"]
    found = KeptLoop(tmp_path, retry_failed=True).outcomes("", samples(), method)
    assert method.turns == ["a", "../d"]
    assert [type(one) for one in found] == [Found, Dropped, Found, Failed, Found]
    assert same(KeptLoop(tmp_path).outcomes("", samples(), method), found)


def test_a_sample_is_kept_under_its_place_among_all(tmp_path: Path) -> None:
    """Whichever of them a step goes through: one that comes back shifts none."""
    numbers = {name: number for number, name in enumerate(NAMES)}
    method = Method()
    KeptLoop(tmp_path, numbers=numbers).outcomes("", samples(NAMES[::2]), method)
    assert Records(tmp_path).finished() == {0, 2, 4}
    KeptLoop(tmp_path, numbers=numbers).outcomes("", samples(NAMES), method)
    assert method.turns == [*NAMES[::2], *NAMES[1::2]]
    # Samples of a method's own making come after all others.
    KeptLoop(tmp_path, numbers=numbers).outcomes("", samples(("made of a", "a", "made of b")), method)
    assert method.turns[5:] == ["made of a", "made of b"]
    assert Records(tmp_path).finished() == {0, 1, 2, 3, 4, 5, 7}


def test_a_method_may_go_through_samples_twice(tmp_path: Path) -> None:
    first, second = Method(), Method()
    for _ in range(2):
        loop = KeptLoop(tmp_path)
        loop.outcomes("", samples(), first)
        loop.outcomes("", samples()[:2], second)
    assert (len(first.turns), len(second.turns)) == (5, 2)
    assert Records(tmp_path / "pass-2").finished() == {0, 1}


def test_methods_within_a_turn_go_their_own_way(tmp_path: Path) -> None:
    def one(sample: Sample) -> Found:
        current_loop().outcomes("", samples(("inner",)), Method())
        assert current_loop().once("inner", lambda: 1, lambda one, path: path.touch(), lambda path: 0) == 1
        return Found.of(numbers_of(sample.id))

    loop = KeptLoop(tmp_path)
    with going_through(loop):
        current_loop().outcomes("", samples(), one)
        assert current_loop() is loop
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 5


def test_who_helps_leaves_when_others_are_at_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method()
    with Records(tmp_path).claim(1), pytest.raises(NothingLeft):
        KeptLoop(tmp_path, is_helper=True).outcomes("", samples(), method)
    assert method.turns == ["a", *NAMES[2:]]


def test_who_does_not_help_waits_for_what_others_are_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, records, claim = Method(), Records(tmp_path), ExitStack()
    claim.enter_context(records.claim(1))
    done = encoded(kept.turn(samples()[1], Method()))

    def sleep(seconds: float) -> None:
        """The other process ends its turn meanwhile."""
        records.write(1, done)
        claim.close()

    monkeypatch.setattr(kept.time, "sleep", sleep)
    found = KeptLoop(tmp_path).outcomes("", samples(), method)
    assert method.turns == ["a", *NAMES[2:]]
    assert same(found, Loop().outcomes("", samples(), Method()))


def _save(text: str, path: Path) -> None:
    path.write_text(text)


def test_what_is_made_once_is_kept_and_made_again_when_damaged(tmp_path: Path) -> None:
    made, told = [], list[str]()

    def once(make: Callable[[], str] = lambda: made.append(1) or "whole") -> str:  # type: ignore[func-returns-value]
        return KeptLoop(tmp_path, told=told.append).once("mean", make, _save, lambda path: path.read_text() + "!")

    def fails() -> str:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        once(fails)
    assert [once(), once(), len(made)] == ["whole!", "whole!", 1]
    path = tmp_path / "shared" / "mean.safetensors"
    path.write_text("half")
    (tmp_path / "shared" / ".mean-abcd1234.safetensors").write_text("of a process that was killed")
    assert [once(), len(made)] == ["whole!", 2]
    assert told == [f"{path} is not what was written; it is made again"]
    path.with_suffix(".sha256").write_bytes(b"\xff")
    assert [once(), len(made)] == ["whole!", 3]
    path.with_suffix(".sha256").unlink()
    path.unlink()
    path.mkdir()
    assert [once(), len(made)] == ["whole!", 4]
    assert sorted(os.listdir(tmp_path / "shared")) == ["mean.lock", "mean.safetensors", "mean.sha256"]


def test_a_full_disk_is_one_error_whoever_writes(tmp_path: Path) -> None:
    def save(made: object, path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="mean.safetensors cannot be written: .*No space left on device"):
        KeptLoop(tmp_path).once("mean", lambda: 1, save, lambda path: 1)

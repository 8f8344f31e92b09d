"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hooked_vlm.files import remove, tidy, whole_file, whole_folder


class BrokenError(Exception):
    pass


def break_off(temporary: Path) -> NoReturn:
    """What a writer does that fails after half of its work."""
    fill(temporary) if temporary.is_dir() else temporary.write_text("half")
    raise BrokenError


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["result.nc", "deep/er/result.nc", "noextension"])
def test_a_file_appears_when_it_is_whole(name: str, tmp_path: Path) -> None:
    with whole_file(tmp_path / name) as temporary:
        temporary.write_text("half")
        assert not (tmp_path / name).exists()
        assert temporary.suffix == Path(name).suffix
        temporary.write_text("whole")
    assert (tmp_path / name).read_text() == "whole"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its name after: a machine that dies leaves what was there, or all of the new."""
    flushed, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        flushed.append((is_folder, os.fstat(descriptor).st_size, (tmp_path / "new").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with whole_file(tmp_path / "new") as temporary:
        temporary.write_text("whole")
    assert flushed[0] == (False, 5, False)
    assert (flushed[1][0], flushed[1][2]) == (True, True)


def test_what_a_killed_process_left_goes_and_all_else_stays(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a b.nc") as file, whole_folder(tmp_path / "c.d") as folder, whole_file(tmp_path / "e"):
        killed = [file, folder, *tmp_path.glob(".e-*")]
        for name in (".hidden", ".nfs00000000046c0", "mine-abcd1234.nc", ".lock", ".e-short", ".e-abcd1234.nc.part"):
            (tmp_path / name).touch()
        (folder / "inner").touch()
        before = files_below(tmp_path)
        tidy(tmp_path)
        assert len(killed) == 3
        gone = {path.relative_to(tmp_path).as_posix() for path in (*killed, folder / "inner")}
        assert files_below(tmp_path) == before - gone
        for path in (folder, folder / "inner", file, *killed[2:]):
            path.mkdir() if path == folder else path.touch()
    tidy(tmp_path / "missing")


def test_a_file_or_a_folder_is_removed_if_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("link", "file", "missing"):
        remove(tmp_path / name)
    assert files_below(tmp_path) == {"folder", "folder/inner"}
    remove(tmp_path / "folder")
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("name", ["old", "new", "deep/er/new"])
def test_a_file_that_fails_leaves_all_as_it_was(name: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("before")
    with pytest.raises(BrokenError), whole_file(tmp_path / name) as temporary:
        break_off(temporary)
    assert files_below(tmp_path) == {"old"}
    assert (tmp_path / "old").read_text() == "before"


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder, not a file"), whole_file(tmp_path):
        pass
    assert files_below(tmp_path) == set()


def fill(folder: Path) -> None:
    (folder / "a").write_text("new")
    (folder / "inner").mkdir()
    (folder / "inner" / "b").write_text("new")


@pytest.mark.parametrize("name", ["new", "deep/er/new"])
def test_a_folder_appears_when_it_is_whole(name: str, tmp_path: Path) -> None:
    with whole_folder(tmp_path / name) as temporary:
        fill(temporary)
        assert not (tmp_path / name).exists()
    assert files_below(tmp_path / name) == {"a", "inner", "inner/b"}
    assert len(list((tmp_path / name).parent.iterdir())) == 1


def test_files_move_into_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b", "inner/mine", "mine", "stale-1", "stale-2"):
        (tmp_path / name).write_text("before")
    with whole_folder(tmp_path, replacing=["stale-*", "a"]) as temporary:
        fill(temporary)
        (temporary / "stale-2").write_text("new")
        assert (tmp_path / "a").read_text() == "before"
    assert files_below(tmp_path) == {"a", "inner", "inner/b", "inner/mine", "mine", "stale-2"}
    new = {name for name in ("a", "inner/b", "inner/mine", "mine", "stale-2") if (tmp_path / name).read_text() == "new"}
    assert new == {"a", "inner/b", "stale-2"}


@pytest.mark.parametrize("name", [".", "new", "deep/er/new"])
def test_a_folder_that_fails_leaves_all_as_it_was(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(BrokenError), whole_folder(tmp_path / name, replacing=["a"]) as temporary:
        break_off(temporary)
    assert files_below(tmp_path) == {"a"}
    assert (tmp_path / "a").read_text() == "before"


def test_only_stale_files_go(tmp_path: Path) -> None:
    """A pattern may match folders, what is being written, and the folder that it is being written in."""
    (tmp_path / "folder").mkdir()
    for name in ("stale", "folder/stale"):
        (tmp_path / name).write_text("before")
    with whole_folder(tmp_path, replacing=["*", "**/*"]) as temporary:
        fill(temporary)
    assert files_below(tmp_path) == {"a", "inner", "inner/b", "folder"}


@pytest.mark.parametrize(("name", "is_folder"), [("a", True), ("inner/b", True), ("inner", False)])
def test_nothing_moves_where_something_is_in_the_way(name: str, is_folder: bool, tmp_path: Path) -> None:
    if is_folder:
        (tmp_path / name).mkdir(parents=True)
    else:
        (tmp_path / name).write_text("before")
    (tmp_path / "stale").write_text("before")
    before = files_below(tmp_path)
    with (
        pytest.raises(FileExistsError, match="is in the way"),
        whole_folder(tmp_path, replacing=["stale"]) as temporary,
    ):
        fill(temporary)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_full_disk_when_the_old_is_replaced(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"), whole(tmp_path / "deep" / "new") as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("new")
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_file_where_a_folder_should_be(whole: Any, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("before")
    with pytest.raises((FileExistsError, NotADirectoryError)), whole(tmp_path / "old" / "new"):
        pass
    assert files_below(tmp_path) == {"old"}


def test_an_interruption_is_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "BrokenError", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "new") as temporary:
        break_off(temporary)
    assert files_below(tmp_path) == set()


def test_an_existing_folder_is_written_from_within(tmp_path: Path) -> None:
    """Its parent may be closed to us, or another disk."""
    (tmp_path / "mine").mkdir()
    with whole_folder(tmp_path / "mine") as temporary:
        assert temporary.parent == tmp_path / "mine"
        fill(temporary)
    assert files_below(tmp_path) == {"mine", "mine/a", "mine/inner", "mine/inner/b"}


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_modes_are_those_of_any_other_file(umask: int, folder: int, file: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "new") as temporary:
            fill(temporary)
        with whole_file(tmp_path / "file") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"new": folder, "inner": folder, "a": file, "b": file, "file": file}

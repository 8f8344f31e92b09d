"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\..*-[a-z0-9_]{8}(\.[^.]*)?")
"""What :mod:`tempfile` makes of our prefixes and suffixes."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes ``path``'s place when the block ends without an error."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    with _present(path.parent):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            _make_readable(temporary)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | Path, *, replacing: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder to fill; it becomes ``folder`` when the block ends without an error.

    Where ``folder`` exists, the files move into it, and those there that match a pattern of ``replacing`` go.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder")
    # Inside an existing folder: that is where we may write, and it may be a disk of its own.
    room = folder if folder.exists() else folder.parent
    with _present(room):
        temporary = Path(tempfile.mkdtemp(dir=room, prefix=f".{folder.name}-"))
        try:
            yield temporary
            for path in (temporary, *temporary.rglob("*")):
                _make_readable(path)
            if room == folder:
                _move_files(temporary, folder, replacing)
            else:
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what processes that were killed left of files that they were writing here; none may be at it now."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move_files(source: Path, target: Path, replacing: Iterable[str]) -> None:
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    matching = {path for pattern in replacing for path in target.glob(pattern) if path.is_file()}
    stale = {path.relative_to(target) for path in matching if source not in path.parents} - set(files)
    in_the_way = [target / file for file in files if (target / file).is_dir()]
    in_the_way += [target / parent for file in files for parent in file.parents if (target / parent).is_file()]
    if in_the_way:
        raise FileExistsError(f"{in_the_way[0]} is in the way of what is to be written to {target}")
    for file in sorted(files):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)
    for file in stale:
        (target / file).unlink()


@contextmanager
def _present(folder: Path) -> Iterator[None]:
    """``folder`` is there, made where it was missing, and unmade when the block fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def _flush(path: Path) -> None:
    """Through to the disk: a machine that dies must not leave a file of the right name and length, and empty."""
    # Not every system, nor every file system, opens or flushes a folder.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _make_readable(path: Path) -> None:
    # Temporary files are made private; what we write should be as readable as any other file.
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

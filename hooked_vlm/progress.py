"""One progress bar for everything that takes a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str, *, shown: bool) -> Generator[Item, None, None]:
    """``items``, under a bar with the time left, which goes away when it is done."""
    if not shown:
        yield from items
        return
    with counted(description, len(items), shown=True) as count:
        for done, item in enumerate(items, start=1):
            yield item
            count(done)


@contextmanager
def counted(
    description: str, total: int, *, done: int = 0, shown: bool, every: float = 60.0
) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` things, of which ``done`` are done; to be told how many are.

    Where there is no terminal, a line every so many seconds in its place, for a log.
    """
    if not shown:
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console.print, description, total, done, every)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda number: bar.update(task, completed=number)


def _lines(
    write: Callable[[str], None], description: str, total: int, done: int, every: float
) -> Callable[[int], None]:
    started = said = time.monotonic()

    def count(number: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= every and number > done:
            said = now
            left = (now - started) / (number - done) * (total - number)
            write(f"{description}: {number} of {total}, {left / 60:.0f} min left")

    return count

"""Bars on the terminal for work that takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

Shows = Callable[[int, int], None]
"""Is told how much is done, and how much there is."""


@contextmanager
def shown(*stages: str) -> Iterator[tuple[Shows, ...]]:
    """A function for each stage, which gets a bar of its own when it is first called; the first one at once.

    On stderr, and only where that is a terminal: not in what is piped on.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:

        def shows(what: str, *, visible: bool) -> Shows:
            task = bar.add_task(what, total=None, visible=visible)

            def show(done: int, there: int) -> None:
                bar.update(task, completed=done, total=there, visible=True)

            return show

        yield tuple(shows(what, visible=index == 0) for index, what in enumerate(stages))

"""A bar on the terminal for work that takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def shown(what: str) -> Iterator[Callable[[int, int], None]]:
    """What shows how much is done, and how much there is; on a terminal only, and not in what is piped on."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, there: int) -> None:
            bar.update(task, completed=done, total=there)

        yield show

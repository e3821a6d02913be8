"""Options that commands have in common, and how one of a few values is asked for and completed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_adam import settings

MODEL, OPTIMIZER, RANKS, WORK, OUTPUT = "The model", "The optimizer", "Ranks and memory", "The run", "Output"
"""Groups of options in ``--help``."""

MOMENTS = settings.CHOICES["moments"]
UPDATES = settings.CHOICES["low_precision_update"]
MASTER_BITS = settings.CHOICES["master_bits"]
NONFINITE = settings.CHOICES["nonfinite"]
BACKENDS = settings.CHOICES["backend"]
OFFLOAD = ("cpu",)


def choice(values: Sequence[object], about: str, group: str | None = None, *names: str, **more: Any) -> Any:
    """An option that takes one of a few values: they stand in its help, and the shell completes them.

    Whether one is accepted says the part of the package that takes it, in the words that the library has for it.
    """
    words = [str(value) for value in values if value is not None]

    def fitting(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    about = f"{about} One of: {', '.join(words)}."
    return typer.Option(*names, help=about, rich_help_panel=group, autocompletion=fitting, **more)


def option(about: str, group: str | None = None, *names: str, **more: Any) -> Any:
    """Any other option."""
    return typer.Option(*names, help=about, rich_help_panel=group, **more)


AsJson = Annotated[bool, option("Print one JSON object, for scripts.", OUTPUT, "--json")]
Sources = Annotated[
    list[Path],
    typer.Argument(help="A file; a folder of torch.distributed.checkpoint; or the files of all ranks' state_dict()."),
]
Key = Annotated[
    str | None,
    option("Where the optimizer's state is in a larger dictionary: optimizer, optimizer_states.0 ..."),
]

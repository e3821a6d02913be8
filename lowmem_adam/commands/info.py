"""``lowmem-adam info``: what a step runs on here."""

from __future__ import annotations

import os
import platform

import torch
import typer
from rich.console import Console
from rich.table import Table

import lowmem_adam
from lowmem_adam.commands import outcome
from lowmem_adam.commands.options import AsJson
from lowmem_adam.kernels import cpu

Facts = dict[str, str | int | list[str] | None]


def info(as_json: AsJson = False) -> None:
    """Say what steps on the CPU run on here: backend, instruction set, threads, OpenMP library, versions.

    Where there is no native library, reason says why: steps are then those of plain torch, with the same results.
    """
    facts = gather()
    if as_json:
        outcome.print_json(facts)
        return
    table = Table("fact", "value", show_header=False, box=None, pad_edge=False)
    table.columns[1].overflow = "fold"  # paths are to be copied whole
    for name, value in facts.items():
        table.add_row(name, "none" if value is None else ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)


def gather() -> Facts:
    """The facts, by name; where there is no native library, ``reason`` says why."""
    facts: Facts
    try:
        library = cpu.load()
    except cpu.LibraryError as error:
        facts = {"backend": "reference", "reason": str(error), "threads": torch.get_num_threads()}
    else:
        facts = {
            "backend": "cpu",
            **cpu.describe(),
            "instruction sets": [name for name in cpu.ISAS if library.has_isa(name)],
        }
    return {
        **facts,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "processors": os.cpu_count(),
        "lowmem_adam": lowmem_adam.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def version(wanted: bool) -> None:
    """``--version``.

    Raises:
        typer.Exit: where it was asked for, since there is nothing else to do then.
    """
    if wanted:
        typer.echo(f"lowmem-adam {lowmem_adam.__version__}")
        raise typer.Exit(outcome.DONE)

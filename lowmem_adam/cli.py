"""The command line, ``lowmem-adam``: what a step runs on and takes, what configs and models do, checkpoint files."""

from __future__ import annotations

import json
import os
import platform
from typing import Annotated

import torch

import lowmem_adam
from lowmem_adam.kernels import cpu

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"lowmem-adam: {error}; the command line needs: pip install 'lowmem-adam[cli]'") from error

from lowmem_adam.commands.check_config import check_config
from lowmem_adam.commands.convert import convert
from lowmem_adam.commands.plan import plan
from lowmem_adam.commands.profile import profile
from lowmem_adam.commands.verify import verify

app = typer.Typer(no_args_is_help=True, help="Adam for models whose optimizer state does not fit.")


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of a table.")] = False,
) -> None:
    """Say what steps on the CPU run on here: backend, instruction set, threads, OpenMP library, versions."""
    facts = gather()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    table = Table("fact", "value", show_header=False, box=None, pad_edge=False)
    table.columns[1].overflow = "fold"  # paths are to be copied whole
    for name, value in facts.items():
        table.add_row(name, "none" if value is None else ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)


def gather() -> dict[str, str | int | list[str] | None]:
    """The facts, by name; where there is no native library, ``reason`` says why."""
    facts: dict[str, str | int | list[str] | None]
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


app.command()(check_config)
app.command()(plan)
app.command()(profile)
app.command()(convert)
app.command()(verify)

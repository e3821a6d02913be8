"""``lowmem-adam check-config``: what a DeepSpeed config does to the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowmem_adam.integrations import deepspeed


def check_config(
    file: Annotated[Path, typer.Argument(help="DeepSpeed's config, a JSON file.")],
    client_optimizer: Annotated[
        bool,
        typer.Option("--client-optimizer", help="The script makes the optimizer, not the config."),
    ] = False,
) -> None:
    """Say what in a DeepSpeed config would refuse the optimizer or step with another; ends with 1 if anything would."""
    try:
        findings = deepspeed.check_config(file, client_optimizer=client_optimizer)
    except (OSError, ValueError) as error:
        typer.echo(f"lowmem-adam: {error}", err=True)
        raise typer.Exit(2) from error
    for finding in findings:
        typer.echo(f"{file}: {finding}")
    if findings:
        raise typer.Exit(1)
    typer.echo(f"{file}: nothing found that would keep the optimizer from stepping")

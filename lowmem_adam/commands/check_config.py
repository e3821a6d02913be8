"""``lowmem-adam check-config``: what a DeepSpeed config does to the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowmem_adam.commands import outcome
from lowmem_adam.commands.options import AsJson
from lowmem_adam.integrations import deepspeed


def check_config(
    file: Annotated[Path, typer.Argument(help="DeepSpeed's config, a JSON file.")],
    client_optimizer: Annotated[
        bool,
        typer.Option("--client-optimizer", help="The script makes the optimizer, not the config."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what in a DeepSpeed config would refuse the optimizer or step with another one, each with a mend of one line.

    Ends with 1 if anything would.
    """
    try:
        findings = deepspeed.check_config(file, client_optimizer=client_optimizer)
    except ValueError as error:
        outcome.refuse(error)
    if as_json:
        told = [finding._asdict() for finding in findings]
        outcome.print_json({"file": str(file), "holds": not findings, "findings": told})
    else:
        for finding in findings:
            typer.echo(f"{file}: {finding}")
        if not findings:
            typer.echo(f"{file}: nothing found that would keep the optimizer from stepping")
    if findings:
        raise typer.Exit(outcome.NO)

"""``lowmem-adam verify``: whether a checkpoint is whole and fit to be loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lowmem_adam import stored, verifying
from lowmem_adam.commands.progress import shown


def verify(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="A file; a folder of torch.distributed.checkpoint; or the files of all ranks' state_dict()."
        ),
    ],
    key: Annotated[
        str | None,
        typer.Option(help="Where the optimizer's state is in a larger dictionary: optimizer, optimizer_states.0 ..."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Say what is in a checkpoint of ours, torch's or bitsandbytes' Adam, and everything that is wrong with it.

    Ends with 0 where nothing is, with 1 where something is, with 2 where it is no checkpoint or cannot be read.
    """
    try:
        with shown("verifying") as progress:
            report = verifying.verify(sources, key, progress)
    except (OSError, stored.NotACheckpointError) as error:
        typer.echo(f"lowmem-adam: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1, default=_plain))
    else:
        for line in _lines(report):
            typer.echo(line)
    if report.faults:
        raise typer.Exit(1)


def _plain(value: object) -> object:
    """A learning rate that is a tensor, as a number."""
    return value.item() if hasattr(value, "item") else str(value)


def _lines(report: verifying.Report) -> list[str]:
    steps = " to ".join(map(str, sorted(set(report.steps)))) or "none"
    total = sum(report.bytes.values())
    each = f", {total / report.elements:.3f} an element" if report.elements else ""
    lines = [
        f"state of {report.kind}: {report.parameters} parameters, {report.with_state} with state",
        f"elements: {report.elements}, of those with state",
        f"steps taken: {steps}",
        f"bytes: {total}{each}",
        *(f"  {name}: {nbytes}" for name, nbytes in report.bytes.items()),
    ]
    for index, group in enumerate(report.groups):
        lines.append(f"param group {index}: " + ", ".join(f"{name} {value}" for name, value in group.items()))
    lines += [f"FAULT: {fault}" for fault in report.faults]
    return [*lines, f"{len(report.faults)} fault(s)" if report.faults else "nothing is wrong with it"]

"""``lowmem-adam verify``: whether a checkpoint is whole and fit to be loaded."""

from __future__ import annotations

from dataclasses import asdict

import typer

from lowmem_adam import stored, verifying
from lowmem_adam.commands import outcome
from lowmem_adam.commands.options import AsJson, Key, Sources
from lowmem_adam.commands.progress import shown


def verify(sources: Sources, key: Key = None, as_json: AsJson = False) -> None:
    """Say what is in a checkpoint of ours, torch's or bitsandbytes' Adam, and everything that is wrong with it.

    Files are read only. Ends with 0 where nothing is wrong and with 1 where something is, or where it is no checkpoint.
    """
    try:
        with shown("reading", "verifying") as (reading, progress):
            report = verifying.verify(sources, key, progress, reading)
    except stored.NoSuchKeyError as error:
        outcome.refuse(error)
    except stored.NotACheckpointError as error:
        report = verifying.Report(UNKNOWN, faults=[str(error)])
    if as_json:
        outcome.print_json({**asdict(report), "holds": not report.faults})
    else:
        for line in _lines(report):
            typer.echo(line)
    if report.faults:
        raise typer.Exit(outcome.NO)


UNKNOWN = "unknown"
"""Whose state it is, where nothing can be read."""


def _lines(report: verifying.Report) -> list[str]:
    steps = " to ".join(map(str, sorted(set(report.steps)))) or "none"
    total = sum(report.bytes.values())
    each = f", {total / report.elements:.3f} an element" if report.elements else ""
    lines = (
        []
        if report.kind == UNKNOWN
        else [
            f"state of {report.kind}: {report.parameters} parameters, {report.with_state} with state",
            f"elements: {report.elements}, of those with state",
            f"steps taken: {steps}",
            f"bytes: {total}{each}",
            *(f"  {name}: {nbytes}" for name, nbytes in report.bytes.items()),
        ]
    )
    for index, group in enumerate(report.groups):
        lines.append(f"param group {index}: " + ", ".join(f"{name} {value}" for name, value in group.items()))
    lines += [f"FAULT: {fault}" for fault in report.faults]
    return [*lines, f"{len(report.faults)} fault(s)" if report.faults else "nothing is wrong with it"]

"""``lowmem-adam convert``: checkpoint files of one optimizer as files of another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_adam import converting, stored
from lowmem_adam.commands import outcome
from lowmem_adam.commands.options import NONFINITE, UPDATES, AsJson, Key, Sources, choice, option
from lowmem_adam.commands.progress import shown

MADE = "Settings of ours, where it is made of another's"


def convert(
    sources: Sources,
    output: Annotated[Path, option("The file to write.", None, "--output", "-o")],
    to: Annotated[
        str | None,
        choice(
            converting.TARGETS,
            "Whose format; without it the format stays: to put parts together, or to take one out of a larger file. "
            "Ours go by the setting of moments.",
        ),
    ] = None,
    key: Key = None,
    alone: Annotated[bool, option("Write the optimizer's state only, not what is around it.", None, "--alone")] = False,
    force: Annotated[bool, option("Take the place of a file that is there.", None, "--force")] = False,
    as_json: AsJson = False,
    optimizer: Annotated[str | None, choice(tuple(stored.OPTIMIZERS), "By default what the state says.", MADE)] = None,
    seed: Annotated[int | None, option("An integer from 0.", MADE)] = None,
    nonfinite: Annotated[str | None, choice(NONFINITE, "What gradients that are not finite do.", MADE)] = None,
    low_precision_update: Annotated[
        str | None, choice(("nearest", "stochastic"), "How 16-bit parameters are rounded.", MADE)
    ] = None,
) -> None:
    """Write a checkpoint that another optimizer loads: torch's, bitsandbytes' or ours, or parts as one whole.

    It holds one parameter in memory at a time; beside the output it needs room on disk for as much again meanwhile.
    Sources are read only, and the output is there whole or not at all. Ends with 1 where the state cannot be converted.
    """
    given: dict[str, Any] = {"seed": seed, "nonfinite": nonfinite, "low_precision_update": low_precision_update}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        _check(to, optimizer, given)
        with shown("converting", "writing") as (progress, writing):
            done = converting.convert(
                sources,
                output,
                to,
                key=key,
                alone=alone,
                optimizer=optimizer,
                given=given,
                force=force,
                progress=progress,
                writing=writing,
            )
    except stored.NoSuchKeyError as error:
        outcome.refuse(error)
    except (TypeError, ValueError) as error:
        outcome.refuse(error, outcome.NO)
    if as_json:
        outcome.print_json({"output": str(output), **done._asdict()})
        return
    typer.echo(
        f"{output}: {done.parameters} parameters of {done.elements} elements, {done.kind} to {done.to or done.kind}, "
        f"{done.source_bytes} to {done.target_bytes} bytes"
    )
    for name, count in done.left_out.items():
        typer.echo(f"left out: {name} of {count} parameters, for which the other optimizer has no place")


def _check(to: str | None, optimizer: str | None, given: dict[str, Any]) -> None:
    """End with wrong usage, which is no answer about the checkpoint."""
    try:
        outcome.check_choice("to", to, converting.TARGETS)
        outcome.check_choice("optimizer", optimizer, tuple(stored.OPTIMIZERS))
        outcome.check_choice("nonfinite", given.get("nonfinite"), NONFINITE)
        outcome.check_choice("low_precision_update", given.get("low_precision_update"), UPDATES)
        if not 0 <= given.get("seed", 0) < 2**63:
            raise ValueError(f"seed is {given['seed']}; accepted: integers from 0 below 2**63")
        stored.check_settings(given)
    except ValueError as error:
        outcome.refuse(error)

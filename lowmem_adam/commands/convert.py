"""``lowmem-adam convert``: checkpoint files of one optimizer as files of another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem_adam import converting, stored
from lowmem_adam.commands.progress import shown


def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="A file; a folder of torch.distributed.checkpoint; or the files of all ranks' state_dict()."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    to: Annotated[
        str | None,
        typer.Option(
            help=f"Whose format: {', '.join(converting.TARGETS)} (the last ones are ours, by the setting of moments). "
            "Without it the format stays: to put parts together, or to take one out of a larger file.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Where the optimizer's state is in a larger dictionary: optimizer, optimizer_states.0 ..."),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Write the optimizer's state without what is around it in the file.")
    ] = False,
    optimizer: Annotated[
        str | None,
        typer.Option(help="AdamW8bit or Adam8bit, where ours is made of another's; by default what its state says."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Setting that ours gets, where it is made of another's.")] = None,
    nonfinite: Annotated[str | None, typer.Option(help="As --seed.")] = None,
    low_precision_update: Annotated[str | None, typer.Option(help="As --seed; nearest or stochastic.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Take the place of a file that is there.")] = False,
) -> None:
    """Write a checkpoint that another optimizer loads: torch's, bitsandbytes' or ours, or parts as one whole.

    It holds one parameter in memory at a time; beside the output it needs room on disk for as much again meanwhile.
    Sources are read only. Ends with 1 where the state cannot be converted, with 2 where a file cannot be read or
    written.
    """
    given: dict[str, Any] = {"seed": seed, "nonfinite": nonfinite, "low_precision_update": low_precision_update}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        with shown("converting") as progress:
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
            )
    except (OSError, stored.NotACheckpointError) as error:
        typer.echo(f"lowmem-adam: {error}", err=True)
        raise typer.Exit(2) from error
    except (TypeError, ValueError) as error:
        typer.echo(f"lowmem-adam: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{output}: {done.parameters} parameters of {done.elements} elements, {done.kind} to {done.to or done.kind}, "
        f"{done.source_bytes} to {done.target_bytes} bytes"
    )
    for name, count in done.left_out.items():
        typer.echo(f"left out: {name} of {count} parameters, for which the other optimizer has no place")

"""``lowmem-adam plan``: what a model's training takes on device and host, ours and others, and what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lowmem_adam import plan as planning
from lowmem_adam.commands import outcome
from lowmem_adam.commands.options import (
    MASTER_BITS,
    MODEL,
    MOMENTS,
    OFFLOAD,
    OPTIMIZER,
    OUTPUT,
    RANKS,
    UPDATES,
    AsJson,
    choice,
    option,
)
from lowmem_adam.commands.progress import shown

GIB = 2**30
ZERO_BUCKET = planning.Settings().zero_bucket


def plan(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A transformers config.json, a .safetensors file, a safetensors index (.json), or a folder with one.",
            show_default=False,
        ),
    ] = None,
    parameters: Annotated[
        str | None, option("Instead of a file: so many parameters, such as 8B, 8e9, 124439808.", MODEL)
    ] = None,
    shape: Annotated[
        list[str] | None,
        option("Instead of a file: a shape, such as 50257x768, or 12*768x3072 for twelve. Repeat it.", MODEL),
    ] = None,
    dtype: Annotated[
        str | None,
        choice(
            tuple(planning.DTYPES),
            "Of parameters and gradients; by default what the file says, or bfloat16.",
            MODEL,
        ),
    ] = None,
    moments: Annotated[str, choice(MOMENTS, "How moments are kept.", OPTIMIZER)] = "8bit",
    low_precision_update: Annotated[
        str,
        choice(
            UPDATES, "How 16-bit parameters are stepped; with split and fp32 peers get float32 weights too.", OPTIMIZER
        ),
    ] = "stochastic",
    master_bits: Annotated[int, choice(MASTER_BITS, "Of the weight that split keeps.", OPTIMIZER)] = 32,
    world_size: Annotated[int, option("Ranks, a device each.", RANKS)] = 1,
    shard: Annotated[bool, option('Whether ranks share the moments (shard_group="world").', RANKS)] = True,
    offload: Annotated[str | None, choice(OFFLOAD, "Where moments are kept, if not on the device.", RANKS)] = None,
    offload_gradients: Annotated[bool, option("Gradients there too.", RANKS, "--offload-gradients")] = False,
    zero_stage: Annotated[
        int, choice((0, 1, 2, 3), "DeepSpeed's stage, under which our optimizer steps; 0 is without it.", RANKS)
    ] = 0,
    bucket_cap_mb: Annotated[float, option("MiB of our buckets, above 0.", RANKS)] = 64.0,
    zero_bucket: Annotated[int, option("Elements of DeepSpeed's reduce_bucket_size.", RANKS)] = ZERO_BUCKET,
    fits: Annotated[
        float | None,
        option("GiB of a device: say what fits, and the cheapest setting that does. Ends with 1 if not.", OUTPUT),
    ] = None,
    host_fits: Annotated[float | None, option("With --fits: GiB of the host for a rank.", OUTPUT)] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model takes on each rank: parameters, gradients, moments, float32 weights, buffers.

    Activations, and what allocators and libraries take for themselves, are not counted. Nothing of the model is loaded.
    """
    try:
        settings = planning.Settings(
            dtype=None if dtype is None else planning.dtype_of(dtype),
            moments=moments,
            low_precision_update=low_precision_update,
            master_bits=master_bits,
            world_size=world_size,
            shard=shard,
            offload=offload,
            offload_gradients=offload_gradients,
            zero_stage=zero_stage,
            bucket_cap_mb=bucket_cap_mb,
            zero_bucket=zero_bucket,
        )
        settings.check()
        limits = _limits(fits, host_fits)
        with shown("planning"):
            found = planning.plan(_model(model, parameters, shape or [], settings), settings)
            cheapest = None if limits is None else planning.cheapest(found.model, settings, *limits)
    except ValueError as error:
        outcome.refuse(error)
    if as_json:
        outcome.print_json(_described(found, limits, cheapest))
    else:
        _show(found, limits, cheapest)
    if limits is not None and not _row_fits(found.own, limits):
        raise typer.Exit(outcome.NO)


Limits = tuple[int, int | None]
"""Bytes of the device, and of the host or None."""


def _limits(fits: float | None, host_fits: float | None) -> Limits | None:
    for name, value in (("fits", fits), ("host_fits", host_fits)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; accepted: finite numbers above 0, in GiB")
    if fits is None:
        if host_fits is not None:
            raise ValueError(f"host_fits is {host_fits:g} and fits None; accepted: host_fits with fits")
        return None
    return int(fits * GIB), None if host_fits is None else int(host_fits * GIB)


def _model(path: Path | None, parameters: str | None, shapes: list[str], settings: planning.Settings) -> planning.Model:
    given = {"MODEL": path, "--parameters": parameters, "--shape": shapes or None}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"the model is given by {named or 'nothing'}; accepted: one of {', '.join(given)}")
    if path is not None:
        return planning.read_model(path, settings.dtype)
    return planning.of_count(planning.count_of(parameters)) if parameters is not None else planning.of_shapes(shapes)


def _row_fits(row: planning.Row, limits: Limits) -> bool:
    return row.device.total <= limits[0] and (limits[1] is None or row.host.total <= limits[1])


def _described(found: planning.Plan, limits: Limits | None, choice: planning.Choice | None) -> dict[str, Any]:
    told = found.described()
    if limits is not None:
        for row, own in zip(found.rows, told["rows"], strict=True):
            own["fits"] = _row_fits(row, limits)
        told["fits"] = {
            "device_bytes": limits[0],
            "host_bytes": limits[1],
            "fits": _row_fits(found.own, limits),
            "cheapest": None if choice is None else choice.described(),
        }
    return told


def _show(found: planning.Plan, limits: Limits | None, choice: planning.Choice | None) -> None:
    console = Console()
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in found.model.weights})
    console.print(
        f"{found.model.source}: {found.model.numel:,} parameters in {len(found.model.weights)} tensor(s), "
        f"{', '.join(dtypes)}; {found.settings.world_size} rank(s)",
        markup=False,
        highlight=False,
    )
    for note in found.model.notes:
        console.print(note, markup=False, highlight=False)
    rows = found.rows
    console.print(_table("GiB on each device", rows, "device", limits))
    if any(row.host.total >= GIB / 1000 for row in rows):
        console.print(_table("GiB on the host, for each rank", rows, "host", None))
    for row in rows:
        if row.note:
            console.print(f"{row.name}: {row.note}", markup=False, highlight=False)
    console.print("Not counted: activations, and what allocators and libraries take for themselves.")
    if limits is not None:
        _answer(console, found, limits, choice)


def _table(title: str, rows: list[planning.Row], where: str, limits: Limits | None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("optimizer")
    for kind in (*planning.KINDS, "total"):
        table.add_column(kind, justify="right")
    if limits is not None:
        table.add_column("fits")
    for row in rows:
        held: planning.Bytes = getattr(row, where)
        cells = [f"{nbytes / GIB:.2f}" for nbytes in held.described().values()]
        table.add_row(row.name, *cells, *(["yes" if _row_fits(row, limits) else "no"] if limits is not None else []))
    return table


def _answer(console: Console, found: planning.Plan, limits: Limits, choice: planning.Choice | None) -> None:
    room = f"{limits[0] / GIB:g} GiB" + ("" if limits[1] is None else f", and {limits[1] / GIB:g} GiB on the host,")
    fits = "fits" if _row_fits(found.own, limits) else "does not fit"
    console.print(f"This setting {fits} into {room} without activations.", markup=False, highlight=False)
    if choice is None:
        console.print("No setting of ours does, with as many ranks.", markup=False, highlight=False)
        return
    console.print(
        f"The cheapest that does: {choice.settings.arguments()}: {choice.row.device.total / GIB:.2f} GiB on the "
        f"device, {choice.row.host.total / GIB:.2f} GiB on the host.",
        markup=False,
        highlight=False,
    )

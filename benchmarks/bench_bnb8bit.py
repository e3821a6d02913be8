"""What a step in bitsandbytes' 8-bit format takes on the CPU: our native kernel against bitsandbytes' own operator.

    python -m benchmarks.bench_bnb8bit [--quick]

``moments="bnb8bit"`` against ``bitsandbytes.optim.AdamW8bit``, which holds the same state, with our own format and
torch's fused AdamW beside them, on one matrix of float32 and of bfloat16. Every contestant first has to follow the
textbook Adam in float64; then all take turns, in another order every round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import harness
from benchmarks.bench_step_time import native
from benchmarks.host_contestants import MOMENTS, Contestant, in_place, missing, ours, timed
from benchmarks.step_contestants import BITSANDBYTES, CODED_ERROR, FUSED, SETTINGS, fused
from benchmarks.step_timing import Plan
from lowmem_adam.layout import FLAT_BLOCK_SIZE

OURS, OWN_FORMAT = "lowmem-adam bnb8bit", "lowmem-adam 8bit"
TARGET = 1 / 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLAT_MOMENTS = 2 * (2 + 8 / FLAT_BLOCK_SIZE)
"""Bytes of this format's moments, read and written."""


def bitsandbytes_adam(params: list[Parameter]) -> Optimizer:
    """Its AdamW8bit, which rounds 16-bit parameters to nearest."""
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(params, **SETTINGS)
    return optimizer


def contestants(dtype: torch.dtype) -> dict[str, Contestant]:
    """By name: what steps a parameter of a dtype."""
    own, eps = 3 * dtype.itemsize, torch.finfo(dtype).eps
    return {
        OURS: Contestant(ours(moments="bnb8bit"), own + FLAT_MOMENTS, CODED_ERROR, eps),
        BITSANDBYTES: Contestant(in_place(bitsandbytes_adam), own + FLAT_MOMENTS, CODED_ERROR, eps, optional=True),
        OWN_FORMAT: Contestant(ours(), own + MOMENTS, CODED_ERROR, eps),
        FUSED: Contestant(in_place(fused), own + 4 * dtype.itemsize, 4 * eps, eps),
    }


def measure(numel: int, stream: int, plan: Plan) -> dict[str, Any]:
    """Rows of both dtypes, each with its ratio to bitsandbytes' time, and who is not there."""
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for label, dtype in DTYPES.items():
        all_of_them = contestants(dtype)
        absent |= missing(all_of_them, dtype)
        there = {name: contestant for name, contestant in all_of_them.items() if name not in absent}
        times = timed(there, numel, stream, plan, dtype)
        base = BITSANDBYTES if BITSANDBYTES in there else OURS
        rows += [row | {"dtype": label, "base": base} | times.ratio(row["name"], base) for row in times.rows]
    return {"rows": rows, "absent": absent}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Our ratio to bitsandbytes by dtype, where that was measured."""
    return {row["dtype"]: row["ratio"] for row in rows if row["name"] == OURS and row["base"] == BITSANDBYTES}


def main(
    quick: Annotated[bool, typer.Option(help="A short version, to see that everything runs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
    name: Annotated[str, typer.Option(help="Name of the files, for other instruction sets.")] = "bnb8bit",
    threads: Annotated[int, typer.Option(help="Threads of all contestants; 0 takes torch's number.", min=0)] = 0,
) -> None:
    """Time a step of both dtypes; ends with 1 if ours misses its target at full size."""
    if threads:
        torch.set_num_threads(threads)
    plan = Plan(rounds=3, seconds=2.0, least=2, sample_seconds=1e-3) if quick else Plan(rounds=15, seconds=120.0)
    data = measure(1 << 17 if quick else 1 << 24, 1 << 20 if quick else 1 << 26, plan)
    ratios = verdicts(data["rows"])
    data |= {"quick": quick, "threads": torch.get_num_threads(), "native": native(), "target": TARGET}
    header = ["dtype", "optimizer", "ns/parameter", "5%", "95%", "1 / ratio, of medians", "1 / median of rounds"]
    header += ["error", "allowed"]
    cells: list[list[harness.Cell]] = [
        [
            *(row[key] for key in ("dtype", "name", "ns", "p5", "p95")),
            *(1 / row[key] for key in ("ratio", "ratio_of_rounds")),
            *(row[key] for key in ("error", "allowed")),
        ]
        for row in data["rows"]
    ]
    title = "Step in bitsandbytes' 8-bit format" + (" (quick run, not to be quoted)" if quick else "")
    harness.print_table(title, header, cells)
    lines = [f"{dtype}: 1/{1 / ratio:.1f} of bitsandbytes' time" for dtype, ratio in ratios.items()]
    lines += [f"{who}: {why}" for who, why in data["absent"].items()]
    verdict = f"{'; '.join(lines)}; target: at most 1/{1 / TARGET:.0f}."
    isa = data["native"].get("isa", "none, the reference ran")
    setting = f"{data['threads']} threads; our native kernel's instruction set: {isa}. Ratios are to bitsandbytes."
    harness.write_results(
        name, data, f"# {title}\n\n{setting} {verdict}\n\n{harness.markdown_table(header, cells)}", output
    )
    typer.echo(verdict)
    if not quick and any(ratio > TARGET for ratio in ratios.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

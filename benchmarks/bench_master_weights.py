"""What float32 weights of bfloat16 parameters cost on the host, against float32 weights that torch steps there.

    python -m benchmarks.bench_master_weights [--quick]

The yardstick is the usual way to it: gradients widened to float32, torch's fused AdamW on float32 master weights, and
the weights rounded into the bfloat16 parameters, all in memory that is there already. (DeepSpeed's offload does so too,
but with its own Adam and gradients that the device has widened; torchao's keeps no float32 weights.)
Every contestant first has to follow the textbook Adam in float64; then all take turns, in another order every round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import harness
from benchmarks.bench_step_time import native
from benchmarks.host_contestants import MOMENTS, Contestant, ours, timed, with_weights
from benchmarks.step_contestants import CODED_ERROR, fused
from benchmarks.step_timing import Plan

YARDSTICK, SPLIT = "torch fused on float32 weights", "split"
TARGET = 0.55
CONTESTANTS = {
    YARDSTICK: Contestant(with_weights(fused, torch.float32, widens=True), 6 + 28 + 6, 1e-5, 2.0**-23),
    "nearest": Contestant(ours(low_precision_update="nearest"), 6 + MOMENTS, CODED_ERROR, 2.0**-7),
    "stochastic": Contestant(ours(), 6 + MOMENTS, CODED_ERROR, 2.0**-7),
    SPLIT: Contestant(ours(low_precision_update="split"), 10 + MOMENTS, CODED_ERROR, 2.0**-23),
    "split, 24 bits": Contestant(
        ours(low_precision_update="split", master_bits=24), 8 + MOMENTS, CODED_ERROR, 2.0**-15
    ),
    "fp32": Contestant(ours(low_precision_update="fp32"), 14 + MOMENTS, CODED_ERROR, 2.0**-23),
}


def measure(numel: int, stream: int, plan: Plan) -> list[dict[str, Any]]:
    """A row for each contestant, with its ratio to the yardstick's time."""
    times = timed(CONTESTANTS, numel, stream, plan)
    return [row | times.ratio(row["name"], YARDSTICK) for row in times.rows]


def main(
    quick: Annotated[bool, typer.Option(help="A short version, to see that everything runs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
    name: Annotated[str, typer.Option(help="Name of the files, for other instruction sets.")] = "master_weights",
    threads: Annotated[int, typer.Option(help="Threads of all contestants; 0 takes torch's number.", min=0)] = 0,
) -> None:
    """Time the host's step of bfloat16 parameters; ends with 1 if "split" misses its target at full size."""
    if threads:
        torch.set_num_threads(threads)
    plan = Plan(rounds=3, seconds=2.0, least=2, sample_seconds=1e-3) if quick else Plan(rounds=41, seconds=120.0)
    rows = measure(1 << 17 if quick else 1 << 25, 1 << 20 if quick else 1 << 26, plan)
    data: dict[str, Any] = {
        "quick": quick,
        "threads": torch.get_num_threads(),
        "native": native(),
        "target": TARGET,
        "rows": rows,
    }
    header = [
        "optimizer",
        "ns/parameter",
        "5%",
        "95%",
        "ratio, of medians",
        "ratio 5%",
        "median of rounds",
        "ratio 95%",
    ]
    header += ["bytes moved", "share of bandwidth", "error", "allowed"]
    keys = ("name", "ns", "p5", "p95", "ratio", "ratio_p5", "ratio_of_rounds", "ratio_p95")
    cells: list[list[harness.Cell]] = [
        [row[key] for key in (*keys, "moved_bytes", "bandwidth_share", "error", "allowed")] for row in rows
    ]
    title = "Step of bfloat16 parameters with float32 weights" + (" (quick run, not to be quoted)" if quick else "")
    harness.print_table(title, header, cells)
    measured = next(row["ratio"] for row in rows if row["name"] == SPLIT)
    verdict = f"{SPLIT!r} takes {measured:.3f} of the yardstick; target: at most {TARGET}."
    isa = data["native"].get("isa", "none, the reference ran")
    setting = f"{data['threads']} threads; our native kernel's instruction set: {isa}."
    harness.write_results(
        name, data, f"# {title}\n\n{setting} {verdict}\n\n{harness.markdown_table(header, cells)}", output
    )
    typer.echo(verdict)
    if not quick and measured > TARGET:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

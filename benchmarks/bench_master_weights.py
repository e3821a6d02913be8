"""What float32 weights of bfloat16 parameters cost on the host, against the work that offloading optimizers do.

    python -m benchmarks.bench_master_weights [--quick]

The yardstick does the work of torchao's and DeepSpeed's CPU offload: gradients widened to float32, torch's fused AdamW
on float32 master weights, and the weights rounded into the bfloat16 parameters, all in memory that is there already.
Every contestant first has to follow the textbook Adam in float64; then all take turns, in another order every round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from benchmarks import harness
from benchmarks.bench_step_time import native
from benchmarks.step_contestants import CODED_ERROR, SETTINGS, VALIDATION_SHAPE, VALIDATION_STEPS, make_params
from benchmarks.step_timing import WARM_STEPS, Plan, bandwidth_row, bandwidth_runs, interleaved
from lowmem_adam import AdamW8bit
from tests.oracle import TextbookAdam

BFLOAT16 = torch.bfloat16
YARDSTICK, SPLIT = "torch fused on float32 weights", "split"
TARGET = 0.55
MOMENTS = 2 * (2 + 2 / 128)
"""Bytes that our moments move, read and written."""


class Running(NamedTuple):
    """Something that steps one parameter: with the gradient that lies in ``param.grad``."""

    step: Callable[[], Any]
    weight: Callable[[], Tensor]


class Contestant(NamedTuple):
    """A way to step a bfloat16 parameter with a bfloat16 gradient."""

    build: Callable[[torch.nn.Parameter], Running]
    moved_bytes: float
    """Least traffic of an element, its parameter and gradient included."""
    error: float
    """What its format allows of the displacement, beside the rounding of its weights."""
    weight_eps: float
    """Between two weights that it can hold, over their magnitude."""


def yardstick(param: torch.nn.Parameter) -> Running:
    master = torch.nn.Parameter(param.detach().float())
    master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW([master], **SETTINGS, fused=True)

    def step() -> None:
        assert master.grad is not None
        assert param.grad is not None
        master.grad.copy_(param.grad)
        optimizer.step()
        param.data.copy_(master.data)

    return Running(step, lambda: master.detach().clone())


def ours(**settings: Any) -> Callable[[torch.nn.Parameter], Running]:
    def build(param: torch.nn.Parameter) -> Running:
        optimizer = AdamW8bit([param], **SETTINGS, **settings)
        return Running(optimizer.step, lambda: optimizer.master_weight(param))

    return build


CONTESTANTS = {
    YARDSTICK: Contestant(yardstick, 6 + 28 + 6, 1e-5, 2.0**-23),
    "nearest": Contestant(ours(low_precision_update="nearest"), 6 + MOMENTS, CODED_ERROR, 2.0**-7),
    "stochastic": Contestant(ours(), 6 + MOMENTS, CODED_ERROR, 2.0**-7),
    SPLIT: Contestant(ours(low_precision_update="split"), 10 + MOMENTS, CODED_ERROR, 2.0**-23),
    "split, 24 bits": Contestant(
        ours(low_precision_update="split", master_bits=24), 8 + MOMENTS, CODED_ERROR, 2.0**-15
    ),
    "fp32": Contestant(ours(low_precision_update="fp32"), 14 + MOMENTS, CODED_ERROR, 2.0**-23),
}


def displacement(contestant: Contestant) -> tuple[float, float]:
    """Error of the weights' displacement after a few steps against float64, and what is allowed."""
    (param,) = make_params([VALIDATION_SHAPE], BFLOAT16)
    start, oracle = param.detach().double(), TextbookAdam(param, **SETTINGS)
    running, path = contestant.build(param), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(VALIDATION_STEPS):
        param.grad = torch.randn(VALIDATION_SHAPE, generator=generator).mul_(0.01).to(BFLOAT16)
        running.step()
        path.append(float(oracle.step(param.grad).norm()))
    moved, weight = oracle.param - start, running.weight()
    if float((param.detach().double() - weight.double()).abs().max()) > float(weight.abs().max()) * 2.0**-8:
        raise RuntimeError("the parameter is not what the weight rounds to")
    allowed = contestant.error + contestant.weight_eps * math.hypot(*path) / float(moved.norm())
    return harness.relative_error(weight.double() - start, moved), allowed


def measure(numel: int, stream: int, plan: Plan) -> list[dict[str, Any]]:
    """A row for each contestant, and one for the memory's bandwidth."""
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, contestant in CONTESTANTS.items():
        error, allowed = displacement(contestant)
        if not error <= allowed:
            raise RuntimeError(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
        (param,) = make_params([(numel // 1024, 1024)], BFLOAT16)
        runs[name] = contestant.build(param).step
        for _ in range(WARM_STEPS):
            runs[name]()
        rows[name] = {"name": name, "error": error, "allowed": allowed, "moved_bytes": contestant.moved_bytes}
    streams = bandwidth_runs(stream)
    samples = interleaved({**runs, **streams}, plan)
    best = max(bandwidth_row(name, samples[name], stream)["allocating_gb_s"] for name in streams)
    base = samples[YARDSTICK]
    for name, row in rows.items():
        low, middle, high = harness.quantiles(seconds / numel * 1e9 for seconds in samples[name])
        row |= {"ns": middle, "p5": low, "p95": high, "rounds": len(samples[name])}
        row["ratio"] = middle / rows[YARDSTICK]["ns"]  # the first row
        ratios = [seconds / other for seconds, other in zip(samples[name], base, strict=True)]
        row |= dict(zip(("ratio_p5", "ratio_of_rounds", "ratio_p95"), harness.quantiles(ratios), strict=True))
        row["bandwidth_share"] = row["moved_bytes"] / middle / best
    return list(rows.values())


def main(
    quick: Annotated[bool, typer.Option(help="A short version, to see that everything runs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
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
        "master_weights", data, f"# {title}\n\n{setting} {verdict}\n\n{harness.markdown_table(header, cells)}", output
    )
    typer.echo(verdict)
    if not quick and measured > TARGET:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

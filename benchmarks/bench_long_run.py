"""Does an optimizer with 8-bit moments drift away from float32 over a long training?

    python -m benchmarks.bench_long_run [--steps 20000] [--device cuda] [--hours 1] [--workers 2] [--quick]

A byte-level Llama (1.8 million parameters) on the standard library's sources, at a learning rate that stays as it is
after the warm-up, so that nothing fades out; beta2 0.999 and 0.9999, paired seeds. Every hundred steps each run records
its loss, the size of its update, and how its moments compare with exact ones of the very gradients that it got
(long_run_training.py).

Criterion. Losses are held-out losses averaged over the last tenth of the steps that all runs have taken. For each
beta2, every run stays finite and the mean difference to float32 AdamW, paired by seed, is no larger than the standard
deviation of float32 AdamW between seeds. The size of the update against that of exact moments must not move away: over
the last quarter it is within 2% of 1, and no further from 1 than over the second quarter by more than 1%.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import harness
from benchmarks.bench_parity import judge
from benchmarks.long_run_training import EXACT, OURS, PEER, Job, Record, Shape, train

BETA2S = (0.999, 0.9999)
SIZE_TARGET, DRIFT_TARGET = 0.02, 0.01
QUICK = Shape(hidden=64, layers=1, length=32, batch=4, every=5, windows=8, warmup=5)
HEADER = (
    "beta2",
    "optimizer",
    "steps",
    "held-out loss",
    "difference to float32",
    "spread of seeds",
    "size of the update / exact, 2nd quarter",
    "last quarter",
    "error of the update, last quarter",
    "sqrt(v) / exact: 5%",
    "50%",
    "95%",
    "holds",
)


def run(job: Job, steps: int, shape: Shape, device: str, seconds: float) -> Record:
    """In a process of its own, with one thread, so that runs side by side do not differ from runs alone."""
    torch.set_num_threads(1)
    return train(job, steps, shape, device, seconds)


def part(values: Sequence[float], begin: float, end: float) -> float:
    """Mean of the values from one share of the way to another."""
    return statistics.fmean(
        values[int(len(values) * begin) : max(int(len(values) * end), int(len(values) * begin) + 1)]
    )


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each beta2 and optimizer, over the steps that all finite runs have taken."""
    lengths = [len(entry["steps"]) for entry in runs if math.isfinite(entry["loss"][-1])]
    common, rows = min(lengths), []
    for beta2 in sorted({entry["beta2"] for entry in runs}):
        finals: dict[str, list[float]] = {}
        for name in (EXACT, OURS, PEER):
            mine = sorted((e for e in runs if (e["beta2"], e["optimizer"]) == (beta2, name)), key=lambda e: e["seed"])
            if not mine:
                continue
            finals[name] = [
                part(e["validation"][:common], 0.9, 1) if math.isfinite(e["loss"][-1]) else math.inf for e in mine
            ]
            row: dict[str, Any] = {"beta2": beta2, "optimizer": name, "steps": mine[0]["steps"][:common][-1]}
            row["loss"] = statistics.fmean(finals[name])
            if name != EXACT:
                row |= judge(finals[EXACT], finals[name]) | _drift(mine, common)
                row["holds"] = row["parity"] and row["steady"]
            rows.append(row)
    return rows


def _drift(runs: Sequence[Mapping[str, Any]], common: int) -> dict[str, Any]:
    second, last = (
        statistics.fmean(part(run["norm_ratio"][:common], *where) for run in runs) for where in ((0.25, 0.5), (0.75, 1))
    )
    error = statistics.fmean(part(run["update_error"][:common], 0.75, 1) for run in runs)
    roots = [statistics.fmean(q[index] for run in runs for q in run["root_ratio"][:common][-1:]) for index in range(3)]
    steady = abs(last - 1) <= SIZE_TARGET and abs(last - 1) - abs(second - 1) <= DRIFT_TARGET
    return {"second_quarter": second, "last_quarter": last, "update_error": error, "roots": roots, "steady": steady}


def rows_of(found: Sequence[Mapping[str, Any]]) -> list[list[harness.Cell]]:
    rows: list[list[harness.Cell]] = []
    for row in found:
        cells: list[harness.Cell] = [row["beta2"], row["optimizer"], row["steps"], row["loss"]]
        if "holds" in row:
            cells += [f"{row['mean_difference']:+.4f} ± {row['standard_error']:.4f}", row["seed_spread"]]
            cells += [row["second_quarter"], row["last_quarter"], row["update_error"], *row["roots"]]
            cells += ["yes" if row["holds"] else "no"]
        else:
            cells += [""] * 8 + ["baseline"]
        rows.append(cells)
    return rows


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Per beta2: loss of ours minus float32's by step, and the size and error of the update against exact moments."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    betas = sorted({entry["beta2"] for entry in data["runs"]})
    figure, axes = pyplot.subplots(
        3, len(betas), figsize=(4.6 * len(betas), 8), layout="constrained", squeeze=False, sharex=True
    )
    colours = {OURS: "tab:blue", PEER: "tab:orange"}
    for column, beta2 in zip(axes.T, betas, strict=True):
        exact = {e["seed"]: e["validation"] for e in data["runs"] if (e["beta2"], e["optimizer"]) == (beta2, EXACT)}
        for entry in data["runs"]:
            if entry["beta2"] != beta2 or entry["optimizer"] == EXACT:
                continue
            colour = {"color": colours[entry["optimizer"]], "linewidth": 0.9}
            label = entry["optimizer"] if entry["seed"] == 0 else None
            difference = [b - a for a, b in zip(exact[entry["seed"]], entry["validation"], strict=False)]
            column[0].plot(entry["steps"][: len(difference)], difference, label=label, **colour)
            column[1].plot(entry["steps"], entry["norm_ratio"], **colour)
            column[2].plot(entry["steps"], entry["update_error"], **colour)
        column[0].set_title(f"beta2 = {beta2:g}")
        column[0].legend(fontsize=8)
        for axis, what in zip(
            column, ("held-out loss minus float32's", "size of update / exact", "error of update"), strict=True
        ):
            axis.set_ylabel(what)
            axis.grid(alpha=0.3)
        column[0].axhline(0, color="black", linewidth=0.6)
        column[1].axhline(1, color="black", linewidth=0.6)
        column[2].set_yscale("log")
        column[2].set_xlabel("step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def measure(
    steps: int, seeds: int, peers: bool, workers: int, shape: Shape, device: str, seconds: float
) -> dict[str, Any]:
    optimizers = (EXACT, OURS, PEER) if peers else (EXACT, OURS)
    jobs = [Job(name, beta2, seed) for seed in range(seeds) for beta2 in BETA2S for name in optimizers]
    runs: dict[Job, Record] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run, job, steps, shape, device, seconds): job for job in jobs}
        for future in as_completed(waiting):
            job = waiting[future]
            record = runs[job] = future.result()
            took = f"{record.steps[-1]} steps in {record.seconds:.0f} s"
            typer.echo(f"{job.label}: {took}, held-out loss {record.validation[-1]:.4f}")
    found = [{**asdict(job), **asdict(runs[job])} for job in jobs]
    return {"steps": steps, "shape": asdict(shape), "device": device, "runs": found, "summary": summary(found)}


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of every run.")] = 20_000,
    hours: Annotated[
        float, typer.Option(help="A run stops after so long; the steps that all took are compared.")
    ] = 1.0,
    seeds: Annotated[int, typer.Option(min=2, help="Paired runs of each optimizer.")] = 2,
    peers: Annotated[bool, typer.Option(help="Also bitsandbytes' format, emulated.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 2,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="A tiny model, a few steps, to see that everything works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON, Markdown and PNG files.")] = harness.RESULTS,
) -> None:
    """Record drift over a long run; ends with 1 where ours does not hold."""
    shape = QUICK if quick else Shape()
    data = {
        "quick": quick,
        **measure(min(steps, 60) if quick else steps, seeds, peers, workers, shape, device, hours * 3600),
    }
    taken = max(row["steps"] for row in data["summary"])
    title = f"A long run: {taken} steps, {seeds} paired seeds" + (" (quick run, not to be quoted)" if quick else "")
    rows = rows_of(data["summary"])
    harness.print_table(title, HEADER, rows)
    criterion = "\n".join(line.strip() for line in (__doc__ or "").split("Criterion. ")[1].splitlines())
    page = f"# {title}\n\n{criterion}\n\n{harness.markdown_table(HEADER, rows)}\n\n![drift](long_run.png)"
    path = harness.write_results("long_run", data, page, output)
    plot(data, path.with_suffix(".png"))
    if not all(row["holds"] for row in data["summary"] if row["optimizer"] == OURS):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

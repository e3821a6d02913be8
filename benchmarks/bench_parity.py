"""Does training with 8-bit moments end where float32 AdamW ends?

    python -m benchmarks.bench_parity [--quick] [--task bytes] [--seeds 5] [--workers 2]

Criterion. Run i of each optimizer starts from the same weights and sees the same data as run i of float32 AdamW;
d_i is the difference of their final validation losses and s the standard deviation of float32 AdamW's final losses
over the seeds. An optimizer has parity on a task where every run stays finite and |mean(d_i)| <= s: exchanging the
optimizer changes the result by no more than drawing another seed does, so that nobody could tell the two apart from
a run of each. Pairing removes the seeds' own spread from the d_i, so that a few seeds resolve a difference well below
s: mean(d_i) has its standard error and its 95% confidence interval (Student's t) beside it, and where all of the
interval lies within s, the seeds were enough to say so. The negative control, m and v each linear in 8 bits, must fail
the same check; where it passes, the task proves nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks import harness
from benchmarks.parity_tasks import TASKS, Outcome, train
from benchmarks.peer_formats import FlashOptim, FormatAdamW, Linear, MomentFormat, bitsandbytes_format
from lowmem_adam import AdamW8bit

BASELINE, OURS, CONTROL = "float32 AdamW", "lowmem-adam 8-bit", "linear 8-bit (control)"


def _torch_adamw(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, fused=True)


def _ours(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return AdamW8bit(params, lr=lr)


def _format(make: Callable[[], MomentFormat]) -> Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]:
    return lambda params, lr: FormatAdamW(params, make, lr=lr)


OPTIMIZERS = {
    BASELINE: _torch_adamw,
    OURS: _ours,
    CONTROL: _format(Linear),
    "bitsandbytes map": _format(bitsandbytes_format),
    "flashoptim format": _format(FlashOptim),
}
JUDGED = (BASELINE, OURS, CONTROL)


def run_seed(task: str, optimizers: list[str], seed: int, quick: bool) -> dict[str, Outcome]:
    """One run of each optimizer, single-threaded so that runs side by side do not differ from runs alone."""
    torch.set_num_threads(1)
    built = TASKS[task](quick)
    return {optimizer: train(built, seed, OPTIMIZERS[optimizer]) for optimizer in optimizers}


def judge(baseline: list[float], other: list[float]) -> dict[str, Any]:
    """The criterion of this file's head, on final losses paired by seed."""
    assert len(baseline) == len(other) >= 2, (len(baseline), len(other))
    spread = statistics.stdev(baseline)
    differences = [b - a for a, b in zip(baseline, other, strict=True)]
    verdict: dict[str, Any] = {"mean_difference": math.inf, "standard_error": math.inf, "seed_spread": spread}
    if not all(math.isfinite(d) for d in differences):
        return verdict | {"interval": None, "interval_within_spread": False, "parity": False}
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = harness.t_quantile(0.975, len(differences) - 1) * error
    verdict |= {"mean_difference": mean, "standard_error": error, "interval": [mean - half, mean + half]}
    return verdict | {"interval_within_spread": abs(mean) + half <= spread, "parity": abs(mean) <= spread}


def measure(tasks: list[str], optimizers: list[str], seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    outcomes: dict[tuple[str, int], dict[str, Outcome]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(run_seed, task, optimizers, s, quick): (task, s) for task in tasks for s in range(seeds)}
        for future in as_completed(jobs):
            task, seed = jobs[future]
            outcomes[task, seed] = future.result()
            typer.echo(f"{task}, seed {seed}: " + ", ".join(f"{o} {r.final:.4f}" for o, r in future.result().items()))
    data: dict[str, Any] = {"quick": quick, "seeds": seeds, "tasks": {}}
    for task in tasks:
        runs = {o: [outcomes[task, seed][o] for seed in range(seeds)] for o in optimizers}
        finals = {o: [run.final for run in found] for o, found in runs.items()}
        data["tasks"][task] = {
            "runs": {o: [asdict(run) for run in found] for o, found in runs.items()},
            "verdicts": {o: judge(finals[BASELINE], finals[o]) for o in optimizers if o != BASELINE},
            "valid": not judge(finals[BASELINE], finals[CONTROL])["parity"],
        }
    return data


def rows_of(data: dict[str, Any]) -> list[list[harness.Cell]]:
    rows: list[list[harness.Cell]] = []
    for task, found in data["tasks"].items():
        for name, runs in found["runs"].items():
            finals = [run["final"] for run in runs]
            verdict = found["verdicts"].get(name)
            cells: list[harness.Cell] = [task, name, statistics.fmean(finals), min(finals), max(finals)]
            if verdict is None:
                spread = statistics.stdev(finals)
                rows.append([*cells, "", "", "", spread, "", "baseline"])
                continue
            between = "-" if verdict["interval"] is None else "{:.4g} to {:.4g}".format(*verdict["interval"])
            figures = [verdict["mean_difference"], verdict["standard_error"], between, verdict["seed_spread"]]
            rows.append(
                [*cells, *figures, *("yes" if verdict[k] else "no" for k in ("interval_within_spread", "parity"))]
            )
    return rows


def main(
    task: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(TASKS)}; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Paired runs of each optimizer.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")] = 2,
    peers: Annotated[bool, typer.Option(help="Also bitsandbytes' and FlashOptim's formats (emulated).")] = False,
    quick: Annotated[bool, typer.Option(help="Short runs, to see that everything works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
) -> None:
    """Compare final validation losses; ends with 1 where ours has no parity or the control passes."""
    chosen = task or list(TASKS)
    unknown = [name for name in chosen if name not in TASKS]
    if unknown:
        raise typer.BadParameter(f"task {unknown[0]!r} is not known; accepted: {', '.join(TASKS)}")
    data = measure(chosen, list(OPTIMIZERS) if peers else list(JUDGED), seeds, workers, quick)
    header = [
        "task",
        "optimizer",
        "mean loss",
        "best",
        "worst",
        "mean difference",
        "standard error",
        "95% interval",
        "spread s",
        "interval within s",
        "parity",
    ]
    title = f"Final validation loss, {seeds} paired seeds" + (" (quick run, not to be quoted)" if quick else "")
    rows = rows_of(data)
    harness.print_table(title, header, rows)
    criterion = "\n".join(line.strip() for line in (__doc__ or "").split("Criterion. ")[1].splitlines())
    harness.write_results("parity", data, f"# {title}\n\n{criterion}\n\n{harness.markdown_table(header, rows)}", output)
    if not all(found["valid"] and found["verdicts"][OURS]["parity"] for found in data["tasks"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

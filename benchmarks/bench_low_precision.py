"""Where nearest rounding stalls, do "stochastic" and "split" end where float32 master weights end?

    python -m benchmarks.bench_low_precision [--quick] [--task words] [--seeds 5] [--workers 2]

A model is pretrained in float32, rounded to bfloat16 and fine-tuned on other data with bfloat16 parameters and
gradients: AdamW at a learning rate whose peak is 1e-5, warmed up over a twentieth of the steps and taken down to a
tenth by a cosine; all else, weight decay of 0.01 among it, is the default. Every float32 weight that is kept starts as
the bfloat16 parameter.

Criterion. Run i of each optimizer starts from the same weights and sees the same data as run i of the baseline,
low_precision_update="fp32"; d_i is the difference of their final validation losses and s the standard deviation of the
baseline's final losses over the seeds. A seed draws initial weights, pretraining, the order of all data, dropout and
the roundings. An optimizer follows the baseline on a task where every run stays finite and |mean(d_i)| <= s; the
standard error of mean(d_i) is printed beside it. Judged are "stochastic", "split" and "split" with 24 bits. A task
counts only where the baseline's mean loss falls by more than s, where the peer, torch's fused AdamW on float32 copies
of the parameters, follows the baseline by the same rule, and where the negative control, "nearest", stalls: all its
runs stay finite and mean(d_i) > s. "Improvement" is the share of the baseline's: (start - final) / (start - baseline's
final), of means over the seeds. Losses are those of the bfloat16 model as it is, since that is what its user has: of
"fp32" and "split" the rounded weights, never the ones that are kept. Logits are widened to float32 before the loss.
"""

from __future__ import annotations

import math
import statistics
import time
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
from benchmarks.bench_parity import judge
from benchmarks.low_precision_tasks import TRANSFERS, MasterWeightAdamW, Run, fine_tune, pretrain
from benchmarks.parity_tasks import OptimizerFactory
from lowmem_adam import AdamW8bit

Factory = Callable[[Iterable[nn.Parameter], float, int], torch.optim.Optimizer]

BASELINE, PEER, CONTROL = "fp32 (baseline)", "torch fused on fp32 copies (peer)", "nearest (control)"
JUDGED = ("stochastic", "split", "split, 24 bits")


def _ours(**settings: Any) -> Factory:
    return lambda params, lr, seed: AdamW8bit(params, lr=lr, seed=seed, **settings)


OPTIMIZERS: dict[str, Factory] = {
    BASELINE: _ours(low_precision_update="fp32"),
    PEER: lambda params, lr, seed: MasterWeightAdamW(params, lr),
    "stochastic": _ours(low_precision_update="stochastic"),
    "split": _ours(low_precision_update="split"),
    "split, 24 bits": _ours(low_precision_update="split", master_bits=24),
    CONTROL: _ours(low_precision_update="nearest"),
}


def _with_seed(build: Factory, seed: int) -> OptimizerFactory:
    return lambda params, lr: build(params, lr, seed)


def run_seed(task: str, seed: int, quick: bool) -> tuple[dict[str, Run], float]:
    """One fine-tuning by each optimizer of what the seed pretrained, and the processor time of it all in seconds."""
    torch.set_num_threads(1)
    started = time.process_time()
    transfer = TRANSFERS[task](quick)
    pretrained = pretrain(transfer.before, seed)
    runs = {
        name: fine_tune(transfer.after, pretrained, seed, _with_seed(build, seed), evaluations=2 if quick else 6)
        for name, build in OPTIMIZERS.items()
    }
    return runs, time.process_time() - started


def verdicts_of(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The criterion of this file's head, on runs paired by seed."""
    finals = {name: [run.final for run in found] for name, found in runs.items()}
    start = statistics.fmean(run.start for run in runs[BASELINE])
    learned = start - statistics.fmean(finals[BASELINE])
    verdicts: dict[str, dict[str, Any]] = {}
    for name, values in finals.items():
        verdict = judge(finals[BASELINE], values)
        verdict["improvement"] = (start - statistics.fmean(values)) / learned if learned else math.nan
        verdicts[name] = verdict
    control = verdicts[CONTROL]
    spread = control["seed_spread"]
    stalls = all(math.isfinite(value) for value in finals[CONTROL]) and control["mean_difference"] > spread
    return {
        "start": start,
        "verdicts": verdicts,
        "control_stalls": stalls,
        "baseline_learns": learned > spread,
        "valid": stalls and learned > spread and verdicts[PEER]["parity"],
        "met": all(verdicts[name]["parity"] for name in JUDGED),
    }


def measure(tasks: list[str], seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    outcomes: dict[tuple[str, int], dict[str, Run]] = {}
    cpu_seconds = dict.fromkeys(tasks, 0.0)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(run_seed, task, seed, quick): (task, seed) for task in tasks for seed in range(seeds)}
        for future in as_completed(jobs):
            task, seed = jobs[future]
            outcomes[task, seed], seconds = future.result()
            cpu_seconds[task] += seconds
            found = ", ".join(f"{name} {run.final:.4f}" for name, run in outcomes[task, seed].items())
            typer.echo(f"{task}, seed {seed}, from {outcomes[task, seed][BASELINE].start:.4f}: {found}")
    data: dict[str, Any] = {"quick": quick, "seeds": seeds, "cpu_seconds": cpu_seconds, "tasks": {}}
    for task in tasks:
        runs = {name: [outcomes[task, seed][name] for seed in range(seeds)] for name in OPTIMIZERS}
        data["tasks"][task] = {
            "runs": {name: [asdict(run) for run in found] for name, found in runs.items()},
            **verdicts_of(runs),
        }
    return data


HEADER = ["task", "optimizer", "start", "final", "mean difference", "standard error", "spread s"]
HEADER += ["improvement", "elements changed", "verdict"]


def rows_of(data: dict[str, Any]) -> list[list[harness.Cell]]:
    rows: list[list[harness.Cell]] = []
    for task, found in data["tasks"].items():
        for name, runs in found["runs"].items():
            verdict = found["verdicts"][name]
            word = "follows" if verdict["parity"] else "does not follow"
            if name == CONTROL:
                word = "stalls" if found["control_stalls"] else "does not stall"
            if name == BASELINE:
                word = "learns" if found["baseline_learns"] else "does not learn"
            cells: list[harness.Cell] = [task, name, found["start"], statistics.fmean(run["final"] for run in runs)]
            cells += [verdict[key] for key in ("mean_difference", "standard_error", "seed_spread")]
            changed = statistics.fmean(run["changed"] for run in runs)
            rows.append([*cells, f"{verdict['improvement']:.1%}", f"{changed:.1%}", word])
    return rows


def plot(data: dict[str, Any], path: Path) -> None:
    """Above, what training gained along the run; below, the paired differences at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = data["tasks"]
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(4.8 * len(tasks), 7.6), layout="constrained", squeeze=False)
    styles = dict(zip(OPTIMIZERS, ("-", (0, (6, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 2)), "-"), strict=True))
    for (upper, lower), (task, found) in zip(axes.T, tasks.items(), strict=True):
        spread = found["verdicts"][BASELINE]["seed_spread"]
        baseline = [run["final"] for run in found["runs"][BASELINE]]
        lower.axhspan(-spread, spread, alpha=0.2, label="spread between seeds of the baseline")
        for position, (name, runs) in enumerate(found["runs"].items()):
            curves = [[value for _, value in run["curve"]] for run in runs if math.isfinite(run["final"])]
            if curves:
                means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
                steps = [step for step, _ in runs[0]["curve"]][: len(means)]
                upper.plot(steps, means, label=name, color=f"C{position}", linestyle=styles[name], linewidth=1.6)
            differences = [
                run["final"] - b for b, run in zip(baseline, runs, strict=True) if math.isfinite(run["final"])
            ]
            lower.scatter([position] * len(differences), differences, s=14, color=f"C{position}")
        upper.set_title(task)
        upper.set_xlabel("step")
        upper.set_ylabel("validation loss, mean of the seeds")
        upper.legend(fontsize=7)
        lower.set_yscale("symlog", linthresh=max(spread, 1e-6) * 2)
        lower.set_xticks(range(len(found["runs"])), list(found["runs"]), rotation=25, ha="right", fontsize=8)
        lower.set_ylabel("final loss minus the baseline's")
        lower.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    task: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(TRANSFERS)}; may be repeated.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Paired runs of each optimizer; 5, or 2 of a quick run.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Seeds side by side, one thread each.")] = 2,
    quick: Annotated[bool, typer.Option(help="Short runs, to see that everything works; not judged.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON, Markdown and PNG files.")] = harness.RESULTS,
) -> None:
    """Compare final validation losses; ends with 1 where a judged one does not follow or a task proves nothing."""
    chosen = task or list(TRANSFERS)
    unknown = [name for name in chosen if name not in TRANSFERS]
    if unknown:
        raise typer.BadParameter(f"task {unknown[0]!r} is not known; accepted: {', '.join(TRANSFERS)}")
    seeds = seeds or (2 if quick else 5)
    data = measure(chosen, seeds, workers, quick)
    title = f"bfloat16 at a learning rate of 1e-5, {seeds} paired seeds"
    title += " (quick run, not to be quoted)" if quick else ""
    rows = rows_of(data)
    harness.print_table(title, HEADER, rows)
    head = (__doc__ or "").split("\n\n", 2)[2]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in data["cpu_seconds"].items())
    body = f"# {title}\n\n{head}\n{harness.markdown_table(HEADER, rows)}\n\nProcessor time: {seconds}."
    path = harness.write_results("low_precision", data, body, output)
    plot(data, path.with_suffix(".png"))
    failed = [name for name, found in data["tasks"].items() if not (found["valid"] and found["met"])]
    if failed and not quick:
        typer.echo(f"missed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""Measure every figure of the README that needs no GPU, and write them into it.

    python -m benchmarks.run_all            # all of it, on a machine that does nothing else
    python -m benchmarks.run_all --quick    # everything in short, into runs/benchmarks: shows that it works
    python -m benchmarks.run_all --only parity --only fidelity

Each benchmark runs in a process of its own, one after the other, and writes JSON, Markdown and pictures to
benchmarks/results; what it prints goes to a log. A benchmark that misses a target ends with status 1 and has measured
all the same; one that breaks has another status, or no results. At the end the README's section and its pictures are
made from the results (benchmarks/readme.py, benchmarks/pictures.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import harness, pictures, readme

ROOT = Path(__file__).resolve().parents[1]
QUICK_OUTPUT = ROOT / "runs" / "benchmarks"
MISSED = 1
"""Status of a benchmark that has measured and missed a target."""


@dataclass(frozen=True)
class Stage:
    """A benchmark: its module, the arguments of a whole run, of a quick one, and the name of its results."""

    name: str
    module: str
    results: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    threads: int | None = None
    """OMP_NUM_THREADS, where it starts several processes."""


STAGES = (
    Stage("fidelity", "bench_codec_fidelity", "codec_fidelity"),
    Stage(
        "parity",
        "bench_parity",
        "parity",
        ("--task", "bytes", "--task", "words", "--task", "digits"),
        ("--quick", "--seeds", "2", "--task", "digits"),
        threads=1,
    ),
    Stage("memory", "bench_memory", "memory"),
    Stage("step", "bench_step_time", "step_time"),
    Stage("weights", "bench_master_weights", "master_weights"),
    Stage("host", "bench_host_time", "host_time"),
    Stage(
        "sharding",
        "bench_sharding",
        "sharding_gpt2",
        ("--shapes", "gpt2", "--dtype", "float32", "--rounds", "7", "--name", "sharding_gpt2"),
        ("--quick", "--shapes", "gpt2", "--ranks", "2", "--dtype", "float32", "--name", "sharding_gpt2"),
    ),
    Stage("deepspeed", "bench_deepspeed", "deepspeed"),
    Stage("quickstart", "bench_quickstart", "quickstart", threads=1),
)


@dataclass(frozen=True)
class Ended:
    """How a stage ended, and after how many seconds."""

    stage: Stage
    status: int
    seconds: float
    measured: bool

    @property
    def verdict(self) -> str:
        if not self.measured:
            return f"no results (status {self.status})"
        return "misses a target" if self.status == MISSED else "done" if self.status == 0 else f"status {self.status}"

    @property
    def broken(self) -> bool:
        return not self.measured or self.status not in (0, MISSED)


def run(stage: Stage, quick: bool, output: Path, logs: Path) -> Ended:
    """Run a benchmark in a process of its own; its output goes to a log and not to the terminal."""
    arguments = [*(stage.quick if quick else stage.arguments), "--output", str(output)]
    found = output / f"{stage.results}.json"
    before = found.stat().st_mtime_ns if found.exists() else None
    environment = dict(os.environ) | ({} if stage.threads is None else {"OMP_NUM_THREADS": str(stage.threads)})
    begin = time.perf_counter()
    with (logs / f"{stage.name}.log").open("w") as log:
        command = [sys.executable, "-m", f"benchmarks.{stage.module}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    measured = found.exists() and found.stat().st_mtime_ns != before
    return Ended(stage, done.returncode, time.perf_counter() - begin, measured)


def choose(only: list[str] | None) -> list[Stage]:
    names = [stage.name for stage in STAGES]
    for name in only or ():
        if name not in names:
            raise typer.BadParameter(f"there is no benchmark {name!r}; accepted: {', '.join(names)}")
    return [stage for stage in STAGES if not only or stage.name in only]


def main(
    quick: Annotated[bool, typer.Option(help="Everything in short; such figures are not to be quoted.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(s.name for s in STAGES)}.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: benchmarks/results, runs/benchmarks if quick.")
    ] = None,
) -> None:
    """Run the benchmarks behind the README and write its section; ends with 1 where one of them broke."""
    stages = choose(only)
    folder = output or (QUICK_OUTPUT if quick else harness.RESULTS)
    logs = harness.CACHE / "logs"
    for made in (folder, logs):
        made.mkdir(parents=True, exist_ok=True)
    ended = []
    for stage in stages:
        typer.echo(f"{stage.name} ...", nl=False)
        ended.append(run(stage, quick, folder, logs))
        typer.echo(f" {ended[-1].seconds:.0f} s, {ended[-1].verdict}")
    total = sum(one.seconds for one in ended)
    typer.echo(f"{total / 60:.1f} minutes; logs are in {logs}")
    broken = [one.stage.name for one in ended if one.broken]
    if quick:
        typer.echo(f"quick results are in {folder}; README.md is left as it is")
    elif folder == harness.RESULTS and not broken:
        pictures.draw(folder, folder)
        readme.write(folder)
        typer.echo("README.md and its pictures are made from these results")
    if broken:
        typer.echo(f"broken: {', '.join(broken)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

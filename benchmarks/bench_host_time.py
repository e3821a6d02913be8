"""How long Python takes for a step of many small tensors, on which kernels take next to no time.

    python -m benchmarks.bench_host_time [--tensors 148] [--device cuda] [--quick]

Contestants step the same tensors in turns, in another order every round, with gradients that are new tensors every
time, as after a backward pass. "all phases" is a step of ours that may not take the last one over again: what the
steps after a change take. On a GPU it is the time until `step` returns, from an idle device.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import harness
from benchmarks.gpu_timing import Clock
from lowmem_adam import AdamW8bit
from lowmem_adam.stepping import Stepper

ELEMENTS = 64
WARM_STEPS = 17  # past those for which Triton compiles anew
OURS, PHASES, FUSED = "lowmem-adam", "lowmem-adam, all phases", "torch fused"


class _Forgetful(Stepper):
    def remember(self, *_: Any) -> None:
        """Nothing, so that the next step goes through all phases."""


def _all_phases(params: Sequence[Parameter]) -> Optimizer:
    optimizer = AdamW8bit(params)
    optimizer._stepper.__class__ = _Forgetful
    return optimizer


CONTESTANTS: dict[str, Callable[[Sequence[Parameter]], Optimizer]] = {
    OURS: AdamW8bit,
    PHASES: _all_phases,
    FUSED: lambda params: torch.optim.AdamW(params, fused=True),
}


def _gradients(params: Sequence[Parameter]) -> None:
    for param in params:
        param.grad = torch.randn_like(param)


def measure(tensors: int, device: torch.device, rounds: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each contestant: microseconds a step and a tensor, and the time's ratio to torch's, round by round."""
    clock, order = Clock(device), random.Random(seed)
    field: dict[str, tuple[list[Parameter], Optimizer]] = {}
    for name, build in CONTESTANTS.items():
        params = [Parameter(torch.randn(ELEMENTS, device=device)) for _ in range(tensors)]
        field[name] = (params, build(params))
    times: dict[str, list[float]] = {name: [] for name in field}
    for number in range(WARM_STEPS + rounds):
        for name in order.sample(list(field), len(field)):
            params, optimizer = field[name]
            _gradients(params)
            _, host = clock.sample(optimizer.step)
            if number >= WARM_STEPS:
                times[name].append(host)
    rows = []
    for name, seconds in times.items():
        low, middle, high = harness.quantiles(second * 1e6 for second in seconds)
        ratios = [ours / theirs for ours, theirs in zip(seconds, times[FUSED], strict=True)]
        row = {"name": name, "tensors": tensors, "us": middle, "p5": low, "p95": high, "us_a_tensor": middle / tensors}
        rows.append(row | {"ratio": harness.median(ratios)})
    return rows


def main(
    tensors: Annotated[str, typer.Option(help="Numbers of tensors, with commas between them.")] = "148,300",
    device: Annotated[str, typer.Option(help="Where they are.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="A short version, to see that everything runs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
    name: Annotated[str, typer.Option(help="Name of the files.")] = "host_time",
) -> None:
    """Time the host's part of steps, with one thread."""
    torch.set_num_threads(1)
    rounds = 5 if quick else 200
    rows = [row for count in tensors.split(",") for row in measure(int(count), torch.device(device), rounds)]
    header = ["optimizer", "tensors", "us a step", "5%", "95%", "us a tensor", "ratio to torch fused"]
    cells: list[list[harness.Cell]] = [
        [row[key] for key in ("name", "tensors", "us", "p5", "p95", "us_a_tensor", "ratio")] for row in rows
    ]
    title = f"Host's time of a step of tensors of {ELEMENTS} elements on {device}"
    title += " (quick run, not to be quoted)" if quick else ""
    harness.print_table(title, header, cells)
    data = {"quick": quick, "device": device, "elements": ELEMENTS, "rounds": rounds, "rows": rows}
    harness.write_results(name, data, f"# {title}\n\n{harness.markdown_table(header, cells)}", output)


if __name__ == "__main__":
    typer.run(main)

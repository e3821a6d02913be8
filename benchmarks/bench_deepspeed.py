"""The optimizer's step under DeepSpeed with offload to the CPU: ours against DeepSpeedCPUAdam, both by the config.

    python -m benchmarks.bench_deepspeed [--quick]

Each contestant is an engine of ZeRO-2 with ``offload_optimizer``, bf16, the same weights and gradients, in one process.
What is timed is the call by which the engine lets the optimizer below it step its flat fp32 partition; engines take
turns, in another order every round. First each one has to follow the textbook Adam in float64 on the gradients that
DeepSpeed hands over, and it is asserted whose kernel ran.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.bench_step_time import native
from benchmarks.step_contestants import CODED_ERROR
from benchmarks.step_timing import TRIAD, bandwidth_row, bandwidth_runs
from lowmem_adam import AdamW8bit, kernels
from tests.oracle import TextbookAdam

OURS, THEIRS, TORCH = "AdamW8bit", "DeepSpeedCPUAdam", "torch.optim.AdamW"
TARGET = 0.7
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
BLOCKS: dict[str, dict[str, Any]] = {
    OURS: {"type": "AdamW8bit", "params": SETTINGS},
    THEIRS: {"type": "AdamW", "params": SETTINGS},
    TORCH: {"type": "AdamW", "params": {**SETTINGS, "torch_adam": True}},
}
"""The ``optimizer`` block of each contestant's config."""
ALLOWED = {OURS: CODED_ERROR, THEIRS: 1e-4, TORCH: 1e-4}
"""Relative error of the displacement: of codes, or of fp32 with the eps added before or after a bias correction."""
WIDTH = 1024
VALIDATION_STEPS = 10


class Weights(nn.Module):
    """Matrices whose gradients are noise, scaled anew every step: no time goes to a model."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        parts = [min(8192, rows - first) for first in range(0, rows, 8192)]
        self.weights = nn.ParameterList(torch.randn(part, WIDTH, generator=generator) * 0.02 for part in parts)
        self.noise = [torch.randn(part, WIDTH, generator=generator).bfloat16() for part in parts]

    def forward(self, scale: Tensor) -> Tensor:
        return sum(((w * n).sum() for w, n in zip(self.weights, self.noise, strict=True)), torch.zeros(())) * scale


class Contestant:
    """An engine, and the optimizer below it with a clock around its step."""

    def __init__(self, name: str, rows: int, watch: Callable[[Tensor, Tensor], Any] | None = None) -> None:
        import deepspeed

        import lowmem_adam.integrations.deepspeed  # noqa: F401 (registers the names)

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": BLOCKS[name],
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        }
        model = Weights(rows)
        self.engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        self.optimizer = self.engine.basic_optimizer
        self.seconds: list[float] = []
        self._watch = watch
        self._step = self.optimizer.step
        self.optimizer.step = self._timed
        assert type(self.optimizer).__name__ == name.rpartition(".")[2], f"{name} was replaced by {self.optimizer}"

    @property
    def flat(self) -> Tensor:
        """The partition that the optimizer steps."""
        flat: Tensor = self.engine.optimizer.single_partition_of_fp32_groups[0]
        return flat

    def _timed(self) -> None:
        if self._watch is not None:
            assert self.flat.grad is not None
            self._watch(self.flat, self.flat.grad)
        start = time.perf_counter()
        self._step()
        self.seconds.append(time.perf_counter() - start)

    def step(self, scale: float) -> float:
        """A step of the whole engine; its seconds."""
        start = time.perf_counter()
        self.engine.backward(self.engine(torch.tensor(scale)))
        self.engine.step()
        return time.perf_counter() - start

    def state_bytes(self) -> float:
        """Of the optimizer's state, a parameter."""
        tensors = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor.nbytes for tensor in tensors) / self.flat.numel()


def displacement_error(name: str) -> float:
    """How far the weights are from the textbook's after some steps, relative to how far these went."""
    oracle: list[TextbookAdam] = []
    began: list[Tensor] = []

    def watch(flat: Tensor, grad: Tensor) -> None:
        if not oracle:
            began.append(flat.detach().clone())
            settings = {key: value for key, value in SETTINGS.items() if key != "betas"}
            oracle.append(TextbookAdam(flat, betas=tuple(SETTINGS["betas"]), **settings))
        oracle[0].step(grad)

    contestant = Contestant(name, 256, watch)
    for step in range(VALIDATION_STEPS):
        contestant.step(scale_of(step))
    return harness.relative_error(contestant.flat.detach().double() - began[0], oracle[0].param - began[0])


def scale_of(step: int) -> float:
    """What a step's noise is multiplied by."""
    return (1.0, -0.7, 1.9, 0.4, -1.3)[step % 5]


def whose_kernel() -> str:
    """The backend of ours that steps a partition under the engine, by its calls."""
    called: list[str] = []

    def counting(name: str, real: Any) -> Any:
        def call(batch: Any) -> Any:
            called.append(name)
            return real(batch)

        return call

    held = dict(kernels.BACKENDS)
    kernels.BACKENDS.update({name: counting(name, real) for name, real in held.items()})
    try:
        contestant = Contestant(OURS, 256)
        for step in range(2):
            contestant.step(scale_of(step))
    finally:
        kernels.BACKENDS.update(held)
    assert isinstance(contestant.optimizer, AdamW8bit)
    assert len(called) == 2, called
    assert len(set(called)) == 1, called
    return called[0]


def measure(
    rows: int, rounds: int, names: tuple[str, ...] = tuple(BLOCKS), stream: int = 1 << 26
) -> list[dict[str, Any]]:
    """Medians of all contestants, with ratios to DeepSpeedCPUAdam where it is among them, and the memory's bandwidth.

    Args:
        rows: of the matrices, of 1,024 elements each.
        rounds: how often each contestant steps.
        names: of the contestants.
        stream: elements of the arrays by which the bandwidth is measured, once a round.
    """
    errors = {name: displacement_error(name) for name in names}
    for name, error in errors.items():
        assert error <= ALLOWED[name], f"{name} is off the textbook by {error:g}; allowed: {ALLOWED[name]:g}"
    engines = {name: Contestant(name, rows) for name in names}
    whole: dict[str, list[float]] = {name: [] for name in names}
    triad, streamed = bandwidth_runs(stream)[TRIAD], []
    for round_ in range(rounds + 2):
        order = list(names)[round_ % len(names) :] + list(names)[: round_ % len(names)]
        for name in order if round_ % 2 else reversed(order):
            whole[name].append(engines[name].step(scale_of(round_)))
        start = time.perf_counter()
        triad()
        streamed.append(time.perf_counter() - start)
    base = THEIRS if THEIRS in names else names[0]
    steady = {name: engine.seconds[2:] for name, engine in engines.items()}
    return [
        {
            "name": name,
            "parameters": engine.flat.numel(),
            "ns": harness.median(steady[name]) / engine.flat.numel() * 1e9,
            "p5": harness.quantiles(steady[name])[0] / engine.flat.numel() * 1e9,
            "p95": harness.quantiles(steady[name])[2] / engine.flat.numel() * 1e9,
            "ratio": harness.median(steady[name]) / harness.median(steady[base]),
            "ratio_of_rounds": harness.median(a / b for a, b in zip(steady[name], steady[base], strict=True)),
            "engine_ratio": harness.median(whole[name][2:]) / harness.median(whole[base][2:]),
            "state_bytes": engine.state_bytes(),
            "error": errors[name],
            "base": base,
            "triad_gb_s": bandwidth_row(TRIAD, streamed[2:], stream)["allocating_gb_s"],
        }
        for name, engine in engines.items()
    ]


def start(folder: str) -> None:
    """A process group of one, as DeepSpeed's launcher makes it."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    os.environ |= {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "DEEPSPEED_LOG_LEVEL": "error"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)


def main(
    quick: Annotated[bool, typer.Option(help="A short version, to see that everything runs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
    name: Annotated[str, typer.Option(help="Name of the files, for other instruction sets.")] = "deepspeed",
    threads: Annotated[int, typer.Option(help="Threads of all contestants; 0 takes torch's number.", min=0)] = 0,
) -> None:
    """Time the step of all contestants at two sizes; ends with 1 if ours misses its target at full size."""
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        start(folder)
        kernel = whose_kernel()
        sizes = (1 << 8,) if quick else (1 << 15, 1 << 17)
        stream = 1 << (16 if quick else 26)
        found = [row for rows in sizes for row in measure(rows, 3 if quick else 25, stream=stream)]
        dist.destroy_process_group()
    report(found, kernel, quick, output, name)
    ours = [row for row in found if row["name"] == OURS]
    if not quick and any(row["ratio"] > TARGET for row in ours):
        raise typer.Exit(1)


def report(found: Sequence[Mapping[str, Any]], kernel: str, quick: bool, output: Path, name: str) -> None:
    """The table and the files."""
    header = ["parameters", "optimizer", "ns/parameter", "5%", "95%", "ratio, of medians", "ratio, median of rounds"]
    header += ["engine's step, ratio", "state, bytes/parameter", "error", "triad, GB/s"]
    keys = ["parameters", "name", "ns", "p5", "p95", "ratio", "ratio_of_rounds", "engine_ratio", "state_bytes", "error"]
    keys += ["triad_gb_s"]
    cells = [[row[key] for key in keys] for row in found]
    title = "Step under DeepSpeed with offload_optimizer" + (" (quick run, not to be quoted)" if quick else "")
    harness.print_table(title, header, cells)
    told = native()
    ratios = ", ".join(f"{row['ratio']:.2f}" for row in found if row["name"] == OURS)
    verdict = f"Ours took {ratios} of DeepSpeedCPUAdam's time; target: at most {TARGET}."
    isa = told.get("isa", "none")
    setting = f"{torch.get_num_threads()} threads; ours ran by backend {kernel!r}, instruction set {isa}."
    harness.write_results(
        name,
        {"rows": found, "quick": quick, "backend": kernel, "native": told, "target": TARGET},
        f"# {title}\n\n{setting} {verdict}\n\n{harness.markdown_table(header, cells)}",
        output,
    )
    typer.echo(verdict)


if __name__ == "__main__":
    typer.run(main)

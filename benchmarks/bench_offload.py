"""What offload takes on the host, on the device and on the bus, and whether transfers run beside the host's step.

    python -m benchmarks.bench_offload [--quick]

Runs on the simulated accelerator of the tests (tests/sim_device), which counts bytes and delays copies, and so needs a
C++ compiler. Offloaded optimizers first have to give the bits of the same optimizer on the host. What the host's step
takes is measured without it, against torch's fused AdamW and, where it is installed, DeepSpeedCPUAdam.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from benchmarks import harness, offload_gradients, offload_host_step
from benchmarks.offload_plot import plot
from benchmarks.step_contestants import SETTINGS, Shape, count, gpt2_shapes, make_params
from benchmarks.step_timing import Plan
from lowmem_adam import AdamW8bit, kernels
from lowmem_adam.offload import SLOTS
from tests import sim_device as sim
from tests.cases import assert_same_bits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 1 << 20
HOST_TARGET, DEVICE_TARGET, PINNED_TARGET = 2.05, 0, 2.0
VALIDATION_STEPS = 3

Table = tuple[str, list[str], list[list[harness.Cell]]]
Span = tuple[float, float]


# ---------------------------------------------------------------- what is stepped


def on_device(shapes: Sequence[Shape], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients that stay as they are, on the simulated device."""
    out = []
    for host in make_params(shapes, dtype):
        assert host.grad is not None
        out.append(torch.nn.Parameter(host.detach().to(sim.NAME)))
        out[-1].grad = host.grad.to(sim.NAME)
    return out


def validate(shapes: Sequence[Shape], dtype: torch.dtype, bucket_mb: float, **settings: Any) -> None:
    """Refuse to measure what does not give the bits of a step on the host."""
    there, here = on_device(shapes, dtype), make_params(shapes, dtype)
    pair = [
        AdamW8bit(there, **SETTINGS, offload="cpu", bucket_cap_mb=bucket_mb, **settings),
        AdamW8bit(here, **SETTINGS, **settings),
    ]
    for opt in pair:
        for _ in range(VALIDATION_STEPS):
            opt.step()
    for offloaded, param in zip(there, here, strict=True):
        assert_same_bits(offloaded.detach().cpu(), param.detach())


# ---------------------------------------------------------------- bytes


def measure_memory(shapes: Sequence[Shape], name: str, bucket_mb: float) -> dict[str, Any]:
    """Bytes of a second step, when everything is there: held, at the peak, and over the bus."""
    dtype, numel = DTYPES[name], count(shapes)
    validate(shapes, dtype, bucket_mb)
    gc.collect()  # the buffers of what was validated
    pinned = sim.pinned_bytes()
    params = on_device(shapes, dtype)
    opt = AdamW8bit(params, **SETTINGS, offload="cpu", bucket_cap_mb=bucket_mb)
    opt.step()
    torch.accelerator.synchronize()
    sim.clear_log()
    sim.reset_peaks()
    held = sim.device_bytes()
    opt.step()
    torch.accelerator.synchronize()
    by_way = {way: sum(copy.bytes for copy in sim.copies() if copy.direction == way) for way in sim.DIRECTIONS}
    return {
        "case": f"GPT-2's shapes, {name}",
        "numel": numel,
        "tensors": len(shapes),
        "host": opt.memory_report()["total_bytes"] / numel,
        "device_peak": sim.peak_device_bytes() - held,
        "pinned_buckets": (sim.peak_pinned_bytes() - pinned) / (bucket_mb * MIB),
        "down": by_way["to_host"] / numel,
        "up": by_way["to_device"] / numel,
        "least_down": 2.0 * dtype.itemsize,
        "least_up": float(dtype.itemsize),
    }


# ---------------------------------------------------------------- time


def timed_step(opt: AdamW8bit) -> dict[str, Any]:
    """A step from its call until the device has its last parameter, with what the host and each way did when."""
    host: list[Span] = []
    kernel_of = kernels.BACKENDS

    def recorded(step_: Callable[..., Any]) -> Callable[..., Any]:
        def call(work: Any) -> Any:
            begin = time.monotonic()
            result = step_(work)
            host.append((begin, time.monotonic()))
            return result

        return call

    torch.accelerator.synchronize()
    sim.clear_log()
    with mock.patch.dict(kernel_of, {name: recorded(step_) for name, step_ in kernel_of.items()}):
        begin = time.monotonic()
        opt.step()
        torch.accelerator.synchronize()
        end = time.monotonic()
    ways: dict[str, list[Span]] = {}
    for way in sim.DIRECTIONS:
        spans = [(copy.begin, copy.end) for copy in sim.copies() if copy.direction == way]
        ways[way] = [(first, last) for first, last in spans if first is not None and last is not None]
    return {"seconds": end - begin, "host": host, **ways, "begin": begin}


def busy(spans: Sequence[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def measure_overlap(rows: int, bucket_mb: float, chunks: int, rounds: int) -> dict[str, Any]:
    """Steps with copies as slow as the computation, which is the reference backend's on one thread.

    That one is slow enough for the delays of the copies to be most of what they take: a simulated copy also costs the
    host's time, which a real one does not.
    """
    shapes: list[Shape] = [(rows, 1024)] * chunks
    settings: dict[str, Any] = {"backend": "reference"}
    validate(shapes[:2], torch.float32, bucket_mb, **settings)
    opt = AdamW8bit(on_device(shapes, torch.float32), **SETTINGS, offload="cpu", bucket_cap_mb=bucket_mb, **settings)
    opt.step()
    alone = timed_step(opt)
    host_of_bucket = busy(alone["host"]) / len(alone["host"])
    bytes_down = 8 * count(shapes) / len(alone["host"])
    found = []
    for way, size in zip(sim.DIRECTIONS, (bytes_down, bytes_down / 2), strict=True):
        sim.set_delay(way, bytes_per_second=size / host_of_bucket)
    for _ in range(rounds):
        step = timed_step(opt)
        parts = [busy(step[lane]) for lane in ("to_host", "host", "to_device")]
        buckets = len(step["host"])
        found.append(
            {
                "seconds": step["seconds"],
                "longest": max(parts),
                "sum": sum(parts),
                "bucket": sum(parts) / buckets,
                "buckets": buckets,
            }
        )
    for way in sim.DIRECTIONS:
        sim.set_delay(way)
    keys = ("seconds", "longest", "sum", "bucket")
    medians = {key: harness.median(row[key] for row in found) for key in keys}
    lanes = {
        lane: [(a - step["begin"], b - step["begin"]) for a, b in step[lane]] for lane in ("host", *sim.DIRECTIONS)
    }
    return {
        **medians,
        "bound": medians["longest"] + medians["bucket"],
        "over_bound": harness.median(row["seconds"] / (row["longest"] + row["bucket"]) for row in found),
        "over_sum": harness.median(row["seconds"] / row["sum"] for row in found),
        "buckets": found[-1]["buckets"],
        "rounds": found,
        "timeline": lanes,
    }


# ---------------------------------------------------------------- results


def verdicts(memory: Sequence[dict[str, Any]], overlap: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for row in memory:
        checks = [
            ("bytes of state a parameter on the host", row["host"], HOST_TARGET),
            ("bytes that a step takes on the device", row["device_peak"], DEVICE_TARGET),
            ("pinned memory, in buckets", row["pinned_buckets"], PINNED_TARGET),
            ("bytes down a parameter", row["down"], row["least_down"]),
            ("bytes up a parameter", row["up"], row["least_up"]),
        ]
        out += [{"case": row["case"], "check": name, "measured": got, "target": most} for name, got, most in checks]
    told = "step / (longest of down, host, up + one bucket)"
    out.append(
        {"case": "transfers as slow as the host", "check": told, "measured": overlap["over_bound"], "target": 1.0}
    )
    return [{**row, "met": row["measured"] <= row["target"]} for row in out]


def tables(data: dict[str, Any]) -> list[Table]:
    checks: list[list[harness.Cell]] = [
        [row["case"], row["check"], row["measured"], row["target"], "yes" if row["met"] else "NO"]
        for row in data["verdicts"]
    ]
    overlap = data["overlap"]
    names = {
        "buckets": "buckets",
        "seconds": "a step, s",
        "longest": "longest of down, host, up, s",
        "bucket": "down, host and up of one bucket, s",
        "sum": "all of them one after the other, s",
        "over_sum": "a step / all one after the other",
    }
    rows: list[list[harness.Cell]] = [[name, overlap[key]] for key, name in names.items()]
    sizes: list[list[harness.Cell]] = [[row["case"], row["numel"], row["tensors"]] for row in data["memory"]]
    return [
        ("Targets", ["case", "check", "measured", "at most", "met"], checks),
        ("Transfers as slow as the host's step", ["", "median"], rows),
        ("Models", ["case", "parameters", "tensors"], sizes),
        *offload_gradients.tables(data["gradients"], data["waiting"]),
        *offload_host_step.tables(data["host_step"]),
    ]


def measure_host_step(quick: bool, threads: int) -> dict[str, Any]:
    plan = Plan(rounds=3, seconds=2.0, least=2, sample_seconds=1e-3) if quick else Plan(rounds=41, seconds=60.0)
    size = {"numel": 1 << 17, "stream": 1 << 20} if quick else {"numel": 1 << 25, "stream": 1 << 26}
    return offload_host_step.measure(**size, plan=plan, threads=threads)


def main(
    quick: Annotated[bool, typer.Option(help="Small models, to see that everything runs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON, Markdown and PNG files.")] = harness.RESULTS,
    threads: Annotated[int, typer.Option(help="Threads of the host's step; 0 takes torch's number.", min=0)] = 0,
) -> None:
    """Measure offload on the simulated accelerator; ends with 1 if a target is missed at full size."""
    try:
        sim.load()
    except sim.SimUnavailableError as problem:
        raise typer.BadParameter(f"there is no simulated accelerator here: {problem}") from problem
    warnings.filterwarnings("ignore", "offload steps on the host")  # one thread is meant here
    host_step = measure_host_step(quick, threads)
    torch.set_num_threads(1)
    shapes = gpt2_shapes(2, 128, 512, 64) if quick else gpt2_shapes()
    bucket_mb = 0.25 if quick else 16.0
    memory = [measure_memory(shapes, name, bucket_mb) for name in DTYPES]
    rows = 128 if quick else 1024
    # Parameter and gradient of each tensor fill one buffer, but for the space between them.
    overlap = measure_overlap(rows, SLOTS / 2 * (rows * 8 / 1024 + 1e-3), chunks=4 if quick else 12, rounds=3)
    data: dict[str, Any] = {"memory": memory, "overlap": overlap, "verdicts": verdicts(memory, overlap)}
    data["host_step"] = host_step
    data["gradients"] = offload_gradients.measure_gradients(shapes, torch.float32, bucket_mb)
    chunks, seconds = (4, 0.02) if quick else (12, 0.05)
    data["waiting"] = offload_gradients.measure_waiting(rows, chunks, rows * 4 / 1024, seconds, rounds=3)
    pages = ["# Offload" + (" (quick run, not to be quoted)" if quick else "")]
    pages.append(
        "On the simulated accelerator. Each optimizer first gave the bits of the same optimizer on the host. For the "
        "transfers as slow as the host's step, that step is the reference backend's on one thread, and the rates of "
        "both ways are set so that each takes as long for a bucket."
    )
    pages.append(
        "For the way from a backward pass to the last parameter, each gradient takes as long to compute as to copy, "
        f"{seconds} s, so that all of them are on their way for {chunks * seconds:g} s."
    )
    pages.append(offload_host_step.setting(host_step))
    for title, header, lines in tables(data):
        harness.print_table(title, header, lines)
        pages.append(f"## {title}\n\n{harness.markdown_table(header, lines)}")
    path = harness.write_results("offload", {"quick": quick, **data}, "\n\n".join(pages), output)
    plot(overlap["timeline"], path.with_suffix(".png"))
    if not quick and not all(row["met"] for row in data["verdicts"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

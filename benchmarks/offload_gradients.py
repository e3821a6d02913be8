"""What becomes of gradients in the offload benchmark: how many are on the device, and what a step still waits for."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.step_contestants import SETTINGS, Shape, count, make_params
from lowmem_adam import AdamW8bit, step_in_backward
from tests import sim_device as sim
from tests.cases import assert_same_bits

WAYS: dict[str, dict[str, Any]] = {
    "step()": {},
    "offload_gradients": {"offload_gradients": True},
    "step_in_backward": {},
}
"""Names, and the keywords of the offloaded optimizer."""


class Case:
    """A model on the simulated device whose gradients are the same in each pass and come about one after the other."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, way: str | None, bucket_mb: float) -> None:
        hosts = make_params(shapes, dtype)
        device = "cpu" if way is None else sim.NAME
        self.params = [nn.Parameter(host.detach().to(device)) for host in hosts]
        self.grads: list[Tensor] = [host.grad.to(device) for host in hosts if host.grad is not None]
        where = {} if way is None else {"offload": "cpu", "bucket_cap_mb": bucket_mb, **WAYS[way]}
        self.opt = AdamW8bit(self.params, **SETTINGS, **where)
        self._handle = step_in_backward(nn.ParameterList(self.params), self.opt) if way == "step_in_backward" else None

    def loss(self) -> Tensor:
        return torch.stack([(param * grad).sum() for param, grad in zip(self.params, self.grads, strict=True)]).sum()

    def step(self) -> None:
        self.opt.zero_grad()
        self.loss().backward()
        self.opt.step()


def validate(shapes: Sequence[Shape], dtype: torch.dtype, way: str, bucket_mb: float, steps: int = 3) -> None:
    """Refuse to measure what does not give the bits of a step on the host."""
    there, here = (Case(shapes, dtype, name, bucket_mb) for name in (way, None))
    for case in (there, here):
        for _ in range(steps):
            case.step()
    for offloaded, param in zip(there.params, here.params, strict=True):
        assert_same_bits(offloaded.detach().cpu(), param.detach())


Table = tuple[str, list[str], list[list[harness.Cell]]]


def tables(gradients: Sequence[dict[str, Any]], waiting: Sequence[dict[str, Any]]) -> list[Table]:
    keys = ("way", "device", "host", "down", "up")
    header = ["gradients go with", "on the device at the peak", "kept on the host", "down", "up"]
    waits: list[list[harness.Cell]] = [[row["way"], row["seconds"], row["gradients"]] for row in waiting]
    return [
        ("Gradients, bytes a parameter", header, [[row[key] for key in keys] for row in gradients]),
        ("From the end of a backward pass to the last parameter", ["", "s", "of all gradients' way"], waits),
    ]


def measure_gradients(shapes: Sequence[Shape], dtype: torch.dtype, bucket_mb: float) -> list[dict[str, Any]]:
    """For each way the bytes of a third pass with its step, when everything is there."""
    numel = count(shapes)
    rows = []
    for way in WAYS:
        validate(shapes, dtype, way, bucket_mb)
        gc.collect()
        case = Case(shapes, dtype, way, bucket_mb)
        for _ in range(2):
            case.step()
        case.opt.zero_grad()
        loss = case.loss()
        torch.accelerator.synchronize()
        gc.collect()
        sim.clear_log()
        sim.reset_peaks()
        held = sim.device_bytes()
        loss.backward()
        case.opt.step()
        torch.accelerator.synchronize()
        by_way = {way: sum(copy.bytes for copy in sim.copies() if copy.direction == way) for way in sim.DIRECTIONS}
        rows.append(
            {
                "way": way,
                "device": (sim.peak_device_bytes() - held) / numel,
                "host": case.opt.memory_report()["gradient_bytes"] / numel,
                "down": by_way["to_host"] / numel,
                "up": by_way["to_device"] / numel,
            }
        )
        del case, loss
    return rows


@contextlib.contextmanager
def slow_gradients(params: Sequence[nn.Parameter], seconds: float) -> Iterator[None]:
    """A gradient takes so long to compute. Operators of the simulated device take no time of their own."""

    def wait(_: Tensor) -> None:
        time.sleep(seconds)

    hooks = [param.register_hook(wait) for param in params]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure_waiting(rows: int, chunks: int, bucket_mb: float, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """How long after a backward pass the device has its parameters, where a gradient takes as long to copy as to make.

    Args:
        rows: of each of the parameters, which have 1,024 columns.
        chunks: parameters.
        bucket_mb: of a bucket.
        seconds: that a gradient takes to make, and to copy.
        rounds: passes, of which the median counts.
    """
    shapes: list[Shape] = [(rows, 1024)] * chunks
    size = rows * 1024 * 4
    found = []
    for way in ("step()", "offload_gradients"):
        case = Case(shapes, torch.float32, way, bucket_mb)
        case.step()
        torch.accelerator.synchronize()
        for direction in sim.DIRECTIONS:
            sim.set_delay(direction, bytes_per_second=size / seconds)
        after = []
        with slow_gradients(case.params, seconds):
            for _ in range(rounds):
                case.opt.zero_grad()
                case.loss().backward()
                end = time.monotonic()
                case.opt.step()
                torch.accelerator.synchronize()
                after.append(time.monotonic() - end)
        for direction in sim.DIRECTIONS:
            sim.set_delay(direction)
        middle = harness.median(after)
        found.append({"way": way, "seconds": middle, "gradients": middle / (chunks * seconds)})
    return found

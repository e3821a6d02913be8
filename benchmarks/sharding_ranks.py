"""What one rank of the sharding benchmark does, the contestants, and the start of all ranks of a case.

A replica under ``DistributedDataParallel`` gets random gradients, other ones on every rank, and averages them. Every
contestant then steps parameters of its own with these, which stay as they are from then on.

Bytes are counted, not derived: the kernel's own account of every TCP socket of this process (TCP_INFO, Linux), which
is of payload, without headers. It counts what gloo sends, and a few hundred bytes of barriers. What is sent again
because it was lost is taken off. Before it is believed it has to agree about a transfer of known size.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import random
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.multiprocessing.spawn import ProcessContext, start_processes
from torch.nn import Module, Parameter, ParameterList
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from benchmarks.step_contestants import SETTINGS, Shape, count
from benchmarks.step_probe import peak_growth
from launch.reporting import optimizer_state_bytes
from lowmem_adam import AdamW8bit

SECONDS = 900.0
"""Far above what a case takes; then its ranks are ended."""

BUCKET_MB, SMALL_BUCKET_MB = 64.0, 4.0  # the first is the default
OURS, OURS_SMALL = "lowmem-adam", f"lowmem-adam, {SMALL_BUCKET_MB:g} MiB buckets"
ZERO, ZERO_VIEWS = "ZeroRedundancyOptimizer", "ZeroRedundancyOptimizer, bucket views"

VALIDATION_STEPS = 3
VALIDATION_FACTOR = -0.5  # of the gradient, from step to step; a power of two, so that it comes back exactly
WARM_STEPS, COUNTED_STEPS = 1, 2

TCP_BYTES_SENT, TCP_BYTES_AGAIN = 200, 208  # offsets in the kernel's struct tcp_info, since Linux 4.19
KNOWN_BYTES = 1 << 24


@dataclass(frozen=True)
class Contestant:
    """A sharded optimizer and the same one without shards, which it has to follow to the bit."""

    name: str
    build: Callable[[list[Parameter]], Optimizer]
    alone: Callable[[list[Parameter]], Optimizer]
    bucket_mb: float | None = None
    """What a step may take besides the state, where the optimizer promises it."""


@dataclass(frozen=True)
class Case:
    """Who steps what, how often."""

    ranks: int
    model: str
    dtype: torch.dtype
    shapes: Sequence[Shape]
    rounds: int
    names: Sequence[str] = (OURS, OURS_SMALL, ZERO, ZERO_VIEWS)

    @property
    def label(self) -> str:
        return f"{self.model} {'bf16' if self.dtype == torch.bfloat16 else 'fp32'}, {self.ranks} ranks"

    @property
    def parameter_bytes(self) -> int:
        return count(self.shapes) * self.dtype.itemsize

    @property
    def held_bytes(self) -> float:
        """Of all ranks at once: parameters of every contestant, gradients, states, and one optimizer without shards."""
        replicas = (len(self.names) + 1) * self.ranks * self.parameter_bytes
        torch_moments = 2.0 * self.parameter_bytes  # in the parameter's type
        states = sum(torch_moments if name in (ZERO, ZERO_VIEWS) else 2.02 * count(self.shapes) for name in self.names)
        return replicas + states + self.parameter_bytes + torch_moments


def contestants(names: Sequence[str]) -> list[Contestant]:
    def sharded(bucket_mb: float) -> Callable[[list[Parameter]], Optimizer]:
        return lambda params: AdamW8bit(params, **SETTINGS, shard_group="world", bucket_cap_mb=bucket_mb)

    def zero(views: bool) -> Callable[[list[Parameter]], Optimizer]:
        # Fused is torch's fastest; comparing with a slower step would flatter us.
        return lambda params: ZeroRedundancyOptimizer(
            params, optimizer_class=AdamW, parameters_as_bucket_view=views, **SETTINGS, fused=True
        )

    def ours_alone(params: list[Parameter]) -> Optimizer:
        return AdamW8bit(params, **SETTINGS)

    def torch_alone(params: list[Parameter]) -> Optimizer:
        return AdamW(params, **SETTINGS, fused=True)

    everybody = [
        Contestant(OURS, sharded(BUCKET_MB), ours_alone, BUCKET_MB),
        Contestant(OURS_SMALL, sharded(SMALL_BUCKET_MB), ours_alone, SMALL_BUCKET_MB),
        Contestant(ZERO, zero(False), torch_alone),
        Contestant(ZERO_VIEWS, zero(True), torch_alone),
    ]
    return [contestant for contestant in everybody if contestant.name in names]


# ---------------------------------------------------------------- bytes sent


def tcp_bytes_sent() -> int | None:
    """Payload that all TCP sockets of this process have sent; None where the kernel does not say."""
    total = 0
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
        for descriptor in descriptors:
            sent = _sent_through(descriptor)
            if sent is None:
                return None
            total += sent
    except OSError:
        return None
    return total


def _sent_through(descriptor: int) -> int | None:
    """Payload sent through a descriptor, 0 of what is no TCP socket."""
    try:
        own = os.dup(descriptor)
    except OSError:  # the one that listed the folder is closed by now
        return 0
    try:
        connection = socket.socket(fileno=own)  # finds out family and type
    except OSError:
        os.close(own)
        return 0
    with connection:
        if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return 0
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
    if len(told) < TCP_BYTES_AGAIN + 8:
        return None
    sent, again = (struct.unpack_from("=Q", told, offset)[0] for offset in (TCP_BYTES_SENT, TCP_BYTES_AGAIN))
    return int(sent - again)


def counted(run: Callable[[], Any]) -> int | None:
    """Bytes that this rank sends during `run`. All ranks call it: what others still forward is waited for."""
    dist.barrier()
    before = tcp_bytes_sent()
    run()
    dist.barrier()
    after = tcp_bytes_sent()
    return None if before is None or after is None else after - before


def by_rank(value: Any) -> list[Any]:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def check_counter() -> float | None:
    """Counted over known bytes of one broadcast, which must be 1; None where nothing can be counted."""
    known = torch.ones(KNOWN_BYTES, dtype=torch.uint8)
    sent = by_rank(counted(lambda: dist.broadcast(known, src=0)))
    if any(value is None for value in sent):
        return None
    found = sum(sent) / (KNOWN_BYTES * (dist.get_world_size() - 1))
    if not math.isclose(found, 1.0, rel_tol=1e-3):
        raise RuntimeError(f"a broadcast of {KNOWN_BYTES} bytes was counted as {sent}")
    return found


# ---------------------------------------------------------------- gradients


class RandomGradient(torch.autograd.Function):
    """Zero, with a random gradient: the backward pass of a model without its cost."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, generator: torch.Generator) -> Tensor:
        ctx.param, ctx.generator = param, generator
        return param.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        param = ctx.param
        return torch.randn(param.shape, generator=ctx.generator, dtype=param.dtype).mul_(0.01), None


class Replica(Module):
    """Parameters of a model's shapes."""

    def __init__(self, params: Sequence[Parameter]) -> None:
        super().__init__()
        self.params = ParameterList(params)

    def forward(self, generator: torch.Generator) -> Tensor:
        zeros: list[Tensor] = [RandomGradient.apply(param, generator) for param in self.params]
        return torch.stack(zeros).sum()


def make_params(case: Case) -> list[Parameter]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=case.dtype).mul_(0.02)) for shape in case.shapes]


def reduced_gradients(params: Sequence[Parameter]) -> tuple[DistributedDataParallel, list[Tensor]]:
    """Averages of every rank's own random gradients, by DDP, in whose buckets they lie."""
    model = DistributedDataParallel(Replica(params), gradient_as_bucket_view=True)
    model(torch.Generator().manual_seed(1 + dist.get_rank())).backward()
    grads = [param.grad for param in params if param.grad is not None]
    assert len(grads) == len(params)
    return model, grads


# ---------------------------------------------------------------- validation


def step_validating(optimizer: Optimizer, params: Sequence[Parameter], grads: Sequence[Tensor]) -> None:
    """Some steps, each with another gradient; the gradients are as before at the end."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    for _ in range(VALIDATION_STEPS):
        optimizer.step()
        for grad in grads:
            grad.mul_(VALIDATION_FACTOR)
    for grad in grads:
        grad.mul_(VALIDATION_FACTOR**-VALIDATION_STEPS)


class Validation:
    """Holds contestants against the optimizer without shards, which takes the same steps on rank 0."""

    def __init__(self, case: Case, grads: Sequence[Tensor]) -> None:
        self.case, self.grads = case, grads
        self._alone: tuple[Any, list[Parameter]] | None = None

    def check(self, contestant: Contestant, optimizer: Optimizer, params: Sequence[Parameter]) -> None:
        """Replicas must be equal on all ranks, and equal to those of the optimizer without shards.

        Raises:
            RuntimeError: they are not.
        """
        step_validating(optimizer, params, self.grads)
        AdamW8bit(list(params), shard_group="world").check_replicas()
        if dist.get_rank() == 0:
            wanted = self._wanted(contestant)
            different = [i for i, (a, b) in enumerate(zip(params, wanted, strict=True)) if not torch.equal(a, b)]
            if different:
                words = f"differs from the same optimizer without shards in parameters {different}"
                raise RuntimeError(f"{self.case.label}: {contestant.name} {words}")

    def _wanted(self, contestant: Contestant) -> list[Parameter]:
        if self._alone is None or self._alone[0] is not contestant.alone:
            self._alone = None
            wanted = make_params(self.case)
            before = [float(param.detach().norm()) for param in wanted]
            step_validating(contestant.alone(wanted), wanted, self.grads)
            after = [float(param.detach().norm()) for param in wanted]
            if not all(math.isfinite(new) and new != old for old, new in zip(before, after, strict=True)):
                raise RuntimeError(f"{self.case.label}: a parameter stepped nowhere, or to what is not finite")
            self._alone = (contestant.alone, wanted)
        return self._alone[1]


# ---------------------------------------------------------------- one case


def time_steps(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the slowest rank, contestants taking turns in another order every round, ranks starting together."""
    order, shuffle = list(steps), random.Random(0).shuffle  # the same on all ranks
    mine: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    for index in range(-WARM_STEPS, rounds):
        shuffle(order)
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            if index >= 0:
                mine[name].append(time.perf_counter() - start)
    gc.enable()
    return {name: [max(times) for times in zip(*by_rank(mine[name]), strict=True)] for name in steps}


def repeatedly(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def measure(case: Case) -> dict[str, Any]:
    """All figures of a case; every rank gets them."""
    entrants = contestants(case.names)
    counter = check_counter()
    first = make_params(case)
    model, grads = reduced_gradients(first)
    copies = [[Parameter(param.detach().clone()) for param in first] for _ in entrants[1:]]
    validation = Validation(case, grads)
    optimizers = {}
    for contestant, params in zip(entrants, [first, *copies], strict=True):
        optimizers[contestant.name] = optimizer = contestant.build(params)
        validation.check(contestant, optimizer, params)
    del validation
    seconds = time_steps({name: optimizer.step for name, optimizer in optimizers.items()}, case.rounds)
    rows = []
    for contestant in entrants:
        optimizer = optimizers[contestant.name]
        sent = by_rank(counted(partial(repeatedly, optimizer.step, COUNTED_STEPS)))
        dist.barrier()
        peaks = by_rank(peak_growth(optimizer.step))
        row: dict[str, Any] = {"name": contestant.name, "bucket_mb": contestant.bucket_mb}
        row |= {"state_bytes": by_rank(optimizer_state_bytes(optimizer)), "seconds": seconds[contestant.name]}
        row["sent_bytes"] = None if None in sent else [value / COUNTED_STEPS for value in sent]
        rows.append(row | {"peak_extra_bytes": None if None in peaks else peaks})
    del model
    return {"counter_check": counter, "threads": torch.get_num_threads(), "rows": rows}


def run_rank(rank: int, case: Case, folder: Path) -> None:
    """One rank from its beginning to its end."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // case.ranks))
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=case.ranks,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    found = measure(case)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's own end, in which a thread of gloo's may abort the process (launch/processes.py).
    os._exit(0)


def run_case(case: Case) -> dict[str, Any]:
    """Start the ranks of a case, each a process of its own, and get what they found."""
    # Ranks are forked from a process that has done nothing but import.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (case, Path(folder))
        context = start_processes(run_rank, arguments, case.ranks, join=False, start_method="forkserver")
        assert isinstance(context, ProcessContext)
        deadline = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise RuntimeError(f"{case.label}: not all ranks ended within {SECONDS:g} s")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    described = {"label": case.label, "ranks": case.ranks, "model": case.model, "dtype": str(case.dtype)}
    described |= {"tensors": len(case.shapes), "numel": count(case.shapes), "parameter_bytes": case.parameter_bytes}
    return {**described, **found}

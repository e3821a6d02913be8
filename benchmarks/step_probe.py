"""First step and extra memory of one contestant, in a process of its own.

    python -m benchmarks.step_probe LABEL NUMEL THREADS

A first step is the user's first: loading of the kernel, start of the threads and creation of the state included. What a
step takes beyond the state is read from the kernel's own account of the process (Linux), which counts the
allocations of every library.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.step_contestants import Contestant, installed_peers, make_params, one_tensor, own_and_torch

STEADY_STEPS = 7
TIMEOUT = 900
ROOT = Path(__file__).resolve().parents[1]


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def account(key: str) -> int | None:
    """A line of /proc/self/status in bytes: VmRSS is held now, VmHWM was held at most."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def peak_growth(run: Callable[[], Any]) -> int | None:
    """Bytes by which `run` raised the process's resident memory at its peak; None where that cannot be read."""
    try:
        # Memory that earlier steps freed and the allocator kept would hide what this one takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    except (OSError, AttributeError):
        return None
    before = account("VmHWM")
    run()
    after = account("VmHWM")
    return None if before is None or after is None else after - before


def state_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Bytes of the state; None where a tensor subclass hides what it holds."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    if any(type(t) is not Tensor for t in tensors):
        return None
    return sum(t.numel() * t.element_size() for t in tensors)


def probe(contestant: Contestant, numel: int) -> dict[str, Any]:
    """First step, steady steps, a second optimizer's first step, and what a steady step takes in memory."""
    params = make_params(one_tensor(numel), contestant.dtype)
    torch.stack([p.sum() for p in params]).sum().item()  # starts the thread pool, as a backward would have
    optimizer = contestant.build(params)
    held = account("VmRSS")
    first = seconds(optimizer.step)
    steady = [seconds(optimizer.step) for _ in range(STEADY_STEPS)]
    extra = peak_growth(optimizer.step)
    state, grown = state_bytes(optimizer), account("VmRSS")
    second = contestant.build(params)
    return {
        "first_seconds": first,
        "steady_seconds": steady,
        "second_first_seconds": seconds(second.step),
        "peak_extra_bytes": extra,
        "kept_extra_bytes": None if held is None or grown is None or state is None else grown - held - state,
    }


def run_probe(contestant: Contestant, numel: int, threads: int) -> dict[str, Any]:
    """`probe` in a fresh process, and with an empty cache of torch.compile, as a new user has it."""
    command = [sys.executable, "-m", "benchmarks.step_probe", contestant.label, str(numel), str(threads)]
    with tempfile.TemporaryDirectory() as cache:
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": cache}
        finished = subprocess.run(
            command, check=True, timeout=TIMEOUT, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True
        )
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def main() -> None:
    label, numel, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    (contestant,) = (c for c in (*own_and_torch(), *installed_peers()) if c.label == label)
    print(json.dumps(probe(contestant, int(numel))))


if __name__ == "__main__":
    main()

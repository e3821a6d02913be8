"""Spawned gloo ranks for tests: a job on each of them, a bounded wait, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes

NEEDS_GLOO = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo"
)

SECONDS = 240
"""Far above what a job takes; then its ranks are ended."""

Job = Callable[[int, Path], Any]
"""Is called with the rank and a folder that all ranks share; what it returns goes through ``torch.save``."""


def run_rank(rank: int, job: Job, world_size: int, folder: Path) -> None:
    """One rank from its beginning to its end."""
    torch.set_num_threads(1)
    rendezvous = (folder / "rendezvous").as_uri()
    # Shorter than the parent waits: a rank left alone says in which call it hangs.
    timeout = timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timeout)
    try:
        torch.save(job(rank, folder), folder / f"result_{rank}.pt")
        dist.barrier()
    except BaseException:  # torch's CheckpointException is no Exception
        # Before this rank's connections close: the other rank's complaint about that may be raised first.
        (folder / f"traceback_{rank}.txt").write_text(f"Rank {rank}: {traceback.format_exc()}")
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's own end, in which a thread of gloo's may abort the process (launch/processes.py).
    os._exit(0)


def on_ranks(world_size: int, job: Job, folder: Path) -> list[Any]:
    """What the job returns on each rank. An error on a rank fails the test and shows that rank's traceback."""
    # Ranks are forked from a process that has done nothing but import: what takes each spawned one three seconds.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.distributed.checkpoint", "torch._dynamo"])
    (folder / "rendezvous").unlink(missing_ok=True)
    context = start_processes(run_rank, (job, world_size, folder), world_size, join=False, start_method="forkserver")
    assert isinstance(context, ProcessContext)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"not all ranks ended within {SECONDS} s"
    except ProcessException as error:
        tracebacks = [path.read_text() for path in sorted(folder.glob("traceback_*.txt"))]
        raise AssertionError("\n".join([*tracebacks, str(error)])) from None
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"result_{rank}.pt", weights_only=True) for rank in range(world_size)]

"""Many scenarios in one start of ranks, and what they share: a sharded optimizer beside one that keeps all."""

from __future__ import annotations

import functools
import itertools
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel

from lowmem_adam import AdamW8bit, agreement
from tests.cases import FEW, Shape, assert_same_bits, copied, make_params, params_of, set_gradients
from tests.ranks import Job, on_ranks
from tests.test_ddp import Model, loss_of

PAIR = 2
"""Ranks, where two are enough."""

SMALL_BUCKET = 2.0**-6
"""MiB: a few thousand elements, so that parameters lie in several buckets."""

ERRORS = (Exception, CheckpointException)
"""torch's CheckpointException is no Exception."""

PATIENCE = 10.0
"""Seconds that a rank waits for others within a scenario, where it should not wait at all."""

FAILED = "FAILED: "

Outcomes = dict[str, list[Any]]
"""What every scenario returned on each rank; a string that begins with ``FAILED`` where it raised."""


# ---------------------------------------------------------------- starting


def run_all(jobs: Sequence[Job], rank: int, folder: Path) -> dict[str, Any]:
    """One scenario after the other, each with a default process group of its own: one that fails harms no other."""
    found: dict[str, Any] = {}
    agreement.MEETING_SECONDS = PATIENCE
    world_size = dist.get_world_size()
    for job in jobs:
        place = folder / name_of(job)
        place.mkdir(exist_ok=True)
        _begin_anew(rank, world_size, place)
        try:
            found[place.name] = job(rank, place)
        except ERRORS:
            found[place.name] = f"{FAILED}rank {rank}: {traceback.format_exc()}"
    _begin_anew(rank, world_size, folder)
    return found


def _begin_anew(rank: int, world_size: int, place: Path) -> None:
    """A new default process group, once all ranks are here: those that failed may have waited for one another."""
    (place / f"here_{rank}").touch()
    deadline = time.monotonic() + 3 * PATIENCE
    while not all((place / f"here_{other}").exists() for other in range(world_size)):
        assert time.monotonic() < deadline, f"not all ranks came to {place}"
        time.sleep(0.002)
    dist.destroy_process_group()
    init_method = (place / "rendezvous_anew").as_uri()
    timeout = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)


def name_of(job: Job) -> str:
    """A scenario's name."""
    return job.__name__


def start(world_size: int, jobs: Sequence[Job], folder: Path) -> Outcomes:
    """Run scenarios on ranks that are started once."""
    of_ranks = on_ranks(world_size, functools.partial(run_all, tuple(jobs)), folder)
    return {name: [found[name] for found in of_ranks] for name in of_ranks[0]}


def outcome(outcomes: Outcomes, job: Job) -> list[Any]:
    """What a scenario returned on each rank; an error in it fails the test and shows its traceback."""
    results = outcomes[name_of(job)]
    errors = [result for result in results if isinstance(result, str) and result.startswith(FAILED)]
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
    return results


def raised(call: Callable[[], object]) -> str:
    """Type and message of the exception that a call raises; "nothing" if it raises none."""
    try:
        call()
    except ERRORS as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def group_of(seconds: float, ranks: Sequence[int] | None = None) -> dist.ProcessGroup:
    """A group of its own with a short time limit: calls that would never meet end, and disturb nobody else."""
    group = dist.new_group(ranks, timeout=timedelta(seconds=seconds))
    assert group is not None
    return group


# ---------------------------------------------------------------- a sharded optimizer and one that is not


def values(opt: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters."""
    return [copied(param) for param in params_of(opt)]


def held(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of what this rank holds, without asking the others: what an error must leave as it was."""
    states = [copied(opt.state[param]) if param in opt.state else {} for param in params_of(opt)]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
    return {"params": values(opt), "state": states, "groups": copied(groups)}


def loads_of(opt: AdamW8bit) -> list[int]:
    """Blocks that every rank holds."""
    return [*opt._cut().loads]


def small(shard_group: Any, shapes: Sequence[Shape] = FEW, seed: int = 0, **keywords: Any) -> AdamW8bit:
    """An optimizer of a few parameters in two groups, the same on all ranks."""
    params = make_params(shapes, keywords.pop("dtype", torch.float32), seed=seed)
    half = len(params) // 2
    groups: list[dict[str, Any]] = [{"params": params[:half]}, {"params": params[half:], "lr": 3e-3}]
    settings = {"lr": 1e-2, "bucket_cap_mb": SMALL_BUCKET, **keywords}
    return AdamW8bit(groups if half else params, shard_group=shard_group, **settings)


def set_trainable_gradients(opt: torch.optim.Optimizer, step: int, seed: int = 0) -> None:
    """The same gradients on all ranks; none for frozen parameters."""
    set_gradients(params_of(opt), step, seed)
    for param in params_of(opt):
        if not param.requires_grad:
            param.grad = None


def take(opt: torch.optim.Optimizer, steps: range, seed: int = 0) -> None:
    """Steps with the same gradients on all ranks."""
    for step in steps:
        set_trainable_gradients(opt, step, seed)
        opt.step()
        opt.zero_grad()


def in_order(state_dict: dict[str, Any]) -> dict[str, Any]:
    """State by parameter, whichever had its first gradient first; settings that a load made lists are tuples again."""
    groups = [{**group, "betas": tuple(group["betas"])} for group in state_dict["param_groups"]]
    return {**state_dict, "state": dict(sorted(state_dict["state"].items())), "param_groups": groups}


def assert_equal_runs(sharded: AdamW8bit, alone: AdamW8bit, to: int = 0) -> None:
    """The parameters of every rank and the state of all together are those of the one that keeps all."""
    assert_same_bits(values(sharded), values(alone), "parameters")
    whole = sharded.consolidate_state_dict(to=to)
    if whole is not None:
        assert_same_bits(in_order(whole), in_order(alone.state_dict()), "state")


class Replica:
    """A rank's model under DDP and its optimizer."""

    def __init__(self, shard_group: Any, plain: torch.nn.Module | None = None, seed: int = 0, **ddp: Any) -> None:
        self.plain = Model(seed) if plain is None else plain
        self.ddp = DistributedDataParallel(self.plain, **ddp)
        self.opt = AdamW8bit(self.plain.parameters(), lr=1e-2, shard_group=shard_group, bucket_cap_mb=SMALL_BUCKET)

    def train(self, rank: int, steps: range) -> None:
        for step in steps:
            loss_of(self.ddp, rank, step).backward()
            self.opt.step()
            self.opt.zero_grad()


# ---------------------------------------------------------------- state that does not fit


def renamed(made: dict[str, Any], rank: int, size: int, to_rank: int, to_size: int) -> dict[str, Any]:
    return {key.replace(f"shard_{rank}_of_{size}", f"shard_{to_rank}_of_{to_size}"): v for key, v in made.items()}


def newer(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "param_groups": [{**group, "format_version": 99} for group in made["param_groups"]]}


def foreign() -> dict[str, Any]:
    params = make_params(FEW)
    opt = torch.optim.SGD(params, momentum=0.9)
    set_gradients(params, 0)
    opt.step()
    return opt.state_dict()


def state_of_another_model() -> dict[str, Any]:
    opt = small(None, FEW[::-1])
    take(opt, range(1))
    return opt.state_dict()


# ---------------------------------------------------------------- memory


def _allocations(call: Callable[[], object]) -> list[int]:
    """Bytes that a call allocates for tensors, in order; what it frees is negative."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [int(event.nbytes()) for event in sorted(changes, key=lambda event: int(event.start_ns()))]


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of tensors that this thread holds during a call beyond those before it, at the worst moment."""
    return max(itertools.accumulate(_allocations(call), initial=0))


def allocated_by(call: Callable[[], object]) -> int:
    """Bytes that a call allocates, whether it frees them or not: gloo's threads free where nobody counts."""
    return sum(max(0, nbytes) for nbytes in _allocations(call))

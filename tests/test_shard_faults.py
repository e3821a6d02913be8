"""Sharded optimizers when ranks die, differ or come alone: an error on all that are left, and nothing lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.multiprocessing.spawn import ProcessContext, start_processes

from lowmem_adam import AdamW8bit, agreement, resharding, updating
from lowmem_adam.shard import Gather
from lowmem_adam.shard_tensor import ShardTensor
from tests.cases import FEW, SHAPES, assert_same_bits, make_params, params_of, set_gradients
from tests.ranks import NEEDS_GLOO, Job
from tests.shard_jobs import (
    PAIR,
    Outcomes,
    Replica,
    assert_equal_runs,
    group_of,
    held,
    name_of,
    outcome,
    raised,
    small,
    start,
    take,
    values,
)
from tests.test_ddp import loss_of

pytestmark = NEEDS_GLOO

THREE = 3
SAVED = 3
"""Steps before the checkpoint that must stay whole."""
END = 5
GROUP_SECONDS = 8.0
"""Time limit of the process groups whose ranks die or part."""
DEAD = "dead"
"""Said of one that did not live to say what it raised."""


# ---------------------------------------------------------------- pairs of which not all come back


def run_in_pair(index: int, jobs: Sequence[Job], folder: Path) -> None:
    """One rank of one pair; all pairs run at once. What its job raises is written down."""
    torch.set_num_threads(1)
    job, rank = jobs[index // PAIR], index % PAIR
    place = folder / name_of(job)
    # The time limit counts from when both are there: so many processes begin at once.
    (place / f"here_{rank}").touch()
    deadline = time.monotonic() + 10 * GROUP_SECONDS
    while not (place / f"here_{1 - rank}").exists():
        assert time.monotonic() < deadline, "the other rank does not come"
        time.sleep(0.01)
    rendezvous, limit = (place / "rendezvous").as_uri(), timedelta(seconds=GROUP_SECONDS)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PAIR, timeout=limit)
    said = raised(lambda: job(rank, place))
    (place / f"unfinished_{rank}").write_text(said)
    (place / f"unfinished_{rank}").rename(place / f"said_{rank}")
    os._exit(0)


def on_pairs(jobs: Sequence[Job], folder: Path) -> dict[str, list[str]]:
    """What each rank of each pair raised."""
    for job in jobs:
        (folder / name_of(job)).mkdir()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.distributed.checkpoint", "torch._dynamo"])
    context = start_processes(
        run_in_pair, (tuple(jobs), folder), PAIR * len(jobs), join=False, start_method="forkserver"
    )
    assert isinstance(context, ProcessContext)
    deadline = time.monotonic() + 10 * GROUP_SECONDS
    try:
        for index, process in enumerate(context.processes):
            if not (index % PAIR == 1 and name_of(jobs[index // PAIR]) == name_of(stopped_job)):
                process.join(max(0.0, deadline - time.monotonic()))
                assert not process.is_alive(), f"{name_of(jobs[index // PAIR])}, rank {index % PAIR} hangs"
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    paths = {name_of(job): [folder / name_of(job) / f"said_{rank}" for rank in range(PAIR)] for job in jobs}
    return {
        name: [path.read_text() if path.exists() else "dead" for path in of_pair] for name, of_pair in paths.items()
    }


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at(count: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works until its last call."""
    calls = [0]

    def counted(*args: Any, **keywords: Any) -> Any:
        calls[0] += 1
        return call(*args, **keywords) if calls[0] < count else die()

    return counted


def saved(folder: Path) -> AdamW8bit:
    """An optimizer after its first steps, with a checkpoint of them in both ways."""
    opt = small("world")
    take(opt, range(SAVED))
    whole = opt.state_dict()
    if dist.get_rank() == 0:
        torch.save({"params": values(opt), "optimizer": whole}, folder / "good.pt")
    dcp_save({"optim": opt}, checkpoint_id=folder / "good")
    return opt


def in_step_job(rank: int, folder: Path) -> Any:
    opt = saved(folder)
    if rank == 1:
        updating._step = dies_at(3, updating._step)
    take(opt, range(SAVED, END))


def in_gather_job(rank: int, folder: Path) -> Any:
    opt = saved(folder)
    if rank == 1:
        Gather._send = dies_at(3, Gather._send)  # type: ignore[method-assign]
    take(opt, range(SAVED, END))


def in_state_dict_job(rank: int, folder: Path) -> Any:
    opt = saved(folder)
    take(opt, range(SAVED, END))
    if rank == 1:
        resharding._collect = dies_at(4, resharding._collect)
    opt.state_dict()


def in_dcp_save_job(rank: int, folder: Path) -> Any:
    opt = saved(folder)
    take(opt, range(SAVED, END))
    if rank == 1:
        ShardTensor.__get_tensor_shard__ = die  # type: ignore[method-assign]
    dcp_save({"optim": opt}, checkpoint_id=folder / "unfinished")


def before_save_job(rank: int, folder: Path) -> Any:
    agreement.MEETING_SECONDS = 2.0
    opt = saved(folder)
    if rank == 1:
        die()
    opt.state_dict()


def stopped_job(rank: int, folder: Path) -> Any:
    """It lives, and its connections stay open, but it does not come."""
    opt = saved(folder)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    take(opt, range(SAVED, END))


DEADLY = (in_step_job, in_gather_job, in_state_dict_job, in_dcp_save_job, before_save_job, stopped_job)


# ---------------------------------------------------------------- pairs that part later, or before they can tell


def bucket_job(rank: int, folder: Path) -> Any:
    """Buckets of another size on each rank."""
    param = nn.Parameter(torch.zeros(512, 512))
    param.grad = torch.ones_like(param)
    AdamW8bit([param], shard_group="world", bucket_cap_mb=0.25 if rank else 64.0).step()


def memory_format_job(rank: int, folder: Path) -> Any:
    """The same shapes, of which one rank holds the memory in another order."""
    format_ = torch.channels_last if rank == 1 else torch.contiguous_format
    params = [nn.Parameter(torch.zeros(128, 128, 3, 3).contiguous(memory_format=format_)) for _ in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    AdamW8bit(params, shard_group="world").step()


def missing_gradient_job(rank: int, folder: Path) -> Any:
    """At the first step one rank has no gradient of a parameter: without DDP nobody would notice."""
    opt = small("world")
    set_gradients(params_of(opt), 0)
    if rank == 1:
        for param in params_of(opt)[1:]:
            param.grad = None
    opt.step()


def later_sparse_job(rank: int, folder: Path) -> Any:
    opt = small("world")
    take(opt, range(2))
    set_gradients(params_of(opt), 2)
    if rank == 1:
        first = params_of(opt)[0]
        assert first.grad is not None
        first.grad = first.grad.to_sparse()
    opt.step()


def later_load_job(rank: int, folder: Path) -> Any:
    agreement.MEETING_SECONDS = 1.0
    opt = small("world")
    take(opt, range(2))
    own = opt.state_dict()
    if rank == 1:
        opt.load_state_dict(own)
    take(opt, range(2, 3))


def later_unfrozen_job(rank: int, folder: Path) -> Any:
    opt = small("world")
    params_of(opt)[0].requires_grad_(False)
    take(opt, range(2))
    params_of(opt)[0].requires_grad_(rank == 1)
    take(opt, range(2, 3))


def join_ddp_job(rank: int, folder: Path) -> Any:
    """One rank has more batches than the other, and Join knows of the model only."""
    replica = Replica("world")
    with Join([replica.ddp]):
        for step in range(2 + rank):
            loss_of(replica.ddp, rank, step).backward()
            replica.opt.step()
            replica.opt.zero_grad()


def join_both_job(rank: int, folder: Path) -> Any:
    replica = Replica("world")
    with Join([replica.ddp, replica.opt]):  # type: ignore[list-item]
        pass


FIRST_STEP = (bucket_job, memory_format_job, missing_gradient_job)
LATER = (later_sparse_job, later_load_job, later_unfrozen_job, join_ddp_job)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("pairs")
    return folder, on_pairs((*DEADLY, *FIRST_STEP, *LATER, join_both_job), folder)


Said = tuple[Path, dict[str, list[str]]]


@pytest.mark.parametrize("job", DEADLY)
def test_when_a_rank_dies_the_other_stops_and_the_last_checkpoint_is_whole(said: Said, job: Job) -> None:
    folder, of_pairs = said
    survivor, dead = of_pairs[name_of(job)]
    assert dead == "dead"
    assert survivor.startswith(("RuntimeError", "DistBackendError", "DistNetworkError", "CheckpointException")), (
        survivor
    )
    if job is before_save_job:
        assert "consolidate_state_dict" in survivor
    place = folder / name_of(job)
    straight = small(None)
    take(straight, range(END))
    good = torch.load(place / "good.pt", weights_only=True)
    for load in (
        lambda opt: opt.load_state_dict(good["optimizer"]),
        lambda opt: dcp_load({"optim": opt}, checkpoint_id=place / "good"),
    ):
        opt = small(None, seed=1)
        with torch.no_grad():
            for param, value in zip(params_of(opt), good["params"], strict=True):
                param.copy_(value)
        load(opt)
        take(opt, range(SAVED, END))
        assert_same_bits(values(opt), values(straight))
        assert_same_bits(opt.state_dict(), straight.state_dict())


@pytest.mark.parametrize("job", FIRST_STEP)
def test_what_ranks_cannot_exchange_without_agreeing_stops_all_of_them_at_the_first_step(said: Said, job: Job) -> None:
    for words in said[1][name_of(job)]:
        assert words.startswith("RuntimeError: ranks that share moments differ: "), words


@pytest.mark.parametrize("job", LATER)
def test_ranks_that_part_later_end_within_the_time_limit_of_their_group(said: Said, job: Job) -> None:
    of_pair = said[1][name_of(job)]
    assert "nothing" not in of_pair
    if job is later_load_job:
        assert of_pair[1].startswith("RuntimeError: load_state_dict() of a sharded optimizer waited 1 s"), of_pair


def test_join_of_the_optimizer_is_refused_in_words(said: Said) -> None:
    for words in said[1][name_of(join_both_job)]:
        assert words.startswith(("RuntimeError: ", "TypeError: ", "ValueError: ")), words
        assert "Join" in words


# ---------------------------------------------------------------- ranks that differ at the first step


def in_one_group(group: Any) -> AdamW8bit:
    return AdamW8bit(make_params(FEW), lr=1e-2, shard_group=group)


def counted_on(group: Any) -> AdamW8bit:
    opt = small(group)
    opt.sharded_state_dict()  # makes the state
    for state in opt.state.values():
        state["step"] += 2
    return opt


def sparse(group: Any) -> AdamW8bit:
    opt = small(group)
    set_gradients(params_of(opt), 0)
    first = params_of(opt)[0]
    assert first.grad is not None
    first.grad = first.grad.to_sparse()
    return opt


def without_memory(group: Any) -> AdamW8bit:
    opt = small(group)

    def step() -> None:
        with mock.patch("lowmem_adam.making.new_state", side_effect=torch.OutOfMemoryError("there is none")):
            AdamW8bit.step(opt)

    opt.step = step  # type: ignore[assignment, method-assign]
    return opt


# How the odd rank makes its optimizer, and what all ranks say.
DIFFERENCES: dict[str, tuple[Callable[[Any], AdamW8bit], str]] = {
    "shape": (lambda group: small(group, (SHAPES[1], *FEW[1:])), "shape (32, 128)"),
    "dtype": (lambda group: small(group, dtype=torch.bfloat16), "torch.bfloat16"),
    "number of groups": (in_one_group, "1 param groups"),
    "number of parameters": (lambda group: small(group, FEW[:-2]), "param group 0: 2 parameters"),
    "learning rate": (lambda group: small(group, lr=0.125), "lr 0.125"),
    "moments": (lambda group: small(group, moments="32bit"), "moments 32bit"),
    "nonfinite": (lambda group: small(group, nonfinite="error"), "nonfinite error"),
    "steps taken": (counted_on, "2 steps"),
    "sparse gradient": (sparse, "torch.sparse_coo"),
    "no memory": (without_memory, "no memory on cpu for"),
}
REFUSED = {"sparse gradient": "ValueError", "no memory": "OutOfMemoryError"}
"""What the odd rank raises where it is no difference of settings."""


def differences_job(rank: int, folder: Path) -> Any:
    found = {}
    for name, (odd, _) in DIFFERENCES.items():
        group = group_of(GROUP_SECONDS)
        opt = odd(group) if rank == 1 else small(group)
        if params_of(opt)[0].grad is None:
            set_gradients(params_of(opt), 0)
        before = held(opt)
        found[name] = raised(opt.step)
        assert_same_bits(held(opt), before)
    return found


# ---------------------------------------------------------------- alone in a collective


def alone_job(rank: int, folder: Path) -> Any:
    """state_dict() and consolidate_state_dict() on one rank only, each in turn, and then on all."""
    agreement.MEETING_SECONDS = 0.5
    opt, alone = small("world"), small(None)
    for one in (opt, alone):
        take(one, range(2))
    said = []
    for caller in range(THREE):
        if rank == caller:
            said += [raised(opt.state_dict), raised(opt.consolidate_state_dict)]
        dist.barrier()
    said.append(raised(lambda: opt.consolidate_state_dict(to=min(rank, 1))))  # not the same rank for all of them
    dist.barrier()
    agreement.MEETING_SECONDS = 10.0
    consolidated = opt.consolidate_state_dict(to=1)
    if rank == 1:
        assert_same_bits(consolidated, alone.state_dict())
    opt._forget_consolidated()
    for _ in range(2):
        whole = opt.state_dict()
        if rank == 0:
            assert_same_bits(whole, alone.state_dict())
    take(opt, range(2, 3))
    take(alone, range(2, 3))
    assert_equal_runs(opt, alone)
    return said


def two_alike_job(rank: int, folder: Path) -> Any:
    """Another optimizer, equal to one whose state_dict() all ranks have called, is asked on one rank only."""
    agreement.MEETING_SECONDS = 0.5
    group = group_of(3.0)
    first, second = small(group), small(group)
    for opt in (first, second):
        take(opt, range(2))
    first.state_dict()
    said = raised(second.state_dict) if rank == 0 else ""
    dist.barrier()
    return said


THREE_JOBS = (differences_job, alone_job, two_alike_job)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return start(THREE, THREE_JOBS, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ_at_the_first_step_all_say_in_what(three: Outcomes, name: str) -> None:
    for rank, found in enumerate(outcome(three, differences_job)):
        words = found[name]
        assert DIFFERENCES[name][1] in words, words
        if name in REFUSED:
            assert words.startswith(f"{REFUSED[name]}: " if rank == 1 else "RuntimeError: rank 1 refuses: ")
        else:
            assert words.startswith("RuntimeError: ranks that share moments differ: rank 0 has ")


def test_state_dict_on_one_rank_only_says_what_to_call_and_all_may_call_it_later(three: Outcomes) -> None:
    for said in outcome(three, alone_job):
        assert len(said) == 3
        assert said[0].startswith("RuntimeError: state_dict() of a sharded optimizer waited 0.5 s")
        assert "consolidate_state_dict(to=rank)" in said[0]
        for words in said[1:]:
            assert words.startswith("RuntimeError: consolidate_state_dict(to=")
            assert words.endswith("waited 0.5 s for the other ranks; accepted: this call on all ranks of shard_group")


def test_state_dict_on_one_rank_only_of_one_of_two_equal_optimizers_is_told_apart(three: Outcomes) -> None:
    assert "consolidate_state_dict(to=rank)" in outcome(three, two_alike_job)[0]

"""Sharded optimizers on process groups, meshes and numbers of ranks of every kind; and the memory they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lowmem_adam import AdamW8bit
from tests.cases import (
    DTYPES,
    FEW,
    Shape,
    assert_same_bits,
    copied,
    differ,
    lay_out,
    make_params,
    params_of,
    set_gradients,
)
from tests.ranks import NEEDS_GLOO
from tests.shard_jobs import (
    PAIR,
    SMALL_BUCKET,
    Outcomes,
    allocated_by,
    assert_equal_runs,
    held,
    loads_of,
    outcome,
    peak_of,
    raised,
    small,
    start,
    take,
    values,
)

pytestmark = NEEDS_GLOO

FOUR = 4
SEVEN = 7


# ---------------------------------------------------------------- groups


def groups_job(rank: int, folder: Path) -> Any:
    """Three of four ranks share one optimizer, then two pairs each have their own."""
    three = dist.new_group([0, 1, 2])
    said = "nothing"
    if rank == 3:
        said = raised(lambda: small(three))
    else:
        opt, alone = small(three), small(None)
        take(opt, range(3))
        take(alone, range(3))
        assert_equal_runs(opt, alone, to=2)
        assert len(loads_of(opt)) == 3
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    mine = rank // 2
    opt, alone = small(pairs[mine]), small(None)
    for one in (opt, alone):
        take(one, range(3), seed=mine)
    whole = opt.state_dict()
    assert_equal_runs(opt, alone, to=1)
    return {"said": said, "params": values(opt), "state": sorted(whole)}


def mesh_job(rank: int, folder: Path) -> Any:
    flat, two = init_device_mesh("cpu", (FOUR,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    alone = small(None)
    take(alone, range(3))
    for mesh, size in ((flat, 4), (two["dp"], 2), (two["tp"], 2)):
        opt = small(mesh)
        take(opt, range(3))
        assert len(loads_of(opt)) == size
        assert_equal_runs(opt, alone, to=size - 1)
    return raised(lambda: small(two))


def outside_job(rank: int, folder: Path) -> Any:
    """A mesh of the first two ranks only: for the others it is an error, at once or when they step."""
    mesh = DeviceMesh("cpu", [0, 1])

    def begin() -> None:
        opt = small(mesh)
        take(opt, range(1))

    return raised(begin)


def flipped_job(rank: int, folder: Path) -> Any:
    found = {}
    for dtype in DTYPES:
        params = make_params(FEW, dtype)
        named = [(f"layer.{index}", param) for index, param in enumerate(params)]
        opt = AdamW8bit(named, shard_group="world", bucket_cap_mb=SMALL_BUCKET)
        take(opt, range(1))
        opt.check_replicas()
        for index, param in enumerate(params):
            before = copied(param)
            if rank == 2:
                width = torch.int32 if dtype == torch.float32 else torch.int16
                with torch.no_grad():
                    flat = param.detach().reshape(-1).clone()
                    flat.view(width)[-1] ^= 1 << (index % 8)
                    param.copy_(flat.view(param.shape))
            found[f"{dtype}, layer.{index}"] = raised(opt.check_replicas)
            with torch.no_grad():
                param.copy_(before)
        opt.check_replicas()
    return found


def tiny_job(rank: int, folder: Path) -> Any:
    """More ranks than blocks."""
    loads = []
    for shapes in ((Shape("bias", (7,), False),), (Shape("scalar", (), False), Shape("no rows", (0, 5), False))):
        opt, alone = (small(group, shapes) for group in ("world", None))
        for one in (opt, alone):
            take(one, range(3))
        whole = opt.state_dict()
        again = small("world", shapes)
        with torch.no_grad():
            for param, value in zip(params_of(again), values(opt), strict=True):
                param.copy_(value)
        again.load_state_dict(whole)
        for one in (opt, again, alone):
            take(one, range(3, 5))
        opt.check_replicas()
        assert_equal_runs(opt, alone, to=SEVEN - 1)
        assert_equal_runs(again, alone)
        loads.append(loads_of(opt))
    return loads


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return start(FOUR, (groups_job, mesh_job, outside_job, flipped_job), tmp_path_factory.mktemp("four"))


# ---------------------------------------------------------------- tests: groups


def test_subgroups_shard_separately_and_a_rank_outside_is_told(four: Outcomes) -> None:
    of_ranks = outcome(four, groups_job)
    assert [found["said"] == "nothing" for found in of_ranks] == [True, True, True, False]
    assert of_ranks[3]["said"].startswith("ValueError: shard_group is ")
    assert "a ProcessGroup of which this process is a member" in of_ranks[3]["said"]
    assert_same_bits(of_ranks[0]["params"], of_ranks[1]["params"])
    assert_same_bits(of_ranks[2]["params"], of_ranks[3]["params"])
    assert differ(of_ranks[0]["params"], of_ranks[2]["params"])
    assert [found["state"] for found in of_ranks] == [
        ["param_groups", "state"],
        ["param_groups", "shard_1_of_2", "state"],
    ] * 2


def test_a_mesh_of_one_dimension_is_a_group_and_one_of_two_is_refused(four: Outcomes) -> None:
    for said in outcome(four, mesh_job):
        assert said.startswith("ValueError: shard_group is a DeviceMesh of 2 dimensions, ('dp', 'tp'); accepted: ")


def test_a_rank_outside_of_a_mesh_is_told(four: Outcomes) -> None:
    said = outcome(four, outside_job)
    assert said[:2] == ["nothing", "nothing"]
    assert all("shard_group" in words for words in said[2:]), said


def test_a_flipped_bit_is_found_on_every_rank_with_parameter_and_rank(four: Outcomes) -> None:
    first, *others = outcome(four, flipped_job)
    assert others == [first] * (FOUR - 1)
    assert len(first) == len(DTYPES) * len(FEW)
    for name, words in first.items():
        layer = name.split(", ")[1]
        assert words.startswith(f"RuntimeError: replicas differ from rank 0's in 1 of {len(FEW)} parameters: ")
        assert f"({layer!r}) (ranks [2])" in words


def test_more_ranks_than_blocks_give_some_of_them_nothing_to_do(tmp_path: Path) -> None:
    assert outcome(start(SEVEN, (tiny_job,), tmp_path), tiny_job) == [[[1, 0, 0, 0, 0, 0, 0]] * 2] * SEVEN


# ---------------------------------------------------------------- tests: one process


def test_world_without_a_process_group_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    opt, alone = small("world"), small(None)
    for one in (opt, alone):
        take(one, range(3))
    assert_same_bits(values(opt), values(alone))
    assert_same_bits(opt.state_dict(), alone.state_dict())
    assert_same_bits(opt.consolidate_state_dict(), alone.state_dict())
    opt.check_replicas()


def test_world_in_one_of_several_processes_waits_for_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    opt = small("world")
    set_gradients(params_of(opt), 0)
    before = held(opt)
    for call in (opt.step, opt.consolidate_state_dict, opt.check_replicas):
        assert "init_process_group" in raised(call)
    assert_same_bits(held(opt), before)


# ---------------------------------------------------------------- memory

BUCKET = 2**18
"""Bytes of a bucket where memory is measured."""

SLACK = 2**14
"""Bytes of scalars, names and other small things."""


def measured_optimizer(*memory: str) -> AdamW8bit:
    """State of about 1 MiB a parameter, half of that on each rank."""
    params = [nn.Parameter(lay_out(torch.zeros(512, 1024), how)) for how in memory]
    opt = AdamW8bit(params, shard_group="world", bucket_cap_mb=BUCKET / 2**20)
    take(opt, range(1))
    return opt


def memory_job(rank: int, folder: Path) -> Any:
    found: dict[str, Any] = {}
    for memory in ("contiguous", "transposed"):
        opt = measured_optimizer(memory)
        set_gradients(params_of(opt), 1)
        found[f"{memory} step"] = allocated_by(opt.step) / len(opt._cut().buckets)
    opt = measured_optimizer("contiguous", "transposed")
    found["own"] = sum(value.nbytes for state in opt.state.values() for value in state.values())
    found["ranks"] = opt.memory_report()["ranks"]
    for to in range(PAIR):
        found[f"consolidate to {to}"] = peak_of(lambda to=to: opt.consolidate_state_dict(to=to))  # type: ignore[misc]
        opt._consolidated = None
        dist.barrier()
    found["state_dict"] = peak_of(opt.state_dict)
    found["dcp save"] = peak_of(lambda: dcp_save({"optim": opt}, checkpoint_id=folder / "saved"))
    found["dcp load"] = peak_of(lambda: dcp_load({"optim": opt}, checkpoint_id=folder / "saved"))
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return start(PAIR, (memory_job,), tmp_path_factory.mktemp("memory"))


def test_a_step_takes_a_bucket_of_memory_and_copies_of_what_does_not_lie_in_one_run(measured: Outcomes) -> None:
    for found in outcome(measured, memory_job):
        assert found["contiguous step"] <= BUCKET + SLACK
        # Beside the bucket: copies of this rank's part of parameter and gradient, made of parts of rows.
        assert found["transposed step"] <= BUCKET + 4 * BUCKET / PAIR + SLACK


def test_only_the_rank_that_is_asked_for_it_ever_holds_the_whole_state(measured: Outcomes) -> None:
    of_ranks = outcome(measured, memory_job)
    total = sum(of_ranks[0]["ranks"])
    for rank, found in enumerate(of_ranks):
        assert found["ranks"] == [other["own"] for other in of_ranks]
        assert abs(found["own"] - total / PAIR) < 0.01 * total
        for call, to in (("consolidate to 0", 0), ("consolidate to 1", 1), ("state_dict", 0)):
            if rank == to:
                assert 0.99 * total < found[call] <= total + SLACK
            else:
                assert found[call] <= SLACK
        assert found["dcp save"] <= found["own"] + SLACK
        # What is read, and a copy of the running state, so that a load that fails has changed nothing.
        assert found["dcp load"] <= 2 * found["own"] + SLACK

"""Sharded optimizers under accelerate: gradient accumulation, and a save by N ranks that M ranks go on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lowmem_adam import AdamW8bit
from tests.cases import assert_same_bits, params_of, set_gradients
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.shard_jobs import SMALL_BUCKET, in_order, values
from tests.test_ddp import Model, loss_of

accelerate = pytest.importorskip("accelerate", reason="save_state and accumulate are accelerate's")

pytestmark = NEEDS_GLOO

WORLDS = (1, 2, 3, 4)
ACCUMULATED = 2
"""Batches a step."""
SAVED, END = 3, 5
"""Steps before the save, and in all."""


def accelerator_of(rank: int) -> Any:
    """As ``accelerate launch`` starts a process of several without a GPU."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size(), "ACCELERATE_USE_CPU": "true"}
    # Of one machine; nothing is looked for there, since the process group is made already.
    variables |= {"LOCAL_WORLD_SIZE": dist.get_world_size(), "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in variables.items()}
    made = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    assert made.num_processes == dist.get_world_size()
    return made


def prepared(accelerator: Any, shard_group: Any, seed: int = 0) -> tuple[Any, Any, AdamW8bit]:
    model = Model(seed)
    opt = AdamW8bit(model.parameters(), lr=1e-2, shard_group=shard_group, bucket_cap_mb=SMALL_BUCKET)
    wrapped, through = accelerator.prepare(model, opt)
    return wrapped, through, opt


def train(accelerator: Any, run: tuple[Any, Any, AdamW8bit], steps: range, *, given: bool = False) -> None:
    """Steps of several batches each; with gradients of their own, or such as every number of ranks has."""
    wrapped, through, opt = run
    for step in steps:
        for batch in range(ACCUMULATED):
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss_of(wrapped, accelerator.process_index, ACCUMULATED * step + batch))
                assert accelerator.sync_gradients == (batch == ACCUMULATED - 1)
                if given and accelerator.sync_gradients:
                    set_gradients(params_of(opt), step)
                through.step()
                through.zero_grad()


def save_job(rank: int, folder: Path) -> Any:
    accelerator = accelerator_of(rank)
    straight = prepared(accelerator, None)
    train(accelerator, straight, range(END))
    accelerator.free_memory()
    sharded = prepared(accelerator, "world")
    train(accelerator, sharded, range(END))
    assert_same_bits(values(sharded[2]), values(straight[2]))
    whole = sharded[2].consolidate_state_dict()
    if whole is not None:
        assert_same_bits(in_order(whole), in_order(straight[2].state_dict()))
        assert all(int(state["step"]) == END for state in whole["state"].values())
    accelerator.free_memory()

    run = prepared(accelerator, "world")
    train(accelerator, run, range(SAVED), given=True)
    accelerator.save_state(str(folder / f"of_{accelerator.num_processes}"))
    train(accelerator, run, range(SAVED, END), given=True)
    return {"params": values(run[2]), "state": run[2].consolidate_state_dict()}


def load_job(rank: int, folder: Path) -> Any:
    accelerator, found = accelerator_of(rank), {}
    for writers in WORLDS:
        run = prepared(accelerator, "world", seed=1)
        accelerator.load_state(str(folder / f"of_{writers}"))
        train(accelerator, run, range(SAVED, END), given=True)
        found[writers] = {"params": values(run[2]), "state": run[2].consolidate_state_dict()}
        accelerator.free_memory()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerate")


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[int, list[Any]]:
    """What every number of ranks comes to without a stop; each has saved its state on the way."""
    return {world: on_ranks(world, save_job, folder) for world in WORLDS}


@pytest.mark.parametrize("readers", WORLDS)
def test_accelerate_goes_on_from_what_any_number_of_ranks_saved(
    straight: dict[int, list[Any]], folder: Path, readers: int
) -> None:
    expected = straight[1][0]
    for of_ranks in straight.values():
        for rank, found in enumerate(of_ranks):
            assert_same_bits(found["params"], expected["params"])
            assert (found["state"] is None) == (rank != 0)
        assert_same_bits(in_order(of_ranks[0]["state"]), in_order(expected["state"]))
    for rank, found in enumerate(on_ranks(readers, load_job, folder)):
        for writers in WORLDS:
            assert_same_bits(found[writers]["params"], expected["params"], f"{writers} ranks saved, {readers} loaded")
            if rank == 0:
                assert_same_bits(in_order(found[writers]["state"]), in_order(expected["state"]))

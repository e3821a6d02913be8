"""Sharded moments: the same bits on any number of ranks, also from a checkpoint of any other number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cases import assert_same_bits, copied, differ, params_of
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.shard_cases import (
    HALF,
    RESUMED,
    SMALL_BUCKET,
    STEPS,
    VARIANTS,
    load_job,
    name_of,
    optimizer,
    take_steps,
    train_and_save_job,
    values,
)

pytestmark = NEEDS_GLOO

WORLD_SIZES = (1, 2, 3, 4, 7)
READERS = (1, 2, 3, 4)

Found = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[int, list[Found]]:
    """What every rank of every number of ranks found; each saved its state half way."""
    found = {}
    for world_size in WORLD_SIZES:
        found[world_size] = on_ranks(world_size, train_and_save_job, folder)
    return found


@pytest.fixture(scope="module")
def straight() -> Found:
    """One process without shards."""
    found = {}
    for variant in VARIANTS:
        opt = optimizer(*variant, None)
        take_steps(opt, range(HALF))
        half = values(opt)
        take_steps(opt, range(HALF, HALF + RESUMED))
        resumed = {"params": values(opt), "state": copied(opt.state_dict())}
        take_steps(opt, range(HALF + RESUMED, STEPS))
        found[name_of(variant)] = {
            "params": values(opt),
            "weights": [opt.master_weight(param) for param in params_of(opt)],
            "state": opt.state_dict(),
            "half": half,
            "resumed": resumed,
        }
    return found


def stepped(state_dict: Found) -> Found:
    """Without the zero state of parameters that never had a gradient, which torch.distributed.checkpoint asks for."""
    return {
        **state_dict,
        "state": {key: state for key, state in sorted(state_dict["state"].items()) if state["step"] > 0},
    }


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_number_of_ranks_gives_the_bits_of_one_process(
    runs: dict[int, list[Found]], straight: Found, world_size: int
) -> None:
    for variant in map(name_of, VARIANTS):
        wanted = straight[variant]
        assert differ(wanted["params"], wanted["half"])
        for rank, found in enumerate(runs[world_size]):
            assert_same_bits(found[variant]["params"], wanted["params"], f"{variant}, parameters of rank {rank}")
            assert_same_bits(found[variant]["weights"], wanted["weights"], f"{variant}, weights on rank {rank}")
        assert_same_bits(stepped(runs[world_size][0][variant]["state"]), wanted["state"], f"{variant}, state")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_rank_keeps_its_part_only(runs: dict[int, list[Found]], world_size: int) -> None:
    for variant in VARIANTS:
        of_ranks = [found[name_of(variant)] for found in runs[world_size]]
        loads = of_ranks[0]["loads"]
        assert all(found["loads"] == loads for found in of_ranks)
        assert sum(loads) == of_ranks[0]["blocks"]
        assert max(loads) - min(loads) <= 1
        # Every rank knows what the others hold, and it is what they measure.
        assert all(found["memory"] == [other["held"] for other in of_ranks] for found in of_ranks)
        if world_size > 1 and variant[2] == SMALL_BUCKET:
            assert of_ranks[0]["buckets"] > 1


@pytest.fixture(scope="module")
def loads(folder: Path, runs: dict[int, list[Found]]) -> dict[int, list[Found]]:
    """What every number of readers made of every number of writers' state."""
    assert runs
    found = {}
    for world_size in READERS:
        found[world_size] = on_ranks(world_size, load_job, folder)
    return found


@pytest.mark.parametrize("way", ["torch.save", "dcp"])
@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("writers", READERS)
def test_saved_by_any_number_of_ranks_and_loaded_by_any_other_as_if_nothing_had_happened(
    loads: dict[int, list[Found]], straight: Found, writers: int, readers: int, way: str
) -> None:
    for variant in map(name_of, VARIANTS):
        for rank, found in enumerate(loads[readers]):
            wanted, loaded = straight[variant]["resumed"], found[f"{variant}-{writers}-{way}"]
            assert differ(wanted["params"], straight[variant]["half"])
            assert_same_bits(loaded["params"], wanted["params"], f"{variant}, parameters of rank {rank}")
            if rank == 0:
                assert_same_bits(stepped(loaded["state"]), wanted["state"], f"{variant}, state")

"""Loads that one rank alone cannot do: an error on all ranks that names it, and nothing changed on any."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lowmem_adam import AdamW8bit, agreement, checkpoint, resharding
from tests.cases import assert_same_bits, params_of
from tests.ranks import NEEDS_GLOO
from tests.shard_jobs import (
    PAIR,
    Outcomes,
    assert_equal_runs,
    foreign,
    held,
    newer,
    outcome,
    raised,
    renamed,
    small,
    start,
    state_of_another_model,
    take,
)

pytestmark = NEEDS_GLOO

ODD = 1
"""The rank whose state does not fit."""
STEPS = 2


def trained() -> tuple[AdamW8bit, AdamW8bit]:
    """An optimizer in shards and one that keeps all, after the same steps."""
    opt, alone = small("world"), small(None)
    for one in (opt, alone):
        take(one, range(STEPS))
    return opt, alone


def own_part(opt: AdamW8bit) -> dict[str, Any]:
    return opt._packed(resharding.as_shard)


def part_of_an_earlier_step(rank: int) -> dict[str, Any]:
    earlier = small("world")
    take(earlier, range(STEPS - 1))
    return own_part(earlier)


def part_with_another_rate(rank: int) -> dict[str, Any]:
    other = small("world", weight_decay=0.25)
    take(other, range(STEPS))
    return own_part(other)


# What the odd rank is given, made on all ranks; what it says, and what the others say.
Case = tuple[Callable[[dict[str, Any], int], Any], str, str]
REFUSES = "RuntimeError: rank 1 refuses: "
DIFFERS = "RuntimeError: ranks that share moments differ: rank 0 has "
STATES: dict[str, Case] = {
    "the part of the other rank": (lambda part, rank: renamed(part, rank, PAIR, 1 - rank, PAIR), "ValueError", REFUSES),
    "a newer version": (lambda part, rank: newer(part), "ValueError: ", REFUSES),
    "another optimizer's state": (lambda part, rank: foreign(), "ValueError: ", REFUSES),
    "another model's state": (lambda part, rank: state_of_another_model(), "ValueError: ", REFUSES),
    "no dictionary": (lambda part, rank: [part], "ValueError: ", REFUSES),
    "a part of an earlier step": (lambda part, rank: part_of_an_earlier_step(rank), DIFFERS, DIFFERS),
    "a part with other settings": (lambda part, rank: part_with_another_rate(rank), DIFFERS, DIFFERS),
}


def states_job(rank: int, folder: Path) -> Any:
    """One rank is given something else than its own part."""
    opt, alone = trained()
    part = own_part(opt)
    before, said = held(opt), {}
    for name, (make, _, _) in STATES.items():
        made = make(part, rank)
        given = made if rank == ODD else part
        said[name] = raised(lambda given=given: opt.load_state_dict(given))  # type: ignore[misc]
        assert_same_bits(held(opt), before, name)
    opt.load_state_dict(part)
    for one in (opt, alone):
        take(one, range(STEPS, STEPS + 2))
    assert_equal_runs(opt, alone)
    return said


def frozen_job(rank: int, folder: Path) -> Any:
    """A load brings state of a parameter that is frozen here, and fails: ranks go on in the same cut."""
    opt, alone = small("world"), small(None)
    saved = small(None, seed=1)
    take(saved, range(STEPS))
    for one in (opt, alone):
        params_of(one)[0].requires_grad_(False)
        take(one, range(STEPS))
    whole = saved.state_dict()
    said = raised(lambda: opt.load_state_dict(foreign() if rank == ODD else whole))
    for one in (opt, alone):
        take(one, range(STEPS, STEPS + 2))
    assert_equal_runs(opt, alone)
    opt.load_state_dict(whole)
    alone.load_state_dict(saved.state_dict())
    for one in (opt, alone):
        params_of(one)[0].requires_grad_(True)
        take(one, range(STEPS, STEPS + 2))
    assert_equal_runs(opt, alone)
    return said


def older_job(rank: int, folder: Path) -> Any:
    """State of a version that had fewer settings, as a rank's own part and as the whole."""
    opt, alone = trained()
    part, whole = own_part(opt), alone.state_dict()
    for state in (part, whole):
        for group in state["param_groups"]:
            del group["master_bits"]
        opt.load_state_dict(state)
    alone.load_state_dict(whole)
    for one in (opt, alone):
        take(one, range(STEPS, STEPS + 2))
    assert_equal_runs(opt, alone)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "FileNotFoundError: "),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "ValueError: "),
    "no checkpoint": (lambda path: path.write_bytes(b"no checkpoint"), "ValueError: "),
}


def files_job(rank: int, folder: Path) -> Any:
    """Every rank reads a file of its own, as on machines without a common disk; one of them is spoilt."""
    saved = small("world", seed=1)
    take(saved, range(STEPS))
    opt, alone = trained()
    before, said = held(opt), {}
    for name, (spoil, _) in FILES.items():
        path = folder / f"{name}_{rank}.pt"
        checkpoint.save(saved, folder / f"{name}_0.pt", to=0)
        checkpoint.save(saved, folder / f"{name}_1.pt", to=1)
        if rank == ODD:
            spoil(path)
        said[name] = raised(lambda path=path: checkpoint.load(opt, path))  # type: ignore[misc]
        assert_same_bits(held(opt), before, name)
    for one in (opt, alone):
        take(one, range(STEPS, STEPS + 2))
    assert_equal_runs(opt, alone)
    return said


def alone_job(rank: int, folder: Path) -> Any:
    """One rank alone loads, first what it could and then what it could not; later all do."""
    opt, alone = trained()
    part = own_part(opt)
    agreement.MEETING_SECONDS, patience = 0.5, agreement.MEETING_SECONDS
    try:
        said = [raised(lambda given=given: opt.load_state_dict(given)) for given in (part, [part]) if rank == ODD]  # type: ignore[misc]
        dist.barrier()
    finally:
        agreement.MEETING_SECONDS = patience
    opt.load_state_dict(part)
    for one in (opt, alone):
        take(one, range(STEPS, STEPS + 2))
    assert_equal_runs(opt, alone)
    return said


JOBS = (states_job, frozen_job, older_job, files_job, alone_job)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    torch.manual_seed(0)
    return start(PAIR, JOBS, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", STATES)
def test_state_that_one_rank_refuses_is_loaded_by_none(pair: Outcomes, name: str) -> None:
    other, odd = (found[name] for found in outcome(pair, states_job))
    assert odd.startswith(STATES[name][1]), odd
    assert other.startswith(STATES[name][2]), other


def test_a_failed_load_leaves_who_holds_what_as_it_was(pair: Outcomes) -> None:
    other, odd = outcome(pair, frozen_job)
    assert odd.startswith("ValueError: ")
    assert other.startswith(REFUSES)


def test_state_of_a_version_with_fewer_settings_loads(pair: Outcomes) -> None:
    outcome(pair, older_job)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_one_rank_cannot_read_is_loaded_by_none(pair: Outcomes, name: str) -> None:
    other, odd = (found[name] for found in outcome(pair, files_job))
    assert odd.startswith(FILES[name][1]), odd
    assert other.startswith(REFUSES), other


def test_a_load_on_one_rank_alone_ends_in_an_error_and_all_may_load_later(pair: Outcomes) -> None:
    other, (could, could_not) = outcome(pair, alone_job)
    assert other == []
    assert could.startswith("RuntimeError: load_state_dict() of a sharded optimizer waited 0.5 s"), could
    assert could_not.startswith("ValueError: "), could_not

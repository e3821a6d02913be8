"""State of sharded optimizers on its way out and in: what callers of every kind do, broken files, and memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from lowmem_adam import AdamW8bit, agreement, resharding
from tests.cases import FEW, assert_same_bits, copied, params_of
from tests.ranks import NEEDS_GLOO, Job
from tests.shard_jobs import (
    PAIR,
    Outcomes,
    Replica,
    assert_equal_runs,
    foreign,
    group_of,
    held,
    in_order,
    newer,
    outcome,
    raised,
    renamed,
    small,
    start,
    state_of_another_model,
    take,
    values,
)

pytestmark = NEEDS_GLOO

SAVED = 3
"""Steps before a save."""
END = 5
"""Steps in all."""


def resumed(shard_group: Any, saved_values: list[Tensor], load: Callable[[AdamW8bit], object]) -> AdamW8bit:
    """An optimizer that goes on from saved parameters and state to the end."""
    opt = small(shard_group)
    with torch.no_grad():
        for param, value in zip(params_of(opt), saved_values, strict=True):
            param.copy_(value)
    load(opt)
    take(opt, range(SAVED, END))
    return opt


def straight() -> AdamW8bit:
    """All steps without a stop and without shards."""
    opt = small(None)
    take(opt, range(END))
    return opt


# ---------------------------------------------------------------- state_dict, load_state_dict


def prepare_job(rank: int, folder: Path) -> Any:
    """What accelerator.prepare does, before the first step and in the middle."""
    opt = small("world")
    for steps in (range(SAVED), range(SAVED, END)):
        before = held(opt)
        opt.load_state_dict(opt.state_dict())
        assert_same_bits(held(opt), before)
        take(opt, steps)
    assert_equal_runs(opt, straight())


def own_part_job(rank: int, folder: Path) -> Any:
    """Every rank writes what it got from state_dict() into a file of its own."""
    opt = small("world")
    take(opt, range(SAVED))
    torch.save(opt.state_dict(), folder / f"{rank}.pt")
    saved_values = values(opt)
    made = torch.load(folder / f"{rank}.pt", weights_only=True)
    assert_equal_runs(resumed("world", saved_values, lambda again: again.load_state_dict(made)), straight(), to=1)
    return sorted(made)


def consolidate_job(rank: int, folder: Path) -> Any:
    """HF Trainer asks one rank only; what was put together for it is dropped by the next step."""
    opt = small(group_of(5))
    take(opt, range(SAVED))
    whole = opt.consolidate_state_dict(to=1)
    assert (whole is None) == (rank == 0)
    alone = small(None)
    take(alone, range(SAVED))
    if rank == 1:
        for _ in range(2):
            assert_same_bits(opt.state_dict(), alone.state_dict())
    dist.barrier()
    take(opt, range(SAVED, END))
    whole = opt.state_dict()
    if rank == 0:
        assert_same_bits(whole, straight().state_dict())
    return sorted(whole)


def several_job(rank: int, folder: Path) -> Any:
    """Every rank that is named gets the whole, in whatever order; what is no rank is refused before any is sent."""
    opt = small("world")
    take(opt, range(SAVED))
    alone = small(None)
    take(alone, range(SAVED))
    refused: list[Any] = [2, -1, True, 0.0, None, [], [0, 2], [1, 1], [0, True], "01"]
    for to in refused:
        with pytest.raises(ValueError, match=r"to is .*; accepted: ranks from 0 below 2, one or several"):
            opt.consolidate_state_dict(to=to)
        assert not opt.consolidated
    for to in ([1, 0], (0, 1)):
        assert_same_bits(in_order(opt.consolidate_state_dict(to=to) or {}), in_order(alone.state_dict()))
        assert opt.consolidated
        assert_same_bits(opt.state_dict(), alone.state_dict())
    assert (opt.consolidate_state_dict(to=[1]) is None) == (rank == 0)
    take(opt, range(SAVED, END))
    assert not opt.consolidated
    assert_equal_runs(opt, straight())


def dropped_job(rank: int, folder: Path) -> Any:
    opt = small("world")
    take(opt, range(SAVED))
    opt.consolidate_state_dict(to=1)
    take(opt, range(SAVED, END))
    whole = opt.state_dict()
    if rank == 0:
        assert_same_bits(whole, straight().state_dict())


def consolidate_then_all_job(rank: int, folder: Path) -> Any:
    """One rank has taken what was put together for it; then all ask, before another step."""
    opt = small(group_of(5))
    take(opt, range(SAVED))
    opt.consolidate_state_dict(to=0)
    if rank == 0:
        opt.state_dict()
    dist.barrier()
    agreement.MEETING_SECONDS, patience = 2.0, agreement.MEETING_SECONDS
    try:
        return raised(opt.state_dict)
    finally:
        agreement.MEETING_SECONDS = patience


# ---------------------------------------------------------------- torch.distributed.checkpoint


def stateful_job(rank: int, folder: Path) -> Any:
    """With shards and without, saved by either and loaded by either."""
    for writer in ("world", None):
        opt = small(writer)
        take(opt, range(SAVED))
        place = folder / str(writer)
        dcp_save({"optim": opt}, checkpoint_id=place)
        saved_values = values(opt)
        for reader in ("world", None):
            again = resumed(
                reader,
                saved_values,
                lambda one, place=place: dcp_load({"optim": one}, checkpoint_id=place),  # type: ignore[misc]
            )
            assert_equal_runs(again, straight())


def functions(rank: int, folder: Path, flatten: bool) -> None:
    """The functions for models and optimizers of torch.distributed.checkpoint, under DDP."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    through = Replica("world")
    through.train(rank, range(SAVED))
    made: dict[str, Any] = {}
    made["model"], made["optim"] = get_state_dict(through.ddp, through.opt, options=options)
    dcp_save(made, checkpoint_id=folder / "saved")
    through.train(rank, range(SAVED, END))
    again = Replica("world", seed=1)
    made["model"], made["optim"] = get_state_dict(again.ddp, again.opt, options=options)
    dcp_load(made, checkpoint_id=folder / "saved")
    set_state_dict(
        again.ddp, again.opt, model_state_dict=made["model"], optim_state_dict=made["optim"], options=options
    )
    again.train(rank, range(SAVED, END))
    assert_same_bits(values(through.opt), values(again.opt))
    assert_same_bits(through.opt.consolidate_state_dict(), again.opt.consolidate_state_dict())


def functions_job(rank: int, folder: Path) -> Any:
    functions(rank, folder, flatten=False)


def flat_functions_job(rank: int, folder: Path) -> Any:
    functions(rank, folder, flatten=True)


def looked_at_job(rank: int, folder: Path) -> Any:
    """To ask for the state before the first step must not take one."""
    looked_at, other = Replica("world"), Replica("world")
    get_optimizer_state_dict(looked_at.ddp, looked_at.opt)
    for replica in (looked_at, other):
        replica.train(rank, range(2))
    assert_same_bits(values(looked_at.opt), values(other.opt))


def full_job(rank: int, folder: Path) -> Any:
    """A full state_dict can be set, and what full_state_dict=True returns is whole or cannot be saved by mistake."""
    alone = Replica(None)
    alone.train(rank, range(SAVED))
    full = copied(get_optimizer_state_dict(alone.ddp, alone.opt, options=StateDictOptions(full_state_dict=True)))
    model = copied(alone.plain.state_dict())
    alone.train(rank, range(SAVED, END))
    for broadcast in (False, True):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        again = Replica("world")
        again.plain.load_state_dict(model)
        given = full if rank == 0 or not broadcast else {}
        set_optimizer_state_dict(again.ddp, again.opt, copied(given), options=options)
        again.train(rank, range(SAVED, END))
        assert_equal_runs(again.opt, alone.opt)

    def save_full() -> None:
        made = get_optimizer_state_dict(again.ddp, again.opt, options=StateDictOptions(full_state_dict=True))
        torch.save(made, folder / f"{rank}.pt")

    said = raised(save_full)
    if said == "nothing":
        wanted = get_optimizer_state_dict(alone.ddp, alone.opt, options=StateDictOptions(full_state_dict=True))
        assert_same_bits(torch.load(folder / f"{rank}.pt", weights_only=True), copied(wanted))
    return said


def async_job(rank: int, folder: Path) -> Any:
    """Steps go on while a thread writes: what is saved is what was there when the call returned."""
    group = group_of(20)  # the thread's collectives may not mix with those of the steps
    plain = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    for way in ("Stateful", "sharded_state_dict", "a stager of its own"):
        opt = small("world")
        take(opt, range(SAVED))
        saved_values = values(opt)
        what = {"optim": opt.sharded_state_dict() if way == "sharded_state_dict" else opt}
        stager = DefaultStager(plain) if way == "a stager of its own" else None
        response: Any = async_save(what, checkpoint_id=folder / way, process_group=group, async_stager=stager)
        take(opt, range(SAVED, END))
        getattr(response, "upload_completion", response).result()
        again = resumed(
            "world",
            saved_values,
            lambda one, way=way: dcp_load({"optim": one}, checkpoint_id=folder / way),  # type: ignore[misc]
        )
        assert_equal_runs(again, straight())


# ---------------------------------------------------------------- broken checkpoints


def shorten(place: Path) -> None:
    path = place / "__1_0.distcp"
    os.truncate(path, path.stat().st_size // 2)


SPOILERS: dict[str, Callable[[Path], None]] = {
    "no metadata": lambda place: (place / ".metadata").unlink(),
    "a missing file": lambda place: (place / "__1_0.distcp").unlink(),
    "a truncated file": shorten,
}


def spoil(rank: int, place: Path, how: str) -> Any:
    """Load a checkpoint directory after it was spoilt: what is said, and whether nothing has changed."""
    saved, opt, alone = small("world", seed=1), small("world"), small(None)
    take(saved, range(SAVED))
    for one in (opt, alone):
        take(one, range(2))
    dcp_save({"optim": saved}, checkpoint_id=place)
    if rank == 0:
        SPOILERS[how](place)
    dist.barrier()
    before = held(opt)
    said = raised(lambda: dcp_load({"optim": opt}, checkpoint_id=place))
    assert said.startswith("CheckpointException"), said
    assert_same_bits(held(opt), before)
    for one in (opt, alone):
        take(one, range(2, 4))
    assert_equal_runs(opt, alone)


def no_metadata_job(rank: int, folder: Path) -> Any:
    spoil(rank, folder / "saved", "no metadata")


def missing_file_job(rank: int, folder: Path) -> Any:
    spoil(rank, folder / "saved", "a missing file")


def truncated_file_job(rank: int, folder: Path) -> Any:
    spoil(rank, folder / "saved", "a truncated file")


def another_model_job(rank: int, folder: Path) -> Any:
    """Directories of another model and of other moments."""
    for index, saved in enumerate((small("world", FEW[1:]), small("world", moments="32bit"))):
        take(saved, range(1))
        dcp_save({"optim": saved}, checkpoint_id=folder / str(index))
        opt = small("world")
        take(opt, range(2))
        before = held(opt)
        what, place = {"optim": opt}, folder / str(index)
        said = raised(lambda what=what, place=place: dcp_load(what, checkpoint_id=place))  # type: ignore[misc]
        assert said.startswith("CheckpointException"), said
        assert_same_bits(held(opt), before)


BAD_STATE = (
    "of another rank",
    "of another number of ranks",
    "two parts",
    "other blocks",
    "blocks of nothing",
    "no part",
    "a number",
    "a part without state",
    "a state that is none",
    "a missing tensor",
    "a newer version",
    "a newer version, whole",
    "an SGD",
    "another model",
    "no dictionary",
)


def bad_state_job(rank: int, folder: Path) -> Any:
    """State that does not fit, in the form of a rank's own part and in others: refused by every rank."""
    opt, alone = small("world"), small(None)
    for one in (opt, alone):
        take(one, range(2))
    whole_or_part = opt.state_dict()
    part = opt._packed(resharding.as_shard)
    key = f"shard_{rank}_of_{PAIR}"
    moved = {**part[key], "spans": {index: [first + 1, end + 1] for index, (first, end) in part[key]["spans"].items()}}
    states = part[key]["state"]
    cases: dict[str, Any] = {
        "of another rank": renamed(part, rank, PAIR, 1 - rank, PAIR),
        "of another number of ranks": renamed(part, rank, PAIR, rank, 3),
        "two parts": {**part, f"shard_{1 - rank}_of_{PAIR}": part[key]},
        "other blocks": {**part, key: moved},
        "blocks of nothing": {**part, key: {**part[key], "spans": {}}},
        "no part": {**part, key: None},
        "a number": {**part, key: 3},
        "a part without state": {**part, key: {"state": None, "spans": {}}},
        "a state that is none": {**part, key: {**part[key], "state": {**states, 0: None}}},
        "a missing tensor": {**part, key: {**part[key], "state": {**states, 0: {"step": states[0]["step"]}}}},
        "a newer version": newer(part),
        "a newer version, whole": newer(whole_or_part),
        "an SGD": foreign(),
        "another model": state_of_another_model(),
        "no dictionary": [part],
    }
    before = held(opt)
    said = {}
    for name, case in cases.items():
        said[name] = raised(lambda case=case: opt.load_state_dict(case))  # type: ignore[misc]
        assert_same_bits(held(opt), before, name)
    for one in (opt, alone):
        take(one, range(2, 4))
    assert_equal_runs(opt, alone)
    return said


# ---------------------------------------------------------------- tests

JOBS: tuple[Job, ...] = (
    prepare_job,
    own_part_job,
    consolidate_job,
    several_job,
    dropped_job,
    consolidate_then_all_job,
    stateful_job,
    functions_job,
    flat_functions_job,
    looked_at_job,
    full_job,
    async_job,
    no_metadata_job,
    missing_file_job,
    truncated_file_job,
    another_model_job,
    bad_state_job,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return start(PAIR, JOBS, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("job", [prepare_job, dropped_job, stateful_job, functions_job, flat_functions_job])
def test_a_load_goes_on_as_if_nothing_had_happened(pair: Outcomes, job: Job) -> None:
    outcome(pair, job)


def test_steps_go_on_while_a_thread_saves_what_was_there(pair: Outcomes) -> None:
    outcome(pair, async_job)


def test_every_rank_can_load_the_part_that_it_saved(pair: Outcomes) -> None:
    assert outcome(pair, own_part_job) == [["param_groups", "state"], ["param_groups", "shard_1_of_2", "state"]]


def test_state_put_together_for_one_rank_is_there_until_the_next_step(pair: Outcomes) -> None:
    assert outcome(pair, consolidate_job) == [["param_groups", "state"], ["param_groups", "shard_1_of_2", "state"]]


def test_state_is_put_together_on_several_ranks(pair: Outcomes) -> None:
    outcome(pair, several_job)


def test_all_ranks_may_ask_after_one_has_taken_what_was_put_together_for_it(pair: Outcomes) -> None:
    assert outcome(pair, consolidate_then_all_job) == ["nothing"] * PAIR


def test_to_ask_for_the_state_before_the_first_step_takes_none(pair: Outcomes) -> None:
    outcome(pair, looked_at_job)


def test_full_state_dicts_can_be_set_and_parts_are_not_saved_under_their_name(pair: Outcomes) -> None:
    for said in outcome(pair, full_job):
        assert said == "nothing" or "consolidate_state_dict" in said


@pytest.mark.parametrize(
    "job",
    [
        no_metadata_job,
        another_model_job,
        pytest.param(missing_file_job),
        pytest.param(truncated_file_job),
    ],
)
def test_a_checkpoint_directory_that_cannot_be_read_leaves_the_optimizer_as_it_was(pair: Outcomes, job: Job) -> None:
    outcome(pair, job)


@pytest.mark.parametrize("name", BAD_STATE)
def test_state_that_does_not_fit_is_refused_by_every_rank_and_changes_nothing(pair: Outcomes, name: str) -> None:
    for found in outcome(pair, bad_state_job):
        assert list(found) == [case if isinstance(case, str) else case.values[0] for case in BAD_STATE]
        assert found[name].startswith("ValueError: "), found[name]

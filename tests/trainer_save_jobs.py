"""Every way in which transformers' Trainer saves, and what is refused or told of: what ranks do in test_trainer.py."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from lowmem_adam import Adam8bit, AdamW8bit, agreement
from lowmem_adam.integrations.transformers import ConsolidateState
from tests.cases import assert_same_bits
from tests.shard_jobs import in_order, raised
from tests.trainer_cases import (
    CHECKPOINT,
    END,
    SAVED,
    Loaded,
    assert_went_on,
    one_of,
    ours_of,
    run,
    saved_state,
    trainer_of,
)

# ---------------------------------------------------------------- every way to a save


class AsksForSave(transformers.TrainerCallback):
    """A user's own reason to save."""

    def __init__(self, step: int, ranks: Sequence[int] = (0, 1)) -> None:
        self.step, self.ranks = step, ranks

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and dist.get_rank() in self.ranks:
            control.should_save = True


class WorseSinceThen(transformers.TrainerCallback):
    """Makes the second of three evaluations the best."""

    def __init__(self) -> None:
        self.losses = iter((3.0, 1.0, 2.0))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        metrics["eval_loss"] = next(self.losses)


def saves(rank: int, folder: Path, expected: Sequence[int], *others: Any, **arguments: Any) -> None:
    """A sharded optimizer's checkpoints are those of one that keeps everything on every rank."""
    kinds = {"sharded": "world", "alone": None}
    for name, shard_group in kinds.items():
        one_of(rank)
        made = [other() for other in others]
        # As a user has it who has not thought of the order.
        run(trainer_of(folder / name, shard_group, callbacks=[ConsolidateState(), *made], **arguments))
    dist.barrier()
    if rank == 0:
        for name in kinds:
            written = sorted(int(path.name.rpartition("-")[2]) for path in (folder / name).glob("checkpoint-*"))
            assert written == list(expected)
        for step in expected:
            sharded, alone = (in_order(saved_state(folder / name / f"checkpoint-{step}")) for name in kinds)
            assert_same_bits(sharded, alone)
            assert {int(state["step"]) for state in sharded["state"].values()} == {step}


def every_two_steps_job(rank: int, folder: Path) -> Any:
    saves(rank, folder, [2, 4, 5], max_steps=5, save_steps=2)


def epochs_job(rank: int, folder: Path) -> Any:
    saves(rank, folder, [5, 10], max_steps=-1, num_train_epochs=2, save_strategy="epoch")


def best_job(rank: int, folder: Path) -> Any:
    saves(
        rank,
        folder,
        [2, 4],
        WorseSinceThen,
        save_strategy="best",
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=2,
    )


def best_at_end_job(rank: int, folder: Path) -> Any:
    """Evaluated before each save, one checkpoint kept, and the best loaded behind the last step."""
    saves(
        rank,
        folder,
        [4],
        WorseSinceThen,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        save_total_limit=1,
    )


def asked_for_later_job(rank: int, folder: Path) -> Any:
    """By a callback behind this one, in the middle of the training."""
    saves(rank, folder, [2], lambda: AsksForSave(2), save_strategy="no")


def asked_for_before_job(rank: int, folder: Path) -> Any:
    one_of(rank)
    trainer = trainer_of(folder, save_strategy="no", callbacks=[AsksForSave(2), ConsolidateState()])
    run(trainer)
    return (folder / "checkpoint-2" / "optimizer.pt").exists()


def model_only_job(rank: int, folder: Path) -> Any:
    """Nothing of the optimizer is written, and nothing is put together."""
    one_of(rank)
    trainer = trainer_of(folder, save_only_model=True)
    trainer.train()
    assert not ours_of(trainer).consolidated
    return (folder / CHECKPOINT / "optimizer.pt").exists()


def search_job(rank: int, folder: Path) -> Any:
    """Ray's search saves by a method of its own after an evaluation."""
    one_of(rank)
    trainer = trainer_of(folder, save_strategy="no")
    found = run(trainer)
    ours_of(trainer)._forget_consolidated()
    trainer.state.is_hyper_param_search = True
    trainer.evaluate()
    trainer._tune_save_checkpoint(str(folder))
    if rank == 0:
        assert_same_bits(in_order(saved_state(folder / f"checkpoint-{END}")), in_order(found["state"]))


def each_node_job(rank: int, folder: Path) -> Any:
    """Two machines that share no disk: each writes the whole, and goes on from what it has written."""
    one_of(rank, local_rank=0)
    own = folder / str(rank)
    straight = run(trainer_of(own, save_on_each_node=True))
    dist.barrier()
    if rank == 1:  # transformers 5.23 writes the model on the first machine only, whatever save_on_each_node says
        for name in ("config.json", "model.safetensors"):
            shutil.copy(folder / "0" / CHECKPOINT / name, own / CHECKPOINT)
    one_of(rank, local_rank=0)
    resumed = run(trainer_of(own / "again", seed=1, save_on_each_node=True), own / CHECKPOINT)
    assert_went_on(resumed, straight)
    dist.barrier()
    first, second = (saved_state(folder / str(machine) / CHECKPOINT) for machine in (0, 1))
    assert_same_bits(in_order(first), in_order(second))


# ---------------------------------------------------------------- what is refused or told of


def alone_in_saving(rank: int, folder: Path, **arguments: Any) -> str:
    """What a training says at whose last step the ranks do not come together."""
    one_of(rank)
    trainer = trainer_of(folder, **arguments)
    patience, agreement.MEETING_SECONDS = agreement.MEETING_SECONDS, 1.0
    try:
        said = raised(trainer.train)
    finally:
        agreement.MEETING_SECONDS = patience
    if said != "nothing":
        trainer.store_flos()  # the other rank adds this up at its end: there it would learn that this one is gone
    return said


def no_callback_job(rank: int, folder: Path) -> Any:
    return alone_in_saving(rank, folder, save_steps=END, callbacks=[])


def one_rank_asks_job(rank: int, folder: Path) -> Any:
    asking = [AsksForSave(END, ranks=[0]), ConsolidateState()]
    return alone_in_saving(rank, folder, save_strategy="no", logging_strategy="no", callbacks=asking)


def later_on_each_node_job(rank: int, folder: Path) -> Any:
    one_of(rank, local_rank=0)
    callbacks = [ConsolidateState(), AsksForSave(2)]
    trainer = trainer_of(folder / str(rank), save_strategy="no", save_on_each_node=True, callbacks=callbacks)
    return raised(trainer.train)


def jit_job(rank: int, folder: Path) -> Any:
    one_of(rank)
    return raised(trainer_of(folder, enable_jit_checkpoint=True).train)


def moments_lost_job(rank: int, folder: Path) -> Any:
    """Trainer passes in silence over an optimizer.pt that is not there."""
    one_of(rank)
    trainer_of(folder, max_steps=SAVED).train()
    dist.barrier()
    if rank == 0:
        (folder / CHECKPOINT / "optimizer.pt").unlink()
    dist.barrier()
    one_of(rank)
    with pytest.warns(RuntimeWarning, match="goes on after step 3, but its checkpoint had no state of the optimizer"):
        trainer_of(folder / "again").train(resume_from_checkpoint=str(folder / CHECKPOINT))


def of_torch_job(rank: int, folder: Path) -> Any:
    """A run that torch's AdamW began goes on with ours, which codes its moments."""
    one_of(rank)
    theirs = (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.98)})
    trainer_of(folder, max_steps=SAVED, optimizer=theirs).train()
    dist.barrier()
    one_of(rank)
    loaded = Loaded()
    trainer = trainer_of(folder / "again", seed=1, callbacks=[ConsolidateState(), loaded])
    found = run(trainer, folder / CHECKPOINT)
    assert all(group["betas"] == (0.8, 0.98) for group in ours_of(trainer).param_groups)
    if rank == 0:
        alone = AdamW8bit([dict(group) for group in ours_of(trainer).param_groups])
        alone.load_state_dict(saved_state(folder / CHECKPOINT))
        coded = [state for state in loaded.state["state"].values() if "exp_avg_code" in state]
        assert len(coded) == 9  # seven matrices of the layer, the embedding, the head
        assert_same_bits(in_order(loaded.state)["state"], in_order(alone.state_dict())["state"])
    return found["steps"]


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "of SGD": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "of Adam8bit": (Adam8bit, {"lr": 1e-2, "shard_group": "world"}),
}
DAMAGES = ("cut off", "a tensor of another shape", "a tensor missing")


def damaged_job(rank: int, folder: Path) -> Any:
    """What a Trainer says that resumes from a file that is damaged, or of another class; nothing is loaded."""
    for name in ("own", *OTHERS):
        one_of(rank)
        trainer_of(folder / name, max_steps=SAVED, optimizer=OTHERS.get(name)).train()
    dist.barrier()
    said = {}
    for name in (*DAMAGES, *OTHERS):
        place = folder / name / CHECKPOINT
        if rank == 0 and name in DAMAGES:
            shutil.copytree(folder / "own" / CHECKPOINT, place)
            damage(place / "optimizer.pt", name)
        dist.barrier()
        one_of(rank)
        trainer = trainer_of(folder / "again", seed=1)
        said[name] = raised(functools.partial(trainer.train, resume_from_checkpoint=str(place)))
        assert not any(ours_of(trainer).state.values())
    return said


def damage(path: Path, how: str) -> None:
    if how == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return
    state = torch.load(path, weights_only=True)
    moments = next(tensors for tensors in state["state"].values() if "exp_avg_code" in tensors)
    if how == "a tensor of another shape":
        moments["exp_avg_code"] = moments["exp_avg_code"][:-1].clone()
    else:
        del moments["exp_avg_code"]
    torch.save(state, path)

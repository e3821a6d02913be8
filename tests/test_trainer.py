"""transformers' Trainer: saves by every way it has, and runs that go on as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
pytest.importorskip("transformers", reason="the Trainer is transformers'")

import transformers

from lowmem_adam import Adam8bit, AdamW8bit
from lowmem_adam.integrations.transformers import ConsolidateState, with_arguments
from tests.cases import assert_same_bits
from tests.launching import ROOT
from tests.ranks import NEEDS_GLOO
from tests.shard_jobs import Outcomes, in_order, outcome, raised, start
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
from tests.trainer_save_jobs import (
    asked_for_before_job,
    asked_for_later_job,
    best_at_end_job,
    best_job,
    damaged_job,
    each_node_job,
    epochs_job,
    every_two_steps_job,
    jit_job,
    later_on_each_node_job,
    model_only_job,
    moments_lost_job,
    no_callback_job,
    of_torch_job,
    one_rank_asks_job,
    search_job,
)

pytestmark = NEEDS_GLOO

# ---------------------------------------------------------------- the same ranks


def resume(rank: int, folder: Path, shard_group: Any) -> None:
    """With dropout, accumulation, clipping, decay and a schedule; the second run has other fresh weights."""
    one_of(rank)
    straight = run(trainer_of(folder, shard_group, dropout=0.2))
    one_of(rank)
    loaded = Loaded()
    trainer = trainer_of(folder / "again", shard_group, seed=1, dropout=0.2, callbacks=[ConsolidateState(), loaded])
    resumed = run(trainer, folder / CHECKPOINT)
    assert_went_on(resumed, straight)
    assert straight["steps"].keys() == set(range(1, END + 1))
    assert len({loss for loss, _, _ in straight["steps"].values()}) == END
    if loaded.state is not None:
        assert_same_bits(in_order(loaded.state), in_order(saved_state(folder / CHECKPOINT)))


def sharded_job(rank: int, folder: Path) -> Any:
    resume(rank, folder, "world")


def unsharded_job(rank: int, folder: Path) -> Any:
    resume(rank, folder, None)


# ---------------------------------------------------------------- other numbers of ranks

# Two ranks with one batch each, or one with two: the same examples, and the same sum of two gradients. Each is scaled
# by a power of two and sums of two do not depend on their order, so that all bits are the same.


def accumulating(rank: int, folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    one_of(rank)
    loaded = Loaded()
    callbacks = [ConsolidateState(), loaded]
    batches = 2 // dist.get_world_size()
    seed = 0 if checkpoint is None else 1
    trainer = trainer_of(folder, seed=seed, callbacks=callbacks, gradient_accumulation_steps=batches)
    found = run(trainer, checkpoint)
    if loaded.state is not None and checkpoint is not None:
        assert_same_bits(in_order(loaded.state), in_order(saved_state(checkpoint)))
    return found


def straight_job(rank: int, folder: Path) -> Any:
    return accumulating(rank, folder)


def one_to_two_job(rank: int, folder: Path) -> Any:
    return accumulating(rank, folder, folder.parent.parent / "one" / "straight_job" / CHECKPOINT)


def two_to_one_job(rank: int, folder: Path) -> Any:
    return accumulating(rank, folder, folder.parent.parent / "two" / "straight_job" / CHECKPOINT)


# ---------------------------------------------------------------- one process


def one_line_job(rank: int, folder: Path) -> Any:
    one_of(rank)
    trainer = trainer_of(folder, optimizer=(AdamW8bit, {"lr": 2e-3}), callbacks=[])
    trainer.train()
    own = ours_of(trainer)
    names = {id(param): name for name, param in trainer.model.named_parameters()}
    groups = [
        (group["weight_decay"], sorted(names[id(param)] for param in group["params"])) for group in own.param_groups
    ]
    return {"groups": groups, "initial_lr": [group["initial_lr"] for group in own.param_groups]}


def into_torch_job(rank: int, folder: Path) -> Any:
    """AdamW of torch takes any state; its first step finds no moments in ours."""
    one_of(rank)
    trainer_of(folder, max_steps=SAVED).train()
    one_of(rank)
    theirs = trainer_of(folder / "again", optimizer=(torch.optim.AdamW, {"lr": 1e-2}))
    return raised(lambda: theirs.train(resume_from_checkpoint=str(folder / CHECKPOINT)))


# ---------------------------------------------------------------- runs

OF_ONE = (straight_job, one_line_job, into_torch_job)
WHOLE = (
    sharded_job,
    unsharded_job,
    every_two_steps_job,
    epochs_job,
    best_job,
    best_at_end_job,
    asked_for_later_job,
    search_job,
    each_node_job,
    moments_lost_job,
)
"""These check all they have to on their ranks."""
OF_TWO = (
    straight_job,
    one_to_two_job,
    *WHOLE,
    asked_for_before_job,
    model_only_job,
    no_callback_job,
    one_rank_asks_job,
    later_on_each_node_job,
    jit_job,
    of_torch_job,
    damaged_job,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


def started(world_size: int, jobs: Sequence[Any], place: Path) -> Outcomes:
    place.mkdir()
    return start(world_size, jobs, place)


@pytest.fixture(scope="module")
def one(folder: Path) -> Outcomes:
    return started(1, OF_ONE, folder / "one")


@pytest.fixture(scope="module")
def two(one: Outcomes, folder: Path) -> Outcomes:
    return started(2, OF_TWO, folder / "two")


@pytest.fixture(scope="module")
def again(two: Outcomes, folder: Path) -> Outcomes:
    return started(1, (two_to_one_job,), folder / "again")


@pytest.mark.parametrize("job", WHOLE, ids=lambda job: job.__name__.removesuffix("_job"))
def test_on_two_ranks(two: Outcomes, job: Any) -> None:
    outcome(two, job)


def test_one_process_and_two_with_the_same_examples_have_the_same_bits(one: Outcomes, two: Outcomes) -> None:
    (alone,), pair = outcome(one, straight_job), outcome(two, straight_job)
    for found in pair:
        assert found["steps"] == alone["steps"]
        assert_same_bits(found["params"], alone["params"])


def test_two_go_on_from_what_one_saved(one: Outcomes, two: Outcomes) -> None:
    (straight,) = outcome(one, straight_job)
    first, second = outcome(two, one_to_two_job)
    assert_went_on(first, straight)
    assert (second["steps"], second["state"]) == (first["steps"], None)


def test_one_goes_on_from_what_two_saved(two: Outcomes, again: Outcomes) -> None:
    (resumed,) = outcome(again, two_to_one_job)
    assert_went_on(resumed, outcome(two, straight_job)[0])


def test_a_save_is_asked_for_before_the_callback(two: Outcomes) -> None:
    assert outcome(two, asked_for_before_job) == [True, True]


def test_a_save_of_the_model_alone_puts_nothing_together(two: Outcomes) -> None:
    assert outcome(two, model_only_job) == [False, False]


def test_without_the_callback_the_saving_rank_says_what_is_missing(two: Outcomes) -> None:
    saving, other = outcome(two, no_callback_job)
    assert saving.startswith("RuntimeError: state_dict() of a sharded optimizer waited 1 s for the other ranks")
    assert "consolidate_state_dict(to=rank)" in saving
    assert "lowmem_adam.integrations.transformers.ConsolidateState" in saving
    assert other == "nothing"


def test_a_save_that_one_rank_alone_asks_for_is_an_error(two: Outcomes) -> None:
    saving, other = outcome(two, one_rank_asks_job)
    assert saving.startswith("RuntimeError: ConsolidateState of a sharded optimizer waited 1 s for the other ranks")
    assert "control.should_save set on all ranks alike" in saving
    assert other == "nothing"


def test_a_late_save_on_each_machine_is_an_error_on_all_ranks(two: Outcomes) -> None:
    for said in outcome(two, later_on_each_node_job):
        assert "step 2, and ranks [0, 1] save: their optimizer.pt is not whole" in said
        assert "accepted: ConsolidateState as the last callback" in said


def test_saves_on_a_signal_are_refused(two: Outcomes) -> None:
    for said in outcome(two, jit_job):
        assert said.startswith("ValueError: enable_jit_checkpoint is True")
        assert said.endswith("accepted with shard_group: enable_jit_checkpoint=False")


def test_a_checkpoint_of_torch_adamw_is_converted(two: Outcomes) -> None:
    first, second = outcome(two, of_torch_job)
    assert first == second
    assert first.keys() == set(range(SAVED + 1, END + 1))


def test_a_damaged_checkpoint_is_refused(two: Outcomes) -> None:
    for said in outcome(two, damaged_job):
        assert said["cut off"].startswith(("OSError", "RuntimeError"))  # torch.load's
        assert "exp_avg_code" in said["a tensor of another shape"]
        assert "accepted: " in said["a tensor of another shape"]
        assert "exp_avg_code" in said["a tensor missing"]
        assert said["of SGD"].startswith("ValueError")
        assert "momentum_buffer" in said["of SGD"]
        assert said["of Adam8bit"].startswith("ValueError")
        assert "decoupled_weight_decay" in said["of Adam8bit"]


def test_one_line_makes_two_groups(one: Outcomes) -> None:
    (found,) = outcome(one, one_line_job)
    (decay, decayed), (no_decay, kept) = found["groups"]
    assert (decay, no_decay) == (0.1, 0.0)
    assert kept == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    ]
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(decayed)
    # Trainer gives a class what stands beside it, and its own learning rate (here 1e-2) to nobody.
    assert found["initial_lr"] == [2e-3, 2e-3]


def test_torch_adamw_does_not_take_our_checkpoint_for_its_own(one: Outcomes) -> None:
    (said,) = outcome(one, into_torch_job)
    assert said == "KeyError: 'exp_avg'"


# ---------------------------------------------------------------- the module itself


def test_the_package_does_not_import_transformers() -> None:
    code = "import sys, lowmem_adam, lowmem_adam.integrations; print('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == "False"


def test_the_arguments_of_a_trainer_reach_the_optimizer() -> None:
    args = transformers.TrainingArguments(
        use_cpu=True, learning_rate=2e-4, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6
    )
    made, keywords = with_arguments(args, seed=3)
    assert made is AdamW8bit
    assert keywords == {"lr": 2e-4, "betas": (0.8, 0.95), "eps": 1e-6, "seed": 3}
    assert with_arguments(args, Adam8bit, lr=1.0)[0] is Adam8bit
    assert with_arguments(args, Adam8bit, lr=1.0)[1]["lr"] == 1.0
    group = made([torch.nn.Parameter(torch.zeros(2))], **keywords).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.8, 0.95), 1e-6)


def test_weight_decay_that_would_be_overridden_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_decay is 0.1, .*accepted: TrainingArguments\(weight_decay="):
        with_arguments(transformers.TrainingArguments(use_cpu=True), weight_decay=0.1)

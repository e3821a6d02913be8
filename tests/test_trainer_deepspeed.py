"""transformers' Trainer over DeepSpeed's engine, with the optimizer by its two ways: of the config, and of a class."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer runs on accelerate")
pytest.importorskip("transformers", reason="the Trainer is transformers'")

import lowmem_adam.integrations.deepspeed  # noqa: F401 (registers the names)
from lowmem_adam import AdamW8bit
from lowmem_adam.integrations.transformers import with_arguments
from tests.deepspeed_jobs import begin
from tests.launching import NEEDS_DEEPSPEED
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.shard_jobs import raised
from tests.trainer_cases import END, SAVED, Recorder, one_of, trainer_of

pytestmark = [NEEDS_GLOO, NEEDS_DEEPSPEED]

AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
NAMED = {
    "optimizer": {
        "type": "AdamW8bit",
        "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
    },
    "zero_allow_untested_optimizer": True,
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# name: the config, settings of a class given to Trainer or None for one by name, param groups, DeepSpeed's optimizer
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, int, str]] = {
    "by name, stage 1": ({**NAMED, "zero_optimization": {"stage": 1}}, None, 1, "DeepSpeedZeroOptimizer"),
    "a class, stage 2, offload": (
        {"zero_optimization": {"stage": 2, **OFFLOAD}, "zero_force_ds_cpu_optimizer": False},
        {},
        2,
        "DeepSpeedZeroOptimizer",
    ),
    # Our own shards: DeepSpeed has the first rank save, and ConsolidateState puts together what it needs.
    "a class, stage 0, shared": ({"zero_optimization": {"stage": 0}}, {"shard_group": "world"}, 2, "AdamW8bit"),
}


def start_anew(rank: int) -> None:
    begin(rank)
    one_of(rank)
    del os.environ["ACCELERATE_USE_CPU"]  # with it accelerate takes no notice of DeepSpeed


def trained(rank: int, name: str, place: Path, seed: int = 0, resume: Path | None = None) -> dict[str, Any]:
    config, client, _, _ = ROWS[name]
    start_anew(rank)
    trainer = trainer_of(
        place,
        seed=seed,
        width=192,
        deepspeed=copy.deepcopy({**AUTO, **config}),
        # Beside a name in the config Trainer looks at no class.
        optimizer=(AdamW8bit, {"lr": 1e-2, **(client or {})}),
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    own = trainer.optimizer.optimizer
    ours = getattr(own, "optimizer", own)
    return {
        "steps": recorder.steps,
        "classes": [type(own).__name__, type(ours).__name__],
        "decays": [group["weight_decay"] for group in ours.param_groups],
        "bytes": ours.memory_report()["bytes_per_parameter"],
    }


def rows_job(rank: int, folder: Path) -> Any:
    found: dict[str, Any] = {}
    for name in ROWS:
        straight = trained(rank, name, folder / name)
        checkpoint = folder / name / f"checkpoint-{SAVED}"
        found[name] = (straight, trained(rank, name, folder / name / "again", 1, checkpoint))
    start_anew(rank)
    found["both"] = raised(
        lambda: trainer_of(
            folder, deepspeed={**AUTO, "optimizer": {"type": "AdamW", "params": {}}, "zero_optimization": {"stage": 1}}
        )
    )
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, rows_job, tmp_path_factory.mktemp("trainer_deepspeed"))


@pytest.mark.parametrize("name", ROWS)
def test_ours_steps_and_a_resumed_run_is_the_uninterrupted_one(results: list[dict[str, Any]], name: str) -> None:
    _, client, groups, wrapper = ROWS[name]
    for of_rank in results:
        straight, resumed = of_rank[name]
        assert straight["classes"] == [wrapper, "AdamW8bit"]
        assert straight["decays"] == [0.1, 0.0][:groups]
        assert straight["steps"].keys() == set(range(1, END + 1))
        assert resumed["steps"] == {step: logged for step, logged in straight["steps"].items() if step > SAVED}
        assert straight["bytes"] < (1.05 if client and "shard_group" in client else 2.05)


def test_a_class_beside_a_name_in_the_config_is_refused(results: list[dict[str, Any]]) -> None:
    for of_rank in results:
        assert of_rank["both"].startswith("ValueError: the DeepSpeed config has optimizer {'type': 'AdamW'")
        assert "without that block" in of_rank["both"]


def test_without_deepspeed_there_is_no_block() -> None:
    class Arguments:
        learning_rate, adam_beta1, adam_beta2, adam_epsilon = 1e-3, 0.9, 0.999, 1e-8

    assert with_arguments(Arguments())[1]["lr"] == 1e-3

"""TRL's SFTTrainer: the one line that gives it AdamW8bit, a save, and a run that goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="TRL runs on accelerate")
pytest.importorskip("transformers", reason="TRL's trainer is transformers'")
pytest.importorskip("trl", reason="the SFTTrainer is TRL's")

from tests.lm_cases import LAUNCH  # isort: skip  (puts launch/ on the path)

from lowmem_adam import AdamW8bit
from tests.cases import assert_same_bits
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.shard_jobs import in_order
from tests.trainer_cases import END, SAVED, Recorder, model_of, one_of, ours_of

pytestmark = [NEEDS_GLOO, pytest.mark.slow]


def sft_job(rank: int, folder: Path) -> Any:
    # Imported on the rank alone: what TRL brings would stay in every later test of the process.
    from datasets import Dataset
    from sft_data import byte_tokenizer
    from trl import SFTConfig, SFTTrainer

    texts = [f"{index} and {index} make {2 * index}" for index in range(40)]

    def run(output_dir: Path, seed: int, resume: Path | None = None) -> dict[str, Any]:
        one_of(rank)
        recorder = Recorder()
        trainer = SFTTrainer(
            model=model_of(seed, vocabulary=258, length=64),
            args=SFTConfig(
                output_dir=str(output_dir),
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                max_steps=END,
                save_steps=SAVED,
                logging_steps=1,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                weight_decay=0.1,
                max_length=64,
            ),
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=byte_tokenizer(),
            optimizer_cls_and_kwargs=(AdamW8bit, {"lr": 1e-2}),
            callbacks=[recorder],
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        own = ours_of(trainer)
        params = [param.detach().clone() for group in own.param_groups for param in group["params"]]
        decays = [group["weight_decay"] for group in own.param_groups]
        return {"steps": recorder.steps, "params": params, "state": own.state_dict(), "decays": decays}

    return {
        "straight": run(folder / "straight", 0),
        "resumed": run(folder / "resumed", 1, folder / "straight" / f"checkpoint-{SAVED}"),
    }


def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """With TRL's defaults: bf16 autocast, and activations computed anew."""
    assert (LAUNCH / "sft_data.py").exists()
    (found,) = on_ranks(1, sft_job, tmp_path)
    straight, resumed = found["straight"], found["resumed"]
    assert straight["decays"] == [0.1, 0.0]
    assert straight["steps"].keys() == set(range(1, END + 1))
    assert straight["steps"][END][0] < straight["steps"][1][0]
    assert resumed["steps"] == {step: logged for step, logged in straight["steps"].items() if step > SAVED}
    assert_same_bits(resumed["params"], straight["params"])
    assert_same_bits(in_order(resumed["state"]), in_order(straight["state"]))

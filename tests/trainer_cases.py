"""transformers' Trainer in tests: a tiny Llama on spawned ranks, with all that a real run has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from lowmem_adam import AdamW8bit
from lowmem_adam.integrations.transformers import ConsolidateState, with_arguments
from tests.cases import assert_same_bits, copied
from tests.launching import forget_accelerate
from tests.shard_jobs import SMALL_BUCKET, in_order

VOCABULARY, LENGTH, EXAMPLES = 64, 16, 40
SAVED, END = 3, 6
"""Steps before the save, and in all."""

CHECKPOINT = f"checkpoint-{SAVED}"


def one_of(rank: int, local_rank: int | None = None) -> None:
    """As ``accelerate launch`` starts a process; a second call is a process that starts anew."""
    forget_accelerate()
    world = dist.get_world_size()
    variables: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank if local_rank is None else local_rank,
        "WORLD_SIZE": world,
    }
    variables |= {"LOCAL_WORLD_SIZE": world if local_rank is None else 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    variables |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in variables.items()}


def model_of(
    seed: int, dropout: float = 0.0, vocabulary: int = VOCABULARY, length: int = LENGTH, width: int = 64
) -> transformers.LlamaForCausalLM:
    """Two groups for Trainer, and both kinds of moments: coded and, of its norms, fp32."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=length,
        attention_dropout=dropout,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def examples() -> list[dict[str, Tensor]]:
    """Counting in steps of one to three, so that there is something to learn."""
    rows = [(torch.arange(LENGTH) * (1 + index % 3) + index) % VOCABULARY for index in range(EXAMPLES)]
    return [{"input_ids": row, "labels": row} for row in rows]


class Recorder(transformers.TrainerCallback):
    """Losses and gradient norms as they are logged, to the last bit."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[float | None, ...]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.steps[state.global_step] = (logs["loss"], logs.get("grad_norm"), logs["learning_rate"])


def trainer_of(
    output_dir: Path,
    shard_group: Any = "world",
    *,
    seed: int = 0,
    dropout: float = 0.0,
    width: int = 64,
    optimizer: tuple[Any, dict[str, Any]] | None = None,
    callbacks: Sequence[transformers.TrainerCallback] | None = None,
    **arguments: Any,
) -> transformers.Trainer:
    """A Trainer with accumulation, clipping, decay and a schedule; the seed is of the fresh weights only."""
    defaults: dict[str, Any] = {
        "max_steps": END,
        "save_steps": SAVED,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "ddp_find_unused_parameters": False,
    }
    args = transformers.TrainingArguments(
        output_dir=str(output_dir), use_cpu=True, report_to=[], disable_tqdm=True, **{**defaults, **arguments}
    )
    if optimizer is None:
        optimizer = with_arguments(args, shard_group=shard_group, bucket_cap_mb=SMALL_BUCKET)
    data = examples()
    return transformers.Trainer(
        model=model_of(seed, dropout, width=width),
        args=args,
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[ConsolidateState()] if callbacks is None else list(callbacks),
        optimizer_cls_and_kwargs=optimizer,
    )


def run(trainer: transformers.Trainer, resume: Path | None = None) -> dict[str, Any]:
    """Train, and say all that two equal runs have in common."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    own = ours_of(trainer)
    # In the order of the param groups: DDP's wrapper gives them other names.
    params = [copied(param) for group in own.param_groups for param in group["params"]]
    return {"steps": recorder.steps, "params": params, "state": own.consolidate_state_dict()}


class Loaded(transformers.TrainerCallback):
    """The whole state of the optimizer when training begins, which is what a checkpoint has brought."""

    state: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.state = copied(optimizer.optimizer.consolidate_state_dict())


def ours_of(trainer: transformers.Trainer) -> AdamW8bit:
    """The optimizer within accelerate's."""
    own = trainer.optimizer.optimizer
    assert isinstance(own, AdamW8bit)
    return own


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """What the Trainer wrote of an optimizer."""
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)


def after_save(found: dict[str, Any]) -> dict[int, Any]:
    """Losses, gradient norms and learning rates of the steps behind the save."""
    return {step: logged for step, logged in found["steps"].items() if step > SAVED}


def assert_went_on(resumed: dict[str, Any], straight: dict[str, Any]) -> None:
    """A resumed run is the uninterrupted one, in every bit of losses, parameters and state."""
    assert resumed["steps"] == after_save(straight)
    assert_same_bits(resumed["params"], straight["params"])
    assert (resumed["state"] is None) == (straight["state"] is None)
    if resumed["state"] is not None:
        assert_same_bits(in_order(resumed["state"]), in_order(straight["state"]))

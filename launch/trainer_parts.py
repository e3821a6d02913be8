"""What trainer_lm.py and sft_lm.py share: a run's settings, its Trainer's arguments, how it starts and ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from lm_model import byte_llama
from lm_settings import check_choice
from processes import leave

from lowmem_adam import AdamW8bit
from lowmem_adam.integrations.transformers import ConsolidateState, with_arguments

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class TrainerSettings:
    """Every choice of a run."""

    output_dir: Path
    data: tuple[Path, ...]
    lr: float
    weight_decay: float
    schedule: str
    warmup_steps: int
    shard: bool
    seed: int
    steps: int
    batch_size: int
    gradient_accumulation_steps: int
    clip: float
    seq_len: int
    hidden_size: int
    layers: int
    log_every: int
    save_every: int
    resume: Path | None
    expect_world_size: int | None

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "layers", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")
        if self.hidden_size < 64 or self.hidden_size % 64:
            raise ValueError(f"hidden_size must be a multiple of 64, got {self.hidden_size}")
        if self.resume is not None and not (self.resume / "trainer_state.json").is_file():
            raise ValueError(f"--resume {self.resume} is no checkpoint of a Trainer: it has no trainer_state.json")

    def arguments(self) -> dict[str, Any]:
        """For ``TrainingArguments`` and TRL's ``SFTConfig``."""
        return {
            "output_dir": str(self.output_dir),
            "use_cpu": not torch.cuda.is_available(),
            "seed": self.seed,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "learning_rate": self.lr,
            "weight_decay": self.weight_decay,
            "lr_scheduler_type": self.schedule,
            "warmup_steps": self.warmup_steps,
            "max_grad_norm": self.clip,
            "logging_steps": self.log_every,
            "save_steps": self.save_every,
            "ddp_find_unused_parameters": False,
            "disable_tqdm": True,
            "report_to": [],
        }

    def optimizer(self, args: transformers.TrainingArguments) -> dict[str, Any]:
        """What a Trainer, of whatever class, needs to step with shared moments, and to save them."""
        chosen = with_arguments(args, AdamW8bit, seed=self.seed, shard_group="world" if self.shard else None)
        return {"optimizer_cls_and_kwargs": chosen, "callbacks": [ConsolidateState()]}


def start(settings: TrainerSettings) -> None:
    """Join the other processes, say how many there are, and refuse a number that was not expected."""
    world_size = PartialState(cpu=not torch.cuda.is_available()).num_processes
    if settings.expect_world_size not in (None, world_size):
        raise ValueError(
            f"world size is {world_size}, but --expect-world-size says {settings.expect_world_size}: on a CPU use "
            "launch/configs/cpu_2.yaml with ACCELERATE_USE_CPU=true in the environment"
        )
    transformers.set_seed(settings.seed)


def build_model(settings: TrainerSettings, special_tokens: int = 0) -> transformers.LlamaForCausalLM:
    """The model that the settings ask for, with fresh weights."""
    return byte_llama(
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        layers=settings.layers,
        heads=settings.hidden_size // 32,
        seq_len=settings.seq_len,
        special_tokens=special_tokens,
    )


def train(trainer: transformers.Trainer, settings: TrainerSettings) -> None:
    """Train from the beginning or a checkpoint, evaluate, and report; trainer_state.json has every figure."""
    resume = None if settings.resume is None else str(settings.resume)
    trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_state()
    optimizer = trainer.optimizer.optimizer
    memory = optimizer.memory_report()
    if trainer.is_world_process_zero():
        ran = (
            f"{trainer.state.global_step} steps of {type(optimizer).__name__} on {trainer.args.world_size} process(es)"
        )
        state = f"{max(memory['ranks']) / memory['parameters']:.2f} bytes of optimizer state a parameter and process"
        print(f"{ran}: validation loss {loss:.3f}; {memory['parameters']} parameters, {state}", flush=True)
    leave(trainer.accelerator)
